"""The searchable table of words, as the page's script takes them: it fills the columns that the table's head names."""

from __future__ import annotations

from typing import Any

from sae_train.report.data import SILENT, TrainedSAE, carried_share
from sae_train.report.text import number

WORD_ROWS = 24_000  # in one page, over all SAEs
CAUSAL = ("effect_latent", "effect", "second_effect", "effect_cos")
HEADS = {
    "word": "word", "letter": "letter", "main": "main latents", "activation": "main activation", "outcome": "outcome",
    "absorber": "taken over by", "cosine": "cosine", "share": "share", "fraction": "fraction", "full": "full",
    "effect_latent": "latent of the largest effect", "effect": "its effect", "second": "second effect",
    "effect_cos": "its cosine", "before": "recalled until (tokens)", "silent": "silent since",
    "taken": "taken over since", "next": "next absorbers (cosine)", "others": "same absorber also on",
}  # fmt: skip


def word_lists(saes: list[TrainedSAE]) -> tuple[list[list[list[Any]]], list[str]]:
    """All words kept, one list per SAE, and notes on what was cut."""
    most = WORD_ROWS // max(sum(bool(sae.words) for sae in saes), 1)
    lists, cut = [], []
    for sae in saes:
        events = {(row["letter"], row["word"]): row for row in sae.event_log.get("events", [])}
        rows = (_word_row(row, events.get((row["letter"], row["word"]))) for row in sae.words)
        rows = sorted(rows, key=lambda row: (-row[8], -row[7], row[0]))
        if len(rows) > most:
            cut.append(f"{sae.label}: the {most:,} most absorbed of {len(rows):,} words are listed.")
        lists.append(rows[:most])
    return lists, cut


def word_columns(saes: list[TrainedSAE]) -> dict[str, str]:
    """Heads by column: older evaluations kept no outcomes, and few ask the language model; empty without words."""
    rows = [sae.words[0] for sae in saes if sae.words]
    if not rows:
        return {}
    absent = set() if any(isinstance(row.get("outcome"), str) for row in rows) else {"outcome"}
    if not any("effect" in row for row in rows):
        absent |= {"effect_latent", "effect", "second", "effect_cos"}
    if not any(sae.event_log.get("events") for sae in saes):
        absent |= {"silent", "taken", "before"}
    return {name: title for name, title in (HEADS | {"letter": saes[0].noun}).items() if name not in absent}


def _word_row(row: dict[str, Any], event: dict[str, Any] | None) -> list[Any]:
    """Word, letter, main latents, activation, absorber, cosine, share of A, fraction, full, outcome, next absorbers,
    for a word of the event log [recalled until, silent since, taken over since] in tokens, and for causal presets the
    latent of the largest effect, the effect, the second's and the latent's cosine."""
    absorbers, cosines = row["absorbers"], [_round(cosine) for cosine in row["absorber_cos"]]
    activation = number(row.get("main_act")) or 0
    cells = [
        str(row["word"]),
        str(row["letter"]),
        [int(latent) for latent in row["main_latents"]],
        None if activation <= SILENT else round(activation, 3),
        int(absorbers[0]) if absorbers else None,
        cosines[0] if cosines else None,
        _round(carried_share(row)),
        _round(row.get("fraction")) or 0.0,
        int((number(row.get("full")) or 0) > 0),
        row.get("outcome") if isinstance(row.get("outcome"), str) else None,
        [[int(latent), cosine] for latent, cosine in zip(absorbers[1:], cosines[1:], strict=False)],
        event and [_whole(event[f"{name}_tokens"]) for name in ("recalled", "silent", "taken")],
    ]
    if "effect" not in row:
        return cells
    latent, *effects = (number(row.get(name)) for name in CAUSAL)
    return [*cells, None if latent is None or latent < 0 else int(latent), *map(_round, effects)]


def _round(value: object) -> float | None:
    finite = number(value)
    return None if finite is None else round(finite, 3)


def _whole(value: object) -> int | None:
    finite = number(value)
    return None if finite is None else int(finite)
