"""The report of one or several runs: verdict, SAEs, curves, grids, letters, words, latents, facts."""

from __future__ import annotations

from typing import Any

from sae_train.config import groups as setting_groups
from sae_train.report.cells import cells
from sae_train.report.data import Run
from sae_train.report.latents import latent_lists
from sae_train.report.render import render
from sae_train.report.text import duration, left_out, number, tick
from sae_train.report.words import word_columns, word_lists


def page(runs: list[Run], refresh: int = 0) -> str:
    """Return the whole report; a browser loads it again after `refresh` seconds."""
    saes = [sae for run in runs for sae in run.saes]
    words, cut = word_lists(saes)
    return render(
        "report.html",
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs compared",
        refresh=refresh,
        runs=runs,
        saes=saes,
        notes=list(dict.fromkeys(note for run in runs for note in run.notes + run.gaps)),
        sampled=next((n for run in runs if (n := run.setting("eval_words"))), None),
        owned=[(sae, run) for run in runs for sae in run.saes],
        cells=cells(runs),
        words=words,
        cut=cut,
        columns=word_columns(saes),
        latents=latent_lists(saes),
        facts=[(run, _facts(run)) for run in runs],
    )


def _facts(run: Run) -> dict[str, Any]:
    """How the run was made; empty groups are left out."""
    facts = run.facts
    tokens, seconds = number(facts.get("tokens")), number(facts.get("seconds"))
    rate = f" ({tick(float(f'{tokens / seconds:.3g}'))} tokens/s)" if tokens and seconds else ""
    rows = {
        "command": facts.get("command") or "not recorded",
        "status": facts.get("status") or "unknown",
        "tokens": tick(tokens) if tokens else None,
        "time": duration(seconds) + rate if seconds else None,
        "left out as outliers": left_out(facts),
        "git commit": facts.get("git_commit") or "not known",
        "hardware": facts.get("hardware"),
        "versions": facts.get("versions"),
    }
    settings = facts.get("settings") or {}
    for group, model in setting_groups().items():
        rows[f"settings: {group}"] = {name: settings[name] for name in model.model_fields if name in settings}
    return {name: value for name, value in rows.items() if value}
