"""Comparisons of SAEs at matched L0, and of architectures also at matched EV, pair by pair.

Two cells are compared as they are where their L0 differ by at most 2 %, and from the one asked for by at most 15 %.
Otherwise each side's scores, label by label and seed by seed, are interpolated on log L0 to the L0 asked for, or to the
nearest that all sides reach, if it has at least four L0 around it; else the pair is left out with its reason. At
matched EV one side is as it was measured, and the other is interpolated on EV between two of its L0. Labels are paired;
a pair needs the same words, which the same eval assets give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.report.cells import SCORES, Cell
from sae_train.report.text import percent

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

CLOSE_L0 = 0.02
ON_TARGET = 0.15  # by so much of the L0 asked for an SAE may miss it and still stand for it
LEAST_POINTS = 4  # L0 of a side that is interpolated
SEEDS_ASKED = 3  # a side; fewer leave the noise of training out of sight


@dataclass(frozen=True)
class Comparison:
    """b − a of each score, or why there is none; `how` says what was matched, and in which way."""

    name: str
    seeds: tuple[int, int]
    how: str
    differences: dict[str, Interval]

    @property
    def few_seeds(self) -> bool:
        return min(self.seeds) < SEEDS_ASKED


def comparisons(cells: list[Cell]) -> list[Comparison]:
    """Architectures at one width and L0, widths of one architecture and L0, L0 of one architecture and width."""
    made = [_at_one_l0(a, b, cells) for a, b in _pairs(cells, "arch") + _pairs(cells, "width")]
    made += [pair for a, b in _pairs(cells, "arch") if (pair := _at_one_ev(a, b, cells))]
    return made + [
        _compare(f"{a.arch}, {width_label(a.width)}: L0 {b.l0:g} − {a.l0:g}{a.at}", "two L0", a, b)
        for a, b in _pairs(cells, "l0")
    ]


def _pairs(cells: list[Cell], trait: str) -> list[tuple[Cell, Cell]]:
    """Cells that differ in one trait only: all pairs of architectures, neighbours in width and L0."""
    others = [name for name in ("setting", "arch", "width", "l0") if name != trait]
    rest = lambda cell: tuple(getattr(cell, name) for name in others)  # noqa: E731
    order = sorted(cells, key=lambda cell: (rest(cell), getattr(cell, trait)))
    pairs: list[tuple[Cell, Cell]] = []
    for _, group in groupby(order, key=rest):
        own = list(group)
        pairs += combinations(own, 2) if trait == "arch" else pairwise(own)
    return pairs


def _at_one_l0(a: Cell, b: Cell, cells: list[Cell]) -> Comparison:
    differs = f"{b.arch} − {a.arch}, {width_label(a.width)}" if a.arch != b.arch else ""
    differs = differs or f"{a.arch}: {width_label(b.width)} − {width_label(a.width)}"
    name = f"{differs}, L0 {a.l0:g}{a.at}"
    matched, how = match_l0((a, b), cells)
    return _compare(name, how, *matched) if matched else Comparison(name, (len(a.saes), len(b.saes)), how, {})


def match_l0(chosen: Sequence[Cell], cells: list[Cell]) -> tuple[tuple[Cell | Side, ...], str]:
    """Cells as they are, or each interpolated to their L0, and how; nothing, with the reason, where neither works."""
    if not all(cell.reached for cell in chosen):
        return (), "not compared: no L0"
    reached = [math.log(cell.reached or 0) for cell in chosen]
    apart, missed = max(reached) - min(reached), next((cell for cell in chosen if not on_target(cell)), None)
    if apart <= CLOSE_L0 and not missed:
        return tuple(chosen), "L0 as reached"
    along = [series(cell, cells) for cell in chosen]
    if target := _shared_l0(chosen[0].l0, reached, along):
        at = f" to {target:.3g}" if target != chosen[0].l0 else ""
        sides = [Side(cell, own, _log_l0, math.log(target)) for cell, own in zip(chosen, along, strict=True)]
        return tuple(sides), f"L0 interpolated{at}"
    if missed:
        return (), f"not compared: {missed.name} reached {missed.l0_span}"
    lacking = any(len(own) < LEAST_POINTS <= _n_l0(cell, cells) for cell, own in zip(chosen, along, strict=True))
    seeds = ", and not interpolated: training seeds are missing at some L0" if lacking else ""
    return (), f"not compared: L0 {percent(math.expm1(apart))} apart{seeds}"


def on_target(cell: Cell) -> bool:
    """Whether a cell came near enough to the L0 asked for to be named by it."""
    return bool(cell.reached) and abs((cell.reached or 0) / cell.l0 - 1) <= ON_TARGET


def _shared_l0(asked: float, reached: Sequence[float], along: Sequence[Sequence[Cell]]) -> float | None:
    """The L0 asked for, if all series have it between their ends, or the nearest that they have among those reached."""
    if any(len(own) < LEAST_POINTS for own in along):
        return None
    low = max(own[0].reached or 0 for own in along)
    high = min(own[-1].reached or 0 for own in along)
    if low <= asked <= high:
        return asked
    nearest = min(max(asked, low), high)
    return nearest if low <= high and min(reached) <= math.log(nearest) <= max(reached) else None


def _at_one_ev(a: Cell, b: Cell, cells: list[Cell]) -> Comparison | None:
    """The pair at the EV of a; None where b's architecture does not reach it from both sides."""
    along = [c for c in series(b, cells) if c.ev is not None]
    if a.ev is None or not along or not min(c.ev for c in along) <= a.ev <= max(c.ev for c in along):
        return None
    name = f"{b.arch} − {a.arch}, {width_label(a.width)}, EV {a.ev:.3f}{a.at}"
    return _compare(f"{name} ({a.arch} at L0 {a.l0:g})", "EV interpolated", a, Side(b, along, lambda c: c.ev, a.ev))


@dataclass(frozen=True)
class Side:
    """Scores of a cell's architecture and width at one place between the cells of a series; it serves as a cell."""

    cell: Cell
    along: Sequence[Cell]
    x: Callable[[Cell], float]
    at: float

    @property
    def letters(self) -> set[str]:
        return set.intersection(*(cell.letters for cell in self.along))

    def having(self, score: str) -> set[str]:
        return set.intersection(*(cell.having(score) for cell in self.along))

    @property
    def saes(self) -> tuple[Any, ...]:
        return self.cell.saes

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return self.cell.seeds

    def matrix(self, score: str, letters: list[str]) -> Any:
        """Seeds × labels, on a straight line between the neighbours."""
        order = sorted(self.along, key=self.x)
        low = [c for c in order if self.x(c) <= self.at][-1]
        high = next(c for c in order if self.x(c) >= self.at)
        span = self.x(high) - self.x(low)
        share = (self.at - self.x(low)) / span if span else 0.0
        return (1 - share) * low.matrix(score, letters) + share * high.matrix(score, letters)


def _compare(name: str, how: str, a: Cell | Side, b: Cell | Side) -> Comparison:
    """b − a over the labels that count in both."""
    from sae_train.evals.intervals import paired_difference

    seeds = len(a.saes), len(b.saes)
    labels = sorted(a.letters & b.letters)
    if not labels:
        return Comparison(name, seeds, "not compared: no label counts in both", {})
    pairs = {score: (b.matrix(score, labels), a.matrix(score, labels)) for score in SCORES}
    return Comparison(name, seeds, how, {score: paired_difference(*pair) for score, pair in pairs.items()})


def series(cell: Cell, cells: list[Cell]) -> list[Cell]:
    """The cell's own architecture and width at every L0, with as many seeds."""
    return sorted((c for c in _family(cell, cells) if c.seeds == cell.seeds), key=lambda c: c.reached or 0)


def _n_l0(cell: Cell, cells: list[Cell]) -> int:
    return len(_family(cell, cells))


def _family(cell: Cell, cells: list[Cell]) -> list[Cell]:
    return [
        c for c in cells
        if (c.setting, c.arch, c.width) == (cell.setting, cell.arch, cell.width) and c.reached
    ]  # fmt: skip


def _log_l0(cell: Cell) -> float:
    return math.log(cell.reached or 0)
