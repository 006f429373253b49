"""A study's scores on the letters that an SAE tells: does absorption fall with L0 where there is a letter latent?

    python benchmarks/told_letters.py checkpoints/study_two_widths [--floor 0.5]

A letter is told at an L0 if its best latent has a mean F1 of at least the floor over the training seeds. For each
architecture and width: the letters told at each L0, and full and fraction on them; then each L0 against the lowest, on
all letters and on those told at both, with a 95 % interval over letters and seeds and the smallest difference that
would be seen.
Over all letters the score also counts those for which there is no letter latent to absorb anything.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

from sae_train.evals.intervals import paired_difference
from sae_train.report.matched import SEEDS_ASKED

SCORES = ("full", "fraction")


def main() -> int:
    args = _arguments()
    try:
        table = pd.read_csv(args.study / "letters.csv").sort_values(["arch", "width", "l0"])
    except OSError as error:
        print(f"told_letters: {error}", file=sys.stderr)
        return 2
    scores = "full, all | full, told | fraction, all | fraction, told"
    print(f"| | L0 | letters told | {scores} | full, minus lowest L0, all (letters) | told at both |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (arch, width), rows in table.groupby(["arch", "width"], sort=False):
        cells = {l0: cell for l0, cell in rows.groupby("l0")}
        lowest = min(cells)
        for l0, cell in cells.items():
            told = told_letters(cell, args.floor)
            means = (
                [cell[name].mean() for name in SCORES],
                [cell[cell["letter"].isin(told)][name].mean() for name in SCORES],
            )
            every = sorted(whole_letters(cells[lowest]) & whole_letters(cell))
            both = sorted(told & told_letters(cells[lowest], args.floor) & set(every))
            against = " | ".join(
                difference(cells[lowest], cell, letters) if l0 > lowest and len(letters) > 1 else "–"
                for letters in (every, both)
            )
            figures = " | ".join(f"{a:.3f} | {b:.3f}" for a, b in zip(*means, strict=True))
            print(f"| {arch}, {width} | {l0:g} | {len(told)} | {figures} | {against} |", flush=True)
    return 0


def told_letters(cell: pd.DataFrame, floor: float) -> set[str]:
    f1 = cell.groupby("letter")["f1_k1"].mean()
    return set(f1.index[f1 >= floor])


def whole_letters(cell: pd.DataFrame) -> set[str]:
    """Letters that have a score in all training seeds."""
    by_letter = cell.dropna(subset=SCORES).groupby("letter")["seed"].nunique()
    return set(by_letter.index[by_letter == cell["seed"].nunique()])


def difference(low: pd.DataFrame, high: pd.DataFrame, letters: list[str]) -> str:
    """Full at the high L0 minus full at the low one, with its interval."""
    tables = [
        cell.pivot(index="seed", columns="letter", values="full")[letters].to_numpy(copy=True) for cell in (high, low)
    ]
    found = paired_difference(*map(torch.from_numpy, tables))
    fewest = min(map(len, tables))
    few = f", {fewest} seed{'s' * (fewest > 1)}: too few" if fewest < SEEDS_ASKED else ""
    said = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], visible {found.visible:.3f}{few}"
    return f"{said} ({len(letters)})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of a study, for its letters.csv")
    parser.add_argument("--floor", type=float, default=0.5, help="of the mean F1 of a letter's best latent")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
