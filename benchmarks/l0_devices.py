"""Ways to hold L0 at a target, on the same runs: relu and jumprelu SAEs with one device after another in the place of
the L0 controller, nothing corrected at the end. jumprelu's moves thresholds and the price of an active latent, the
others the price alone, which is λ itself but for ours. It writes a CSV and a table.

    python benchmarks/l0_devices.py

The other devices are those of open trainers, in the form that this learner's loss (squared error + λ·sparsity) gives
them: slow integral control with a bounded factor (after SynthSAEBench, arXiv 2602.14687), λ up or down by a fixed
factor, an integral controller in log space, and the loss c·(L0/L0* − 1)² (dictionary_learning), which is a λ of
2c·(L0/L0* − 1)/L0* on jumprelu's differentiable L0; relu has no such L0.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from l0_control import unpriced
from torch import Tensor

from sae_train.files import read_json
from sae_train.runs.run import Run, train
from sae_train.training import learner
from sae_train.training.architectures import TRAINED
from sae_train.training.l0 import L0Controller, LevelController

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "l0_devices.csv"
WIDTH, TARGETS = "1k", (10, 50)


class OnLambda(L0Controller):
    """The same with the coefficient as λ itself: all the difference is jumprelu's."""


class SlowIntegral(L0Controller):
    """log λ += 3e-4·(L0_ema/L0* − 1), EMA .99, λ within [.01, 100] times its start."""

    PROPORTIONAL, SMOOTHING, MAX_FACTOR = 0.0, 0.99, 100.0
    INTEGRAL = 3e-4

    def _error(self) -> Tensor:
        return (self.ema / self.target - 1).nan_to_num(0.0)


class UpOrDown(L0Controller):
    """λ times 1 ± 3e-4 by the sign of the error, after a fifth of the run."""

    PROPORTIONAL, SMOOTHING = 0.0, 0.0
    INTEGRAL = math.log1p(3e-4)

    def __init__(self, target: float, start: float, first_step: int, device: torch.device | str = "cpu"):
        super().__init__(target, start, 4 * first_step, device)

    def _error(self) -> Tensor:
        return (self.ema - self.target).sign().nan_to_num(0.0)


class LogIntegral(L0Controller):
    """log λ += .01·tanh(3·log(L0_ema/L0*)), EMA .95, after a tenth of the run."""

    PROPORTIONAL, SMOOTHING = 0.0, 0.95
    INTEGRAL = 0.01

    def __init__(self, target: float, start: float, first_step: int, device: torch.device | str = "cpu"):
        super().__init__(target, start, 2 * first_step, device)

    def _error(self) -> Tensor:
        return (3 * (self.ema.clamp_min(1e-3) / self.target).log()).tanh().nan_to_num(0.0)


class Quadratic(L0Controller):
    """c·(L0/L0* − 1)²: its gradient is that of λ·L0 with λ = 2c·(L0/L0* − 1)/L0*, of the batch before."""

    SMOOTHING, WEIGHT = 0.0, 1.0

    @property
    def coefficient(self) -> Tensor:
        return 2 * self.WEIGHT * (self.ema / self.target - 1).nan_to_num(0.0) / self.target


class Quadratic100(Quadratic):
    """The same with c = 100."""

    WEIGHT = 100.0


DEVICES = {
    "thresholds and price (jumprelu's)": LevelController,
    "PI in log space (relu's)": L0Controller,
    "the same on λ itself": OnLambda,
    "slow integral, EMA .99": SlowIntegral,
    "up or down by 3e-4": UpOrDown,
    "integral in log space": LogIntegral,
    "quadratic, c = 1": Quadratic,
    "quadratic, c = 100": Quadratic100,
}


def main() -> None:
    args = _arguments()
    rows = [row for name, device in DEVICES.items() for row in _measure(args, name, device)]
    table = pd.DataFrame(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.5g")
    print("| device | SAE | L0 reached | off | EV |", "|---|---|---|---|---|", sep="\n")
    for row in table.itertuples():
        off = row.l0_reached / row.l0 - 1
        print(f"| {row.device} | {row.arch}, L0 {row.l0:g} | {row.l0_reached:.2f} | {off:+.1%} | {row.ev:.4f} |")


def _measure(args: argparse.Namespace, name: str, device: type[L0Controller]) -> list[dict[str, object]]:
    """Train with this device and read off the held-out figures; a finished run is read only."""
    archs = ["jumprelu"] if issubclass(device, Quadratic | LevelController) else ["relu", "jumprelu"]
    folder = args.runs / device.__name__
    if not (folder / "run.json").exists() or read_json(folder / "run.json").get("status") != "finished":
        kept = learner.L0Controller, {arch: (TRAINED[arch].calibrate, TRAINED[arch].moves_levels) for arch in archs}
        learner.L0Controller = device
        for arch in archs:
            TRAINED[arch].calibrate = lambda self, held_out: None
            TRAINED[arch].moves_levels = device is LevelController
        try:
            with nullcontext() if device in (L0Controller, LevelController) else unpriced("jumprelu"):
                train(
                    name=folder.name, out=str(args.runs), arch=archs, width=WIDTH, l0=list(TARGETS),
                    tokens=args.tokens, absorption=False,
                )  # fmt: skip
        finally:
            learner.L0Controller = kept[0]
            for arch, (calibrate, moves_levels) in kept[1].items():
                TRAINED[arch].calibrate, TRAINED[arch].moves_levels = calibrate, moves_levels
    return [
        {"device": name, "arch": sae["arch"], "width": sae["width"], "l0": sae["l0"], "tokens": args.tokens,
         "l0_reached": sae["final"]["metrics/l0"], "ev": sae["final"]["metrics/explained_variance"]}
        for sae in Run(folder).info["saes"]
    ]  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "checkpoints" / "l0_devices", help="where runs are kept")
    parser.add_argument("--tokens", type=int, default=500_000, help="activations each SAE is trained on")
    return parser.parse_args()


if __name__ == "__main__":
    main()
