"""The page of one evaluated SAE: its scores beside its baselines, label by label, word by word."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sae_train.report.data import TrainedSAE
from sae_train.report.findings import FAMILY
from sae_train.report.interventions import margin_chart, mean_changes
from sae_train.report.letters import letter_charts
from sae_train.report.readers import plain
from sae_train.report.render import render
from sae_train.report.text import duration, noun_of
from sae_train.report.words import word_columns, word_lists

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from sae_train.evals.result import AbsorptionResult
    from sae_train.report.suite import SuiteTable

RECALL = "absorption/mean_recall_main"


def eval_page(
    result: AbsorptionResult, baselines: dict[str, dict[str, float]], interventions: pd.DataFrame | None,
    about: dict[str, str], suite: Sequence[SuiteTable] = (),
) -> str:  # fmt: skip
    """Return the whole page; an invalid result gets its reason and no score."""
    sae = record_of(result, baselines, about)
    words, cut = word_lists([sae])
    changes = mean_changes(interventions)
    return render(
        "eval.html",
        title=f"Absorption of {sae.name}",
        sae=sae,
        about=about,
        letter_charts=letter_charts(sae),
        changes=changes,
        margin=margin_chart(changes),
        clean=interventions["clean"].mean() if changes and interventions is not None else None,
        n_edited=len(interventions) if interventions is not None else 0,
        columns=word_columns([sae]),
        words=words,
        cut=cut,
        latents=[],
        suite=suite,
        settings=_settings(result, about),
    )


def record_of(
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


def _settings(result: AbsorptionResult, about: dict[str, str]) -> dict[str, Any]:
    rows: dict[str, Any] = {**about, "seed": result.seed, "asset hash": result.asset_hash}
    if result.seconds:
        rows["time"] = {"all": duration(result.seconds)} | {k: duration(v) for k, v in result.timings.items()}
    rows |= {name.replace("_", " "): _short(value) for name, value in result.details.items()}
    if result.thresholds is not None:
        rows["thresholds"] = _short(asdict(result.thresholds))
    return rows


def _short(value: Any) -> Any:
    """Settings as they are read: short numbers, groups within groups as pairs."""
    if isinstance(value, dict):
        return {name: _pairs(inner) if isinstance(inner, dict) else _short(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    return "–" if value is None else value


def _pairs(group: dict[str, Any]) -> str:
    return "; ".join(f"{name} {_short(value)}" for name, value in group.items())
