"""What the benchmark writes: tidy CSV rows, and a markdown table per problem."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.csv_rows import machine, quantiles

if TYPE_CHECKING:
    from benchmarks.kernels.bench_problem import Problem

COLUMNS = (
    "date", "machine", "threads", "load", "versions", "device", "arch", "d_in", "d_sae", "batch", "k", "side",
    "setting", "part", "n", "p20", "p50", "p80", "floor_share", "transient_mib", "memory_method",
)  # fmt: skip
FLOOR = "encoder GEMM"


def rows_of(p: Problem, sides: list[Any], threads: int) -> list[dict[str, Any]]:
    """Return one row per side and part; floor_share is the encoder GEMM's median, at that precision, over its own."""
    floors = {side.equalised: statistics.median(side.ms) for side in sides if side.name == FLOOR}
    common = {
        "date": time.strftime("%Y-%m-%dT%H:%M"), "machine": machine(p.device), "threads": threads,
        "load": round(os.getloadavg()[0], 2), **vars(p),
    }  # fmt: skip
    out = []
    for side in sides:
        own = {"side": side.name, "setting": _setting(side), "versions": side.built["versions"]}
        floor = floors.get(side.equalised, floors.get(False))
        share = round(floor / statistics.median(side.ms), 3) if floor else ""
        memory = {"transient_mib": round(side.memory["mib"], 1), "memory_method": side.memory["method"]}
        for part, ms in {"step": side.ms, **side.parts}.items():
            extra = {"floor_share": share, **memory} if part == "step" else {}
            out.append({**common, **own, "part": part, "n": len(ms), **quantiles(ms), **extra})
    return out


def _setting(side: Any) -> str:
    return "equalised" if side.equalised else "as shipped"


def table(p: Problem, rows: list[dict[str, Any]]) -> str:
    """Return a markdown table: steps, parts, ratio to the first side, share of the floor, memory."""
    steps = [row for row in rows if row["part"] == "step"]
    title = f"{p.arch}, d_in {p.d_in}, d_sae {p.d_sae}, batch {p.batch}, L0 {p.k}, {p.device}"
    lines = [f"\n{title} ({steps[0]['machine']}, {steps[0]['threads']} threads, load {steps[0]['load']})", ""]
    lines += ["| side | setting | ms p50 (p20–p80) | × first | forward | backward | optimiser | floor | MiB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in steps:
        parts = [_part(rows, row, part) for part in ("forward", "backward", "optimiser")]
        ratio = row["p50"] / steps[0]["p50"]
        cells = [row["side"], row["setting"], f"{row['p50']:.0f} ({row['p20']:.0f}–{row['p80']:.0f})", f"{ratio:.2f}"]
        share = f"{100 * row['floor_share']:.0f} %" if row["floor_share"] != "" else "–"
        lines.append("| " + " | ".join([*cells, *parts, share, f"{row['transient_mib']:.0f}"]) + " |")
    return "\n".join(lines)


def _part(rows: list[dict[str, Any]], step: dict[str, Any], part: str) -> str:
    own = [r for r in rows if r["part"] == part and (r["side"], r["setting"]) == (step["side"], step["setting"])]
    return f"{own[0]['p50']:.0f}" if own else "–"
