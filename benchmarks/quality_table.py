"""The two Markdown tables of quality.py, with figures read off at a wanted L0, from benchmarks/results/quality.csv."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FIGURES = ("ev", "loss_recovered", "silent", "dead")
CONFIGURATION = ("model", "tokens", "width", "asked")


def at(ladder: list[dict[str, Any]], l0: float, figures: tuple[str, ...] = FIGURES) -> dict[str, float] | None:
    """Figures at an L0, on a line in log L0 between the nearest SAEs on either side; None where a side is empty."""
    figures = (*figures, "coefficient")
    if len(ladder) == 1 and ladder[0]["arch"] == "topk":  # which is exact
        return {figure: ladder[0][figure] for figure in figures}
    below = [row for row in ladder if 0 < row["l0"] <= l0]
    above = [row for row in ladder if row["l0"] > l0]
    if not below or not above:
        return None
    a, b = max(below, key=lambda row: row["l0"]), min(above, key=lambda row: row["l0"])
    share = math.log(l0 / a["l0"]) / math.log(b["l0"] / a["l0"])
    return {figure: a[figure] + share * (b[figure] - a[figure]) for figure in figures}


def table(results: Path) -> str:
    """Both sides over the seeds, then all that SAELens' best was chosen from; of rows measured again the last count."""
    import pandas as pd

    data = pd.read_csv(results)
    data = data.drop_duplicates([*CONFIGURATION, "side", "candidate", "arch", "seed", "coefficient"], keep="last")
    out = []
    for (_, tokens, width, asked), some in data.groupby(list(CONFIGURATION), sort=False):
        out += [f"Width {width:,}, L0 {asked}, {tokens:,} tokens:", ""]
        out += ["| SAELens' best | | sae-train | SAELens | sae-train is |", "|---|---|---|---|---|"]
        groups = [group for _, group in some.groupby("arch", sort=False)]
        out += [line for group in groups for line in _sides(group)]
        out += ["", "| seed 0, at sae-train's L0 | ev | loss_recovered | silent | dead |", "|---|---|---|---|---|"]
        out += [line for group in groups for line in _candidates(group)] + [""]
    return "\n".join(out)


def _sides(some: pd.DataFrame) -> list[str]:
    mine = some[some["side"] == "sae-train"].set_index("seed")
    peers = some[some["side"] == "SAELens"]
    name = peers[peers["seed"] == max(mine.index)]["candidate"].iloc[-1]  # only the best went on to other seeds
    both = [(own, at(_ladder(peers, name, seed), own["l0"])) for seed, own in mine.iterrows()]
    if not all(theirs for _, theirs in both):
        return [f"| {name} | not on both sides of L0 for each seed | | | |"]
    lines = []
    for figure in FIGURES:
        a, b = [own[figure] for own, _ in both], [theirs[figure] for _, theirs in both]
        sign = 1 if figure in ("ev", "loss_recovered") else -1
        gaps = [sign * (min(a) - max(b)), sign * (max(a) - min(b))]
        verdict = "better" if min(gaps) > 0 else "worse" if max(gaps) < 0 else "not told apart"
        lines.append(f"| {name} | {figure} | {_spread(a)} | {_spread(b)} | {verdict} |")
    return lines


def _candidates(some: pd.DataFrame) -> list[str]:
    own = some[(some["side"] == "sae-train") & (some["seed"] == 0)].iloc[-1]
    peers = some[some["side"] == "SAELens"]
    lines = [f"| sae-train {own['arch']} | " + " | ".join(f"{own[figure]:.4f}" for figure in FIGURES) + " |"]
    for name in sorted(set(peers["candidate"]), key=lambda name: (name.split("-")[:-1], float(name.split("-")[-1]))):
        ladder = _ladder(peers, name, 0)
        peer = at(ladder, own["l0"])
        cells = [f"{peer[figure]:.4f}" for figure in FIGURES] if peer else [_explain_miss(ladder), "", "", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _ladder(peers: pd.DataFrame, name: str, seed: int) -> list[dict[str, Any]]:
    return peers[(peers["candidate"] == name) & (peers["seed"] == seed)].to_dict("records")


def _explain_miss(ladder: list[dict[str, Any]]) -> str:
    return "L0 " + ", ".join(f"{row['l0']:.1f} at coefficient {row['coefficient']:g}" for row in ladder)


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"
