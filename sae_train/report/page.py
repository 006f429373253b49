"""Puts the page together: verdict, SAEs, curves, grids, letters, words, facts, with style and script inline.

In: runs. Out: one HTML text that loads nothing from anywhere.
"""

from __future__ import annotations

from sae_train.config import groups as setting_groups
from sae_train.report import tables
from sae_train.report.absorbing import course, density, event_charts
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.figures import curves, legend, letter_maps, styles
from sae_train.report.findings import FAMILY, MEASURES
from sae_train.report.glossary import glossary
from sae_train.report.latents import latent_lists, latent_section
from sae_train.report.letters import letter_charts, letter_table, probe_table, recall_bars
from sae_train.report.pareto import pareto
from sae_train.report.seeds import comparison_table, seed_table
from sae_train.report.shell import document, flat, folded, paragraphs, section, tiles
from sae_train.report.svg import shown
from sae_train.report.text import duration, escape, fixed, nouns, number, percent, short, target, tick
from sae_train.report.verdict import about, headline, verdict
from sae_train.report.words import word_lists, word_section


def page(runs: list[Run]) -> str:
    """Return the whole report of one or several runs."""
    saes = [sae for run in runs for sae in run.saes]
    listed_words, cut = word_lists(saes)
    data = {"words": listed_words, "latents": latent_lists(saes)}
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        _top(title, runs, saes),
        _table(saes),
        _truth(saes),
        _curves(saes),
        _grids(saes),
        _seeds(runs),
        _comparisons(runs),
        _panels(runs),
        word_section(saes, cut, "Words absorbed", _word_lead(saes)),
        latent_section(saes),
        _facts(runs),
    ]
    return document(title, sections, data)


def _top(title: str, runs: list[Run], saes: list[TrainedSAE]) -> str:
    notes = [note for run in runs for note in run.notes + run.gaps]
    scored = any(sae.get(MEASURES["full"]) is not None and not sae.invalid for sae in saes)
    preset = runs[0].setting("preset")
    if scored:
        notes.insert(0, _caveat(str(preset) if preset else None, runs))
    answer = headline(runs)
    body = f'<div class="verdict answer">{answer}</div>' if answer else ""
    body += _tiles(saes[0]) if len(saes) == 1 and not saes[0].failed else ""
    body += f'<div class="verdict">{paragraphs(verdict(runs))}</div>'
    body += glossary(saes[0].noun, any(sae.get(FAMILY) is not None for sae in saes)) if saes else ""
    body += "".join(f'<p class="note">{escape(note)}</p>' for note in dict.fromkeys(notes))
    return f"<header><h1>{escape(title)}</h1>{body}</header>"


def _caveat(preset: str | None, runs: list[Run]) -> str:
    sample = next((words for run in runs if (words := run.setting("eval_words"))), None)
    return (
        "Intervals are 95 % bootstraps over the evaluated words; other training seeds would differ more."
        + (f" Scores follow the preset {preset}." if preset else "")
        + (f" The eval used a sample of {sample} words." if sample else "")
    )


def _tiles(sae: TrainedSAE) -> str:
    cells = [("L0", short(sae.get("metrics/l0")), f"asked for {target(sae.l0)}")]
    cells += [("explained variance", fixed(sae.get("metrics/explained_variance")), "of held-out activations")]
    cells += [("CE loss recovered", fixed(sae.get("metrics/ce_loss_score")), "1: as without the SAE")]
    cells += [("dead latents", percent(sae.dead), f"of {sae.width:,}" if sae.width else "")]
    for measure, metric in MEASURES.items() if not sae.invalid else ():
        low, high = (fixed(sae.get(f"{metric}_{end}")) for end in ("low", "high"))
        span = f"{low} to {high}" if number(sae.get(metric)) is not None else "not evaluated"
        cells.append((f"absorption, {measure}", fixed(sae.get(metric)), span))
    if not sae.invalid and sae.get(FAMILY) is not None:
        cells.append(("absorption, full", fixed(sae.get(FAMILY)), "family-corrected"))
    noun, labels = escape(sae.noun), len(sae.last_letters) or 26
    cells.append((f"{nouns(noun)} that count", fixed(sae.get("absorption/n_letters"), 0), f"of {labels}"))
    if not sae.invalid:
        cells.append((f"F1 of {noun} latents", fixed(sae.get("absorption/mean_f1"), 2), f"mean over {nouns(noun)}"))
    return tiles(cells)


def _table(saes: list[TrainedSAE]) -> str:
    if not saes:
        return ""
    lead = "Small numbers are 95 % intervals; baselines’ scores are fraction / full."
    lead += " Click a heading to sort." if len(saes) > 1 else ""
    bars = shown(recall_bars(saes)) if len(saes) > 1 else ""
    return section("SAEs", tables.overview(saes) + bars, lead=lead)


def _truth(saes: list[TrainedSAE]) -> str:
    found = tables.truth(saes)
    lead = "Measured against the planted dictionary; absorption is the mean over parents, of all words alike."
    return section("Against the truth", found, lead=lead) if found else ""


def _curves(saes: list[TrainedSAE]) -> str:
    css, meaning = styles(saes)
    drawn = curves(saes, css)
    if not drawn:
        return section("Training", "<p>Nothing was logged yet, so there is nothing to draw.</p>") if saes else ""
    lead = "Hover or touch a curve for its values."
    lead += " Press names to bring their curves forward." if len(saes) > 1 else ""
    lead += f" How to tell them apart – {escape(meaning)}." if meaning else ""
    chips = legend(saes, css) if len(saes) > 1 else ""
    return section("Training", chips + shown(drawn, "plots"), "many" if len(saes) > 6 else "", lead)


def _grids(saes: list[TrainedSAE]) -> str:
    blocks = tables.grids(saes) + shown(pareto(saes), "plots")
    return section("Width and L0", blocks, lead="Last values on held-out text; seeds averaged.") if blocks else ""


def _seeds(runs: list[Run]) -> str:
    noun = next((sae.noun for run in runs for sae in run.saes), "letter")
    lead = (
        f"Intervals are 95 % two-way bootstraps over the training seeds and the {escape(nouns(noun))} that count "
        "in all of them. Of differences as large as the smallest visible one, four in five would be found."
    )
    found = seed_table(runs)
    return section("Training seeds", found, lead=lead) if found else ""


def _comparisons(runs: list[Run]) -> str:
    noun = next((sae.noun for run in runs for sae in run.saes), "letter")
    lead = (
        f"Differences paired over {escape(nouns(noun))}, with 95 % two-way bootstraps over them and training seeds. "
        "L0 as reached where it differs by at most 2 %, else interpolated on log L0 over at least four. One verdict in "
        "twenty is wrong by chance."
    )
    found = comparison_table(runs)
    return section("Distinguishable or not", found, lead=lead) if found else ""


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
    return section(f"Absorption by {escape(pairs[0][0].noun)}", (chooser if len(pairs) > 1 else "") + "".join(panels))


def _panel(index: int, sae: TrainedSAE, run: Run, hidden: bool, several: bool) -> str:
    body = paragraphs(about(sae, run)) if several else ""
    body += shown(density(sae))
    if not sae.letters:
        body += "<p>There are no letters to show for this SAE: the absorption eval left none.</p>"
    else:
        body += tables.baselines(sae)
        body += shown(letter_maps(sae)) or "<p>One evaluation only: no course over time.</p>"
        body += paragraphs([sentence]) if (sentence := course(sae)) else ""
        body += shown(event_charts(sae))
        body += probe_table(sae) if sae.invalid else shown(letter_charts(sae)) + letter_table(sae)
    return f'<div class="panel" data-sae="{index}"{" hidden" if hidden else ""}>{body}</div>'


def _word_lead(saes: list[TrainedSAE]) -> str:
    noun = "letter" if not saes or saes[0].noun == "letter" else "label"
    return (
        f"Words with the {noun} on which its main latents are silent or weak, and the latent that carries the "
        f"{noun} instead: the cosine of its decoder row with the {noun}’s probe, and its share of the "
        "activation’s projection on the probe."
        + (
            " Silent since: the evaluation from which on its main latents never fired on it again."
            if any(sae.event_log for sae in saes)
            else ""
        )
    )


def _facts(runs: list[Run]) -> str:
    return section("The run" if len(runs) == 1 else "The runs", "".join(_facts_of(run, len(runs) == 1) for run in runs))


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
    rows += [[name, flat(facts.get(name))] for name in ("hardware", "versions") if facts.get(name)]
    settings = facts.get("settings") or {}
    for group, model in setting_groups().items():
        values = {name: settings[name] for name in model.model_fields if name in settings}
        rows += [[f"settings: {group}", flat(values)]] if values else []
    return folded("Settings, versions, hardware" if alone else run.title, rows, opened=alone)
