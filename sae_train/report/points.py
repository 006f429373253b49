"""Draws scatter plots and histograms as inline SVG coloured by the page's style sheet.

In: a `Scatter` or `Bars`. Out: SVG text in which every point and bar says its values on hovering.
"""

from __future__ import annotations

from sae_train.report.charts import BOTTOM, CHARACTER, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, log_ticks, nice_ticks
from sae_train.report.shapes import Bars, Point, Scatter
from sae_train.report.text import escape, interval, short, tick

BARS_HEIGHT = 150


def draw_scatter(chart: Scatter) -> str:
    """Draw each series as points joined by a line, with the intervals of y."""
    points = [point for _, _, series in chart.series for point in series]
    x = Scale(*_span([p.x for p in points], chart.log), LEFT, WIDTH - RIGHT, chart.log)
    low, high = _span([v for p in points for v in (p.y, p.low, p.high) if v is not None], False)
    least = min([0.0, *(p.y for p in points)]) if chart.zero else low
    y = Scale(least, high, HEIGHT - BOTTOM, TOP)
    parts = _axes(chart, x, y)
    for _, css, series in chart.series:
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in series)
        line = f'<path d="M{path}"/>' if len(series) > 1 else ""
        marks = "".join(_point(p, x, y, chart) for p in series)
        parts.append(f'<g class="line {css}">{line}{marks}</g>')
    return _svg(chart.title, HEIGHT, parts)


def draw_bars(chart: Bars) -> str:
    """Draw counts as bars side by side."""
    bottom = BARS_HEIGHT - BOTTOM
    y = Scale(0, max(count for *_, count, _ in chart.bars) * 1.06 or 1, bottom, TOP)
    gap = 0.7 if chart.apart else 0
    wide = (WIDTH - LEFT - RIGHT) / (len(chart.bars) + gap)
    parts = [_level(y, value, tick(value)) for value in nice_ticks(0, y.high, 3)]
    free = 0.0  # where the next axis label may begin
    for i, (label, shown, count, css) in enumerate(chart.bars):
        at = LEFT + (i + gap * (i >= chart.apart)) * wide
        parts.append(
            f'<rect class="part {css}" x="{at + 1:.1f}" y="{y(count):.1f}" width="{wide - 2:.1f}" '
            f'height="{bottom - y(count):.1f}"><title>{escape(label)}: {count:,.0f}</title></rect>'
        )
        half = len(shown) * CHARACTER / 2
        if shown and at + wide / 2 - half >= free:
            parts.append(_text(at + wide / 2, bottom + 14, shown))
            free = at + wide / 2 + half + CHARACTER
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 28, chart.x_title))
    return _svg(chart.title, BARS_HEIGHT, parts)


def _axes(chart: Scatter, x: Scale, y: Scale) -> list[str]:
    parts = [_level(y, value, tick(value)) for value in nice_ticks(y.low, y.high)]
    for value in log_ticks(x.low, x.high) if x.log else nice_ticks(x.low, x.high, 4):
        parts.append(_text(x(value), HEIGHT - 16, tick(value)))
    return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 2, chart.x_title)]


def _point(p: Point, x: Scale, y: Scale, chart: Scatter) -> str:
    span = interval(p.low, p.high)
    said = f"{p.name}: {chart.y_title} {short(p.y)}{f' ({span})' if span else ''}, {chart.x_title} {short(p.x)}"
    bar = f'<path class="span" d="M{x(p.x):.1f},{y(p.low or 0):.1f}V{y(p.high):.1f}"/>' if p.high is not None else ""
    dot = f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3.2"/>'
    return f"<g>{bar}{dot}<title>{escape(said)}</title></g>"


def _level(y: Scale, value: float, text: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>'


def _text(at: float, y: float, text: str) -> str:
    return f'<text x="{at:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def _span(values: list[float], log: bool) -> tuple[float, float]:
    """The values with some room at both sides; never empty."""
    low, high = min(values), max(values)
    if log:
        pad = max((high / low) ** 0.06, 1.1)
        return low / pad, high * pad
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return low - pad, high + pad


def _svg(title: str, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:g}"'
    return f'<svg class="points" {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
