"""Every chart of a report with a name: runs come in, (folder/name, chart) pairs go out, for files."""

from __future__ import annotations

from sae_train.report.absorbing import density, event_charts
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.figures import curves, grid, letter_maps, styles
from sae_train.report.letters import letter_charts, recall_bars
from sae_train.report.pareto import pareto
from sae_train.report.shapes import Chart, HeatMap
from sae_train.report.tables import GRIDS


def gallery(runs: list[Run]) -> list[tuple[str, Chart]]:
    """Curves, grids, trade-offs and each SAE's own charts, under the names that their files get."""
    saes = [sae for run in runs for sae in run.saes]
    found = [("training", chart) for chart in curves(saes, styles(saes)[0])]
    found += [("width-and-l0", chart) for chart in [*grid_maps(saes), *pareto(saes)]]
    found += [("saes", chart) for chart in recall_bars(saes)]
    for sae in saes:
        own = [*density(sae), *letter_maps(sae), *event_charts(sae), *letter_charts(sae)]
        found += [(f"saes/{_folder(sae, runs)}", chart) for chart in own]
    return [(f"{folder}/{chart.key}", chart) for folder, chart in found]


def grid_maps(saes: list[TrainedSAE]) -> list[Chart]:
    """Width × L0 maps with numbers, one a metric and architecture."""
    maps = []
    for title, metric in GRIDS.items():
        tables = grid(saes, metric)
        found = [v for _, _, values in tables.values() for row in values for v in row if v is not None]
        for name, (widths, targets, values) in tables.items():
            key = f"{metric.split('/')[1]}-{name.replace(' · ', '-')}"
            columns = [f"L0 {target}" for target in targets]
            shade = (min(found), max(found))
            maps.append(HeatMap(key, f"{title}, {name}", "width, L0", widths, columns, values, *shade, numbers=True))
    return maps


def _folder(sae: TrainedSAE, runs: list[Run]) -> str:
    return f"{sae.run}/{sae.name}" if len(runs) > 1 else sae.name
