"""The report's tables: SAEs side by side, one SAE beside its baselines, width × L0 grids.

In: SAEs. Out: HTML, all strings escaped.
"""

from __future__ import annotations

from typing import Any

from sae_train.report.data import TrainedSAE
from sae_train.report.figures import grid
from sae_train.report.findings import FAMILY, MEASURES, family_name, measure_name
from sae_train.report.shell import table
from sae_train.report.text import ABSENT, escape, fixed, interval, nouns, percent, short, target

GRIDS = {
    "Explained variance": "metrics/explained_variance",
    "Absorption, fraction": MEASURES["fraction"],
    "Absorption, full": MEASURES["full"],
    "MCC": "toy/mcc",
    "True absorption": "toy/absorption",
    "Absorption seen by a k-sparse probe": "toy/absorption_split",
}
TRUTH = {
    "mcc": "MCC",
    "recovered": "recovered",
    "f1": "F1",
    "absorption": "absorption",
    "absorption_weighted": "by frequency",
    "absorption_split": "to a k-sparse probe",
    "parent_precision": "precision, parent",
    "parent_recall": "recall, parent",
    "encoder_child": "child in parent’s encoder",
    "decoder_parent": "parent in child’s decoder",
}
BASELINES = {
    "random": ("random SAE", "random directions, same width and L0"),
    "shuffled_labels": ("shuffled labels", "this SAE, asked for labels dealt at random"),
    "random_directions": ("random directions", "this SAE, random vectors for the probe"),
    "probe": ("probe", "its read-outs as latents: upper bound of recall"),
}
MOST_ROWS = 16  # a longer table scrolls within its own height
PROJECTED = ("shuffled_labels", "random_directions", "probe")  # scored so by every preset
COLUMNS = {
    "mean_fraction": "fraction",
    "mean_full": "full",
    "mean_full_family": "full, family",
    "mean_recall_main": "recall, main latents",
    "mean_f1": "F1, best latent",
}


def overview(saes: list[TrainedSAE]) -> str:
    """One row per SAE: asked and reached, quality, absorption with intervals, baselines, status."""
    beside = [name for name in BASELINES if name == "random" or any(sae.baselines.get(name) for sae in saes)]
    with_family = any(sae.get(FAMILY) is not None for sae in saes)
    head = ["SAE", "L0 asked", "L0 reached", "EV", "CE recovered", "dead"]
    scores = [f"absorption, {measure_name(saes[0], measure)}" for measure in MEASURES]
    scores += [family_name(saes[0])] if with_family else []
    ways = [", by projections" if saes[0].causal and name in PROJECTED else "" for name in beside]
    scores += [BASELINES[name][0] + way for name, way in zip(beside, ways, strict=True)] + [
        escape(nouns(saes[0].noun)),
        "mean F1",
    ]
    rows = [_overview_row(sae, beside, with_family, len(scores)) for sae in saes]
    return table(head + scores, rows, "sortable", tall=len(rows) > MOST_ROWS)


def baselines(sae: TrainedSAE, whole: bool = False) -> str:
    """One SAE's scores beside those of its baselines, of all of them if whole; empty where none was evaluated."""
    if sae.invalid or not any(sae.baselines.get(name) for name in BASELINES):
        return ""
    own = {name: sae.get(f"absorption/{name}") for key in COLUMNS for name in (key, f"{key}_low", f"{key}_high")}
    beside = {name: sae.baselines.get(name) or {} for name in BASELINES}
    known = {name for figures in (own, *beside.values()) for name in figures if figures[name] is not None}
    columns = [name for name in COLUMNS if whole or name in known]
    rows = [["<b>this SAE</b>", *(_spanned(own, name) for name in columns)]]
    for name, (title, note) in BASELINES.items():
        if beside[name] or whole:
            cells = [_spanned(beside[name], column) + _way(sae, name, beside[name], column) for column in columns]
            rows.append([f"{title}<br><small>{note}</small>", *cells])
    titles = COLUMNS | {"mean_full": measure_name(sae, "full"), "mean_full_family": family_name(sae)}
    return table(["", *(titles[name] for name in columns)], rows, "beside")


def truth(saes: list[TrainedSAE]) -> str:
    """SAEs of a toy against its dictionary; empty where none was."""
    known = [sae for sae in saes if sae.get("toy/mcc") is not None]
    names = [name for name in TRUTH if any(sae.get(f"toy/{name}") is not None for sae in known)]
    rows = [[escape(sae.label), *(fixed(sae.get(f"toy/{name}")) for name in names)] for sae in known]
    return table(["SAE", *(TRUTH[name] for name in names)], rows, "sortable") if rows else ""


def grids(saes: list[TrainedSAE]) -> str:
    """Width × L0 tables with shaded numbers: one block a metric, one table an architecture."""
    blocks = []
    for title, metric in GRIDS.items():
        tables = grid(saes, metric)
        found = [v for _, _, values in tables.values() for row in values for v in row if v is not None]
        if not found:
            continue
        maps = ""
        for name, (widths, targets, values) in tables.items():
            rows = [
                [w, *(_shaded(v, min(found), max(found)) for v in row)] for w, row in zip(widths, values, strict=True)
            ]
            head = ["<small>width ↓ L0 →</small>", *targets]
            maps += f'<div class="cell-map"><small>{escape(name)}</small>{table(head, rows, "map")}</div>'
        blocks.append(f'<div class="metric"><h3>{escape(title)}</h3><div class="maps">{maps}</div></div>')
    return f'<div class="metrics">{"".join(blocks)}</div>' if blocks else ""


def _overview_row(sae: TrainedSAE, beside: list[str], with_family: bool, n_scores: int) -> list[str]:
    cells = [escape(sae.label), target(sae.l0), short(sae.get("metrics/l0"))]
    cells += [fixed(sae.get(f"metrics/{name}")) for name in ("explained_variance", "ce_loss_score")]
    cells.append(percent(sae.dead))
    reason = f"failed: {sae.failed}" if sae.failed else f"no valid score: {sae.invalid}" if sae.invalid else ""
    if reason:
        return [*cells, f'<td colspan="{n_scores}" class="reason">{escape(reason)}</td>']
    cells += [_spanned(sae.final, metric) for metric in MEASURES.values()]
    cells += [fixed(sae.get(FAMILY))] if with_family else []
    cells += [_pair(sae.baselines.get(name) or {}) for name in beside]
    return [*cells, fixed(sae.get("absorption/n_letters"), 0), fixed(sae.get("absorption/mean_f1"), 2)]


def _pair(figures: dict[str, Any]) -> str:
    pair = [fixed(figures.get(f"mean_{measure}")) for measure in MEASURES]
    return " / ".join(pair) if set(pair) != {ABSENT} else ABSENT


def _way(sae: TrainedSAE, baseline: str, figures: dict[str, Any], column: str) -> str:
    """A full score of another kind than its column's says so."""
    other = sae.causal and baseline in PROJECTED and column == "mean_full" and figures.get(column) is not None
    return " <small>by projections</small>" if other else ""


def _spanned(figures: dict[str, Any], name: str) -> str:
    span = interval(figures.get(f"{name}_low"), figures.get(f"{name}_high"))
    return fixed(figures.get(name)) + (f" <small>{span}</small>" if span else "")


def _shaded(value: float | None, low: float, high: float) -> str:
    if value is None:
        return ABSENT
    share = (value - low) / (high - low) if high > low else 0
    return f'<td style="--share:{6 + 60 * share:.0f}%">{fixed(value)}</td>'
