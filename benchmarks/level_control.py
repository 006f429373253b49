"""What moving thresholds adds to the control of L0: jumprelu SAEs with it and with the coefficient alone.

    python benchmarks/level_control.py --model smollm2 --hook blocks.8.hook_resid_post --dataset english_mix.parquet

Same activations, seed and settings (a --width of 4k, L0 50, 400,000 tokens by default). Printed, and written to
benchmarks/results/level_control.csv, are the held-out L0 before the correction that ends a run, and EV and the share of
dead latents after it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from csv_rows import append, machine

from sae_train.runs.run import train
from sae_train.training.architectures import TRAINED
from sae_train.training.metrics import held_out_metrics

RESULTS = Path(__file__).resolve().parent / "results" / "level_control.csv"
COLUMNS = ("date", "machine", "model", "width", "l0", "tokens", "levels", "l0_before", "ev", "dead")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("model", "speller"), ("hook", None), ("dataset", None), ("width", "4k"), ("tokens", "400k")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            {"date": time.strftime("%Y-%m-%d"), "machine": machine("cpu"), **measure(args, levels, scratch)}
            for levels in (False, True)
        ]
    append(args.out, COLUMNS, rows)
    print("| | L0 before the correction | EV after it | dead |", "|---|---|---|---|", sep="\n")
    for row in rows:
        how = "levels and coefficient" if row["levels"] else "coefficient alone"
        print(f"| {how} | {row['l0_before']:.1f} | {row['ev']:.4f} | {row['dead']:.1%} |")
    return 0


def measure(args: argparse.Namespace, levels: bool, scratch: str) -> dict[str, Any]:
    """Train one SAE with or without moving levels."""
    arch, before = "jumprelu", []
    cls = TRAINED[arch]
    kept = cls.moves_levels, cls.calibrate

    def calibrate(self: Any, held_out: Any) -> None:
        before.append(held_out_metrics(self.sae, held_out)["metrics/l0"])
        kept[1](self, held_out)

    cls.moves_levels, cls.calibrate = levels, calibrate
    asked = {name: getattr(args, name) for name in ("model", "hook", "dataset", "width", "l0", "tokens")}
    try:
        run = train(
            **{name: value for name, value in asked.items() if value is not None}, arch=arch, absorption=False,
            absorption_evals=2, batch_tokens=2048, activation_cache=f"{scratch}/activations", out=scratch,
        )  # fmt: skip
    finally:
        cls.moves_levels, cls.calibrate = kept
    final = run.info["saes"][0]["final"]
    figures = {"ev": final["metrics/explained_variance"], "dead": final["sparsity/dead_fraction"]}
    return {**{k: asked[k] for k in ("model", "width", "l0", "tokens")}, "levels": levels,
            "l0_before": before[-1], **figures}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
