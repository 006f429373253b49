"""What is given up for what: SAEs' last figures as scatter plots, a line joining the L0 of one architecture and width.

Figures of several training seeds are averaged.
"""

from __future__ import annotations

from itertools import groupby

from sae_train.config import width_label
from sae_train.report.data import TrainedSAE, place_name
from sae_train.report.figures import COLOURS, DASHES
from sae_train.report.shapes import Chart, Point, Scatter

MOST_NAMED = 8  # series that each have a colour
PLOTS = {  # metrics of x and y
    "full-l0": ("metrics/l0", "absorption/mean_full"),
    "fraction-l0": ("metrics/l0", "absorption/mean_fraction"),
    "full-ev": ("metrics/explained_variance", "absorption/mean_full"),
    "full-ce": ("metrics/ce_loss_score", "absorption/mean_full"),
    "ev-l0": ("metrics/l0", "metrics/explained_variance"),
    "ce-l0": ("metrics/l0", "metrics/ce_loss_score"),
    "precision-l0": ("metrics/l0", "absorption/mean_precision_main"),
    "recall-l0": ("metrics/l0", "absorption/mean_recall_main"),
}
AXES = {
    "metrics/l0": "L0", "metrics/explained_variance": "explained variance", "metrics/ce_loss_score": "loss recovered",
    "absorption/mean_full": "full absorption", "absorption/mean_fraction": "absorption fraction",
    "absorption/mean_precision_main": "precision of the main latents",
    "absorption/mean_recall_main": "recall of the main latents",
}  # fmt: skip


def pareto(saes: list[TrainedSAE]) -> list[Chart]:
    """Every plot that has at least two points; empty for one SAE."""
    usable = [sae for sae in saes if sae.width and sae.l0 and not sae.failed]
    charts = []
    for name, (x, y) in PLOTS.items():
        log = x == "metrics/l0"
        known = [sae for sae in usable if _has_value(sae, x, log) and _has_value(sae, y, False)]
        series = _series(known, x, y)
        if sum(len(points) for _, _, points in series) > 1:
            zero, (dashes, legend) = y.startswith("absorption"), _legend(series)
            note = "; ".join(filter(None, [f"mean over {known[0].nouns}" if zero else "", dashes]))
            title = f"{AXES[y][0].upper()}{AXES[y][1:]} against {AXES[x]}"
            charts.append(Scatter(name, title, note, series, AXES[x], AXES[y], log, zero, legend=legend))
    return charts


def _has_value(sae: TrainedSAE, metric: str, positive: bool) -> bool:
    value = sae.usable(metric)
    return value is not None and (value > 0 or not positive)


def _series(saes: list[TrainedSAE], x: str, y: str) -> list[tuple[str, str, list[Point]]]:
    places, archs, widths = (sorted({getattr(sae, trait) for sae in saes}) for trait in ("place", "arch", "width"))
    several = len({run for run, _ in places}) > 1
    kinds = [(place, arch, width) for place in places for arch in archs for width in widths]
    own_series = {kind: [s for s in saes if (s.place, s.arch, s.width) == kind] for kind in kinds}
    own_series = {kind: own for kind, own in own_series.items() if own}
    series = []
    for i, (kind, own) in enumerate(own_series.items()):
        place, arch, width = kind
        css = f"c{i % COLOURS} d0 o0"
        if len(own_series) > MOST_NAMED:
            css = f"c{archs.index(arch) % COLOURS} d{widths.index(width) % DASHES} o{min(places.index(place), 3)}"
        name = f"{place_name(place, several)}{arch} {width_label(width)}"
        by_l0 = groupby(sorted(own, key=lambda sae: sae.l0 or 0), key=lambda sae: sae.l0 or 0)
        points = [_point(list(seeds), x, y) for _, seeds in by_l0]
        series.append((name, css, sorted(points, key=lambda point: point.x)))
    return series


def _point(seeds: list[TrainedSAE], x: str, y: str) -> Point:
    return average(seeds, sum(sae.get(x) or 0 for sae in seeds) / len(seeds), y)


def average(seeds: list[TrainedSAE], at: float, y: str) -> Point:
    """The mean of a metric over training seeds as a point; the interval of a single SAE."""
    first, n = seeds[0], len(seeds)
    value = sum(sae.get(y) or 0 for sae in seeds) / n
    if n > 1:
        return Point(f"{first.label.split('-seed_')[0]}, mean of {n} seeds", at, value)
    return Point(first.label, at, value, first.get(f"{y}_low"), first.get(f"{y}_high"))


def _legend(series: list[tuple[str, str, list[Point]]]) -> tuple[str, list[tuple[str, str]]]:
    """What dashes and colours mean: each series its own colour, or of many the architectures."""
    if len(series) <= MOST_NAMED:
        return "", [(f"part {css.split()[0]}", name) for name, css, _ in series]
    archs = dict.fromkeys((css.split()[0], name.split()[-2]) for name, css, _ in series)
    widths = ", ".join(dict.fromkeys(name.split()[-1] for name, _, _ in series))
    return f"dashes: width {widths}, in this order", [(f"part {css}", name) for css, name in archs]
