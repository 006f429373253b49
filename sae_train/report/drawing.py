"""Draws a chart of any kind as marks, each of which says its value on hovering."""

from __future__ import annotations

import math

from sae_train.report.marks import (
    CHARACTER,
    WIDTH,
    Node,
    Scale,
    left_margin,
    line,
    pad_range,
    rect,
    row_label,
    text,
)  # fmt: skip
from sae_train.report.shapes import Bars, Chart, Curves, Dots, HeatMap, Line, Mark, Point, Row, Scatter, Stacked
from sae_train.report.text import fixed, interval, label_name, percent, short

HEIGHT, BARS_HEIGHT = 230, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 32  # around curves, points and bars
MOST_POINTS = 160
APART = 5.0  # between the intervals of neighbouring series at one value of x
WARM_UP = 0.03  # share of the x-axis that does not stretch the y-axis
ROW, ROWS_TOP, ROWS_BOTTOM = 15, 6, 20


def draw(chart: Chart) -> Node:
    """Draw a chart that holds at least one value."""
    return PENS[type(chart)](chart)


def _plot(css: str, chart: Chart, height: float, nodes: list[Node], **attributes: str) -> Node:
    size = f"0 0 {WIDTH} {height:g}"
    return Node("svg", css, *nodes, viewBox=size, role="img", aria_label=chart.title, **attributes)


def _levels(y: Scale, count: int = 5) -> list[Node]:
    """Horizontal rules with their numbers."""
    return [
        node
        for at, words in y.ticks(count)
        for node in (line("grid", (LEFT, at), (WIDTH - RIGHT, at)), text(LEFT - 6, at + 4, words, "end"))
    ]


def _foot(x_title: str, height: float, ticks: list[tuple[float, str]]) -> list[Node]:
    title = text((LEFT + WIDTH - RIGHT) / 2, height - 2, x_title)
    return [text(at, height - 15, words) for at, words in ticks] + [title]


def _curves(chart: Curves) -> Node:
    lines = [_thin(own) for own in chart.lines]
    x = Scale(0, max(max(own.x) for own in lines) or 1, LEFT, WIDTH - RIGHT)
    y = Scale(*pad_range(_late(chart, lines), chart.log, chart.zero), HEIGHT - BOTTOM, TOP, chart.log)
    body = [line("target", (LEFT, y(at)), (WIDTH - RIGHT, y(at))) for at in chart.targets if y.low <= at <= y.high]
    body += [_band(own, x, y) for own in lines if own.low and own.high] + [_path(own, x, y) for own in lines]
    inner = {"x": LEFT, "y": TOP - 6, "width": WIDTH - LEFT - RIGHT + 6, "height": HEIGHT - TOP - BOTTOM + 9}
    nodes = [
        Node("g", "axes", *_levels(y), *_foot("tokens", HEIGHT, x.ticks(4))),
        Node("clipPath", "", Node("rect", **inner), id=f"clip-{chart.key}"),
        Node("g", "", *body, clip_path=f"url(#clip-{chart.key})"),
        Node("line", "guide", y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden"),
    ]
    hover = {"data_end": f"{x.high:g}", "data_left": str(LEFT), "data_right": str(WIDTH - RIGHT)}
    return _plot("plot", chart, HEIGHT, nodes, **hover)


def _late(chart: Curves, lines: list[Line]) -> list[float]:
    """What the y-axis spans: the points after the warm-up, with bands and targets."""
    end = max(max(own.x) for own in lines)
    values = list(chart.targets)
    for own in lines:
        late = [i for i, x in enumerate(own.x) if x >= WARM_UP * end] or range(len(own.x))
        values += [series[i] for series in (own.y, own.low, own.high) if series for i in late]
    return values


def _path(own: Line, x: Scale, y: Scale) -> Node:
    points = [(x(a), y(b)) for a, b in zip(own.x, own.y, strict=True)]
    inside = [Node("polyline", points=points)] if len(points) > 1 else []
    inside += [Node("circle", cx=a, cy=b, r=2.2) for a, b in points if len(points) <= 20]
    data = {f"data_{name}": _numbers(getattr(own, name)) for name in ("x", "y", "low", "high")}
    return Node(
        "g", f"line {own.css}", *inside, data_sae=own.index, data_name=own.name if own.index < 0 else "", **data
    )


def _band(own: Line, x: Scale, y: Scale) -> Node:
    there, back = ([(x(a), y(b)) for a, b in zip(own.x, ends or [], strict=True)] for ends in (own.high, own.low))
    return Node("polygon", f"band {own.css}", points=there + back[::-1], data_sae=own.index)


def _numbers(values: list[float] | None) -> str:
    return " ".join(f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}" for value in values or [])


def _thin(own: Line) -> Line:
    """Keep at most MOST_POINTS points, the last one always."""
    stride = math.ceil(len(own.x) / MOST_POINTS)
    keep = sorted({*range(0, len(own.x), stride), len(own.x) - 1})
    series = ([values[i] for i in keep] if values else None for values in (own.x, own.y, own.low, own.high))
    return Line(own.index, own.css, *series, own.name)  # type: ignore[arg-type]


def _scatter(chart: Scatter) -> Node:
    points = [point for _, _, series in chart.series for point in series]
    x = Scale(*pad_range([p.x for p in points], chart.log), LEFT, WIDTH - RIGHT, chart.log)
    seen = [value for p in points for value in (p.y, p.low, p.high) if value is not None]
    y = Scale(*pad_range(seen, zero=chart.zero), HEIGHT - BOTTOM, TOP)
    ticks = [(x(at), words) for at, words in chart.ticks] or x.ticks(4)
    nodes = _levels(y) + _foot(chart.x_title, HEIGHT, ticks)
    with_span = [name for name, _, series in chart.series if any(p.low is not None for p in series)]
    aside = {name: APART * (i - (len(with_span) - 1) / 2) for i, name in enumerate(with_span)} if chart.ticks else {}
    for name, css, series in chart.series:
        at = [x(p.x) + aside.get(name, 0.0) for p in series]
        joined = [Node("polyline", points=[(a, y(p.y)) for a, p in zip(at, series, strict=True)])] * (len(series) > 1)
        nodes.append(
            Node("g", f"line {css}", *joined, *(_point(p, a, y, chart) for a, p in zip(at, series, strict=True)))
        )
    return _plot("points", chart, HEIGHT, nodes)


def _point(p: Point, at: float, y: Scale, chart: Scatter) -> Node:
    span = interval(p.low, p.high)
    words = f"{p.name}: {chart.y_title} {short(p.y)}{f' ({span})' if span else ''}, {chart.x_title} {short(p.x)}"
    bar = [line("span", (at, y(p.low)), (at, y(p.high)))] if p.low is not None and p.high is not None else []
    out = 5 if at < WIDTH / 2 else -5
    beside = [text(at + out, y(p.y) - 5, p.beside, "start" if out > 0 else "end", "soft")] if p.beside else []
    return Node("g", "", *bar, Node("circle", cx=at, cy=y(p.y), r=3.2), *beside, Node("title", "", words))


def _bars(chart: Bars) -> Node:
    bottom = BARS_HEIGHT - BOTTOM
    y = Scale(0, max(count for *_, count, _ in chart.bars) * 1.06 or 1, bottom, TOP)
    gap = 0.7 if chart.apart else 0
    wide = (WIDTH - LEFT - RIGHT) / (len(chart.bars) + gap)
    nodes, ticks = _levels(y, 3), []
    free = 0.0  # where the next axis label may begin
    for i, (label, shown, count, css) in enumerate(chart.bars):
        at = LEFT + (i + gap * (i >= chart.apart)) * wide
        title = f"{label}: {count:,.0f}"
        nodes.append(rect(f"part {css}", at + 1, y(count), wide - 2, bottom - y(count), title))
        half = len(shown) * CHARACTER / 2
        if shown and at + wide / 2 - half >= free:
            ticks.append((at + wide / 2, shown))
            free = at + wide / 2 + half + CHARACTER
    return _plot("points", chart, BARS_HEIGHT, nodes + _foot(chart.x_title, BARS_HEIGHT, ticks))


def _heat_map(chart: HeatMap) -> Node:
    cell, left, top = 28 if chart.numbers else 13, left_margin(chart.rows), 4
    wide = (WIDTH - left - 6) / max(len(chart.columns), 1)
    nodes = []
    for i, (row, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        y = top + i * cell
        nodes.append(row_label(row, left, y + cell / 2))
        for j, value in enumerate(values):
            if value is None:
                continue
            words = f"{label_name(row)}, {chart.columns[j]}: {fixed(value)}"
            shaded = f"{0.04 + (0.6 if chart.numbers else 0.96) * chart.share(value):.2f}"
            nodes.append(rect("", left + j * wide, y, wide - 1, cell - 1, words, fill_opacity=shaded))
            nodes += [text(left + (j + 0.5) * wide, y + cell / 2 + 4, fixed(value), css="ink")] if chart.numbers else []
    bottom = top + len(chart.rows) * cell
    for j in range(len(chart.columns) - 1, -1, -math.ceil(len(chart.columns) / 6)):
        nodes.append(text(left + (j + 0.5) * wide, bottom + 13, chart.columns[j]))
    return _plot("heat", chart, bottom + 20, nodes)


def _dots(chart: Dots) -> Node:
    left, (low, high) = left_margin([row.label for row in chart.rows]), chart.span or _span(chart.rows)
    x = Scale(low, high, left, WIDTH - chart.right)
    bottom = ROWS_TOP + chart.height * len(chart.rows)
    ruled = [(at, "grid") for at, _ in x.ticks()] + [(x(v), css) for v, css in chart.lines if low <= v <= high]
    nodes = [line(css, (at, ROWS_TOP), (at, bottom)) for at, css in ruled] + _row_ticks(x.ticks(), bottom)
    for i, row in enumerate(chart.rows):
        y = ROWS_TOP + chart.height * (i + 0.5)
        nodes.append(row_label(row.label, left, y))
        nodes += [_dot(mark, label_name(row.label), x, y) for mark in row.marks if mark.value is not None]
        at, anchor = (WIDTH - 2, "end") if row.marks else (left + 4, "start")
        nodes += [text(at, y + 4, row.note, anchor, "soft")] if row.note else []
    return _plot("rows", chart, bottom + ROWS_BOTTOM, nodes)


def _dot(mark: Mark, label: str, x: Scale, y: float) -> Node:
    span = interval(mark.low, mark.high)
    ends = [line("span", (x(mark.low), y), (x(mark.high), y))] if span else []  # type: ignore[arg-type]
    words = f"{label}, {mark.name}: {fixed(mark.value)}{f' ({span})' if span else ''}"
    return Node("g", mark.css, *ends, Node("circle", cx=x(mark.value or 0), cy=y, r=3.2), Node("title", "", words))


def _span(rows: list[Row]) -> tuple[float, float]:
    """All marks and intervals, from 0 where none is below it."""
    marks = [mark for row in rows for mark in row.marks]
    values = [v for mark in marks for v in (mark.value, mark.low, mark.high) if v is not None] or [0.0, 1.0]
    low, high = min(*values, 0.0), max(*values, 0.0)
    pad = 0.05 * (high - low) or 0.05
    return low - pad * (low < 0), high + pad * (high > 0 or low == 0)


def _stacked(chart: Stacked) -> Node:
    left = left_margin([label for label, _ in chart.rows])
    x, bottom = Scale(0, 1, left, WIDTH - 10), ROWS_TOP + ROW * len(chart.rows)
    nodes = []
    for i, (label, shares) in enumerate(chart.rows):
        y, start = ROWS_TOP + ROW * i, 0.0
        nodes.append(row_label(label, left, y + ROW / 2))
        nodes += [text(left + 4, y + 11.5, "does not count", "start", "soft")] if shares is None else []
        for share, name, css in zip(shares or [], chart.names, chart.css, strict=False):
            words = f"{label_name(label)}, {name}: {percent(share)}"
            nodes.append(rect(f"part {css}", x(start), y + 1.5, x(start + share) - x(start), ROW - 3, words))
            start += share
    ticks = [(x(value), percent(value, 0)) for value in (0, 0.25, 0.5, 0.75, 1)]
    return _plot("rows", chart, bottom + ROWS_BOTTOM, nodes + _row_ticks(ticks, bottom))


def _row_ticks(ticks: list[tuple[float, str]], bottom: float) -> list[Node]:
    return [
        text(WIDTH - 1, bottom + 14, words, "end") if at > WIDTH - 16 else text(at, bottom + 14, words)
        for at, words in ticks
    ]


PENS = {
    Curves: _curves, HeatMap: _heat_map, Dots: _dots, Stacked: _stacked, Scatter: _scatter, Bars: _bars,
}  # fmt: skip
