"""Charts of a study, in the form of the paper's figures 4, 5, 8b and 9: a line joins the cells of one width or one L0.

Bars are two-way 95 % intervals over letters and training seeds; what chance gives is drawn in dots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sae_train.config import width_label
from sae_train.report.cells import Cell
from sae_train.report.figures import COLOURS
from sae_train.report.shapes import Chart, Point, Scatter

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

Figures = dict[str, list[Chart]]
IntervalOf = Callable[[Cell, str], "Interval | None"]
ChanceOf = Callable[[Cell], "float | None"]
Series = tuple[str, str, list[Point]]
NOTE = "95 % intervals over letters and seeds"
LOG = ("l0", "width")
MOST_TICKS = 6
TITLES = {
    "l0": "L0", "width": "width", "ev": "explained variance", "full": "full absorption",
    "f1_k1": "F1 of the best latent", "precision_main": "precision", "recall_main": "recall",
    "n_split": "main latents per letter",
}  # fmt: skip


def figures_of(cells: Sequence[Cell], interval: IntervalOf, chance: ChanceOf) -> Figures:
    """The charts under each question; a question may have none."""
    archs, widths = dict.fromkeys(cell.arch for cell in cells), sorted({cell.width for cell in cells})
    draw = _Drawing(cells, interval, chance)
    charts: Figures = {question: [] for question in ("width", "l0", "arch", "main", "splitting")}
    for arch in archs:
        own = [cell for cell in cells if cell.arch == arch]
        precision = f"Precision against recall of the main latents, {arch}"
        charts["width"] += draw(f"width-{arch}", f"Full absorption against width, {arch}", own, "l0", "width", "full")
        charts["l0"] += draw(f"l0-{arch}", f"Full absorption against L0, {arch}", own, "width", "l0", "full")
        charts["main"] += draw(f"f1-{arch}", f"F1 of the best latent against L0, {arch}", own, "width", "l0", "f1_k1")
        charts["main"] += draw(f"recall-{arch}", precision, own, "width", "recall_main", "precision_main")
        charts["splitting"] += draw(f"split-{arch}", f"Main latents per letter, {arch}", own, "l0", "width", "n_split")
    for width in widths if len(archs) > 1 else ():
        own, label = [cell for cell in cells if cell.width == width], width_label(width)
        charts["arch"] += draw(f"l0-{label}", f"Full absorption against L0, width {label}", own, "arch", "l0", "full")
        charts["arch"] += draw(f"ev-{label}", f"Full absorption against EV, width {label}", own, "arch", "ev", "full")
    return charts


class _Drawing:
    """Makes a chart of cells: `by` tells the lines apart, `x` is a trait or a metric, `y` a metric."""

    def __init__(self, every: Sequence[Cell], interval: IntervalOf, chance: ChanceOf):
        self.interval, self.chance = interval, chance
        self.values = {by: sorted({getattr(cell, by) for cell in every}) for by in ("arch", "width", "l0")}

    def __call__(self, key: str, title: str, cells: list[Cell], by: str, x: str, y: str) -> list[Chart]:
        """The chart; none where no line would have two points."""
        own = {getattr(cell, by) for cell in cells}
        numbered = [(i, value) for i, value in enumerate(self.values[by]) if value in own]  # one colour on the page
        lines = [(i, _name(by, value), [c for c in cells if getattr(c, by) == value]) for i, value in numbered]
        series: list[Series] = [(name, f"c{i % COLOURS} d0 o0", self._points(own, x, y)) for i, name, own in lines]
        if all(len(points) < 2 for _, _, points in series):
            return []
        beside = [("chance", f"c{i % COLOURS} d2 o2", self._by_chance(own, x)) for i, _, own in lines]
        beside = [one for one in beside if one[2] and y == "full" and x != "ev"]  # random SAEs' EV is far below
        joined = "; joined by L0" + (", which rises with EV" if x == "ev" else "") if x not in LOG else ""
        note = NOTE + ("; faint and dotted: by chance" if beside else "") + joined
        legend = [(f"part c{i % COLOURS}", name) for i, name, _ in lines]
        zero = y in ("full", "f1_k1")
        ticks = _ticks(cells, x)
        return [Scatter(key, title, note, series + beside, TITLES[x], TITLES[y], x in LOG, zero, ticks, legend=legend)]

    def _points(self, cells: list[Cell], x: str, y: str) -> list[Point]:
        """In the order of L0, or of width along a width axis; against another score the ends say their L0."""
        known = []
        for cell in sorted(cells, key=lambda cell: cell.width if x == "width" else cell.l0):
            at, found = self._at(cell, x), self.interval(cell, y)
            if at is not None and found is not None:
                known.append((cell, at, found))
        ends = {known[0][0].name, known[-1][0].name} if known and "main" in x else set()
        return [
            Point(cell.name, at, found.mean, found.low, found.high, f"L0 {cell.l0:g}" if cell.name in ends else "")
            for cell, at, found in known
        ]

    def _by_chance(self, cells: list[Cell], x: str) -> list[Point]:
        known = [(self._at(cell, x), self.chance(cell), cell.name) for cell in cells]
        points = [Point(f"chance beside {name}", at, y) for at, y, name in known if at is not None and y is not None]
        return sorted(points, key=lambda point: point.x)

    def _at(self, cell: Cell, x: str) -> float | None:
        """Where a cell stands on the x-axis."""
        if x in ("l0", "width", "ev"):
            return cell.reached if x == "l0" else getattr(cell, x)
        found = self.interval(cell, x)
        return found.mean if found else None


def _ticks(cells: list[Cell], x: str) -> list[tuple[float, str]]:
    """The values of a trait along the x-axis, where they are few."""
    values = sorted({getattr(cell, x) for cell in cells}) if x in LOG else []
    if len(values) > MOST_TICKS:
        return []
    return [(value, width_label(value) if x == "width" else f"{value:g}") for value in values]


def _name(trait: str, value: object) -> str:
    """What a line's legend says."""
    if trait == "arch":
        return str(value)
    return f"width {width_label(int(str(value)))}" if trait == "width" else f"L0 {value:g}"
