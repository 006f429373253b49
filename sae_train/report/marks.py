"""What charts are drawn with: marks in pixels, scales and ticks. The page takes marks as SVG, `plates` paints them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from sae_train.report.text import label_name, tick

WIDTH = 380
CHARACTER, MOST_LEFT = 6.3, 160  # width of a label's character, most room for labels
FEWEST_TICKS = 3


class Node:
    """An SVG element; `css` names colour, dash and strength in the page's style sheet, `inside` are nodes or text."""

    def __init__(self, tag: str, css: str = "", *inside: Node | str, **attributes: Any):
        self.tag, self.css, self.inside, self.attributes = tag, css, inside, attributes

    def __html__(self) -> str:
        given = {name: value for name, value in ({"class": self.css} | self.attributes).items() if value != ""}
        head = "".join(
            f' {name.replace("_", "-")}="{escape(_write_attribute(value))}"' for name, value in given.items()
        )
        inside = "".join(map(escape, self.inside))
        return f"<{self.tag}{head}>{inside}</{self.tag}>" if inside else f"<{self.tag}{head}/>"


def _write_attribute(value: object) -> str:
    if isinstance(value, list):
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def text(x: float, y: float, words: str, anchor: str = "middle", css: str = "") -> Node:
    return Node("text", css, words, x=x, y=y, text_anchor=anchor)


def line(css: str, start: tuple[float, float], end: tuple[float, float]) -> Node:
    return Node("line", css, x1=start[0], y1=start[1], x2=end[0], y2=end[1])


def rect(css: str, x: float, y: float, width: float, height: float, title: str, **attributes: Any) -> Node:
    """A rectangle that says `title` on hovering."""
    size = {"x": x, "y": y, "width": max(width, 0.0), "height": max(height, 0.0)}
    return Node("rect", css, Node("title", "", title), **size, **attributes)


def row_label(label: str, left: float, y: float) -> Node:
    """A row's label at its left, cut if it is too long for any margin."""
    name, room = label_name(label), int((MOST_LEFT - 8) / CHARACTER)
    if len(name) <= room:
        return text(left - 6, y + 4, name, "end")
    return Node(
        "text", "", name[: room - 1] + "…", Node("title", "", name), x=left - 6, y=y + 4, text_anchor="end"
    )  # fmt: skip


def left_margin(labels: list[str]) -> float:
    """Room for the rows' labels, within reason."""
    longest = max((len(label) for label in labels), default=1)
    return min(max(longest * CHARACTER + 8, 20), MOST_LEFT)


@dataclass(frozen=True)
class Scale:
    """Values from low to high as pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low * 1e-3))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Places and words of the axis' numbers."""
        values = log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)
        return [(self(value), tick(value)) for value in values]


def pad_range(values: list[float], log: bool = False, zero: bool = False) -> tuple[float, float]:
    """Span values with some room at both sides, or from 0; never empty, positive if logarithmic."""
    if log:
        values = [value for value in values if value > 0] or [0.1, 1]
        low, high = min(values), max(values)
        pad = max((high / low) ** 0.06, 1.25 * low / high)  # a constant gets room, too
        return low / pad, high * pad
    low, high = min(values), max(values)
    low = min(low, 0) if zero else low
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return (low if zero else low - pad), high + pad


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, at steps of 1, 2 or 5 times a power of ten: about `count`, at least three."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    steps = [factor * power for factor in (0.2, 0.5, 1, 2, 5, 10)]
    fitting = next(i for i, step in enumerate(steps) if step >= raw * 0.999)
    ticks: list[float] = []
    for step in steps[fitting::-1]:
        first = math.ceil(low / step - 1e-9)
        ticks = [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
        if len(ticks) >= FEWEST_TICKS:
            break
    return ticks


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a log axis: decades, or 1-2-5 steps, or even steps, whichever is dense enough first."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return nice_ticks(low, high, 4)
