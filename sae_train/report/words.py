"""The searchable table of words: SAEs with their words come in, JSON for the page's script and an empty table go out.

The script fills the table with the columns that its head names.
"""

from __future__ import annotations

import json
from typing import Any

from sae_train.report.data import SILENT, TrainedSAE, carried
from sae_train.report.shell import paragraphs, section, table
from sae_train.report.text import escape, number

WORD_ROWS = 24_000  # in one page, over all SAEs
CAUSAL = ("effect_latent", "effect", "second_effect", "effect_cos")
HEADS = {
    "word": "word", "letter": "letter", "main": "main latents", "activation": "main activation", "outcome": "outcome",
    "absorber": "taken over by", "cosine": "cosine", "share": "share", "fraction": "fraction", "full": "full",
    "effect_latent": "latent of the largest effect", "effect": "its effect", "second": "second effect",
    "effect_cos": "its cosine", "before": "recalled until (tokens)", "silent": "silent since",
    "taken": "taken over since", "next": "next absorbers (cosine)", "others": "same absorber also on",
}  # fmt: skip


def word_lists(saes: list[TrainedSAE]) -> tuple[str, list[str]]:
    """All words kept as a JSON text safe inside <script>, one list per SAE, and notes on what was cut."""
    most = WORD_ROWS // max(sum(bool(sae.words) for sae in saes), 1)
    lists, cut = [], []
    for sae in saes:
        events = {(row["letter"], row["word"]): row for row in sae.event_log.get("events", [])}
        rows = (_word_row(row, events.get((row["letter"], row["word"]))) for row in sae.words)
        rows = sorted(rows, key=lambda row: (-row[8], -row[7], row[0]))
        if len(rows) > most:
            cut.append(f"{sae.label}: the {most:,} most absorbed of {len(rows):,} words are listed.")
        lists.append(rows[:most])
    text = json.dumps(lists, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"), cut


def word_section(saes: list[TrainedSAE], cut: list[str], title: str, lead: str) -> str:
    """The table, its search and its notes; a sentence where there are no words."""
    if not any(sae.words for sae in saes):
        return section(title, "<p>No absorbed word was recorded.</p>") if saes else ""
    search = (
        '<p class="controls needs-script"><label>Search <input id="search" type="search" '
        'placeholder="word, label or latent"></label> <label><input id="only-full" type="checkbox"> '
        'only full absorption</label> <span id="count"></span></p>'
    )
    more = '<p><button type="button" id="more" hidden>show more</button></p>'
    head = [f'<th scope="col" data-column="{name}">{HEADS[name]}</th>' for name in _columns(saes)]
    head[1] = f'<th scope="col" data-column="letter">{escape(saes[0].noun)}</th>'
    body = search + table(head, [], "words") + more + "<noscript><p>This table needs JavaScript.</p></noscript>"
    notes = paragraphs([escape(note) for note in cut], "note")
    return section(f'{title} <span id="words-of"></span>', body + notes, lead=lead)


def _columns(saes: list[TrainedSAE]) -> list[str]:
    """What the words of these SAEs hold: older evaluations kept no outcomes, and few ask the language model."""
    rows = [sae.words[0] for sae in saes if sae.words]
    absent = set() if any(isinstance(row.get("outcome"), str) for row in rows) else {"outcome"}
    if not any("effect" in row for row in rows):
        absent |= {"effect_latent", "effect", "second", "effect_cos"}
    if not any(sae.event_log.get("events") for sae in saes):
        absent |= {"silent", "taken", "before"}
    return [name for name in HEADS if name not in absent]


def _word_row(row: dict[str, Any], event: dict[str, Any] | None) -> list[Any]:
    """Word, letter, main latents, activation, absorber, cosine, share of A, fraction, full, outcome, next absorbers,
    for a word of the event log [recalled until, silent since, taken over since] in tokens, and for causal presets the
    latent of the largest effect, the effect, the second's and the latent's cosine."""
    absorbers, cosines = row["absorbers"], [_round(cosine) for cosine in row["absorber_cos"]]
    activation = number(row.get("main_act")) or 0
    found = [
        str(row["word"]),
        str(row["letter"]),
        [int(latent) for latent in row["main_latents"]],
        None if activation <= SILENT else round(activation, 3),
        int(absorbers[0]) if absorbers else None,
        cosines[0] if cosines else None,
        _round(carried(row)),
        _round(row.get("fraction")) or 0.0,
        int((number(row.get("full")) or 0) > 0),
        row.get("outcome") if isinstance(row.get("outcome"), str) else None,
        [[int(latent), cosine] for latent, cosine in zip(absorbers[1:], cosines[1:], strict=False)],
        event and [_whole(event[f"{name}_tokens"]) for name in ("recalled", "silent", "taken")],
    ]
    if "effect" not in row:
        return found
    latent, *effects = (number(row.get(name)) for name in CAUSAL)
    return [*found, None if latent is None or latent < 0 else int(latent), *map(_round, effects)]


def _round(value: object) -> float | None:
    found = number(value)
    return None if found is None else round(found, 3)


def _whole(value: object) -> int | None:
    found = number(value)
    return None if found is None else int(found)
