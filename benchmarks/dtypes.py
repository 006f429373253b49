"""What a language model in bfloat16 does to the figures of its SAEs: the same runs in float32 and in bfloat16.

    python benchmarks/dtypes.py --flags='--model smollm2 --hook blocks.8.hook_resid_post --dataset TEXT --width 4k'

The flags are those of a run; seeds, text and words are the same in both. Printed, and appended to
benchmarks/results/dtypes.csv, are each SAE's final figures and the seconds of the whole run.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from csv_rows import append, machine

from sae_train.runs.run import Run

RESULTS = Path(__file__).resolve().parent / "results" / "dtypes.csv"
FIGURES = {
    "ev": "metrics/explained_variance", "l0": "metrics/l0", "loss_recovered": "metrics/ce_loss_score",
    "dead": "sparsity/dead_fraction", "fraction": "absorption/mean_fraction", "full": "absorption/mean_full",
    "f1": "absorption/mean_f1",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", required=True, help="flags of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [row for dtype in ("float32", "bfloat16") for row in figures(args.flags, dtype)]
    columns = ("date", "machine", "sae", "dtype", *FIGURES, "seconds")
    append(args.out, columns, [{"date": time.strftime("%Y-%m-%d"), "machine": machine("cpu"), **row} for row in rows])
    print("| SAE | dtype | " + " | ".join(FIGURES) + " | seconds |", "|---" * (3 + len(FIGURES)) + "|", sep="\n")
    for row in sorted(rows, key=lambda row: row["sae"]):
        values = " | ".join("–" if row[name] is None else f"{row[name]:.4f}" for name in FIGURES)
        print(f"| {row['sae']} | {row['dtype']} | {values} | {row['seconds']:.0f} |")
    return 0


def figures(flags: str, dtype: str) -> list[dict[str, object]]:
    """Run with one dtype; return a row for each SAE."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "sae_train", *shlex.split(flags), "--dtype", dtype]
        start = time.perf_counter()
        subprocess.run([*command, "--out", scratch, "--name", "run"], check=True)
        seconds = time.perf_counter() - start
        saes = Run(Path(scratch) / "run").info["saes"]
    return [
        {"sae": sae["name"], "dtype": dtype, "seconds": seconds}
        | {name: sae["final"].get(figure) for name, figure in FIGURES.items()}
        for sae in saes
    ]


if __name__ == "__main__":
    sys.exit(main())
