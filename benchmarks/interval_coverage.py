"""Are a study's intervals as wide as they say? What its scores vary by, and how often a verdict is false.

    python benchmarks/interval_coverage.py benchmarks/results/study_two_widths [STUDY...] [--runs 400]

First, for each study and architecture, over the differences between neighbouring widths and neighbouring L0: what a
cell's mean owes to the training seed as a whole (a seed that is high on all letters), as a share of what it varies from
seed to seed, the rest being noise of single letters in single seeds; and the standard error that the bootstrap gives,
over the one by variance components (a two-way random model: the letters' differences of the seeds' means, which hold
the noise, plus each side's variance of seeds, by the method of moments, none below 0).

Then differences of two cells of three seeds and 26 letters that do not differ, drawn from such models: how often the
interval leaves out 0 (5 % if it is what it says), and the bootstrap's standard error over the true one. One of the
models has the variances of the first study, the mean over its cells.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from sae_train.errors import UserError
from sae_train.evals.intervals import Z_VISIBLE, paired_difference
from sae_train.runs.display import aside

if TYPE_CHECKING:
    from sae_train.evals.contexts import Progress

SEEDS, LETTERS = 3, 26
N_MODELS = 4  # of what may vary


def main() -> int:
    args = _arguments()
    try:
        cells = {study: cells_of(study) for study in args.studies}
    except (OSError, UserError) as error:
        print(f"interval_coverage: {error}", file=sys.stderr)
        return 2
    with aside() as display:
        show(cells, args.runs, display)
    return 0


def show(cells: dict[Path, dict[tuple[str, int, float], np.ndarray]], runs: int, tell: Progress) -> None:
    """Print both tables, row by row."""
    rows = [(study, arch) for study, own in cells.items() for arch in dict.fromkeys(key[0] for key in own)]
    n_all, doing, first = len(rows) + N_MODELS, "measuring intervals, row by row", next(iter(cells))
    print("| | differences | share of seeds as a whole | bootstrap's standard error over the components' |")
    print("|---|---|---|---|")
    for n_done, (study, arch) in enumerate(rows):
        tell(doing, n_done, n_all)
        own = {key: cell for key, cell in cells[study].items() if key[0] == arch}
        print(row_of(f"{study.name}, {arch}", own), flush=True)
    measured = np.mean([components(cell) for cell in cells[first].values()], axis=0)
    models = {
        "letters alone": (0.0, 0.1, 0.0),
        "noise of single letters in single seeds alone": (0.0, 0.0, 0.1),
        "seeds as a whole alone": (0.1, 0.0, 0.0),
        f"as in {first.name}": tuple(np.sqrt(measured)),
    }
    print("\n| varies | verdicts where nothing is | bootstrap's standard error over the true one |\n|---|---|---|")
    for n_done, (name, model) in enumerate(models.items(), start=len(rows)):
        tell(doing, n_done, n_all)
        false, ratio = simulated(model, runs)
        print(f"| {name} | {100 * false:.1f} % | {ratio:.2f} |", flush=True)


def cells_of(study: Path) -> dict[tuple[str, int, float], np.ndarray]:
    """Full absorption, seeds × letters, of each cell with three seeds or more, of letters that have it in all cells."""
    letters = pd.read_csv(study / "letters.csv").sort_values(["arch", "width", "l0", "seed"])
    tables = {
        key: own.pivot(index="seed", columns="letter", values="full")
        for key, own in letters.groupby(["arch", "width", "l0"])
    }
    tables = {key: table for key, table in tables.items() if len(table) >= SEEDS}
    if not tables:
        raise UserError(f"{study} has no cell with {SEEDS} training seeds, of which alone something can be said")
    shared = sorted(set.intersection(*(set(table.dropna(axis=1).columns) for table in tables.values())))
    return {key: table[shared].to_numpy(copy=True) for key, table in tables.items()}


def components(cell: np.ndarray) -> tuple[float, float, float]:
    """Variance of seeds as a whole, of letters, and of the rest (method of moments)."""
    n_seeds, n_letters = cell.shape
    by_seed, by_letter = cell.mean(1, keepdims=True), cell.mean(0, keepdims=True)
    rest = ((cell - by_seed - by_letter + cell.mean()) ** 2).sum() / ((n_seeds - 1) * (n_letters - 1))
    seeds = max(0.0, float(by_seed.var(ddof=1)) - rest / n_letters)
    letters = max(0.0, float(by_letter.var(ddof=1)) - rest / n_seeds)
    return seeds, letters, float(rest)


def row_of(name: str, cells: dict[tuple[str, int, float], np.ndarray]) -> str:
    """One architecture's row of the first table."""
    pairs = []
    for trait in (1, 2):
        rows: dict[float, list] = {}
        for key in sorted(cells, key=lambda key: key[trait]):
            rows.setdefault(key[3 - trait], []).append(cells[key])
        pairs += [pair for row in rows.values() for pair in pairwise(row)]
    if not pairs:
        return f"| {name} | 0 | – | – |"
    ratios = [bootstrap_error(*pair) / error_by_components(*pair) for pair in pairs]
    seeds, _, rest = np.mean([components(cell) for cell in cells.values()], axis=0)
    share = seeds / (seeds + rest / next(iter(cells.values())).shape[1])
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    return f"| {name} | {len(pairs)} | {100 * share:.0f} % | {middle:.2f} ({low:.2f} to {high:.2f}) |"


def bootstrap_error(a: np.ndarray, b: np.ndarray) -> float:
    return paired_difference(torch.from_numpy(b), torch.from_numpy(a)).visible / Z_VISIBLE


def error_by_components(a: np.ndarray, b: np.ndarray) -> float:
    seeds = sum(components(cell)[0] / len(cell) for cell in (a, b))
    return float(np.sqrt((b.mean(0) - a.mean(0)).var(ddof=1) / a.shape[1] + seeds))


def simulated(model: tuple[float, float, float], runs: int) -> tuple[float, float]:
    """How often 0 is left out, and the bootstrap's standard error over the true one.

    Letters differ between the two sides by twice their variance: each side has its own.
    """
    rng = np.random.default_rng(0)
    seeds, letters, rest = model
    found = []
    for _ in range(runs):
        a, b = (
            rng.normal(0, seeds, (SEEDS, 1))
            + rng.normal(0, letters, (1, LETTERS))
            + rng.normal(0, rest, (SEEDS, LETTERS))
            for _ in range(2)
        )
        found.append(paired_difference(torch.from_numpy(a), torch.from_numpy(b)))
    true = np.sqrt(2 * (seeds**2 / SEEDS + letters**2 / LETTERS + rest**2 / (SEEDS * LETTERS)))
    errors = np.sqrt(np.mean([(one.visible / Z_VISIBLE) ** 2 for one in found]))
    return float(np.mean([one.excludes_zero for one in found])), float(errors / true)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY", help="folders of studies, for letters.csv")
    parser.add_argument("--runs", type=int, default=400, help="of each model, of two cells that do not differ")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
