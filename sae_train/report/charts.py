"""Draws curves and heat maps as inline SVG coloured by the page's style sheet, so that they follow light and dark.

In: `Curves` (lines over tokens) or a `HeatMap`. Out: SVG text that keeps the values for hovering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sae_train.report.shapes import Curves, HeatMap, Line
from sae_train.report.text import escape, fixed, label_name, tick

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 32
MOST_POINTS = 160
CHARACTER, MOST_LEFT = 6.3, 160  # width of a label's character, most room for labels
WARM_UP = 0.03  # share of the x-axis that does not stretch the y-axis


@dataclass(frozen=True)
class Scale:
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


def draw_curves(figure: Curves) -> str:
    """Draw one figure as SVG; figures without a point are the caller's business."""
    lines = [_thinned(line) for line in figure.lines]
    x = Scale(0, max(max(line.x) for line in lines) or 1, LEFT, WIDTH - RIGHT)
    y = Scale(*_y_range(figure, lines), HEIGHT - BOTTOM, TOP, figure.log)
    body = _axes(x, y) + [_target(value, y) for value in figure.targets if y.low <= value <= y.high]
    body += [_band(line, x, y) for line in lines if line.low and line.high] + [_path(line, x, y) for line in lines]
    clip = f'<clipPath id="clip-{figure.key}"><rect x="{LEFT}" y="{TOP - 6}" width="{WIDTH - LEFT - RIGHT + 6}" '
    clip += f'height="{HEIGHT - TOP - BOTTOM + 9}"/></clipPath>'
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(figure.title)} over tokens" '
        f'data-end="{x.high:g}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}">'
        f'{clip}{body[0]}<g clip-path="url(#clip-{figure.key})">{"".join(body[1:])}</g>'
        f'<line class="guide" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def draw_heat_map(chart: HeatMap) -> str:
    """Draw rows × columns of values as shaded cells, each with its number on hovering."""
    rows, columns = chart.rows, chart.columns
    cell, left, top = 13, left_margin(rows), 4
    wide = (WIDTH - left - 6) / max(len(columns), 1)
    parts = []
    for i, row in enumerate(rows):
        parts.append(row_label(row, left, top + i * cell + cell - 7))
        for j, value in enumerate(chart.values[i]):
            if value is not None:
                span = chart.high - chart.low
                shade = min((value - chart.low) / span, 1) if span else 0
                parts.append(
                    f'<rect x="{left + j * wide:.1f}" y="{top + i * cell}" width="{wide - 1:.1f}" '
                    f'height="{cell - 1}" fill-opacity="{0.04 + 0.96 * shade:.2f}">'
                    f"<title>{escape(label_name(row))}, {escape(columns[j])}: {fixed(value)}</title></rect>"
                )
    every = math.ceil(len(columns) / 6)
    bottom = top + len(rows) * cell
    for j in range(len(columns) - 1, -1, -every):
        x = left + (j + 0.5) * wide
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{escape(columns[j])}</text>')
    size = f'viewBox="0 0 {WIDTH} {bottom + 20}"'
    return f'<svg class="heat" {size} role="img" aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'


def left_margin(labels: list[str]) -> float:
    """Room for the rows' labels, within reason."""
    longest = max((len(label) for label in labels), default=1)
    return min(max(longest * CHARACTER + 8, 20), MOST_LEFT)


def row_label(label: str, left: float, y: float) -> str:
    """Write a row's label at its left, cut if it is too long for any margin."""
    name, room = label_name(label), int((MOST_LEFT - 8) / CHARACTER)
    shown = name if len(name) <= room else name[: room - 1] + "…"
    whole = f"<title>{escape(name)}</title>" if shown != name else ""
    return f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}{whole}</text>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, at steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a log axis: decades, or 1-2-5 steps, or even steps, whichever is dense enough first."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return nice_ticks(low, high, 4)


def _y_range(figure: Curves, lines: list[Line]) -> tuple[float, float]:
    """Span all points after the warm-up, bands and targets included; never empty, positive if logarithmic."""
    end = max(max(line.x) for line in lines)
    values = list(figure.targets)
    for line in lines:
        late = [i for i, x in enumerate(line.x) if x >= WARM_UP * end] or range(len(line.x))
        values += [series[i] for series in (line.y, line.low, line.high) if series for i in late]
    if figure.log:
        values = [value for value in values if value > 0] or [0.1, 1]
        low, high = min(values), max(values)
        pad = max((high / low) ** 0.06, 1.25 / (high / low))  # a constant gets room, too
        return low / pad, high * pad
    low, high = min(values), max(values)
    low = min(low, 0) if figure.zero else low
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return (low if figure.zero else low - pad), high + pad


def _axes(x: Scale, y: Scale) -> list[str]:
    parts = []
    for value in log_ticks(y.low, y.high) if y.log else nice_ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick(value)}</text>')
    for value in nice_ticks(0, x.high, 4):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{tick(value)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 1}" text-anchor="middle">tokens</text>')
    return [f'<g class="axes">{"".join(parts)}</g>']


def _target(value: float, y: Scale) -> str:
    return f'<line class="target" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'


def _path(line: Line, x: Scale, y: Scale) -> str:
    points = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, line.y, strict=True)]
    dots = "".join(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.2"/>' for p in points)
    data = f'data-x="{_numbers(line.x)}" data-y="{_numbers(line.y)}"'
    if line.low and line.high:
        data += f' data-low="{_numbers(line.low)}" data-high="{_numbers(line.high)}"'
    name = f' data-name="{escape(line.name)}"' if line.index < 0 else ""
    path = f'<path d="M{" ".join(points)}"/>' if len(points) > 1 else ""
    dots = dots if len(points) <= 20 else ""
    return f'<g class="line {line.css}" data-sae="{line.index}"{name} {data}>{path}{dots}</g>'


def _band(line: Line, x: Scale, y: Scale) -> str:
    there = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, line.high or [], strict=True)]
    back = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, line.low or [], strict=True)]
    return f'<path class="band {line.css}" data-sae="{line.index}" d="M{" ".join(there + back[::-1])}Z"/>'


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}" for value in values)


def _thinned(line: Line) -> Line:
    """Keep at most MOST_POINTS points, the last one always."""
    stride = math.ceil(len(line.x) / MOST_POINTS)
    keep = sorted({*range(0, len(line.x), stride), len(line.x) - 1})
    pick = lambda values: [values[i] for i in keep] if values else None  # noqa: E731
    return Line(line.index, line.css, pick(line.x), pick(line.y), pick(line.low), pick(line.high), line.name)
