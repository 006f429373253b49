"""What a short run needs: L0 before the correction that ends a run, EV and dead latents after it, for every
architecture, and without the devices that serve short runs.

    python benchmarks/short_runs.py --model smollm2 --dataset english_mix.parquet

Same activations, seed and settings (width 16k, L0 50, 1 M tokens by default). `weak revival` is a weaker pull on dead
latents: AuxK not in the units of the error beside it, or the pre-activation loss at the published 3e-6 (relu; for
jumprelu in place of AuxK). `coefficient alone` is jumprelu without moving its thresholds. Rows go to
benchmarks/results/short_runs.csv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from csv_rows import append, machine

from sae_train.runs.run import train
from sae_train.training import losses
from sae_train.training.architectures import TRAINED
from sae_train.training.metrics import held_out_metrics

RESULTS = Path(__file__).resolve().parent / "results" / "short_runs.csv"
COLUMNS = (
    "date",
    "machine",
    "model",
    "width",
    "l0",
    "tokens",
    "seed",
    "arch",
    "how",
    "l0_before",
    "l0_after",
    "ev",
    "dead",
)
PLAIN, WEAK, ALONE = "as it is", "weak revival", "coefficient alone"
CASES = (
    *((arch, PLAIN) for arch in TRAINED), ("topk", WEAK), ("jumprelu", WEAK), ("relu", WEAK), ("jumprelu", ALONE),
)  # fmt: skip
PUBLISHED_PULL = 3e-6


def main() -> int:
    args = _arguments()
    cases = [case for case in CASES if case[0] in args.arch.split(",")]
    print("| | | L0 before the correction | after it | EV | dead |", "|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as scratch:
        for arch, how in cases:
            row = measure(args, arch, how, scratch)
            append(args.out, COLUMNS, [{"date": time.strftime("%Y-%m-%d"), "machine": machine("cpu"), **row}])
            figures = f"{row['l0_before']:.1f} | {row['l0_after']:.1f} | {row['ev']:.4f} | {row['dead']:.1%}"
            print(f"| {arch} | {how} | {figures} |", flush=True)
    return 0


def measure(args: argparse.Namespace, arch: str, how: str, scratch: str) -> dict[str, Any]:
    """Train one SAE and look at it before and after its correction."""
    asked = {name: getattr(args, name) for name in ("model", "width", "l0", "tokens", "seed")}
    given = {name: value for name, value in vars(args).items() if name in ("hook", "dataset") and value is not None}
    with changed(arch, how) as before:
        run = train(
            **asked, **given, arch=arch, absorption=False, batch_tokens=2048, out=scratch,
            activation_cache=f"{scratch}/activations",
        )  # fmt: skip
    final = run.info["saes"][0]["final"]
    figures = {"ev": final["metrics/explained_variance"], "dead": final["sparsity/dead_fraction"]}
    return asked | {"arch": arch, "how": how, "l0_before": before[-1], "l0_after": final["metrics/l0"]} | figures


@contextmanager
def changed(arch: str, how: str) -> Iterator[list[float]]:
    """Take a device from an architecture, and collect the L0 that its calibration begins with."""
    cls, before = TRAINED[arch], []
    calibrate, revive = cls.calibrate, cls.revival

    def look_and_calibrate(self: Any, held_out: Any) -> None:
        before.append(held_out_metrics(self.sae, held_out)["metrics/l0"])
        calibrate(self, held_out)

    def weakly(self: Any, run: Any, x: Any, recon: Any, dead: Any) -> Any:
        if arch == "topk":
            return revive(self, run, x, recon, dead) / self.sae.cfg.d_in
        sae, level = self.sae, self.leaves["log_threshold"].exp() if arch == "jumprelu" else 0.0
        return PUBLISHED_PULL * losses.pre_activation(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, level, dead)

    new: dict[str, Any] = {"calibrate": look_and_calibrate}
    new |= {"revival": weakly} if how == WEAK else {"moves_levels": False} if how == ALONE else {}
    with patch.multiple(cls, **new):
        yield before


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("model", "speller"), ("hook", None), ("dataset", None), ("width", "16k"), ("tokens", "1M")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", default=",".join(TRAINED), help="a comma list")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
