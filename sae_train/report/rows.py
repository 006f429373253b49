"""What of a design can be compared along width or L0: rows of cells, and the rows that a main claim averages over.

A design may be uneven: 16k latents at two L0 where 1k has four, one seed where others have three, a missed L0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from sae_train.report.cells import Cell
from sae_train.report.matched import SEEDS_ASKED, Side, match_l0, on_target

Place = Cell | Side
Places = tuple[Place, ...]


@dataclass(frozen=True)
class Row:
    """Values of a trait at one value of the other trait, `at`, with a place for each, or none and why (`how`)."""

    at: float
    values: tuple[float, ...]
    places: Places
    how: str

    @property
    def ends(self) -> tuple[float, float]:
        return self.values[0], self.values[-1]

    def only(self, values: Sequence[float]) -> Places:
        return tuple(place for value, place in zip(self.values, self.places, strict=True) if value in values)


@dataclass(frozen=True)
class Pool:
    """Rows with the same training seeds at values of a trait that all of them have."""

    values: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def places(self) -> list[Places]:
        return [row.only(self.values) for row in self.rows]


def rows_along(trait: str, own: list[Cell]) -> list[Row]:
    """Rows of one architecture's cells along width or L0, by the other one.

    Where some cells have enough training seeds and others do not, those that do are a row of their own, before the one
    of all. Of widths that do not match all together each largest set that does is a row, beside the reason.
    """
    other = "l0" if trait == "width" else "width"
    along = _matched if trait == "width" else _on_target
    found: list[Row] = []
    for at in sorted({getattr(cell, other) for cell in own}):
        every = sorted((c for c in own if getattr(c, other) == at), key=lambda cell: getattr(cell, trait))
        enough = [cell for cell in every if len(cell.seeds) >= SEEDS_ASKED]
        rows = list(along(at, enough, own)) if len(enough) > 1 else []
        known = {row.ends for row in rows}
        more = along(at, every, own) if len(every) > max(len(enough), 1) else ()
        found += rows + [row for row in more if row.ends not in known]
    return found


def _matched(at: float, row: list[Cell], own: list[Cell]) -> Iterator[Row]:
    """The largest sets of widths at one matched L0, and the whole row with its reason where it is none of them."""
    kept: list[set[int]] = []
    for size in range(len(row), 1, -1):
        for chosen in combinations(row, size):
            widths = tuple(cell.width for cell in chosen)
            if any(set(widths) <= larger for larger in kept):
                continue
            places, how = match_l0(chosen, own)
            if places:
                kept.append(set(widths))
            if places or size == len(row):
                yield Row(at, widths, places, how)


def _on_target(at: float, row: list[Cell], _: list[Cell]) -> Iterator[Row]:
    """The cells that came near the L0 asked for, and those that did not with the reason."""
    near = [cell for cell in row if not cell.reached or on_target(cell)]
    if len(near) > 1:
        yield Row(at, tuple(cell.l0 for cell in near), tuple(near), "several L0")
    if len(near) < len(row):
        missed = "; ".join(f"{cell.name} reached {cell.l0_span}" for cell in row if cell not in near)
        yield Row(at, tuple(cell.l0 for cell in row), (), f"not compared: {missed}")


def pools_of(rows: Sequence[Row]) -> list[Pool]:
    """Over what the main claims average: for each span of values the rows that have all of it, the longest span first.

    A row alone is there only if it shares no span with another one.
    """
    rows = [row for row in rows if row.places]
    spans = {row.values for row in rows}
    while more := {_shared(a, b) for a, b in combinations(spans, 2)} - spans:
        spans |= more
    by_ends: dict[tuple[float, float], Pool] = {}
    for span in sorted((span for span in spans if len(span) > 1), key=lambda span: (-len(span), span)):
        pool, ends = _pool(span, rows), (span[0], span[-1])
        if ends not in by_ends or len(pool.rows) > len(by_ends[ends].rows):
            by_ends[ends] = pool
    averaged = {id(row) for pool in by_ends.values() if len(pool.rows) > 1 for row in pool.rows}
    return [pool for pool in by_ends.values() if len(pool.rows) > 1 or id(pool.rows[0]) not in averaged]


def _shared(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    return tuple(value for value in a if value in b)


def _pool(span: tuple[float, ...], rows: Sequence[Row]) -> Pool:
    having = {row.at: row for row in reversed(rows) if set(span) <= set(row.values)}
    places = {id(row.only(span)[0]): row for row in having.values()}
    kept = alike([row.only(span) for row in having.values()])
    return Pool(span, tuple(sorted((places[id(each[0])] for each in kept), key=lambda row: row.at)))


def alike(rows: list[Places]) -> list[Places]:
    """Rows that have the same training seeds, place by place: of such groups one with enough, then the largest."""
    groups: dict[tuple, list[Places]] = {}
    for row in rows:
        groups.setdefault(tuple(place.seeds for place in row), []).append(row)
    return max(groups.items(), key=lambda item: _worth(*item), default=((), []))[1]


def _worth(seeds: tuple, rows: list[Places]) -> tuple[bool, int, int]:
    return min(map(len, seeds)) >= SEEDS_ASKED, len(rows), sum(map(len, seeds))
