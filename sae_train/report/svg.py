"""One door to the drawing of charts for the page: a chart of any kind comes in, SVG or a captioned figure goes out."""

from __future__ import annotations

from collections.abc import Iterable

from sae_train.report.charts import draw_curves, draw_heat_map
from sae_train.report.marks import draw_dots, draw_stacked
from sae_train.report.points import draw_bars, draw_scatter
from sae_train.report.shapes import Bars, Chart, Curves, Dots, HeatMap, Scatter, Stacked
from sae_train.report.shell import figure

PENS = {
    Curves: draw_curves, HeatMap: draw_heat_map, Dots: draw_dots, Stacked: draw_stacked, Scatter: draw_scatter,
    Bars: draw_bars,
}  # fmt: skip


def draw(chart: Chart) -> str:
    """Draw a chart that holds at least one value."""
    return PENS[type(chart)](chart)


def shown(charts: Iterable[Chart], css: str = "plots two") -> str:
    """Charts beside one another, each under its caption; empty without any."""
    figures = "".join(figure(chart.title, chart.note, draw(chart)) for chart in charts)
    return f'<div class="{css}">{figures}</div>' if figures else ""
