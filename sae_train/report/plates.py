"""Draws charts with matplotlib, for files: a chart comes in, a figure in the page's light colours goes out."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from sae_train.report.marks import span_of
from sae_train.report.shapes import Bars, Chart, Curves, Dots, HeatMap, Scatter, Stacked
from sae_train.report.text import label_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
STRENGTHS = (1.0, 0.7, 0.5, 0.35)
MOST_NAMED = 12  # series in a legend


def plate(chart: Chart) -> Figure:
    """Draw any chart; the caller saves the figure."""
    from matplotlib.figure import Figure

    n_rows = len(getattr(chart, "rows", ()))
    figure = Figure(figsize=(5.4, max(3.4, 0.8 + 0.19 * n_rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(chart.title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    BRUSHES[type(chart)](axes, chart)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, frameon=False)
    return figure


def _curves(axes: Any, chart: Curves) -> None:
    for line in chart.lines:
        colour, dash, strength = _look(line.css)
        name = line.name if len(chart.lines) <= MOST_NAMED else None
        axes.plot(line.x, line.y, dash, color=colour, alpha=strength, lw=1.4, label=name)
        if line.low and line.high:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
    for target in chart.targets:
        axes.axhline(target, color="grey", lw=0.8, ls=":")
    if chart.log:
        axes.set_yscale("log")
    if chart.zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens", fontsize=8)


def _scatter(axes: Any, chart: Scatter) -> None:
    for name, css, points in chart.series:
        colour, dash, strength = _look(css)
        x, y = [p.x for p in points], [p.y for p in points]
        label = name if len(chart.series) <= MOST_NAMED else None
        axes.plot(x, y, dash, marker="o", ms=3.5, color=colour, alpha=strength, lw=1.2, label=label)
        for p in points:
            if p.low is not None and p.high is not None:
                axes.plot([p.x, p.x], [p.low, p.high], color=colour, alpha=0.5, lw=1.2)
    if chart.log:
        axes.set_xscale("log")
    if chart.zero:
        axes.set_ylim(bottom=min(0.0, *(p.y for *_, points in chart.series for p in points)))
    axes.set_xlabel(chart.x_title, fontsize=8)
    axes.set_ylabel(chart.y_title, fontsize=8)


def _heat_map(axes: Any, chart: HeatMap) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in chart.values]
    high = chart.high if chart.high > chart.low else chart.low + 1
    axes.imshow(values, cmap="Blues", vmin=chart.low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(chart.rows)), [label_name(row) for row in chart.rows])
    every = max(1, len(chart.columns) // 8)
    axes.set_xticks(range(0, len(chart.columns), every), chart.columns[::every])
    for i, row in enumerate(chart.values if chart.numbers else []):
        for j, value in enumerate(row):
            if value is not None:
                dark = (value - chart.low) / (high - chart.low) > 0.6
                axes.text(
                    j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )


def _dots(axes: Any, chart: Dots) -> None:
    named: set[str] = set()
    for i, row in enumerate(chart.rows):
        for mark in row.marks:
            if mark.value is None:
                continue
            colour = _look(mark.css)[0]
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.low, mark.high], [i, i], color=colour, alpha=0.45, lw=2)
            face = "none" if "ring" in mark.css else colour
            label = None if mark.name in named else mark.name
            axes.plot(mark.value, i, "o", ms=4, mec=colour, mfc=face, ls="", label=label)
            named.add(mark.name)
        if row.note and not row.marks:
            axes.text(0, i, row.note, fontsize=7, color="grey", va="center")
    for value, css in chart.lines:
        colour, dash = ("black", "--") if css == "mean" else (palette()["c3"], ":")
        axes.axvline(value, color=colour, ls=dash, lw=1, label="mean" if css == "mean" else f"{css} SAE")
    axes.set_xlim(*(chart.span or span_of(chart.rows)))
    _rows(axes, [row.label for row in chart.rows])


def _stacked(axes: Any, chart: Stacked) -> None:
    start = [0.0] * len(chart.rows)
    for k, (name, css) in enumerate(zip(chart.names, chart.css, strict=True)):
        shares = [row[k] if row else 0.0 for _, row in chart.rows]
        axes.barh(range(len(chart.rows)), shares, 0.8, left=start, color=_look(css)[0], label=name)
        start = [a + b for a, b in zip(start, shares, strict=True)]
    _rows(axes, [label for label, _ in chart.rows])


def _bars(axes: Any, chart: Bars) -> None:
    places = [i + 0.7 * (i >= chart.apart > 0) for i in range(len(chart.bars))]
    axes.bar(places, [count for *_, count, _ in chart.bars], 0.9, color=[_look(css)[0] for *_, css in chart.bars])
    axes.set_xticks(places, [shown for _, shown, *_ in chart.bars], rotation=45 if len(chart.bars) > 12 else 0)
    axes.set_xlabel(chart.x_title, fontsize=8)
    axes.set_ylabel(chart.y_title, fontsize=8)


BRUSHES = {
    Curves: _curves, Scatter: _scatter, HeatMap: _heat_map, Dots: _dots, Stacked: _stacked, Bars: _bars,
}  # fmt: skip


def _rows(axes: Any, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), [label_name(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)


@functools.cache
def palette() -> dict[str, str]:
    """The page's light colours by class, those of outcomes (out0, …) included."""
    style = resources.files("sae_train.report").joinpath("style.css").read_text(encoding="utf-8")
    light = style[: style.index("@media")]
    colours = dict(re.findall(r"--(c\d): (#[0-9a-f]{6})", light))
    outcomes = dict(re.findall(r"\.(out\d) { --c: var\(--(c\d)\); }", style))
    return colours | {name: colours[colour] for name, colour in outcomes.items()}


def _look(css: str) -> tuple[str, str, float]:
    """Colour, dash and strength of css classes such as 'c3 d1 o0'."""
    colours, classes = palette(), css.split()
    number = lambda letter: next((int(c[1:]) for c in classes if c[0] == letter and c[1:].isdigit()), 0)  # noqa: E731
    colour = next((colours[c] for c in classes if c in colours), colours["c0"])
    return colour, DASHES[number("d")], STRENGTHS[number("o")]
