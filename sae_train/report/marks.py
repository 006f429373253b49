"""Draws one row a label as inline SVG coloured by the page's style sheet: dots with intervals, or stacked bars.

In: rows of values. Out: SVG text in which every mark says its value on hovering.
"""

from __future__ import annotations

from sae_train.report.charts import Scale, left_margin, nice_ticks, row_label
from sae_train.report.shapes import Dots, Mark, Row, Stacked
from sae_train.report.text import escape, fixed, interval, label_name, percent, tick

WIDTH, RIGHT, TOP, BOTTOM = 380, 10, 6, 20


def draw_dots(chart: Dots) -> str:
    """Draw marks along a shared axis."""
    rows, height = chart.rows, chart.height
    left, low, high = left_margin([row.label for row in rows]), *(chart.span or span_of(rows))
    x = Scale(low, high, left, WIDTH - chart.right)
    bottom = TOP + height * len(rows)
    parts = [_ruling(x, bottom)]
    parts += [_vertical(x, value, css, bottom) for value, css in chart.lines if low <= value <= high]
    for i, row in enumerate(rows):
        y = TOP + height * (i + 0.5)
        parts.append(row_label(row.label, left, y))
        parts += [_mark(mark, label_name(row.label), x, y) for mark in row.marks if mark.value is not None]
        if row.note:
            at, anchor = (WIDTH - 2, "end") if row.marks else (left + 4, "start")
            parts.append(
                f'<text class="soft" x="{at}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(row.note)}</text>'
            )
    return _svg(chart.title, bottom + BOTTOM, parts)


def draw_stacked(chart: Stacked) -> str:
    """Draw shares of a whole, one bar a label; rows without shares are said not to count."""
    rows = chart.rows
    left, height = left_margin([label for label, _ in rows]), 15
    x, bottom = Scale(0, 1, left, WIDTH - RIGHT), TOP + height * len(rows)
    parts = []
    for i, (label, shares) in enumerate(rows):
        y, start = TOP + height * i, 0.0
        parts.append(row_label(label, left, y + height / 2))
        if shares is None:
            parts.append(f'<text class="soft" x="{left + 4}" y="{y + 11.5:.1f}">does not count</text>')
        for share, name, colour in zip(shares or [], chart.names, chart.css, strict=False):
            said = f"{escape(label_name(label))}, {name}: {percent(share)}"
            parts.append(
                f'<rect class="part {colour}" x="{x(start):.1f}" y="{y + 1.5:.1f}" '
                f'width="{max(x(start + share) - x(start), 0):.1f}" height="{height - 3}"><title>{said}</title></rect>'
            )
            start += share
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_tick(x(value), bottom, percent(value, 0)))
    return _svg(chart.title, bottom + BOTTOM, parts)


def key(entries: list[tuple[str, str]]) -> str:
    """What marks and colours mean: (css, words) each; css `dot`, `ring`, `part` or `rule` with a colour."""
    return " ".join(f'<span class="key"><i class="{css}"></i>{escape(words)}</span>' for css, words in entries)


def span_of(rows: list[Row]) -> tuple[float, float]:
    """All marks and intervals, from 0 where none is below it."""
    marks = [mark for row in rows for mark in row.marks]
    values = [v for mark in marks for v in (mark.value, mark.low, mark.high) if v is not None] or [0.0, 1.0]
    low, high = min(*values, 0.0), max(*values, 0.0)
    pad = 0.05 * (high - low) or 0.05
    return low - pad * (low < 0), high + pad * (high > 0 or low == 0)


def _mark(mark: Mark, label: str, x: Scale, y: float) -> str:
    span = interval(mark.low, mark.high)
    said = f"{escape(label)}, {escape(mark.name)}: {fixed(mark.value)}{f' ({span})' if span else ''}"
    line = ""
    if mark.low is not None and mark.high is not None:
        line = f'<path class="span" d="M{x(mark.low):.1f},{y:.1f}H{x(mark.high):.1f}"/>'
    at = x(mark.value or 0)
    return f'<g class="{mark.css}">{line}<circle cx="{at:.1f}" cy="{y:.1f}" r="3.2"/><title>{said}</title></g>'


def _ruling(x: Scale, bottom: float) -> str:
    ticks = nice_ticks(x.low, x.high, 5)
    lines = "".join(_vertical(x, value, "grid", bottom) for value in ticks)
    return lines + "".join(_tick(x(value), bottom, tick(value)) for value in ticks)


def _vertical(x: Scale, value: float, css: str, bottom: float) -> str:
    return f'<line class="{css}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{bottom}"/>'


def _tick(at: float, bottom: float, text: str) -> str:
    anchor = "end" if at > WIDTH - 16 else "middle"
    at = min(at, WIDTH - 1) if anchor == "middle" else WIDTH - 1
    return f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{text}</text>'


def _svg(title: str, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:g}"'
    return f'<svg class="rows" {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
