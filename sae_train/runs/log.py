"""What a run leaves behind as it goes: run.json, metrics.jsonl, tables of the eval, and the door to a mirror.

Its files are whole at any moment: rows are appended, all else is renamed into place.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.errors import explaining, first_line
from sae_train.files import finite, keep_lines, read_metrics, write_json, write_parquet

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = (
    "sae-train",
    "torch",
    "transformers",
    "transformer-lens",
    "datasets",
    "accelerate",
    "numpy",
    "triton",
)


def provenance() -> dict[str, Any]:
    """Versions, hardware and the git commit of the code that runs; unknown parts are None."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpus": gpus,
        },
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the checkout that holds this package; None for an installed copy or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def final_figures(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest value of every figure of a run's metrics.jsonl, by SAE."""
    finals: dict[str, dict[str, Any]] = {}
    for row in read_metrics(folder):
        finals.setdefault(row.get("sae"), {}).update(row)
    return finals


class GrowingTable:
    """A Parquet file to which rows are added; each time it is rewritten whole."""

    def __init__(self, path: Path):
        self.path = path
        self._parts: list[pd.DataFrame] = []

    def add(self, tables: list[pd.DataFrame]) -> None:
        """Add rows; no table, no write."""
        import pandas as pd

        if tables:
            self._parts = [pd.concat(self._parts + tables, ignore_index=True)]
            write_parquet(self.path, self._parts[0])

    def rewind(self, reached: dict[str, int]) -> None:
        """Keep only rows up to the step that each SAE has reached."""
        import pandas as pd

        if self.path.exists():
            with explaining(lambda error: f"{str(self.path)!r} cannot be read: {first_line(error)}; move it away"):
                table = pd.read_parquet(self.path)
            self._parts = [table[table["step"] <= table["sae"].map(reached).fillna(-1)]]


class RunLog:
    """The files of one run folder: absorption holds letters (and the last words), trajectory all words at all looks.

    `rewind` forgets what lies after a saved state.
    """

    def __init__(self, folder: Path, mirror: Mirror | None = None):
        self.folder = folder
        self.mirror = mirror or Mirror()
        self.absorption = GrowingTable(folder / "absorption.parquet")
        self.trajectory = GrowingTable(folder / "trajectory.parquet")

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def write_run(self, content: dict[str, Any]) -> None:
        write_json(self.folder / "run.json", content)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row (one SAE, one step) to metrics.jsonl and to the mirror."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")
        self.mirror.log(row)

    def rewind(self, reached: dict[str, int]) -> None:
        """Keep only rows up to the step that each SAE has reached, so that a resumed run logs every step once."""
        keep_lines(self.metrics_path, lambda row: row["step"] <= reached.get(row["sae"], -1))
        self.absorption.rewind(reached)
        self.trajectory.rewind(reached)


class Mirror:
    """No mirror: takes rows and does nothing, so that the loop has no `if`."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one row of metrics.jsonl."""

    def show(self) -> None:
        """Take what a finished run's folder has to show."""

    def close(self) -> None:
        """End the mirror."""
