"""What the benchmarks share: rows of plain values are added to a CSV file, with the processor's name."""

from __future__ import annotations

import csv
import os
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


def machine(device: str) -> str:
    """Return the name of the processor with its number of cores, or the GPU's."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    return f"{cpu()} x {os.cpu_count()}"


def quantiles(values: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    values = sorted(values)
    ranks = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {name: round(values[round(share * (len(values) - 1))], 3) for name, share in ranks.items()}


def append(out: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with a header where the file is new."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.is_file()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
