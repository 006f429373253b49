"""Run `sae-train eval --suite` with the real sae-bench 0.6.0 on one SAE, and hold its core figures to ours.

    python tests/crosscheck/saebench_suite.py --peer-python ENV/bin/python [SAE_FOLDER --model M --hook H --dataset D]

Without SAE_FOLDER a small one is trained on the embedded model. sae-bench's data sets are not fetched: stand-ins, cut
from the embedded text, lie where its loader looks first, so that the numbers of sparse probing, SCR and TPP mean
nothing and show that the way there is whole. The core eval reads the SAE's own text: its L0 and its share of latents
that fire must be ours, and its two explained variances those of its formulas on all tokens that are not special.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
N_TEXTS = 6000  # sae-bench asks for more than 40 of each profession and gender on each side of the split
PROFESSIONS = (0, 1, 2, 6, 9, 21, 13, 25, 22, 26, 11)  # that sae-bench's classes name
SETS = {
    "sparse-probing": {"dataset_names": ["fancyzhx/ag_news"], "probe_train_set_size": 80, "probe_test_set_size": 40},
    "scr": {"dataset_names": ["LabHC/bias_in_bios_class_set1"], "train_set_size": 80, "test_set_size": 40,
            "column1_vals_lookup": {"LabHC/bias_in_bios_class_set1": [["professor", "nurse"]]}},
    "tpp": {"dataset_names": ["LabHC/bias_in_bios_class_set1"], "train_set_size": 80, "test_set_size": 40},
}  # fmt: skip
TOLERANCE = {"float32": 2e-3, "bfloat16": 3e-2}  # sae-bench rounds the SAE as well
TITLES = {"l0": "L0", "frac_alive": "latents that fired", "explained_variance": "explained variance",
          "explained_variance_legacy": "explained variance, token by token"}  # fmt: skip


def main() -> int:
    """Return 1 where a figure is not the one that it should be, else 0."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sae = args.sae or _train(folder)
        _write_sets(folder)
        settings = {"core": {"n_eval_reconstruction_batches": args.batches, "batch_size_prompts": args.batch,
                             "n_eval_sparsity_variance_batches": args.batches}}  # fmt: skip
        (folder / "suite.yaml").write_text(yaml.safe_dump(settings | SETS))
        _evaluate(args, sae.resolve(), folder)
        rows = _compare(args, sae, folder / "out")
    print("| figure | sae-bench | by its formula here | as sae-train measures |\n|---|---|---|---|")
    for name, *values in rows:
        print(f"| {TITLES[name]} | {' | '.join('–' if value is None else f'{value:.4f}' for value in values)} |")
    off = [name for name, theirs, same, _ in rows if abs(theirs - same) > TOLERANCE[args.dtype] * max(1, abs(same))]
    print(f"off: {', '.join(off)}" if off else "all as they should be")
    return int(bool(off))


def _run(arguments: list[str], cwd: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "sae_train", *arguments], cwd=cwd, env=env)
    if done.returncode:
        raise SystemExit(f"sae-train {' '.join(arguments)} failed")


def _train(folder: Path) -> Path:
    grid = ["--width", "1k", "--l0", "8", "--tokens", "409600", "--no-absorption"]
    _run([*grid, "--out", str(folder), "--name", "run"], folder)
    return folder / "run" / "saes" / "topk-1k-l0_8"


def _write_sets(folder: Path) -> None:
    """Texts of the embedded model under sae-bench's names and columns, with labels in turn."""
    from sae_train.data.documents import find_documents

    documents = chain.from_iterable(find_documents("generated")[0].reads())
    texts = [" ".join(text.split()[:40]) for _, text in islice(documents, N_TEXTS) if text.strip()]
    bios = [{"hard_text": t, "profession": PROFESSIONS[i % 11], "gender": i // 11 % 2} for i, t in enumerate(texts)]
    for name, rows in (
        ("fancyzhx/ag_news", [{"text": text, "label": i % 4} for i, text in enumerate(texts[:800])]),
        ("LabHC/bias_in_bios", bios),
    ):
        (folder / name).mkdir(parents=True)
        half = len(rows) // 2
        for split, part in (("train", rows[:half]), ("test", rows[half:])):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def _evaluate(args: argparse.Namespace, sae: Path, folder: Path) -> None:
    flags = [f"--{name}={value}" for name in ("model", "hook", "dataset") if (value := getattr(args, name))]
    flags += ["--suite", args.suite, "--suite-python", args.peer_python, "--suite-config", "suite.yaml"]
    _run(["eval", str(sae), "--out", "out", "--dtype", args.dtype, "--eval-words", args.eval_words, *flags], folder)


def _compare(args: argparse.Namespace, path: Path, out: Path) -> list[tuple[str, float, float, float | None]]:
    """Name, sae-bench's value, the same by its formula from our activations, and our own figure."""
    from sae_train.data.language_model import load_language_model
    from sae_train.data.tokens import open_tokens
    from sae_train.sae.files import load_sae

    record = json.loads((out / "eval_results" / "suite.json").read_text())["evals"]["core"]
    result = json.loads((out / "eval_results" / "core" / record["file"]).read_text())
    theirs = {key: value for group in result["eval_result_metrics"].values() for key, value in group.items()}
    sae = load_sae(path)
    lm = load_language_model(args.model or "speller", args.hook or sae.cfg.hook_name, dtype=args.dtype)
    n = args.batch * args.batches
    rows = open_tokens(args.dataset or "generated", lm.tokenizer, context=result["eval_config"]["context_size"],
                       sequences=8, bos_id=lm.bos_id, held_out_tokens=16_384).held_out[:n]  # fmt: skip
    known = {lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id} - {None}
    x = torch.cat([lm.activations(row[None])[0] for row in rows])
    same = _by_formula(sae, x[~torch.isin(rows.flatten(), torch.tensor(sorted(known)))])
    return [(name, theirs[name], same[name], record["ours"].get(name)) for name in TITLES]


@torch.no_grad()
def _by_formula(sae: Any, x: torch.Tensor) -> dict[str, float]:
    """sae-bench 0.6.0's get_sparsity_and_variance_metrics, on all activations at once."""
    latents = torch.cat([sae.encode(part) for part in x.split(1024)])
    error = (x - sae.decode(latents)).double().square().sum(1)
    squares = x.double().square()
    spread = (x - x.mean(0)).double().square().sum(1)
    return {
        "l0": float((latents != 0).sum(1).double().mean()),
        "frac_alive": float((latents > 0).any(0).double().mean()),
        "explained_variance": float(1 - error.mean() / (squares.sum(1).mean() - squares.mean() ** 2)),
        "explained_variance_legacy": float((1 - error / spread).mean()),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", nargs="?", type=Path, help="SAE folder; default: one is trained on the embedded model")
    parser.add_argument("--peer-python", required=True, help="python of an environment with sae-bench")
    parser.add_argument("--suite", default="core,sparse-probing,scr,tpp")
    parser.add_argument("--batches", type=int, default=8, help="of the core eval")
    parser.add_argument("--batch", type=int, default=16, help="rows at a time of the core eval")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--eval-words", default="600")
    for name in ("model", "hook", "dataset"):
        parser.add_argument(f"--{name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
