"""The paper's result in miniature: absorption against width and against L0 on the embedded model, over seeds.

It leaves two runs (reused when finished), a table as CSV, and a figure as SVG.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.files import read_json, whole
from sae_train.runs.run import Run, train

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2)
WIDTHS = (256, 1024, 4096)
TARGETS = (4, 8, 16, 32)
FIXED_WIDTH, FIXED_L0 = 1024, 8
SCORES = ("mean_full", "mean_fraction")


@dataclass(frozen=True)
class Slope:
    """Change of a score from one end of a sweep to the other, by seed."""

    name: str
    by_seed: tuple[float, ...]
    sign: int

    @property
    def holds(self) -> bool:
        return all(self.sign * change > 0 for change in self.by_seed)


def measure(out: Path, tokens: int = 1_000_000) -> pd.DataFrame:
    """Train both sweeps (or read them where they are finished) and return one row per SAE."""
    import pandas as pd

    common = {"arch": "topk", "seed": list(SEEDS), "tokens": tokens, "absorption_evals": 2, "out": str(out)}
    by_width = _run(out / "miniature-width", width=list(WIDTHS), l0=FIXED_L0, **common)
    by_l0 = _run(out / "miniature-l0", width=FIXED_WIDTH, l0=[l0 for l0 in TARGETS if l0 != FIXED_L0], **common)
    rows = [_row(sae) for run in (by_width, by_l0) for sae in run.info["saes"]]
    return pd.DataFrame(rows).sort_values(["width", "l0", "seed"], ignore_index=True)


def _run(folder: Path, **settings: Any) -> Run:
    if (folder / "run.json").exists() and read_json(folder / "run.json").get("status") == "finished":
        return Run(folder)
    return train(name=folder.name, **settings)


def _row(sae: dict[str, Any]) -> dict[str, Any]:
    final = sae["final"]
    figures = {
        "l0_reached": "metrics/l0",
        "ev": "metrics/explained_variance",
        "dead": "sparsity/dead_fraction",
        "n_letters": "absorption/n_letters",
        "mean_f1": "absorption/mean_f1",
        **{score: f"absorption/{score}" for score in SCORES},
    }
    return {key: sae[key] for key in ("arch", "width", "l0", "seed")} | {
        name: final.get(figure) for name, figure in figures.items()
    }


def slopes(table: pd.DataFrame, score: str = "mean_full") -> list[Slope]:
    """What must hold: the score rises with width at fixed L0, and falls with L0 at fixed width, for every seed."""
    cell = table.set_index(["width", "l0", "seed"])[score]

    def change(a: tuple[int, float], b: tuple[int, float]) -> tuple[float, ...]:
        return tuple(float(cell[(*b, seed)] - cell[(*a, seed)]) for seed in SEEDS)

    width = f"{score}, width {width_label(WIDTHS[0])} to {width_label(WIDTHS[-1])} at L0 {FIXED_L0}"
    l0 = f"{score}, L0 {TARGETS[0]} to {TARGETS[-1]} at width {width_label(FIXED_WIDTH)}"
    return [
        Slope(width, change((WIDTHS[0], FIXED_L0), (WIDTHS[-1], FIXED_L0)), +1),
        Slope(l0, change((FIXED_WIDTH, TARGETS[0]), (FIXED_WIDTH, TARGETS[-1])), -1),
    ]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Two panels, a dot for each seed and a line through the means: against width, and against L0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    panels = [
        (axes[0], table[table["l0"] == FIXED_L0], "width", f"width at L0 {FIXED_L0}"),
        (axes[1], table[table["width"] == FIXED_WIDTH], "l0", f"L0 at width {width_label(FIXED_WIDTH)}"),
    ]
    for axis, part, key, label in panels:
        for score, colour in zip(SCORES, ("tab:blue", "tab:orange"), strict=True):
            mean = part.groupby(key)[score].mean()
            axis.plot(mean.index, mean, color=colour, label=score.removeprefix("mean_"))
            axis.plot(part[key], part[score], "o", color=colour, markersize=4, alpha=0.6)
        axis.set_xscale("log", base=2)
        values = sorted(part[key].unique())
        axis.set_xticks(values, [width_label(v) if key == "width" else f"{v:g}" for v in values])
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("absorption, mean over letters")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    with whole(path) as temporary:
        fig.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(fig)
