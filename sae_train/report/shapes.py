"""What the report draws, as plain values: one class a kind of chart, each of which knows its numbers as a table.

How they look is elsewhere (`drawing`). `css` names colour, dash and strength as the page's style sheet does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

Table = tuple[list[str], list[list[object]]]


@dataclass(frozen=True)
class Chart(ABC):
    """What all kinds share; `key` is a name for links and files, `legend` what marks and colours mean: (css, words)."""

    key: str
    title: str
    note: str
    legend: list[tuple[str, str]] = field(default_factory=list, kw_only=True)

    @abstractmethod
    def table(self) -> Table:
        """Return column names and rows of the values drawn."""


@dataclass(frozen=True)
class Line:
    """One SAE's curve, or with index −1 a curve with only a name."""

    index: int
    css: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    name: str = ""


@dataclass(frozen=True)
class Curves(Chart):
    """Lines over tokens; `targets` are horizontal dashed lines."""

    lines: list[Line]
    log: bool = False
    zero: bool = False
    targets: list[float] = field(default_factory=list)

    def table(self) -> Table:
        none = [None] * max(len(line.x) for line in self.lines)
        rows = [
            [line.name, *point]
            for line in self.lines
            for point in zip(line.x, line.y, line.low or none, line.high or none, strict=False)
        ]
        return ["sae", "tokens", self.key, "low", "high"], rows


@dataclass(frozen=True)
class Point:
    """A named point with the interval of its y; `beside` is written next to it."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    beside: str = ""


@dataclass(frozen=True)
class Scatter(Chart):
    """Points by series (name, css, points), each series joined by a line in the order of its points.

    `zero` begins the y-axis at 0, `log` is of the x-axis. `ticks` are the values of x, with what the axis says, where
    all points share them: there the intervals of series stand side by side.
    """

    series: list[tuple[str, str, list[Point]]]
    x_title: str
    y_title: str
    log: bool = False
    zero: bool = True
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def table(self) -> Table:
        rows = [[name, p.name, p.x, p.y, p.low, p.high] for name, _, points in self.series for p in points]
        return ["series", "sae", self.x_title, self.y_title, "low", "high"], rows


@dataclass(frozen=True)
class HeatMap(Chart):
    """Rows × columns of shaded cells from `low` to `high`; with `numbers` each cell shows its value."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    low: float
    high: float
    numbers: bool = False

    def share(self, value: float) -> float:
        """How dark a cell is, from 0 to 1."""
        return min((value - self.low) / (self.high - self.low), 1) if self.high > self.low else 0

    def table(self) -> Table:
        return ["", *self.columns], [[row, *values] for row, values in zip(self.rows, self.values, strict=True)]


@dataclass(frozen=True)
class Mark:
    """A value, with its interval where there is one; css is `dot` or `ring` and a colour."""

    name: str
    value: float | None
    css: str = "dot c0"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One label's marks; note is printed in their place if there are none, else at the right."""

    label: str
    marks: list[Mark]
    note: str = ""


@dataclass(frozen=True)
class Dots(Chart):
    """One row a label, marks along a shared axis; `lines` are vertical ones, (value, css)."""

    rows: list[Row]
    span: tuple[float, float] | None = None
    height: int = 15
    lines: list[tuple[float, str]] = field(default_factory=list)
    right: int = 10

    def table(self) -> Table:
        rows = [[row.label, m.name, m.value, m.low, m.high, row.note] for row in self.rows for m in row.marks]
        return ["label", "mark", "value", "low", "high", "note"], rows


@dataclass(frozen=True)
class Stacked(Chart):
    """Shares of a whole, one bar a row; None for a row that has none."""

    rows: list[tuple[str, list[float] | None]]
    names: list[str]
    css: list[str]

    def table(self) -> Table:
        return ["label", *self.names], [[label, *(shares or [])] for label, shares in self.rows]


@dataclass(frozen=True)
class Bars(Chart):
    """A histogram: (label, label on the axis, count, css) a bar; the first `apart` ones stand apart."""

    bars: list[tuple[str, str, float, str]]
    x_title: str
    y_title: str
    apart: int = 0

    def table(self) -> Table:
        return [self.x_title, self.y_title], [[label, count] for label, _, count, _ in self.bars]
