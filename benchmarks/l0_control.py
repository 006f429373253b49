"""How close a finished SAE's L0 is to `--l0`, and what control costs: SAEs of every architecture are trained on several
widths and targets, and relu and jumprelu once more with coefficients set by hand. It writes a CSV, a figure and tables.

    python benchmarks/l0_control.py                                         the embedded model: 60 SAEs, then by hand
    python benchmarks/l0_control.py --model FOLDER --dataset FOLDER         another model, width 4k, L0 16 and 64
    python benchmarks/l0_control.py --only 1k                               some parts: 1k, 4k, 16k, by-hand, report

Every L0 and EV is of held-out activations that neither training nor calibration saw. By hand means: the coefficient
stays where it was set, for seven values a factor of 2 apart around what the controller arrived at, from the same start
and without an offset at the end; at a target's L0 the best EV of these runs is read off by interpolation on log L0.
Finished runs are kept in --runs and not trained again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from sae_train.files import read_json, whole
from sae_train.runs.run import Run, train
from sae_train.training.architectures import TRAINED
from sae_train.training.l0 import L0Controller

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "l0_control.csv"
FIGURE = ROOT / "docs" / "l0_control.svg"
ARCHITECTURES = ("relu", "jumprelu", "topk", "batchtopk", "matryoshka")
TARGETS = (10, 25, 50, 100)
WIDTHS = ("1k", "4k", "16k")
OTHER = {"width": "4k", "l0": (16, 64)}
STEERED = ("relu", "jumprelu")
BY_HAND = {"width": "1k", "steps": 7, "factor": 2.0}
COLUMNS = {
    "l0_reached": "metrics/l0",
    "ev": "metrics/explained_variance",
    "loss_recovered": "metrics/ce_loss_score",
    "dead": "sparsity/dead_fraction",
    "coefficient": "details/l0_coefficient",
}


def main() -> None:
    args = _arguments()
    if args.model:
        _train_controlled(args, Path(args.model).name, OTHER["width"], OTHER["l0"])
    else:
        for width in (w for w in WIDTHS if args.only in (None, w)):
            _train_controlled(args, "speller", width, TARGETS)
        if args.only in (None, "by-hand"):
            _train_by_hand(args)
    table = _table(args.runs)
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.5g")
    print(_cells(table), _summary(table), _against_hand(table), sep="\n\n")
    _figure(table, FIGURE)


def _train_controlled(args: argparse.Namespace, model: str, width: str, targets: tuple[int, ...]) -> None:
    """One run an architecture, so that an interruption costs one of them."""
    for arch in ARCHITECTURES:
        _run(args, f"{model}-{arch}-{width}", arch=arch, width=width, l0=list(targets))


def _train_by_hand(args: argparse.Namespace) -> None:
    for arch in STEERED:
        rows = _rows(args.runs / f"speller-{arch}-{BY_HAND['width']}")
        middle = math.exp(sum(math.log(row["coefficient"]) for row in rows) / len(rows))
        for step in range(BY_HAND["steps"]):
            coefficient = middle * BY_HAND["factor"] ** (step - BY_HAND["steps"] // 2)
            with _uncontrolled(arch, coefficient):
                _run(args, f"by_hand-{arch}-{step}", arch=arch, width=BY_HAND["width"], l0=list(TARGETS))


@contextmanager
def _uncontrolled(arch: str, coefficient: float) -> Iterator[None]:
    """The controller's gains at zero, its start at the coefficient, no offset at the end."""
    cls = TRAINED[arch]
    kept = cls.first_coefficient, cls.calibrate, cls.moves_levels, L0Controller.PROPORTIONAL, L0Controller.INTEGRAL
    cls.first_coefficient, cls.calibrate = coefficient, lambda self, held_out: None
    cls.moves_levels, L0Controller.PROPORTIONAL, L0Controller.INTEGRAL = False, 0.0, 0.0
    try:
        with unpriced(arch):
            yield
    finally:
        cls.first_coefficient, cls.calibrate, cls.moves_levels, L0Controller.PROPORTIONAL, L0Controller.INTEGRAL = kept


@contextmanager
def unpriced(arch: str) -> Iterator[None]:
    """The controller's coefficient is λ itself, not a share of the error."""
    cls = TRAINED[arch]
    forward = cls.forward
    cls.forward = lambda self, x: replace(forward(self, x), price=1.0)
    try:
        yield
    finally:
        cls.forward = forward


def _run(args: argparse.Namespace, name: str, **settings: Any) -> None:
    folder = args.runs / name
    if (folder / "run.json").exists():
        if read_json(folder / "run.json").get("status") == "finished":
            return
        raise SystemExit(f"{folder} is not finished: resume it (sae-train resume) or remove it.")
    model = {"model": args.model, "dataset": args.dataset} if args.model else {}
    train(name=name, out=str(args.runs), tokens=args.tokens, absorption=False, **model, **settings)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """One row an SAE of a run, from its final held-out figures."""
    info = Run(folder).info
    part, model = (
        ("by hand" if folder.name.startswith("by_hand") else "controlled"),
        Path(info["settings"]["model"]).name,
    )
    same = ("arch", "width", "l0", "seed")
    return [
        {"model": model, "part": part, **{key: sae[key] for key in same}, "tokens": info["settings"]["tokens"]}
        | {name: sae["final"].get(figure) for name, figure in COLUMNS.items()}
        for sae in info["saes"]
    ]


def _table(runs: Path) -> pd.DataFrame:
    folders = sorted(path.parent for path in runs.glob("*/run.json"))
    rows = [row for folder in folders if Run(folder).info["status"] == "finished" for row in _rows(folder)]
    table = pd.DataFrame(rows).sort_values(["model", "part", "arch", "width", "l0", "coefficient"], ignore_index=True)
    table["off"] = table["l0_reached"] / table["l0"] - 1
    return table


def _cells(table: pd.DataFrame) -> str:
    """L0 reached and EV, a row an architecture and width, a column a target."""
    out = []
    for model, of_model in table[table["part"] == "controlled"].groupby("model", sort=False):
        targets = sorted(of_model["l0"].unique())
        out += [f"| {model} | " + " | ".join(f"L0 {t:g}" for t in targets) + " |", "|---" * (len(targets) + 1) + "|"]
        for (arch, width), cells in of_model.groupby(["arch", "width"]):
            by_target = cells.set_index("l0")
            figures = [f"{by_target.l0_reached[t]:.2f} (EV {by_target.ev[t]:.3f})" for t in targets]
            out.append(f"| {arch}, {width:,} | " + " | ".join(figures) + " |")
        out.append("")
    return "\n".join(out)


def _summary(table: pd.DataFrame) -> str:
    off = table.loc[table["part"] == "controlled", "off"].abs()
    return (
        f"{len(off)} SAEs: {(off <= 0.02).mean():.0%} within 2 % of the L0 asked for, {(off <= 0.01).mean():.0%} "
        f"within 1 %, the furthest {off.max():.1%} off."
    )


def _against_hand(table: pd.DataFrame) -> str:
    """EV of each controlled SAE beside the best EV by hand at its target."""
    by_hand = table[table["part"] == "by hand"]
    out = ["| SAE | EV, controlled | EV, by hand at the same L0 | difference |", "|---|---|---|---|"]
    for (arch, width), runs in by_hand.groupby(["arch", "width"]):
        mine = table.query("part == 'controlled' and model == 'speller' and arch == @arch and width == @width")
        for row in mine.itertuples():
            best = _best_ev(runs, row.l0_reached)
            out.append(f"| {arch}, {width:,}, L0 {row.l0:g} | {row.ev:.4f} | {best:.4f} | {row.ev - best:+.4f} |")
    return "\n".join(out)


def _best_ev(runs: pd.DataFrame, l0: float) -> float:
    """Upper envelope over the runs' starts of EV interpolated on log L0; NaN where no two runs span l0."""
    best = float("nan")
    for _, curve in runs.groupby("l0"):
        points = sorted((math.log(row.l0_reached), row.ev) for row in curve.itertuples() if row.l0_reached > 0)
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 <= math.log(l0) <= x1 and x1 > x0:
                value = y0 + (y1 - y0) * (math.log(l0) - x0) / (x1 - x0)
                best = value if math.isnan(best) else max(best, value)
    return best


def _figure(table: pd.DataFrame, path: Path) -> None:
    """Deviation of L0 by target, and EV over L0 at each width, one colour an architecture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = table.query("part == 'controlled' and model == 'speller'")
    widths = sorted(cells["width"].unique())
    fig, axes = plt.subplots(1, 1 + len(widths), figsize=(3.2 * (1 + len(widths)), 3.2), layout="constrained")
    jitter = {arch: 0.94 + 0.03 * i for i, arch in enumerate(ARCHITECTURES)}
    for i, arch in enumerate(ARCHITECTURES):
        mine = cells[cells["arch"] == arch]
        axes[0].scatter(mine["l0"] * jitter[arch], 100 * mine["off"], s=14, color=f"C{i}", label=arch)
        for axis, width in zip(axes[1:], widths, strict=True):
            line = mine[mine["width"] == width].sort_values("l0_reached")
            axis.plot(line["l0_reached"], line["ev"], "o-", ms=3, lw=1, color=f"C{i}", label=arch)
    axes[0].axhspan(-2, 2, color="0.9", zorder=0)
    axes[0].set(title="L0 reached against asked", xlabel="L0 asked", ylabel="% off", xscale="log", ylim=(-5, 5))
    for axis, width in zip(axes[1:], widths, strict=True):
        axis.set(title=f"width {width:,}", xlabel="L0 reached", ylabel="explained variance", xscale="log")
    for axis in axes:
        axis.set_xticks(TARGETS, TARGETS)
        axis.minorticks_off()
    axes[-1].legend(fontsize=7)
    with whole(path) as temporary:
        fig.savefig(temporary, format="svg", metadata={"Date": None})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "checkpoints" / "l0_control", help="where runs are kept")
    parser.add_argument(
        "--only", choices=[*WIDTHS, "by-hand", "report"], help="one part; the tables cover all there is"
    )
    parser.add_argument("--tokens", type=int, default=500_000, help="activations each SAE is trained on")
    parser.add_argument("--model", help="folder of another language model")
    parser.add_argument("--dataset", help="its text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
