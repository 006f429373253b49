"""Paints the page's charts for files, in its light colours: the same marks, by matplotlib, with title and legend."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from sae_train.report.drawing import draw
from sae_train.report.marks import CHARACTER, WIDTH, Node, text
from sae_train.report.shapes import Chart, Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = {"d1": (6, 3), "d2": (2, 3), "d3": (8, 3, 2, 3), "target": (3, 3), "mean": (4, 3), "random": (1.5, 2.5)}
STRENGTHS = {"o1": 0.7, "o2": 0.5, "o3": 0.35, "span": 0.45, "band": 0.16}
COLOURS = {"grid": "rule", "target": "soft", "mean": "ink", "random": "c3", "heat": "accent", "title": "ink"}
MOST_NAMED = 12  # series in a legend
GAP, LINE = 24, 16  # between charts, and from one line of words to the next


def picture(charts: list[Chart], columns: int = 1) -> Figure:
    """One figure of all charts; several that have the same legend share it. The caller saves it."""
    from matplotlib.figure import Figure

    shared = len(charts) > 1 and all(_entries(chart) == _entries(charts[0]) for chart in charts)
    frames = [_frame(chart, not shared) for chart in charts]
    legend = _legend(charts[0], columns * (WIDTH + GAP)) if shared else []
    tall = max((height for _, height in frames), default=LINE) + GAP
    below = -(-len(frames) // columns) * tall
    width, height = columns * (WIDTH + GAP), below + _height(legend) + GAP / 2
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for i, (nodes, _) in enumerate(frames):
        _paint_at(axes, nodes, GAP / 2 + i % columns * (WIDTH + GAP), GAP / 2 + i // columns * tall)
    _paint_at(axes, legend, GAP / 2, below)
    return figure


def _frame(chart: Chart, named: bool) -> tuple[list[Node], float]:
    """A chart under its title, note and legend, and the height of it all."""
    above = [text(0, LINE, chart.title, "start", "title"), *_wrap(chart.note)]
    above += _legend(chart, WIDTH, _height(above)) if named else []
    drawn = draw(chart)
    top = _height(above) + 6
    return [*above, Node("g", "", drawn, top=top)], top + float(drawn.attributes["viewBox"].split()[-1])


def _wrap(note: str) -> list[Node]:
    lines = re.findall(rf".{{1,{int(WIDTH / (CHARACTER - 0.8))}}}(?:\s|$)", note)
    return [text(0, (i + 2) * LINE, words.strip(), "start") for i, words in enumerate(lines)]


def _entries(chart: Chart) -> list[tuple[str, str]]:
    return [(f"line {own.css}", own.name) for own in chart.lines] if isinstance(chart, Curves) else chart.legend


def _legend(chart: Chart, width: float, top: float = 0) -> list[Node]:
    """What marks and colours mean, in as many lines as they need."""
    nodes, x, y = [], 0.0, top + LINE
    entries = _entries(chart)
    for css, words in entries if len(entries) <= MOST_NAMED else []:
        long = len(words) * CHARACTER + 30
        x, y = (0.0, y + LINE) if x and x + long > width else (x, y)
        nodes += [_sample(css, x, y - 4), text(x + 20, y, words, "start")]
        x += long
    return nodes


def _sample(css: str, x: float, y: float) -> Node:
    kind = css.split()[0]
    if kind in ("dot", "ring"):
        return Node("circle", css, cx=x + 8, cy=y, r=3.2)
    if kind == "part":
        return Node("rect", css, x=x + 3, y=y - 5, width=10, height=10)
    ends = [(x, y), (x + 16, y)] if kind == "line" else [(x + 8, y - 6), (x + 8, y + 6)]
    return Node("polyline", css, points=ends)


def _height(nodes: list[Node]) -> float:
    return max((node.attributes.get("y", 0) for node in nodes), default=0)


def _paint_at(axes: Any, nodes: list[Node], x: float, y: float) -> None:
    from matplotlib.transforms import Affine2D

    for node in nodes:
        moved = Affine2D().translate(x, y + node.attributes.get("top", 0)) + axes.transData
        _paint(axes, node, [], {"transform": moved, "zorder": 1})


def _paint(axes: Any, node: Node, css: list[str], how: dict[str, Any]) -> None:
    from matplotlib.patches import Circle, Polygon, Rectangle

    css, a = [*css, *node.css.split()], node.attributes
    colour, dash, strength = _look(css)
    fill = {"facecolor": colour, "alpha": float(a.get("fill_opacity", strength)), "linewidth": 0} | how
    match node.tag:
        case "text":
            side = {"start": "left", "middle": "center", "end": "right"}[a["text_anchor"]]
            words = str(node.inside[0])
            colour, weight = _look(node.css.split())[0], "bold" if node.css == "title" else "normal"
            axes.text(a["x"], a["y"], words, ha=side, size=9.5, color=colour, weight=weight, parse_math=False, **how)
        case "line" | "polyline" if a.get("visibility") != "hidden":
            ends = a.get("points") or [(a["x1"], a["y1"]), (a["x2"], a["y2"])]
            wide = 0.7 if "grid" in css else 1.7 if {"line", "span"} & set(css) else 1
            axes.plot(*zip(*ends, strict=True), color=colour, alpha=strength, lw=wide, dashes=dash, **how)
        case "polygon":
            axes.add_patch(Polygon(a["points"], **fill))
        case "rect":
            axes.add_patch(Rectangle((a["x"], a["y"]), a["width"], a["height"], **fill))
        case "circle":
            ring = {"facecolor": "white", "edgecolor": colour, "linewidth": 1.5} if "ring" in css else {}
            axes.add_patch(Circle((a["cx"], a["cy"]), a["r"], **fill | ring))
        case "svg" | "g":
            for part in node.inside:
                if isinstance(part, Node) and part.tag == "clipPath":  # what follows is drawn within
                    box = part.inside[0].attributes  # type: ignore[union-attr]
                    left, top, right, bottom = box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]
                    inner = Polygon([(left, top), (right, top), (right, bottom), (left, bottom)], **how)
                    how = how | {"clip_path": inner}
                elif isinstance(part, Node):
                    _paint(axes, part, css, how)


@functools.cache
def palette() -> dict[str, str]:
    """The page's light colours by class, those of outcomes (out0, …) included."""
    style = resources.files("sae_train.report").joinpath("style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style[: style.index("@media")]))
    outcomes = dict(re.findall(r"\.(out\d) { --c: var\(--(c\d)\); }", style))
    return colours | {name: colours[colour] for name, colour in (outcomes | COLOURS).items()}


def _look(css: list[str]) -> tuple[str, tuple[float, ...], float]:
    """Colour, dashes and strength that the classes ask for, the last one first."""
    colours, last = palette(), css[::-1]
    colour = next((colours[name] for name in last if name in colours), colours["soft"])
    dash = next((DASHES[name] for name in last if name in DASHES), ())
    return colour, dash, next((STRENGTHS[name] for name in last if name in STRENGTHS), 1.0)
