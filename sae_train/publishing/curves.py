"""A run's curves as one picture, for model cards and W&B: the report's charts, from rows of metrics.jsonl alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_train.files import whole
from sae_train.report.data import saes_in
from sae_train.report.figures import curves
from sae_train.report.plates import picture

PANELS = ("ev", "l0", "ce", "dead", "fraction", "full", "mcc", "toy")
LOOK = "metrics/explained_variance"  # rows that have it were looked at on held-out text


def write_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figures that the rows have as PNG, a line per SAE over training tokens."""
    saes = saes_in([row for row in rows if row.get(LOOK) is not None])
    css = [f"c{i % 8} d{i // 8 % 4} o0" for i in range(len(saes))]
    charts = {chart.key: chart for chart in curves(saes, css)}
    figure = picture([charts[key] for key in PANELS if key in charts], columns=2)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
