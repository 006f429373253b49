"""The report's tables: SAEs, width × L0 grids, letters, and the absorbed words as JSON for the page's script.

In: SAEs. Out: HTML (all strings escaped) or plain lists.
"""

from __future__ import annotations

import json
from typing import Any

from sae_train.report.data import SILENT, TrainedSAE, carried
from sae_train.report.figures import grid
from sae_train.report.text import ABSENT, escape, fixed, interval, number, percent, short, target
from sae_train.report.verdict import MEASURES

WORD_ROWS = 24_000  # in one page, over all SAEs
GRIDS = {
    "Explained variance": "metrics/explained_variance",
    "Absorption, fraction": MEASURES["fraction"],
    "Absorption, full": MEASURES["full"],
}


def table(head: list[str], rows: list[list[str]], css: str = "") -> str:
    """Wrap ready cells (already HTML) in a table that scrolls sideways on a narrow screen."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows)
    inside = f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{css}">{inside}</table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def overview(saes: list[TrainedSAE]) -> str:
    """One row per SAE: asked and reached, quality, absorption with intervals, random baseline, status."""
    head = [
        "SAE",
        "L0 asked",
        "L0 reached",
        "EV",
        "CE recovered",
        "dead",
        "absorption, fraction",
        "absorption, full",
    ]
    head += ["random SAE", "letters", "mean F1"]
    return table(head, [_overview_row(sae) for sae in saes], "sortable")


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
        blocks.append(f'<h3>{escape(title)}</h3><div class="maps">{maps}</div>')
    return "".join(blocks)


def letters(sae: TrainedSAE) -> str:
    """The last evaluation by letter."""
    head = [
        "letter",
        "fraction",
        "full",
        "fully absorbed / words",
        "main latents",
        "F1, best latent",
        "F1, main latents",
    ]
    head += ["recall, main", "probe F1"]
    return table(head, [_letter_row(row) for row in sae.last_letters], "sortable letters")


def words(saes: list[TrainedSAE]) -> tuple[str, list[str]]:
    """All absorbed words as a JSON text safe inside <script>, one list per SAE, and notes on what was cut."""
    most = WORD_ROWS // max(sum(bool(sae.words) for sae in saes), 1)
    lists, cut = [], []
    for sae in saes:
        rows = sorted((_word_row(row) for row in sae.words), key=lambda row: (-row[8], -row[7], row[0]))
        if len(rows) > most:
            cut.append(f"{sae.label}: the {most:,} most absorbed of {len(rows):,} words are listed.")
        lists.append(rows[:most])
    text = json.dumps(lists, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"), cut


def _overview_row(sae: TrainedSAE) -> list[str]:
    cells = [escape(sae.label), target(sae.l0), short(sae.get("metrics/l0"))]
    cells += [
        fixed(sae.get("metrics/explained_variance")),
        fixed(sae.get("metrics/ce_loss_score")),
        percent(sae.dead),
    ]
    reason = f"failed: {sae.failed}" if sae.failed else f"no valid score: {sae.invalid}" if sae.invalid else ""
    if reason:
        return [*cells, f'<td colspan="5" class="reason">{escape(reason)}</td>']
    cells += [_with_interval(sae, metric) for metric in MEASURES.values()]
    random = [fixed(sae.baseline.get(f"mean_{measure}")) for measure in MEASURES]
    cells.append(" / ".join(random) if set(random) != {ABSENT} else ABSENT)
    return [*cells, fixed(sae.get("absorption/n_letters"), 0), fixed(sae.get("absorption/mean_f1"), 2)]


def _with_interval(sae: TrainedSAE, metric: str) -> str:
    span = interval(sae.get(f"{metric}_low"), sae.get(f"{metric}_high"))
    return fixed(sae.get(metric)) + (f" <small>{span}</small>" if span else "")


def _shaded(value: float | None, low: float, high: float) -> str:
    if value is None:
        return ABSENT
    share = (value - low) / (high - low) if high > low else 0
    return f'<td style="--share:{6 + 60 * share:.0f}%">{fixed(value)}</td>'


def _letter_row(row: dict[str, Any]) -> list[str]:
    letter = escape(str(row["letter"]).upper())
    if not row.get("counts"):
        reason = f"does not count: its probe has F1 {fixed(row.get('probe_f1'), 2)}"
        return [letter, f'<td colspan="7" class="reason">{reason}</td>', fixed(row.get("probe_f1"), 2)]
    cells = [_bar(row.get("fraction")), _bar(row.get("full"))]
    full, main = number(row.get("n_full")), [str(int(latent)) for latent in row["main_latents"]]
    cells.append(f"{fixed(full, 0)} / {fixed(row.get('n_tp'), 0)}")
    cells.append(f"{fixed(row.get('n_split'), 0)} <small>{', '.join(main[:4])}{', …' if len(main) > 4 else ''}</small>")
    figures = (row.get(key) for key in ("f1_k1", "f1_split", "recall_main", "probe_f1"))
    return [letter, *cells, *(fixed(value, 2) for value in figures)]


def _bar(value: object) -> str:
    share = min(max(number(value) or 0, 0), 1)
    return f'<td class="bar" style="--share:{100 * share:.1f}%">{fixed(value)}</td>'


def _word_row(row: dict[str, Any]) -> list[Any]:
    """Word, letter, main latents, activation, absorber, cosine, share of A, fraction, full."""
    absorbers = row["absorbers"]
    cosine = number(row["absorber_cos"][0]) if row["absorber_cos"] else None
    share = carried(row)
    activation = number(row.get("main_act")) or 0
    return [
        str(row["word"]),
        str(row["letter"]),
        [int(latent) for latent in row["main_latents"]],
        None if activation <= SILENT else round(activation, 3),
        int(absorbers[0]) if absorbers else None,
        None if cosine is None else round(cosine, 3),
        None if share is None else round(share, 3),
        round(number(row.get("fraction")) or 0, 3),
        int(number(row.get("full")) == 1),
    ]
