"""What the benchmarks share: rows of plain values are added to a CSV file, with the processor's name."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def append(out: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with a header where the file is new."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.is_file()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
