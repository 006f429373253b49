"""Scores by layer: the last figures of a run's SAEs at several hooks, over the blocks of their hooks.

A line joins the SAEs that differ in the block alone; figures of several training seeds are averaged.
"""

from __future__ import annotations

import re
from itertools import groupby

from sae_train.config import width_label
from sae_train.report.data import TrainedSAE, place_name
from sae_train.report.figures import COLOURS, DASHES
from sae_train.report.pareto import AXES, average
from sae_train.report.shapes import Point, Scatter

SCORES_BY_LAYER = (
    "absorption/mean_full",
    "absorption/mean_fraction",
    "metrics/explained_variance",
    "metrics/ce_loss_score",
)
HOOK = re.compile(r"blocks\.(\d{1,4})\.(.+)")
Kind = tuple[tuple[str, str], str, int, float]


def by_layer(saes: list[TrainedSAE]) -> list[Scatter]:
    """A chart for each score that was measured at two hooks or more; none of runs at one hook each."""
    usable = [sae for sae in saes if HOOK.fullmatch(sae.hook) and sae.width and sae.l0 and not sae.failed]
    charts = []
    for metric in SCORES_BY_LAYER:
        known = [sae for sae in usable if sae.usable(metric) is not None]
        if len({sae.place for sae in known}) < 2:
            continue
        zero, title = metric.startswith("absorption"), f"{AXES[metric][0].upper()}{AXES[metric][1:]} by layer"
        series = _series(known, metric)
        legend = [(f"part {css}", name) for name, css, _ in series]
        note = f"mean over {known[0].nouns}" if zero else ""
        key = f"{metric.split('/')[1].removeprefix('mean_')}-layer"
        charts.append(Scatter(key, title, note, series, "block", AXES[metric], False, zero, legend=legend))
    return charts


def _series(saes: list[TrainedSAE], metric: str) -> list[tuple[str, str, list[Point]]]:
    several = len({sae.run for sae in saes}) > 1
    made = []
    for i, (kind, own) in enumerate(groupby(sorted(saes, key=_kind), key=_kind)):
        (run, hook), arch, width, l0 = kind
        at_blocks = groupby(sorted(own, key=_block), key=_block)
        points = [average(list(seeds), block, metric) for block, seeds in at_blocks]
        name = f"{place_name((run, hook), several)}{arch} {width_label(width)} L0 {l0:g}"
        made.append((name, f"c{i % COLOURS} d{i // COLOURS % DASHES} o0", points))
    return made


def _kind(sae: TrainedSAE) -> Kind:
    """What SAEs on one line have in common: run and hook but for the block, architecture, width and L0."""
    return (sae.run, HOOK.fullmatch(sae.hook)[2]), sae.arch, sae.width, sae.l0


def _block(sae: TrainedSAE) -> int:
    return int(HOOK.fullmatch(sae.hook)[1])
