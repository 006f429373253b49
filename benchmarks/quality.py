"""Quality beside SAELens at matched L0: EV, loss recovered and dead latents of relu, topk and jumprelu SAEs that both
trainers made of the same batches. It adds rows to benchmarks/results/quality.csv and prints a table.

    python benchmarks/quality.py --peer-python ENV/bin/python                 width 1k, L0 32, three seeds
    python benchmarks/quality.py --peer-python ENV/bin/python --archs topk --l0 10
    python benchmarks/quality.py --table                                      from the rows there are; trains nothing

ENV is an environment with sae-lens. sae-train runs one command with its defaults. SAELens' SAETrainer gets the batches
that sae-train trained on, in their order, the same warm-up and decay, and for each architecture the best of OPTIONS
on seed 0: highest EV at our L0. Its relu and jumprelu are read off at our SAE's L0, on a line in log L0 between the two
nearest SAEs that lie on either side (quality_peer.py finds them). Every SAE is read by load_sae and measured by our
code; SAEs that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from csv_rows import append, cpu
from quality_table import CONFIGURATION, FIGURES, at, table

from sae_train.files import whole, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.csv"
ARCHITECTURES = ("relu", "topk", "jumprelu")
COLUMNS = (
    "date", "machine", *CONFIGURATION, "side", "arch", "candidate", "seed", "lr", "coefficient", "l0", *FIGURES
)  # fmt: skip
ANTHROPIC = {
    "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1,
    "jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 3e-6,
}  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {  # lrs: learning rate, first coefficient to try; tries: SAEs of a seed
    "relu": [{"kind": "relu", "options": {}, "tries": 6, "lrs": {2e-3: 1.65, 4e-3: 1.27, 8e-3: 1.02, 16e-3: 0.85}}],
    "topk": [{"kind": "topk", "options": {}, "tries": 1, "lrs": dict.fromkeys((2e-3, 4e-3, 8e-3, 16e-3))}],
    "jumprelu": [
        {
            "kind": "jumprelu-tanh", "options": ANTHROPIC, "tries": 6,
            "lrs": {2e-3: 0.33, 4e-3: 0.21, 8e-3: 0.165, 16e-3: 0.14},
        },
        {"kind": "jumprelu-step", "options": {}, "tries": 2, "lrs": {4e-3: 1.0}},
    ],
}  # fmt: skip
DEAD_SHARE = 0.05  # of the run's last activations
LOSS_ROWS = 128


def main() -> None:
    args = _arguments()
    if not args.table:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch

        torch.set_num_threads(args.threads)
        append(RESULTS, COLUMNS, rows(args))
    print(table(RESULTS))


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure both sides."""
    folder = args.runs / f"{args.width}-{args.l0}-{args.tokens}"
    opened = _session(args)
    job = job_for(args, opened, folder)
    measure = _measure(opened, job["batches"])
    mine = ours(args, folder, measure)
    peer = Peer(args, folder, job, measure)
    l0 = {(row["arch"], row["seed"]): row["l0"] for row in mine}
    first = [want | {"seed": 0, "l0": l0[arch, 0]} for arch in args.archs for want in candidates(arch)]
    tried = peer.train(first)
    best = [_best([want for want in first if want["arch"] == arch], tried) for arch in args.archs]
    others = [want | {"seed": seed, "l0": l0[want["arch"], seed]} for want in best for seed in range(1, args.seeds)]
    common = {
        "date": time.strftime("%Y-%m-%d"), "machine": cpu(), "model": Path(opened.settings.lm.model).name,
        "tokens": args.tokens, "width": opened.settings.specs[0].width, "asked": args.l0,
    }  # fmt: skip
    return [common | {key: short(value) for key, value in row.items()} for row in [*mine, *tried, *peer.train(others)]]


def candidates(arch: str) -> list[dict[str, Any]]:
    return [
        {"name": f"{option['kind']}-{lr:g}", "arch": arch, "lr": lr, "start": start} | option
        for option in OPTIONS[arch]
        for lr, start in option["lrs"].items()
    ]


def ours(args: argparse.Namespace, folder: Path, measure: Any) -> list[dict[str, Any]]:
    """Our SAEs, from one command; an interrupted one is gone on with."""
    from sae_train.runs.run import Run, resume, train

    path = folder / "ours"
    if not (path / "run.json").exists():
        train(
            name="ours", out=str(folder), arch=list(args.archs), seed=list(range(args.seeds)), absorption=False,
            **_settings(args),
        )  # fmt: skip
    elif Run(path).info["status"] != "finished":
        resume(path)
    saes = Run(path).info["saes"]
    return [
        {"side": "sae-train", "arch": sae["arch"], "candidate": "defaults", "seed": sae["seed"]}
        | measure(path / "saes" / sae["name"])
        for sae in saes
    ]


class Peer:
    """SAELens in its environment."""

    def __init__(self, args: argparse.Namespace, folder: Path, job: dict[str, Any], measure: Any):
        self.python, self.folder, self.job, self.measure = args.peer_python, folder, job, measure

    def train(self, searches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each SAE that these searches need."""
        path = self.folder / "job.json"
        write_json(path, {**self.job, "searches": searches})
        command = [self.python, str(ROOT / "benchmarks" / "quality_peer.py"), str(path)]
        with (self.folder / "peer.log").open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=log)
        if done.returncode:
            raise SystemExit(f"SAELens failed: {self.folder / 'peer.log'} says how")
        return [
            {"side": "SAELens", "arch": want["arch"], "candidate": want["name"], "seed": want["seed"]}
            | {name: json.loads((path / "trained.json").read_text())[name] for name in ("lr", "coefficient")}
            | self.measure(path)
            for want in searches
            for path in sorted(Path(self.job["out"]).glob(f"{want['name']}-seed_{want['seed']}-*"))
        ]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"width": args.width, "l0": args.l0, "tokens": args.tokens, "device": "cpu"}


def _session(args: argparse.Namespace) -> Any:
    from sae_train.config import resolve
    from sae_train.errors import UserError
    from sae_train.runs.session import begin, open_session

    try:
        opened = open_session(resolve(_settings(args)))
        begin(opened)  # from here on outliers are left out, as in the run
        return opened
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def job_for(args: argparse.Namespace, opened: Any, folder: Path) -> dict[str, Any]:
    """Keep the training batches on disk; return what the peer is to be told of them."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    settings, batches, held_out = opened.settings, folder / "batches.npy", folder / "held_out.npy"
    steps = settings.n_steps
    if not batches.is_file():
        shape = (steps, settings.train.batch_tokens, opened.first.source.d_in)
        with whole(batches) as new:
            file = np.lib.format.open_memmap(new, "w+", np.float32, shape)
            for step in range(steps):
                file[step] = next(opened.first.data).numpy()
            file.flush()
            np.save(held_out, opened.first.held_out.numpy())
    return {
        "batches": str(batches), "held_out": str(held_out), "out": str(folder / "peer"),
        "d_in": opened.first.source.d_in, "width": settings.specs[0].width, "threads": args.threads,
        "warm_up": round(settings.train.lr_warm_up * steps), "decay": round(settings.train.lr_decay * steps),
        "window": _last(steps) - 1,  # its latents are dead after more steps than that: then sae-train's are, too
    }  # fmt: skip


def _last(steps: int) -> int:
    return math.ceil(DEAD_SHARE * steps)


def _measure(opened: Any, batches: str) -> Any:
    """From an SAE's folder to its figures; where SAELens left what it reconstructs, load_sae must read the same."""
    import numpy as np
    import torch

    from sae_train import load_sae
    from sae_train.evals import fidelity
    from sae_train.training.metrics import held_out_metrics

    language = opened.first.language
    data = fidelity.FidelityData.build(language.lm, language.rows[:LOSS_ROWS], language.drop_ids)
    stored = np.load(batches, mmap_mode="r")
    last = torch.from_numpy(np.array(stored[-_last(len(stored)) :])).flatten(0, 1)

    def measure(folder: Path) -> dict[str, float]:
        kept = folder / "figures.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        sae = load_sae(folder)
        if (folder / "checked.npy").is_file():
            theirs = torch.from_numpy(np.load(folder / "checked.npy"))
            torch.testing.assert_close(sae(opened.first.held_out[: len(theirs)]), theirs, rtol=1e-4, atol=1e-4)
        metrics = held_out_metrics(sae, opened.first.held_out)
        figures = {
            "l0": metrics["metrics/l0"], "ev": metrics["metrics/explained_variance"],
            "loss_recovered": fidelity.loss_recovered(language.lm, sae, data)["metrics/ce_loss_score"],
            "silent": (metrics["density"] == 0).float().mean().item(),
            "dead": (held_out_metrics(sae, last)["density"] == 0).float().mean().item(),
        }  # fmt: skip
        write_json(kept, figures)
        return figures

    return measure


def _best(wants: list[dict[str, Any]], tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The candidate with the highest EV at our L0, to be started from the coefficient that has it."""
    reached = []
    for want in wants:
        figures = at([row for row in tried if row["candidate"] == want["name"]], want["l0"])
        reached += [(figures["ev"], want | {"start": figures["coefficient"]})] if figures else []
    if not reached:
        raise SystemExit(f"SAELens: no {wants[0]['arch']} came to both sides of L0 {wants[0]['l0']:.1f}")
    return max(reached, key=lambda pair: pair[0])[1]


def short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with sae-lens")
    parser.add_argument("--runs", type=Path, default=ROOT / "checkpoints" / "quality", help="where SAEs are kept")
    parser.add_argument("--archs", type=lambda text: text.split(","), default=list(ARCHITECTURES))
    parser.add_argument("--width", default="1k")
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    if unknown := set(args.archs) - set(ARCHITECTURES):
        parser.error(f"--archs: {', '.join(sorted(unknown))} is none of {', '.join(ARCHITECTURES)}")
    check(parser, args, RESULTS)
    if args.seeds < 2:
        parser.error(f"--seeds: {args.seeds} is not enough, 2 are")
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, results: Path) -> None:
    """End in one sentence where there are no rows to show, or no peer to measure."""
    if args.table and not results.is_file():
        parser.error(f"--table: {results} does not exist: measure first")
    if not args.table and not shutil.which(args.peer_python):
        parser.error(f"--peer-python: {args.peer_python} is no program")


if __name__ == "__main__":
    main()
