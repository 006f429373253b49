"""Puts the page together: verdict, SAEs, curves, grids, letters, words, facts, with style and script inline.

In: runs. Out: one HTML text that loads nothing from anywhere.
"""

from __future__ import annotations

from importlib import resources

from sae_train.report import tables
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.figures import curves, legend, letter_maps, styles
from sae_train.report.text import duration, escape, fixed, number, percent, short, target, tick
from sae_train.report.verdict import MEASURES, about, verdict

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
<noscript><style>.panel[hidden]{{display:block}}.needs-script{{display:none}}</style></noscript>
</head>
<body>
<main>
{body}
</main>
<div id="tip" hidden></div>
<script type="application/json" id="words">{words}</script>
<script>{script}</script>
</body>
</html>
"""


def page(runs: list[Run]) -> str:
    """Return the whole report of one or several runs."""
    saes = [sae for run in runs for sae in run.saes]
    words, cut = tables.words(saes)
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        _top(title, runs, saes),
        _table(saes),
        _curves(saes),
        _grids(saes),
        _panels(runs),
        _words(saes, cut),
    ]
    return SHELL.format(
        title=f"{escape(title)} · sae-train",
        style=_asset("style.css"),
        script=_asset("script.js"),
        words=words,
        body="\n".join(filter(None, [*sections, _facts(runs)])),
    )


def _asset(name: str) -> str:
    return resources.files("sae_train.report").joinpath(name).read_text(encoding="utf-8")


def _section(title: str, body: str, css: str = "", lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section class="{css}"><h2>{title}</h2>{lead}{body}</section>'


def _paragraphs(sentences: list[str], css: str = "") -> str:
    return "".join(f'<p class="{css}">{sentence}</p>' for sentence in sentences)


def _top(title: str, runs: list[Run], saes: list[TrainedSAE]) -> str:
    notes = [note for run in runs for note in run.notes + run.gaps]
    scored = any(sae.get(MEASURES["full"]) is not None and not sae.invalid for sae in saes)
    preset = runs[0].setting("eval", "preset")
    if scored:
        notes.insert(0, _caveat(str(preset) if preset else None, runs))
    body = _tiles(saes[0]) if len(saes) == 1 and not saes[0].failed else ""
    body += f'<div class="verdict">{_paragraphs(verdict(runs))}</div>'
    body += "".join(f'<p class="note">{escape(note)}</p>' for note in dict.fromkeys(notes))
    return f"<header><h1>{escape(title)}</h1>{body}</header>"


def _caveat(preset: str | None, runs: list[Run]) -> str:
    sample = next((words for run in runs if (words := run.setting("eval", "eval_words"))), None)
    return (
        "Intervals are 95 % bootstraps over the evaluated words; other training seeds would differ more."
        + (f" Scores follow the preset {preset}." if preset else "")
        + (f" The eval used a sample of {sample} words." if sample else "")
    )


def _tiles(sae: TrainedSAE) -> str:
    tiles = [("L0", short(sae.get("metrics/l0")), f"asked for {target(sae.l0)}")]
    tiles += [("explained variance", fixed(sae.get("metrics/explained_variance")), "of held-out activations")]
    tiles += [("CE loss recovered", fixed(sae.get("metrics/ce_loss_score")), "1: as without the SAE")]
    tiles += [("dead latents", percent(sae.dead), f"of {sae.width:,}" if sae.width else "")]
    for measure, metric in MEASURES.items() if not sae.invalid else ():
        low, high = (fixed(sae.get(f"{metric}_{end}")) for end in ("low", "high"))
        span = f"{low} to {high}" if number(sae.get(metric)) is not None else "not evaluated"
        tiles.append((f"absorption, {measure}", fixed(sae.get(metric)), span))
    tiles.append(("letters that count", fixed(sae.get("absorption/n_letters"), 0), "of 26"))
    if not sae.invalid:
        tiles.append(("F1 of letter latents", fixed(sae.get("absorption/mean_f1"), 2), "mean over letters"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _table(saes: list[TrainedSAE]) -> str:
    lead = "Small numbers are 95 % intervals; the random SAE’s scores are fraction / full."
    lead += " Click a heading to sort." if len(saes) > 1 else ""
    return _section("SAEs", tables.overview(saes), lead=lead) if saes else ""


def _curves(saes: list[TrainedSAE]) -> str:
    css, meaning = styles(saes)
    drawn = curves(saes, css)
    if not drawn:
        return _section("Training", "<p>Nothing was logged yet, so there is nothing to draw.</p>") if saes else ""
    boxes = "".join(
        f'<figure id="{figure.key}"><figcaption><h3>{escape(figure.title)}</h3>'
        f"<small>{escape(figure.note)}</small></figcaption>{svg}</figure>"
        for figure, svg in drawn
    )
    lead = "Hover or touch a curve for its values."
    lead += " Press names to bring their curves forward." if len(saes) > 1 else ""
    lead += f" How to tell them apart – {escape(meaning)}." if meaning else ""
    shown = legend(saes, css) if len(saes) > 1 else ""
    return _section("Training", f'{shown}<div class="plots">{boxes}</div>', "many" if len(saes) > 6 else "", lead)


def _grids(saes: list[TrainedSAE]) -> str:
    blocks = tables.grids(saes)
    return _section("Width and L0", blocks, lead="Last values; seeds averaged.") if blocks else ""


def _panels(runs: list[Run]) -> str:
    """One panel an SAE: its own verdict, letters over time, letters now; a chooser when there are several."""
    pairs = [(sae, run) for run in runs for sae in run.saes]
    if not pairs:
        return ""
    first = next((i for i, (sae, _) in enumerate(pairs) if sae.letters), 0)
    panels = [_panel(i, sae, run, i != first, len(pairs) > 1) for i, (sae, run) in enumerate(pairs)]
    options = "".join(
        f'<option value="{i}"{" selected" if i == first else ""}>{escape(sae.label)}</option>'
        for i, (sae, _) in enumerate(pairs)
    )
    chooser = f'<label class="chooser needs-script">SAE <select id="sae">{options}</select></label>'
    return _section("Absorption by letter", (chooser if len(pairs) > 1 else "") + "".join(panels))


def _panel(index: int, sae: TrainedSAE, run: Run, hidden: bool, several: bool) -> str:
    body = _paragraphs(about(sae, run)) if several else ""
    if not sae.letters:
        body += "<p>There are no letters to show for this SAE: the absorption eval left none.</p>"
    else:
        maps = "".join(
            f"<figure><figcaption><h3>{escape(title)}</h3></figcaption>{svg}</figure>"
            for title, svg in letter_maps(sae)
        )
        body += f'<div class="plots two">{maps}</div>' if maps else "<p>One evaluation only: no course over time.</p>"
        body += tables.letters(sae)
    return f'<div class="panel" data-sae="{index}"{" hidden" if hidden else ""}>{body}</div>'


def _words(saes: list[TrainedSAE], cut: list[str]) -> str:
    if not any(sae.words for sae in saes):
        return _section("Words absorbed", "<p>No absorbed word was recorded.</p>") if saes else ""
    names = [
        "word",
        "letter",
        "main latents",
        "taken over by",
        "cosine",
        "share",
        "fraction",
        "full",
    ]
    names.append("same absorber also on")
    search = (
        '<p class="controls needs-script"><label>Search <input id="search" type="search" '
        'placeholder="word, letter or latent"></label> <label><input id="only-full" type="checkbox"> '
        'only full absorption</label> <span id="count"></span></p>'
    )
    more = '<p><button type="button" id="more" hidden>show more</button></p>'
    body = search + tables.table(names, [], "words") + more + "<noscript><p>This table needs JavaScript.</p></noscript>"
    lead = (
        "Words with the letter on which its main latents are silent or weak, and the latent that carries the "
        "letter instead: the cosine of its decoder row with the letter’s probe, and its share of the "
        "activation’s projection on the probe."
    )
    return _section(
        'Words absorbed <span id="words-of"></span>',
        body + _paragraphs([escape(c) for c in cut], "note"),
        lead=lead,
    )


def _facts(runs: list[Run]) -> str:
    return _section(
        "The run" if len(runs) == 1 else "The runs", "".join(_facts_of(run, len(runs) == 1) for run in runs)
    )


def _facts_of(run: Run, alone: bool) -> str:
    facts = run.facts
    command = facts.get("command") or "not recorded"
    rows = [
        ["command", f"<code>{escape(command)}</code>"],
        ["status", escape(facts.get("status") or "unknown")],
    ]
    tokens, seconds = number(facts.get("tokens")), number(facts.get("seconds"))
    if tokens:
        rows.append(["tokens", tick(tokens)])
    if seconds:
        rate = f" ({tick(float(f'{tokens / seconds:.3g}'))} tokens/s)" if tokens else ""
        rows.append(["time", duration(seconds) + rate])
    rows.append(["git commit", escape(facts.get("git_commit") or "not known")])
    rows += [[name, _flat(facts.get(name))] for name in ("hardware", "versions") if facts.get(name)]
    settings = facts.get("settings")
    groups = settings.items() if isinstance(settings, dict) else []
    rows += [[f"settings: {escape(group)}", _flat(values)] for group, values in groups]
    head = f"<summary>{escape(run.title)}</summary>" if not alone else "<summary>Settings, versions, hardware</summary>"
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in rows)
    table = f'<div class="scroll"><table class="facts">{body}</table></div>'
    return f"<details{' open' if alone else ''}>{head}{table}</details>"


def _flat(value: object) -> str:
    """A dictionary as 'key value' pairs in one flowing cell."""
    if not isinstance(value, dict):
        return escape(", ".join(map(str, value)) if isinstance(value, list) else value)
    pairs = ((key, ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in value.items())
    return " ".join(f"<span><b>{escape(k)}</b> {escape('–' if v is None else v)}</span>" for k, v in pairs)
