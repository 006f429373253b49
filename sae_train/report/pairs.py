"""Pairs of cells at one width, or of one architecture, that differ in nothing but what is compared.

Architectures are compared at the same L0, at the same L0 on the words of the eval, and at the same EV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from sae_train.report.cells import Cell
from sae_train.report.matched import Side, match_l0
from sae_train.report.rows import Places, alike

L0, WORDS_L0, EV = MATCHED = ("L0", "L0 on the words", "EV")  # at which architectures are compared
NOT_COMPARED = "not compared: "


class Pairs:
    """Two sides at several L0 (or other values of what is matched): those with the same seeds are averaged."""

    def __init__(self, tried: dict[float, tuple[Places, str]], noun: str, without: Sequence[str] = ()):
        """`tried` has the places, or none, with how they were matched or why not; `without` says what was not tried."""
        self.noun, self.without = noun, without
        found = {at: places for at, (places, _) in tried.items() if places}
        kept = alike(list(found.values()))
        self.kept = {at: places for at, places in found.items() if any(places is one for one in kept)}
        self.hows = list(dict.fromkeys(tried[at][1] for at in self.kept))
        self.reasons = {at: how for at, (places, how) in tried.items() if not places}
        others = {at: f"{NOT_COMPARED}other or fewer training seeds" for at in found if at not in self.kept}
        self._left = dict(sorted((self.reasons | others).items()))

    @property
    def how(self) -> str:
        """How those that are averaged were matched, or why there are none; empty where nothing was tried."""
        return ", ".join(self.hows) if self.kept else why(self.reasons.values())

    @property
    def left(self) -> str:
        """Which ones are not among those that are averaged, and why; empty where there are none."""
        said = [
            f"{self.noun} {_listed(at for at in self._left if self._left[at] == reason)} {reason}"
            for reason in dict.fromkeys(self._left.values())
        ]
        return "; ".join([*said, *self.without]) if self.kept else ""

    @property
    def named(self) -> str:
        """What is averaged over: every L0 by its value, of other things the number."""
        over = f"L0 {_listed(self.kept)}" if self.noun == L0 else f"{len(self.kept)} {self.noun}"
        return over if self.noun == L0 and len(self.kept) == 1 else f"mean over {over}"


def pairs_at_l0(a: str, b: str, width: int, cells: list[Cell]) -> Pairs:
    """Two architectures of one width at every L0 that both have."""
    at = {(cell.arch, cell.l0): cell for cell in cells if cell.width == width}
    shared = sorted({l0 for arch, l0 in at if arch == a} & {l0 for arch, l0 in at if arch == b})
    return Pairs({l0: match_l0((at[a, l0], at[b, l0]), cells) for l0 in shared}, L0)


def pairs_of_widths(narrow: int, wide: int, own: list[Cell]) -> Pairs:
    """Two widths of one architecture's cells at every L0 that both have."""
    at = {(cell.width, cell.l0): cell for cell in own}
    shared = [l0 for l0 in sorted({cell.l0 for cell in own}) if (narrow, l0) in at and (wide, l0) in at]
    return Pairs({l0: match_l0((at[narrow, l0], at[wide, l0]), own) for l0 in shared}, L0)


def pairs_at_words_l0(a: str, b: str, width: int, cells: list[Cell]) -> Pairs:
    """Two architectures of one width at every L0 on the words that one has and both reach."""
    return _pairs_along(a, b, width, cells, lambda cell: math.log(cell.words_l0) if cell.words_l0 else None, WORDS_L0)


def pairs_at_ev(a: str, b: str, width: int, cells: list[Cell]) -> Pairs:
    """Two architectures of one width at every EV that one has and both reach."""
    return _pairs_along(a, b, width, cells, lambda cell: cell.ev, EV)


def _pairs_along(a: str, b: str, width: int, cells: list[Cell], of: Callable[[Cell], float | None], noun: str) -> Pairs:
    """Both sides at every EV (or what `of` reads) that one has and both reach, interpolated between the L0 of each."""
    sides, without = {}, []
    for arch in (a, b):
        own = [cell for cell in cells if (cell.arch, cell.width) == (arch, width) and of(cell) is not None]
        sides[arch] = [cell for (cell,) in alike([(cell,) for cell in own])]
        other = [cell.l0 for cell in own if cell not in sides[arch]]
        without += [f"without {arch} at L0 {_listed(other)}: other or fewer training seeds"] if other else []
    if not all(sides.values()):
        return Pairs({}, noun)
    low = max(min(of(cell) for cell in side) for side in sides.values())
    high = min(max(of(cell) for cell in side) for side in sides.values())
    points = sorted({of(cell) for side in sides.values() for cell in side if low <= of(cell) <= high})
    side_at = lambda arch, point: Side(sides[arch][0], sides[arch], of, point)  # noqa: E731
    return Pairs({point: ((side_at(a, point), side_at(b, point)), "") for point in points}, noun, without)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def why(reasons: Iterable[str]) -> str:
    """Several reasons why there is no difference, in one."""
    each = dict.fromkeys(reason.removeprefix(NOT_COMPARED) for reason in reasons)
    return f"{NOT_COMPARED}{'; '.join(each)}" if each else ""
