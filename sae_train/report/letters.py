"""One SAE label by label at its last evaluation, as charts. "Letter" stands for any label of the hierarchy."""

from __future__ import annotations

from typing import Any

from sae_train.evals.outcomes import OUTCOMES
from sae_train.report.data import TrainedSAE, outcomes_of
from sae_train.report.findings import MEASURES, OUTCOME_LEGEND, chance_level, chance_name, measure_name
from sae_train.report.shapes import Chart, Dots, Mark, Row, Stacked
from sae_train.report.text import number

COLOURS = [f"out{i}" for i in range(len(OUTCOMES))]


def letter_charts(sae: TrainedSAE) -> list[Chart]:
    """Scores with intervals, outcomes and splitting of each label; empty without labels."""
    if sae.invalid or not any(row.get("counts") for row in sae.last_letters):
        return []
    charts = [*(_scores(sae, measure) for measure in MEASURES), _outcomes(sae), _splitting(sae)]
    return [chart for chart in charts if chart]


def recall_bars(saes: list[TrainedSAE]) -> list[Chart]:
    """Where the recall of each SAE's main latents goes, one bar an SAE; empty where it was not kept."""
    rows = [(sae.label, sae.outcomes) for sae in saes if sae.outcomes and not sae.invalid]
    if not rows:
        return []
    note = f"means over {saes[0].nouns}:"
    return [Stacked("recall-by-sae", "Where recall goes", note, rows, list(OUTCOMES), COLOURS, legend=OUTCOME_LEGEND)]


def _scores(sae: TrainedSAE, measure: str) -> Chart | None:
    family = not (sae.causal and measure == "full")
    mean, chance = sae.get(MEASURES[measure]), chance_level(sae, measure)
    rows = [Row(str(row["letter"]), *_marks(row, measure, family)) for row in sae.last_letters]
    if not any(row.marks for row in rows):
        return None
    entries = [("dot c0", "score with 95 % interval" if _has_interval(sae, measure) else "score")]
    hollow = any(mark.css.startswith("ring") for row in rows for mark in row.marks)
    entries += [("ring c1", "family-corrected")] if hollow else []
    entries += [("rule mean", "mean")] if mean is not None else []
    entries += [("rule random", chance_name(sae, measure))] if chance is not None else []
    lines = [(value, css) for value, css in ((mean, "mean"), (chance, "random")) if value is not None]
    title = f"Absorption, {measure_name(sae, measure)}, by {sae.noun}"
    return Dots(f"{measure}-by-label", title, "", rows, lines=lines, legend=entries)


def _marks(row: dict[str, Any], measure: str, family: bool) -> tuple[list[Mark], str]:
    if not row.get("counts"):
        return [], "does not count"
    low, high = (number(row.get(f"{measure}_{end}")) for end in ("low", "high"))
    marks = [Mark(measure, number(row.get(measure)), "dot c0", low, high)]
    corrected = number(row.get(f"{measure}_family")) if family else None
    if corrected is not None:
        marks.append(Mark(f"{measure}, family-corrected", corrected, "ring c1"))
    return marks, ""


def _has_interval(sae: TrainedSAE, measure: str) -> bool:
    return any(number(row.get(f"{measure}_low")) is not None for row in sae.last_letters)


def _outcomes(sae: TrainedSAE) -> Chart | None:
    rows = [(str(row["letter"]), outcomes_of(row) if row.get("counts") else None) for row in sae.last_letters]
    if not any(shares for _, shares in rows):
        return None
    rows = ([("all", sae.outcomes)] if sae.outcomes else []) + rows
    title = f"Where recall goes, by {sae.noun}"
    return Stacked("recall-by-label", title, "", rows, list(OUTCOMES), COLOURS, legend=OUTCOME_LEGEND)


def _splitting(sae: TrainedSAE) -> Chart:
    names = {
        "f1_k1": ("best latent", "dot c7"),
        "f1_split": ("main latents", "dot c0"),
        "probe_f1": ("probe", "ring c1"),
    }
    rows = []
    for row in sae.last_letters:
        marks = [Mark(f"F1 of the {name}", number(row.get(k)), css) for k, (name, css) in names.items()]
        split = number(row.get("n_split"))
        note = "does not count" if not row.get("counts") else "" if split is None else f"{split:.0f}"
        rows.append(Row(str(row["letter"]), marks if row.get("counts") else [], note))
    title = f"F1 and splitting, by {sae.noun}"
    least = min((mark.value for row in rows for mark in row.marks if mark.value is not None), default=0.0)
    span, legend = (max(least - 0.05, 0), 1.02), [(css, name) for name, css in names.values()]
    return Dots("f1-by-label", title, "at the right: number of main latents", rows, span, right=30, legend=legend)
