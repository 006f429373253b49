"""One SAE label by label: its last evaluation comes in; charts with intervals and a table go out.

"Letter" stands for any label of the hierarchy.
"""

from __future__ import annotations

from typing import Any

from sae_train.evals.outcomes import OUTCOMES
from sae_train.report.data import TrainedSAE, outcomes_of
from sae_train.report.findings import MEASURES, family_name, measure_name, outcome_key
from sae_train.report.marks import key
from sae_train.report.shapes import Chart, Dots, Mark, Row, Stacked
from sae_train.report.shell import table
from sae_train.report.text import escape, fixed, label_name, nouns, number

COLOURS = [f"out{i}" for i in range(len(OUTCOMES))]


def letter_charts(sae: TrainedSAE) -> list[Chart]:
    """Scores with intervals, outcomes and splitting of each label; empty without labels."""
    if sae.invalid or not any(row.get("counts") for row in sae.last_letters):
        return []
    found = [*(_scores(sae, measure) for measure in MEASURES), _outcomes(sae), _splitting(sae)]
    return [chart for chart in found if chart]


def letter_table(sae: TrainedSAE) -> str:
    """The last evaluation by label."""
    head = [escape(sae.noun), *(measure_name(sae, measure) for measure in MEASURES)]
    with_family = any("full_family" in row for row in sae.last_letters)
    head += [family_name(sae)] if with_family else []
    head += [
        "fully absorbed / words",
        "main latents",
        "F1, best latent",
        "F1, main latents",
        "recall, main",
        "probe F1",
    ]
    return table(head, [_letter_row(row, with_family) for row in sae.last_letters], "sortable letters")


def probe_table(sae: TrainedSAE) -> str:
    """Which labels count and why: all that is to be said of them where the score is not valid."""
    head = [escape(sae.noun), "counts", "probe F1", "words"]
    rows = [
        [escape(label_name(row["letter"])), "yes" if row.get("counts") else "no", fixed(row.get("probe_f1"), 2),
         fixed(row.get("n_tp"), 0)]
        for row in sae.last_letters
    ]  # fmt: skip
    return table(head, rows, "sortable letters")


def recall_bars(saes: list[TrainedSAE]) -> list[Chart]:
    """Where the recall of each SAE's main latents goes, one bar an SAE; empty where it was not kept."""
    rows = [(sae.label, sae.outcomes) for sae in saes if sae.outcomes and not sae.invalid]
    note = "means over " + escape(nouns(saes[0].noun if saes else "letter")) + f": {key(outcome_key())}"
    return [Stacked("recall-by-sae", "Where recall goes", note, rows, list(OUTCOMES), COLOURS)] if rows else []


def _scores(sae: TrainedSAE, measure: str) -> Chart | None:
    family = not (sae.causal and measure == "full")
    mean, random = sae.get(MEASURES[measure]), number(sae.baseline.get(f"mean_{measure}"))
    rows = [Row(str(row["letter"]), *_marks(row, measure, family)) for row in sae.last_letters]
    if not any(row.marks for row in rows):
        return None
    entries = [("dot c0", "score with 95 % interval" if _with_interval(sae, measure) else "score")]
    hollow = any(mark.css.startswith("ring") for row in rows for mark in row.marks)
    entries += [("ring c1", "family-corrected")] if hollow else []
    entries += [("rule mean", "mean")] if mean is not None else []
    entries += [("rule random", "random SAE")] if random is not None else []
    lines = [(value, css) for value, css in ((mean, "mean"), (random, "random")) if value is not None]
    title = f"Absorption, {measure_name(sae, measure)}, by {sae.noun}"
    return Dots(f"{measure}-by-label", title, key(entries), rows, lines=lines)


def _marks(row: dict[str, Any], measure: str, family: bool) -> tuple[list[Mark], str]:
    if not row.get("counts"):
        return [], "does not count"
    low, high = (number(row.get(f"{measure}_{end}")) for end in ("low", "high"))
    marks = [Mark(measure, number(row.get(measure)), "dot c0", low, high)]
    corrected = number(row.get(f"{measure}_family")) if family else None
    if corrected is not None:
        marks.append(Mark(f"{measure}, family-corrected", corrected, "ring c1"))
    return marks, ""


def _with_interval(sae: TrainedSAE, measure: str) -> bool:
    return any(number(row.get(f"{measure}_low")) is not None for row in sae.last_letters)


def _outcomes(sae: TrainedSAE) -> Chart | None:
    rows = [(str(row["letter"]), outcomes_of(row) if row.get("counts") else None) for row in sae.last_letters]
    if not any(shares for _, shares in rows):
        return None
    rows = ([("all", sae.outcomes)] if sae.outcomes else []) + rows
    title = f"Where recall goes, by {sae.noun}"
    return Stacked("recall-by-label", title, key(outcome_key()), rows, list(OUTCOMES), COLOURS)


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
    note = key([(css, name) for name, css in names.values()]) + " at the right: number of main latents"
    return Dots("f1-by-label", title, note, rows, (max(least - 0.05, 0), 1.02), right=30)


def _letter_row(row: dict[str, Any], with_family: bool) -> list[str]:
    letter = escape(label_name(row["letter"]))
    if not row.get("counts"):
        reason = f"does not count: its probe has F1 {fixed(row.get('probe_f1'), 2)}"
        return [letter, f'<td colspan="{7 + with_family}" class="reason">{reason}</td>', fixed(row.get("probe_f1"), 2)]
    cells = [_bar(row.get("fraction")), _bar(row.get("full"))]
    cells += [fixed(row.get("full_family"))] if with_family else []
    full, main = number(row.get("n_full")), [str(int(latent)) for latent in row["main_latents"]]
    cells.append(f"{fixed(full, 0)} / {fixed(row.get('n_tp'), 0)}")
    cells.append(f"{fixed(row.get('n_split'), 0)} <small>{', '.join(main[:4])}{', …' if len(main) > 4 else ''}</small>")
    figures = (row.get(name) for name in ("f1_k1", "f1_split", "recall_main", "probe_f1"))
    return [letter, *cells, *(fixed(value, 2) for value in figures)]


def _bar(value: object) -> str:
    share = min(max(number(value) or 0, 0), 1)
    return f'<td class="bar" style="--share:{100 * share:.1f}%">{fixed(value)}</td>'
