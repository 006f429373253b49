"""The page of one evaluated SAE: a result, its baselines and interventions come in, one HTML text goes out.

It is put together from the parts of the run's report: sentences, tables, charts by label, the words.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sae_train.report import tables
from sae_train.report.data import TrainedSAE
from sae_train.report.findings import (
    FAMILY,
    MEASURES,
    absorption,
    family,
    family_name,
    lost,
    meaning,
    measure_name,
    weak,
)
from sae_train.report.glossary import glossary
from sae_train.report.interventions import intervention_section
from sae_train.report.letters import letter_charts, letter_table, probe_table
from sae_train.report.readers import plain
from sae_train.report.shell import document, flat, folded, paragraphs, section, tiles
from sae_train.report.svg import shown
from sae_train.report.text import duration, escape, fixed, interval, noun_of, nouns, short
from sae_train.report.words import word_lists, word_section

if TYPE_CHECKING:
    import pandas as pd

    from sae_train.evals.result import AbsorptionResult

RECALL = "absorption/mean_recall_main"


def eval_page(
    result: AbsorptionResult, baselines: dict[str, dict[str, float]], interventions: pd.DataFrame | None,
    about: dict[str, str],
) -> str:  # fmt: skip
    """Return the whole page; an invalid result gets its reason and no score."""
    sae = evaluated(result, baselines, about)
    title = f"Absorption of {sae.name}"
    words, cut = word_lists([sae])
    sections = [_top(title, sae, about), _beside(sae), _by_label(sae)]
    if not sae.invalid:
        sections += [intervention_section(interventions, sae.noun), word_section([sae], cut, "Words", _lead(sae))]
    return document(title, [*sections, _settings(result, about)], {"words": words, "latents": "[]"})


def evaluated(
    result: AbsorptionResult, baselines: dict[str, dict[str, float]], about: dict[str, str]
) -> TrainedSAE:  # fmt: skip
    """The result as the report's record of an SAE."""
    name = str(about.get("SAE", "this SAE"))
    letters = [{"step": 0} | plain(row) for row in result.by_letter.to_dict("records")]
    return TrainedSAE(
        name=name, label=name, run=name, arch="", width=None, l0=None, seed=None, failed=None,
        invalid=None if result.valid else result.reason or "no reason was recorded", final=_figures(result),
        baselines={name: dict(figures) for name, figures in baselines.items() if figures}, history=[], letters=letters,
        words=[plain(row) for row in result.words.to_dict("records")] if result.valid else [],
        noun=noun_of((result.details.get("assets") or {}).get("hierarchy")), preset=result.preset,
    )  # fmt: skip


def _figures(result: AbsorptionResult) -> dict[str, Any]:
    """The result under the names of metrics.jsonl, with an interval wherever it has one."""
    figures = result.metrics() | {"metrics/l0": result.l0, "metrics/explained_variance": result.ev}
    for metric in (FAMILY, RECALL) if result.valid else ():
        low, high = result.interval(metric.removeprefix("absorption/"))
        figures |= {f"{metric}_low": low, f"{metric}_high": high}
    return figures


def _top(title: str, sae: TrainedSAE, about: dict[str, str]) -> str:
    facts = [f"{escape(name)}: <code>{escape(value)}</code>" for name, value in about.items() if name != "SAE"]
    body = f'<p class="about">{" · ".join(facts)}</p>' if facts else ""
    sentences = [part(sae) for part in (absorption, family, lost, weak)]
    if not sae.invalid:
        body += _tiles(sae)
    body += f'<div class="verdict">{paragraphs([sentence for sentence in sentences if sentence])}</div>'
    if not sae.invalid:
        body += paragraphs([meaning(sae), _caveat(sae)], "note") + glossary(sae.noun, with_family=True)
    return f"<header><h1>{escape(title)}</h1>{body}</header>"


def _caveat(sae: TrainedSAE) -> str:
    text = "Intervals are 95 % bootstraps over the evaluated words; other training seeds would differ more."
    if sae.causal:
        text += (
            f" The preset {escape(sae.preset)} takes the causal rate for <i>full</i>: the share of words on which the "
            "model’s answer owes most to one latent that is not a main one. Fractions, family-corrected rates and "
            "where recall goes are by projections."
        )
    return text


def _tiles(sae: TrainedSAE) -> str:
    cells = []
    names = {f"absorption, {measure_name(sae, measure)}": metric for measure, metric in MEASURES.items()}
    names |= {family_name(sae): FAMILY, "recall of main latents": RECALL}
    for name, metric in names.items():
        span = interval(sae.get(f"{metric}_low"), sae.get(f"{metric}_high"))
        cells.append((name, fixed(sae.get(metric)), span))
    noun = escape(sae.noun)
    counting = fixed(sae.get("absorption/n_letters"), 0)
    cells += [
        (f"F1 of {noun} latents", fixed(sae.get("absorption/mean_f1"), 2), f"mean over {nouns(noun)}"),
        (f"{nouns(noun)} that count", counting, f"of {len(sae.last_letters)}"),
        ("L0", short(sae.get("metrics/l0")), "active latents per test word"),
        ("explained variance", fixed(sae.get("metrics/explained_variance")), "of test words"),
    ]
    return tiles(cells)


def _beside(sae: TrainedSAE) -> str:
    found = tables.baselines(sae, whole=True)
    lead = (
        "Small numbers are 95 % intervals over words. A broken SAE absorbs nothing, so read scores with recall and F1."
    )
    return section("Beside its baselines", found, lead=lead) if found else ""


def _by_label(sae: TrainedSAE) -> str:
    if not sae.letters:
        return ""
    title = f"By {escape(sae.noun)}"
    if sae.invalid:
        return section(
            title, probe_table(sae), lead=f"Which {escape(nouns(sae.noun))} a linear probe reads off the model."
        )
    return section(
        title,
        shown(letter_charts(sae)) + letter_table(sae),
        lead="Hover a mark for its value. Click a heading to sort.",
    )


def _lead(sae: TrainedSAE) -> str:
    noun = "letter" if sae.noun == "letter" else "label"
    return (
        f"All words that the probe reads right, the most absorbed first; search by word, {noun}, latent or outcome. "
        f"Beside each absorber is the cosine of its decoder row with the {noun}’s probe; share is what the first one "
        "carries of the activation’s projection on the probe."
    )


def _settings(result: AbsorptionResult, about: dict[str, str]) -> str:
    rows = [[escape(name), escape(value)] for name, value in about.items()]
    rows += [["seed", str(result.seed)], ["asset hash", escape(result.asset_hash)]]
    if result.seconds:
        took = {name: duration(seconds) for name, seconds in result.timings.items()}
        rows.append(["time", f"{duration(result.seconds)} {flat(took)}"])
    rows += [[escape(name.replace("_", " ")), flat(_short(value))] for name, value in result.details.items()]
    if result.thresholds is not None:
        rows.append(["thresholds", flat(_short(asdict(result.thresholds)))])
    return section("How it was measured", folded("Settings and thresholds", rows))


def _short(value: Any) -> Any:
    """Settings as they are read: short numbers, groups within groups as pairs."""
    if isinstance(value, dict):
        return {name: _pairs(inner) if isinstance(inner, dict) else _short(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    return "–" if value is None else value


def _pairs(group: dict[str, Any]) -> str:
    return "; ".join(f"{name} {_short(value)}" for name, value in group.items())
