"""Recovery of a planted dictionary beside SAELens: MCC, recovered features, F1 and EV of relu, topk and jumprelu SAEs
that both trainers made of the same samples. It adds rows to benchmarks/results/toy_peers.csv and prints a table.

    python benchmarks/toy_peers.py --peer-python ENV/bin/python                 dictionary, trees, pairs
    python benchmarks/toy_peers.py --table                                      from the rows there are; trains nothing

ENV is an environment with sae-lens. sae-train runs `--model toy` at width 512 and L0 8 with the toy's preset. SAELens'
SAETrainer gets the same batches in their order, the same warm-up and decay, and for each architecture the learning rate
and loss (OPTIONS) with the highest MCC; its relu and jumprelu are read off at our SAE's L0, as in quality.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from csv_rows import append, cpu
from quality import ANTHROPIC, Peer, check, job_for, short
from quality_table import at

from sae_train.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "toy_peers.csv"
DATASETS = ("dictionary", "trees", "pairs")
FIGURES = ("ev", "mcc", "recovered", "f1")
COLUMNS = ("date", "machine", "dataset", "side", "arch", "candidate", "lr", "coefficient", "l0", *FIGURES)
NEAR = 1.25  # SAEs whose L0 is further off are not read between
SETTINGS = {"model": "toy", "arch": ["relu", "topk", "jumprelu"], "width": 512, "l0": 8, "device": "cpu"}
OPTIONS = {  # learning rate: first coefficient to try
    ("relu", "relu"): ({}, 6, {1e-3: 2.0, 3e-3: 2.0, 1e-2: 2.0, 2e-2: 2.5}),
    ("topk", "topk"): ({}, 1, dict.fromkeys((1e-3, 3e-3, 1e-2))),
    ("jumprelu", "jumprelu-tanh"): (ANTHROPIC, 6, {1e-3: 0.5, 3e-3: 0.5, 1e-2: 0.5}),
    ("jumprelu", "jumprelu-step"): ({}, 3, {3e-3: 1.0}),
}


def main() -> None:
    args = _arguments()
    if not args.table:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch
        import torch

        torch.set_num_threads(args.threads)
        for dataset in args.datasets:
            append(RESULTS, COLUMNS, rows(args, dataset))
    print(table(RESULTS))


def rows(args: argparse.Namespace, dataset: str) -> list[dict[str, Any]]:
    """Train and measure both sides on one data set."""
    from sae_train.config import resolve
    from sae_train.runs.run import Run, resume, train
    from sae_train.runs.session import open_session

    folder = args.runs / dataset
    if not (folder / "ours" / "run.json").is_file():
        train(name="ours", out=str(folder), dataset=dataset, **SETTINGS)
    elif Run(folder / "ours").info["status"] != "finished":
        resume(folder / "ours")
    opened = open_session(resolve(SETTINGS | {"dataset": dataset}))
    measure = _measure(opened)
    mine = [
        {"side": "sae-train", "arch": sae["arch"], "candidate": "preset"} | measure(folder / "ours/saes" / sae["name"])
        for sae in Run(folder / "ours").info["saes"]
    ]
    l0 = {row["arch"]: row["l0"] for row in mine}
    peer = Peer(args, folder, job_for(args, opened, folder), measure)
    searches = [
        {
            "name": f"{kind}-{lr:g}", "arch": arch, "kind": kind, "options": options, "tries": tries, "lr": lr,
            "start": start, "seed": 0, "l0": l0[arch],
        }
        for (arch, kind), (options, tries, lrs) in OPTIONS.items()
        for lr, start in lrs.items()
    ]  # fmt: skip
    common = {"date": time.strftime("%Y-%m-%d"), "machine": cpu(), "dataset": dataset}
    made = [common | {key: short(value) for key, value in row.items()} for row in [*mine, *peer.train(searches)]]
    return [{key: row.get(key) for key in COLUMNS} for row in made]


def _measure(opened: Any) -> Any:
    """From an SAE's folder to its figures on held-out samples."""
    from sae_train import load_sae
    from sae_train.data.toy import held_out_sample
    from sae_train.evals.truth import truth
    from sae_train.training.metrics import held_out_metrics

    sample = held_out_sample(opened.first.source.toy, opened.settings.data.held_out_tokens)

    def measure(folder: Path) -> dict[str, float]:
        kept = folder / "figures.json"
        if not kept.is_file():
            sae = load_sae(folder)
            metrics = held_out_metrics(sae, sample.x)
            known = truth(sae, opened.first.source.toy, sample)
            figures = {"l0": metrics["metrics/l0"], "ev": metrics["metrics/explained_variance"]}
            write_json(kept, figures | {name: known[name] for name in ("mcc", "recovered", "f1")})
        return json.loads(kept.read_text())

    return measure


def table(results: Path) -> str:
    """A line a data set and architecture: ours, and SAELens' best by MCC at our L0; of rows measured again the last."""
    import pandas as pd

    data = pd.read_csv(results)
    data = data.drop_duplicates(["dataset", "side", "arch", "candidate", "coefficient"], keep="last")
    names = ("mcc", "recovered", "f1", "ev")
    heads = [f"{name}: ours | SAELens" for name in ("MCC", "recovered", "F1", "EV")]
    out = ["| | L0 | " + " | ".join(heads) + " | SAELens' best |", "|---" * 11 + "|"]
    for (dataset, arch), some in data.groupby(["dataset", "arch"], sort=False):
        own = some[some["side"] == "sae-train"].iloc[-1]
        peers = some[some["side"] == "SAELens"]
        ladders = {name: group.to_dict("records") for name, group in peers.groupby("candidate")}
        near = {
            name: [row for row in ladder if 1 / NEAR < row["l0"] / own["l0"] < NEAR] for name, ladder in ladders.items()
        }
        read = {name: at(ladder, own["l0"], FIGURES) for name, ladder in near.items() if ladder}
        reached = {name: figures for name, figures in read.items() if figures}
        best = max(reached, key=lambda name: reached[name]["mcc"])
        theirs = reached[best]
        cells = [f"{own['l0']:.2f}", *(f"{side[name]:.3f}" for name in names for side in (own, theirs)), best]
        out.append(f"| {dataset}, {arch} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with sae-lens")
    parser.add_argument("--runs", type=Path, default=ROOT / "checkpoints" / "toy_peers", help="where SAEs are kept")
    parser.add_argument("--datasets", type=lambda text: text.split(","), default=list(DATASETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    if unknown := set(args.datasets) - set(DATASETS):
        parser.error(f"--datasets: {', '.join(sorted(unknown))} is none of {', '.join(DATASETS)}")
    check(parser, args, RESULTS)
    return args


if __name__ == "__main__":
    main()
