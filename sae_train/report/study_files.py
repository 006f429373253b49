"""Writes a study: its page, and its numbers as files (claims, cells, SAEs, letters)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.errors import explaining
from sae_train.files import write_json, write_text
from sae_train.report.cells import SETTINGS, Cell
from sae_train.report.data import load_runs
from sae_train.report.render import render
from sae_train.report.study import (
    LETTER_METRICS,
    QUESTIONS,
    Study,
    chance_level,
    findings,
    onset,
    random_level,
    read_study,
)
from sae_train.report.study_charts import figures_of
from sae_train.report.text import listed, noun_of, number, plural, target

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

DIGITS = 6  # of what the files hold
BESIDE = {
    "l0_reached": "metrics/l0", "l0_words": "absorption/l0_words", "explained_variance": "metrics/explained_variance",
    "loss_recovered": "metrics/ce_loss_score", "dead": "sparsity/dead_fraction",
}  # fmt: skip


def write_study(folders: Sequence[Path], out: Path, missing: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Write the study of the runs that are there, as `write_tables` does.

    `missing` are parts that are not trained yet, which the page names. UserError where no two cells can be compared.
    """
    study = read_study(load_runs([folder for folder in folders if folder.exists()]))
    study.left_out.extend(f"{name}: not trained yet" for name in missing)
    return write_tables(study, out)


def write_tables(study: Study, out: Path) -> tuple[Path, list[str]]:
    """Write study.html, study.json and four tables as CSV; return the page, and the answers as sentences.

    The same runs give the same files, byte by byte.
    """
    import pandas as pd

    tables = {"claims": _claim_rows(study), "cells": _cell_rows(study), "saes": _sae_rows(study)}
    page = out / "study.html"
    with explaining(lambda error: f"the study cannot be written to {str(out)!r}: {error.strerror}", OSError):
        for name, rows in (tables | {"letters": _letter_rows(study)}).items():
            write_text(out / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False))
        settings = {
            name: study.runs[0].setting(name) for name in (*SETTINGS, "hook", "dataset", "dtype", "batch_tokens")
        }
        answers, rest = findings(study)
        found = {"findings": answers | rest, "settings": settings, "left_out": study.left_out}
        write_json(out / "study.json", found | tables)
        write_text(page, _page(study, answers, rest))
    return page, [line for group in answers.values() for line in group]


def _page(study: Study, main: dict[str, list[str]], rest: dict[str, list[str]]) -> str:
    first = study.runs[0]
    charts = figures_of(study.cells, study.interval, chance_level)
    return render(
        "study.html",
        title=f"What width and L0 do to absorption: {first.setting('model')}, {first.setting('hook')}",
        study=study,
        lead=_lead(study),
        n_claims=sum(len(study.of(question)) for question in QUESTIONS),
        main=main,
        rest=rest,
        questions=QUESTIONS,
        charts=charts,
        chance_level=chance_level,
        random_level=random_level,
        onset=onset,
        facts={
            "SAEs": sum(len(run.saes) for run in study.runs),
            "parts": [run.name for run in study.runs],
            "seeds": sorted({seed for cell in study.cells for seed in cell.seeds if seed is not None}),
            **{name.replace("_", " "): first.setting(name) for name in (*SETTINGS, "dataset", "dtype", "batch_tokens")},
            "versions": first.facts.get("versions") or {},
        },
        words=[],
        latents=[],
    )


def _lead(study: Study) -> str:
    """What the page is about, for those who have only the page."""
    first, saes = study.runs[0], [sae for cell in study.cells for sae in cell.saes]
    traits = {name: sorted({getattr(cell, name) for cell in study.cells}) for name in ("arch", "width", "l0")}
    labels = {"width": width_label, "l0": target}
    said = {name: listed([str(labels.get(name, str)(v)) for v in own], len(own)) for name, own in traits.items()}
    words, tokens = first.setting("eval_words"), number(first.setting("tokens"))
    noun = noun_of(first.setting("hierarchy"))
    return (
        f"{plural(len(saes), 'sparse autoencoder')} (SAEs) of the activations of {first.setting('model')} at "
        f"{first.setting('hook')}: {said['arch']}, width {said['width']}, L0 {said['l0']}, "
        f"{_seeds(study.cells)}, "
        f"{f'{tokens:,.0f}' if tokens else 'some'} training tokens each. {_uneven(study)}"
        f"Absorption: a latent that seems to stand for "
        f"{'a first letter' if noun == 'letter' else f'one {noun}'} stays silent on some of its words, because another "
        f"latent took the job over; measured on {f'{words:,} words' if words else 'all words of the vocabulary'}."
    )


def _seeds(cells: Sequence[Cell]) -> str:
    """How many training seeds the cells have: 3 training seeds, or 1 to 3."""
    counts = sorted({len(cell.saes) for cell in cells})
    fewest = f"{counts[0]} to " if len(counts) > 1 else ""
    return fewest + plural(counts[-1], "training seed")


def _uneven(study: Study) -> str:
    """A sentence where not every architecture was trained at every width and L0."""
    traits = [{getattr(cell, name) for cell in study.cells} for name in ("arch", "width", "l0")]
    if len(study.cells) == math.prod(map(len, traits)):
        return ""
    return (
        "Not every architecture was trained at every width and L0 (the table of cells has those that were): a claim "
        "names the widths and L0 that it rests on, and claims over different ones share SAEs. "
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _spread(interval: Interval | None, prefix: str = "") -> dict[str, float | None]:
    names = {"": "mean", "_low": "low", "_high": "high", "_visible": "visible"}
    ends = {end: getattr(interval, name) if interval else None for end, name in names.items()}
    return {f"{prefix}{end}": _rounded(value) for end, value in ends.items()}


def _claim_rows(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "question": c.question, "metric": c.metric, "where": c.where, "first": c.ends[0], "last": c.ends[1],
            "main": c.pooled, "expected": c.expected, "verdict": c.verdict,
            "matched": "; ".join(filter(None, (c.how, c.left))),
            "seeds_first": c.seeds[0], "seeds_last": c.seeds[1], "letters": c.labels,
            "means": " ".join(f"{mean:.{DIGITS}f}" for mean in c.means), **_spread(c.difference, "difference"),
            "sentence": c.sentence,
        }
        for c in study.claims
    ]  # fmt: skip


def _cell_rows(study: Study) -> list[dict[str, Any]]:
    rows = []
    for cell in study.cells:
        row = {
            "arch": cell.arch,
            "width": cell.width,
            "l0": cell.l0,
            "seeds": len(cell.saes),
            "letters": len(cell.letters),
        }
        row |= {name: _rounded(cell.mean_of(metric)) for name, metric in BESIDE.items()}
        for metric in LETTER_METRICS:
            row |= _spread(study.interval(cell, metric), metric)
        row["chance"] = _rounded(chance_level(cell))
        rows.append(row | {f"random_{score}": _rounded(random_level(cell, score)) for score in ("full", "fraction")})
    return rows


def _sae_rows(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "name": sae.name,
            "arch": sae.arch,
            "width": sae.width,
            "l0": sae.l0,
            "seed": sae.seed,
            "left_out": sae.failed or sae.invalid,
        }
        | {name: _rounded(sae.get(metric)) for name, metric in BESIDE.items()}
        | {
            key.split("/")[1]: _rounded(number(value))
            for key, value in sorted(sae.final.items())
            if key.startswith("absorption/mean")
        }
        | {f"random_{key}": _rounded(number(sae.chance.get(f"mean_{key}"))) for key in ("full", "fraction")}
        for run in study.runs
        for sae in run.saes
    ]


def _letter_rows(study: Study) -> list[dict[str, Any]]:
    """The letters that count, at its last look, of each SAE with a valid score, once where several runs have it.

    Those of the SAEs in cells are all that claims are made from.
    """
    scored = [sae for run in study.runs for sae in run.saes if not sae.failed and not sae.invalid]
    used = {id(sae) for cell in study.cells for sae in cell.saes}
    first = {
        (sae.arch, sae.width, sae.l0, sae.seed): sae
        for sae in sorted(reversed(scored), key=lambda sae: id(sae) in used)
    }
    return [
        {"arch": sae.arch, "width": sae.width, "l0": sae.l0, "seed": sae.seed, "letter": row["letter"]}
        | {metric: _rounded(number(row.get(metric))) for metric in LETTER_METRICS}
        for sae in scored
        if sae is first[sae.arch, sae.width, sae.l0, sae.seed]
        for row in sae.last_letters
        if row.get("counts")
    ]
