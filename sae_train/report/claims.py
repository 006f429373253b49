"""What a study says: how scores move with width, L0 and architecture, each as a difference with its interval.

Every difference is between cells at a matched L0 (or EV), paired over letters, with a two-way bootstrap over letters
and training seeds (`evals.intervals.paired_difference`). Where an architecture was trained at several L0 (or widths),
the main claim is the mean over them: scores are averaged letter by letter and seed by seed before they are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.report.cells import Cell
from sae_train.report.matched import SEEDS_ASKED
from sae_train.report.pairs import (
    EV,
    L0,
    NOT_COMPARED,
    WORDS_L0,
    pairs_at_ev,
    pairs_at_l0,
    pairs_at_words_l0,
    pairs_of_widths,
    why,
)
from sae_train.report.rows import Places, Pool, Row, alike, pools_of, rows_along
from sae_train.report.text import fixed

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

METRICS = {
    "full": "full absorption",
    "full_beyond": "full absorption beyond chance",
    "fraction": "the absorption fraction",
    "full_family": "family-corrected full absorption",
    "precision_main": "precision of the main latents",
    "recall_main": "recall of the main latents",
    "n_split": "the number of main latents per letter",
}
ABSORPTION = ("full", "full_beyond", "fraction", "full_family")
# What the paper and others found: +1 rises with the trait, −1 falls, 0 nothing is expected.
EXPECTED = {
    "width": dict.fromkeys(ABSORPTION, 1) | {"precision_main": 1, "recall_main": -1, "n_split": 1},
    "l0": dict.fromkeys(ABSORPTION, -1) | {"precision_main": -1, "recall_main": 1, "n_split": 0},
}
COMPARED = ("full", "full_beyond", "fraction")  # of architectures
HOLDS, FAILS, UNSEEN, FEW = "holds", "fails, the other way round", "not distinguishable", "too few seeds"
FOUND = "distinguishable"


@dataclass(frozen=True)
class Claim:
    """A difference (last − first end) of one metric, or why there is none (`how`)."""

    question: str
    """width, l0, arch at L0 (or another of MATCHED), or splitting"""
    metric: str
    where: str
    """what is held fixed"""
    ends: tuple[str, str]
    expected: int
    how: str
    pooled: bool = False
    """the mean over all that was matched, which is the study's main claim"""
    seeds: tuple[int, int] = (0, 0)
    labels: int = 0
    means: tuple[float, ...] = ()
    """of all that lies between the ends, in order"""
    difference: Interval | None = None
    left: str = ""
    """what is not in it though it was trained, and why"""

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return self.how
        if min(self.seeds) < SEEDS_ASKED:
            return FEW
        if not self.difference.excludes_zero:
            return UNSEEN
        if not self.expected:
            return FOUND
        return HOLDS if self.expected * self.difference.mean > 0 else FAILS

    @property
    def told_apart(self) -> bool:
        """Whether the ends are, one way or the other."""
        return self.verdict in (HOLDS, FAILS, FOUND)

    @property
    def turned(self) -> Claim:
        """The same, first − last."""
        d = self.difference
        other_way = d and replace(d, mean=-d.mean, low=-d.high, high=-d.low)
        return replace(self, ends=self.ends[::-1], seeds=self.seeds[::-1], means=self.means[::-1], difference=other_way)

    @property
    def figures(self) -> str:
        """The difference as it is printed everywhere."""
        if self.difference is None:
            return self.how
        d, (a, b) = self.difference, self.seeds
        return (
            f"{signed(d.mean)} [{signed(d.low)}, {signed(d.high)}], smallest visible {fixed(d.visible)}, "
            f"{a if a == b else f'{a} and {b}'} seed{'s' if max(self.seeds) > 1 else ''}"
        )

    @property
    def sentence(self) -> str:
        """The claim made from its numbers, whether it holds or not."""
        name, (first, last) = METRICS[self.metric], self.ends
        where = "; ".join(filter(None, (self.where, self.left)))
        among = f"({where})" if "arch" in self.question else f"({first} to {last}{self._turns()}; {where})"
        said = self._say_of_architectures(name) if "arch" in self.question else self._say_of_trend(name)
        return f"{said} {among}: {self.figures}."

    def _say_of_trend(self, name: str) -> str:
        trait = "L0" if self.question == "l0" else "width"
        if not self.told_apart:
            return f"{name} with {trait}{self._open()}"
        moves = "rises" if self.difference and self.difference.mean > 0 else "falls"
        against = ", against what is expected" if self.verdict == FAILS else ""
        return f"{name} {moves} with {trait}{against}"

    def _turns(self) -> str:
        """The means in order, where a trend that is claimed does not go the same way at every step."""
        steps = [b - a for a, b in pairwise(self.means)]
        one_way = all(step >= 0 for step in steps) or all(step <= 0 for step in steps)
        return (
            "" if one_way or not self.told_apart else f", but not at every step: {' → '.join(map(fixed, self.means))}"
        )

    def _say_of_architectures(self, name: str) -> str:
        first, last = self.ends
        if self.verdict != FOUND:
            return f"{name} of {last} and {first}{self._open()}"
        return (
            f"{name} is {'more' if self.difference and self.difference.mean > 0 else 'less'} in {last} than in {first}"
        )

    def _open(self) -> str:
        return "" if self.difference is None else f": {self.verdict}"


def signed(value: float) -> str:
    """Write +0.050 or −0.012; the sign is that of the value, however it is rounded."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{fixed(abs(value))}"


def claims(cells: list[Cell]) -> list[Claim]:
    """Every claim of a study on what was measured, main ones before their parts."""
    made = [claim for trait in ("width", "l0") for claim in _trends(cells, trait)]
    measured = {metric for metric in METRICS if any(cell.having(metric) for cell in cells)}
    return [c for c in (*made, *_splitting(cells), *_architectures(cells)) if c.metric in measured]


def _trends(cells: list[Cell], trait: str) -> Iterator[Claim]:
    """From the least to the most of a trait: the mean over values of the other trait, then at each of them."""
    other = "l0" if trait == "width" else "width"
    for arch in dict.fromkeys(cell.arch for cell in cells):
        rows = rows_along(trait, [cell for cell in cells if cell.arch == arch])
        pools = pools_of(rows)
        for metric, expected in EXPECTED[trait].items():
            about = {"question": trait, "metric": metric, "expected": expected}
            for pool in pools:
                if len(pool.rows) > 1:
                    where = f"{arch}, mean over {_noun(other)} {', '.join(_label(other, row.at) for row in pool.rows)}"
                    how, ends = _hows(row.how for row in pool.rows), _ends(pool.values, trait)
                    yield _compare(pool.places, how, where=where, ends=ends, pooled=True, **about)
            for row, values in _parts(rows, pools):
                main = not pools or any(len(pool.rows) == 1 and pool.rows[0] is row for pool in pools)
                where, ends = f"{arch} at {_noun(other)} {_label(other, row.at)}", _ends(values, trait)
                places = [row.only(values)] if row.places else []
                yield _compare(places, row.how, where=where, ends=ends, pooled=main, **about)


def _parts(rows: Sequence[Row], pools: Sequence[Pool]) -> list[tuple[Row, tuple[float, ...]]]:
    """Each row with all its values, and with the span of each mean that it is a part of."""
    found, known = [(row, row.values) for row in rows], {(row.at, row.ends) for row in rows if row.places}
    for pool in pools:
        for row in pool.rows if len(pool.rows) > 1 else ():
            key = row.at, (pool.values[0], pool.values[-1])
            found += [(row, pool.values)] if key not in known else []
            known.add(key)
    return sorted(found, key=lambda part: part[0].at)


def _ends(values: Sequence[float], trait: str) -> tuple[str, str]:
    return _label(trait, values[0]), _label(trait, values[-1])


def _hows(ways: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(ways))


def _splitting(cells: list[Cell]) -> Iterator[Claim]:
    """For each architecture the first width with distinguishably more main latents per letter than the narrowest.

    Where no width has, the widest that could be compared.
    """
    for arch in dict.fromkeys(cell.arch for cell in cells):
        own = [cell for cell in cells if cell.arch == arch]
        enough = [cell for cell in own if len(cell.seeds) >= SEEDS_ASKED] or own
        narrowest, found = min(cell.width for cell in enough), []
        for width in sorted({cell.width for cell in own if cell.width > narrowest}):
            found.append(_more_latents(arch, narrowest, width, own))
            if found[-1].verdict == HOLDS:
                break
        if found:
            known = [c for c in found if c.verdict not in (c.how, FEW)] or [c for c in found if c.difference] or found
            claim = known[-1]
            fewer = [_label("width", width) for width in sorted({c.width for c in own if c.width < narrowest})]
            said = [f"width {width} not judged: {FEW}" for width in fewer]
            said += [
                f"width {c.ends[1]} {c.verdict if c.verdict == c.how else f'not judged: {FEW}'}"
                for c in found
                if c is not claim and c.verdict in (c.how, FEW)
            ]
            yield replace(claim, left="; ".join(filter(None, (claim.left, *said))))


def _more_latents(arch: str, narrow: int, wide: int, own: list[Cell]) -> Claim:
    """The number of main latents per letter at one width minus that at another, over all L0 that both have."""
    pairs = pairs_of_widths(narrow, wide, own)
    about = {"question": "splitting", "metric": "n_split", "expected": 1, "pooled": True, "left": pairs.left}
    where = f"{arch}, {pairs.named}" if pairs.kept else arch
    ends = (_label("width", narrow), _label("width", wide))
    how = pairs.how or "not compared: no two widths at one L0"
    return _compare(list(pairs.kept.values()), how, where=where, ends=ends, **about)


def _architectures(cells: list[Cell]) -> Iterator[Claim]:
    """All pairs of architectures at matched L0, L0 on the eval's words and EV, over all widths and at each."""
    ways = (
        (L0, pairs_at_l0, "L0 as reached or interpolated"),
        (WORDS_L0, pairs_at_words_l0, "L0 on the words interpolated"),
        (EV, pairs_at_ev, "EV interpolated"),
    )
    widths, has_words = sorted({cell.width for cell in cells}), any(cell.words_l0 for cell in cells)
    for a, b in combinations(dict.fromkeys(cell.arch for cell in cells), 2):
        for matched, pairs_of, how in ways if has_words else (ways[0], ways[2]):
            tried = {width: pairs_of(a, b, width, cells) for width in widths}
            by_width = {width: pairs for width, pairs in tried.items() if pairs.kept}
            every = alike([places for pairs in by_width.values() for places in pairs.kept.values()])
            reasons = why(pairs.how for pairs in tried.values() if pairs.how and not pairs.kept)
            for metric in COMPARED:
                about = {"question": f"arch at {matched}", "metric": metric, "ends": (a, b), "expected": 0}
                if len(by_width) != 1:
                    used = ", ".join(
                        width_label(w)
                        for w, pairs in by_width.items()
                        if any(places is one for places in pairs.kept.values() for one in every)
                    )
                    where = f"at the same {matched}, mean over {len(every)} pairs of width ({used}) and {matched}"
                    reason = how if every else reasons or f"{NOT_COMPARED}no {matched} that both reach"
                    yield _compare(every, reason, where=where, pooled=True, **about)
                for width, pairs in tried.items():
                    where = f"at the same {matched}, width {width_label(width)}"
                    if pairs.kept:
                        places, main = list(pairs.kept.values()), len(by_width) == 1
                        where = f"{where}, {pairs.named}"
                        yield _compare(places, how, where=where, pooled=main, left=pairs.left, **about)
                    elif pairs.how and by_width:
                        yield _compare([], pairs.how, where=where, **about)


def _compare(rows: Sequence[Places], how: str, *, metric: str, **about: Any) -> Claim:
    """Last − first place of the rows' means, over the labels that all of them have."""
    from sae_train.evals.intervals import paired_difference

    if not rows:
        return Claim(metric=metric, how=how, **about)
    labels = sorted(set.intersection(*(place.having(metric) for row in rows for place in row)))
    if len(labels) < 2:  # of one alone nothing is known of how letters differ
        few = "one letter" if labels else "no letter"
        return Claim(metric=metric, how=f"{NOT_COMPARED}{few} has a value in all cells", **about)
    means = [sum(place.matrix(metric, labels) for place in places) / len(rows) for places in zip(*rows, strict=True)]
    return Claim(
        metric=metric,
        how=how,
        seeds=(len(means[0]), len(means[-1])),
        labels=len(labels),
        means=tuple(float(mean.mean()) for mean in means),
        difference=paired_difference(means[-1], means[0]),
        **about,
    )


def _label(trait: str, value: float) -> str:
    return width_label(int(value)) if trait == "width" else f"{value:g}"


def _noun(trait: str) -> str:
    return {"l0": "L0"}.get(trait, trait)
