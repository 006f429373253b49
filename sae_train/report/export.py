"""Writes a report as files: PNG, SVG and CSV of every chart, and CSV of every table."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_train.errors import explaining
from sae_train.files import whole
from sae_train.report.absorbing import density, event_charts
from sae_train.report.data import Run, TrainedSAE, load_runs
from sae_train.report.figures import curves, letter_maps, styles, width_maps
from sae_train.report.layers import by_layer
from sae_train.report.letters import letter_charts, recall_bars
from sae_train.report.pareto import pareto
from sae_train.report.plates import picture
from sae_train.report.shapes import Chart
from sae_train.report.text import number

DPI = 160
PLAIN = ("name", "run", "arch", "width", "l0", "seed", "failed", "invalid")


def export(folders: list[Path], out: Path) -> list[Path]:
    """Write everything below `out`, whose files of the same names are replaced; return the paths written.

    Raises UserError for folders that are no runs and for an `out` that cannot be written.
    """
    runs = load_runs(folders)
    with explaining(lambda error: f"the figures cannot be written to {str(out)!r}: {error.strerror}", OSError):
        return [*_tables(runs, out), *_charts(runs, out)]


def _charts(runs: list[Run], out: Path) -> Iterator[Path]:
    import matplotlib

    # Text stays text in SVG files, and the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sae-train"}):
        for name, chart in gallery(runs):
            path = out / name
            yield _csv(path.with_name(f"{path.name}.csv"), *chart.table())
            figure = picture([chart])
            for kind in ("svg", "png"):
                file = path.with_name(f"{path.name}.{kind}")
                with whole(file) as temporary:
                    figure.savefig(temporary, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
                yield file


def _tables(runs: list[Run], out: Path) -> Iterator[Path]:
    """SAEs with all their last figures, letters at every evaluation, absorbed words and the event log."""
    saes = [sae for run in runs for sae in run.saes]
    figures = [
        {name: getattr(sae, name) for name in PLAIN} | {k: v for k, v in sae.final.items() if number(v) is not None}
        for sae in saes
    ]
    yield _records(out / "saes.csv", figures)
    for name, attribute in (("letters", "letters"), ("words", "words")):
        yield _records(out / f"{name}.csv", ({"sae": s.label, **row} for s in saes for row in getattr(s, attribute)))
    yield _records(out / "events.csv", (row | {"sae": s.label} for s in saes for row in s.event_log.get("events", [])))


def _records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    rows = list(records)
    head = list(dict.fromkeys(name for row in rows for name in row))
    return _csv(path, head, [[_cell(row.get(name)) for name in head] for row in rows])


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _csv(path: Path, head: list[str], rows: list[list[Any]]) -> Path:
    with whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows([["" if value is None or value != value else value for value in row] for row in rows])
    return path


def gallery(runs: list[Run]) -> list[tuple[str, Chart]]:
    """Every chart of a report under the name that its files get: curves, grids, trade-offs, each SAE's own."""
    saes = [sae for run in runs for sae in run.saes]
    charts: list[tuple[str, Chart]] = [("training", chart) for chart in curves(saes, styles(saes)[0])]
    charts += [("width-and-l0", chart) for maps in width_maps(saes).values() for _, chart in maps]
    charts += [("width-and-l0", chart) for chart in pareto(saes)]
    charts += [("layers", chart) for chart in by_layer(saes)]
    charts += [("saes", chart) for chart in recall_bars(saes)]
    for sae in saes:
        own = [*density(sae), *letter_maps(sae), *event_charts(sae), *letter_charts(sae)]
        charts += [(f"saes/{_folder(sae, runs)}", chart) for chart in own]
    return [(f"{folder}/{chart.key}", chart) for folder, chart in charts]


def _folder(sae: TrainedSAE, runs: list[Run]) -> str:
    return f"{sae.run}/{sae.name}" if len(runs) > 1 else sae.name
