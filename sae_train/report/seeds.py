"""Cells of a grid that hold several training seeds: runs come in, a table of two-way intervals and one of comparisons
between neighbouring cells go out. Without such cells nothing goes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.shell import table
from sae_train.report.text import escape, fixed, interval, nouns, number, short

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

SCORES = ("fraction", "full")


@dataclass(frozen=True)
class Cell:
    """SAEs that differ in their training seed only; setting tells apart runs of other models, presets or lengths."""

    setting: tuple[str, ...]
    arch: str
    width: int
    l0: float
    saes: tuple[TrainedSAE, ...]

    @property
    def name(self) -> str:
        return f"{self.arch}, {width_label(self.width)}, L0 {self.l0:g}"

    @property
    def letters(self) -> set[str]:
        """Labels that count in all seeds."""
        return set.intersection(*(set(_values(sae, SCORES[0])) for sae in self.saes))

    def matrix(self, score: str, letters: list[str]) -> Any:
        """Seeds × labels."""
        import torch

        rows = [_values(sae, score) for sae in self.saes]
        return torch.tensor([[row[letter] for letter in letters] for row in rows], dtype=torch.float64)


def cells(runs: list[Run]) -> list[Cell]:
    """Cells with at least two seeds, by architecture, width and L0."""
    found: dict[tuple, dict[int, TrainedSAE]] = {}
    for run in runs:
        settings = ("model", "hook", "preset", "hierarchy", "tokens")
        setting = tuple(str(run.setting(name)) for name in settings)
        for sae in run.saes:
            usable = not sae.failed and not sae.invalid and _values(sae, SCORES[0])
            if usable and sae.width and sae.l0 and sae.seed is not None:
                found.setdefault((setting, sae.arch, sae.width, sae.l0), {}).setdefault(sae.seed, sae)
    several = [Cell(*key, tuple(seeds.values())) for key, seeds in sorted(found.items()) if len(seeds) > 1]
    return [cell for cell in several if cell.letters]


def neighbours(found: list[Cell]) -> list[tuple[Cell, Cell, str]]:
    """Pairs to compare, and in which way: the next width at one L0, the next L0 at one width."""
    pairs = []
    for trait, other in (("width", "l0"), ("l0", "width")):
        order = lambda cell, t=trait, o=other: (cell.setting, cell.arch, getattr(cell, o), getattr(cell, t))  # noqa: E731
        for _, group in groupby(sorted(found, key=order), key=lambda cell: order(cell)[:3]):
            pairs += [(a, b, trait) for a, b in pairwise(group)]
    return pairs


def seed_tables(runs: list[Run]) -> str:
    """Both tables as HTML; empty without a cell of several seeds."""
    found = cells(runs)
    if not found:
        return ""
    noun = nouns(found[0].saes[0].noun)
    head = ["cell", "seeds", escape(noun), "L0 reached"]
    head += [title for score in SCORES for title in (score, "smallest visible difference")]
    text = table(head, [_cell_row(cell) for cell in found], "sortable")
    rows = [row for pair in neighbours(found) if (row := _pair_row(*pair))]
    if rows:
        names = ["comparison", *(title for score in SCORES for title in (f"difference, {score}", "verdict"))]
        text += "<h3>Neighbouring cells</h3>" + table(names, rows, "pairs")
    return text


def _values(sae: TrainedSAE, score: str) -> dict[str, float]:
    """The last evaluation's labels that count."""
    rows = {str(row["letter"]): number(row.get(score)) for row in sae.last_letters if row.get("counts")}
    return {letter: value for letter, value in rows.items() if value is not None}


def _cell_row(cell: Cell) -> list[str]:
    from sae_train.evals.intervals import letters_by_seeds

    letters = sorted(cell.letters)
    reached = [value for sae in cell.saes if (value := sae.get("metrics/l0")) is not None]
    l0 = " to ".join(dict.fromkeys(short(value) for value in (min(reached), max(reached)))) if reached else "–"
    row = [escape(cell.name), str(len(cell.saes)), str(len(letters)), l0]
    for score in SCORES:
        found = letters_by_seeds(cell.matrix(score, letters))
        row += [_spanned(found), fixed(found.visible)]
    return row


def _pair_row(a: Cell, b: Cell, trait: str) -> list[str]:
    from sae_train.evals.intervals import paired_difference

    letters = sorted(a.letters & b.letters)
    if not letters:
        return []
    if trait == "width":
        name = f"{b.arch}, L0 {b.l0:g}: width {width_label(b.width)} − {width_label(a.width)}"
    else:
        name = f"{b.arch}, {width_label(b.width)}: L0 {b.l0:g} − {a.l0:g}"
    row = [escape(name)]
    for score in SCORES:
        found = paired_difference(b.matrix(score, letters), a.matrix(score, letters))
        judged = "distinguishable" if found.excludes_zero else "not distinguishable"
        row += [_spanned(found), f"{judged} <small>(visible from {fixed(found.visible)})</small>"]
    return row


def _spanned(found: Interval) -> str:
    return f"{fixed(found.mean)} <small>{interval(found.low, found.high)}</small>"
