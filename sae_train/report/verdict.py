"""The verdict: what the runs found, in plain sentences with numbers and 95 % intervals.

In: runs. Out: HTML-safe sentences; "not distinguishable" where an interval holds the compared value.
"""

from __future__ import annotations

from sae_train.report.data import Run, TrainedSAE
from sae_train.report.findings import (
    MEASURES,
    absorption,
    against_random,
    against_zero,
    family,
    lost,
    meaning,
    weak,
)
from sae_train.report.text import duration, escape, fixed, interval, listed, number, percent, plural, short, tick

CLOSE_L0 = 0.02
MOST_TOLD = 4  # SAEs whose answers are all told at the top


def headline(runs: list[Run]) -> str:
    """The answer in plain words: how much each SAE absorbs, of many the least and the most; empty without a score."""
    whole = [sae for run in runs for sae in run.saes if not sae.failed and not sae.invalid]
    scored = sorted((s for s in whole if s.get(MEASURES["full"]) is not None), key=lambda s: s.get(MEASURES["full"]))
    if not scored:
        return ""
    sae = scored[0]
    noun = escape(sae.noun)
    first = "first letter" if sae.noun == "letter" else noun
    question = (
        f"<b>Does a latent that stands for a {first} fire on every word with that {noun}?</b> (A "
        "latent is one of the directions that an SAE takes activations apart into.) Where it stays silent "
        f"because another latent carries the {noun} instead, the {noun} is <i>absorbed</i>."
    )
    told = scored if len(scored) <= MOST_TOLD else [scored[0], scored[-1]]
    many = "" if len(told) == len(scored) else f" The least and the most of {len(scored)} SAEs:"
    items = "".join(f"<li>{_answer(sae)}</li>" for sae in sorted(told, key=lambda s: s.get(MEASURES["full"])))
    return f"{question}{many}<ul>{items}</ul>"


def _answer(sae: TrainedSAE) -> str:
    metric, noun = MEASURES["full"], escape(sae.noun)
    low, high = (sae.get(f"{metric}_{end}") for end in ("low", "high"))
    random = number(sae.baseline.get("mean_full"))
    span = f" (95 % interval {percent(low)} to {percent(high)})" if low is not None and high is not None else ""
    share = f"<b>{percent(sae.get(metric))}</b> of a {noun}’s words, on average"
    text = f"<b>{escape(sae.label)}</b>: absorbed on {share}{span}"
    if random is None:
        return f"{text}."
    above = against_random(sae, "full")
    judged = "distinguishably more than" if above else "not distinguishably more than"
    return f"{text}, {judged} a random SAE ({percent(random)})."


def verdict(runs: list[Run]) -> list[str]:
    """Sentences on all runs: one SAE is told in full, several are compared."""
    saes = [sae for run in runs for sae in run.saes]
    sentences = [sentence for run in runs if (sentence := _unfinished(run))]
    if len(saes) == 1:
        return sentences + about(saes[0], runs[0])
    return sentences + (_compared(saes, runs) if saes else [])


def about(sae: TrainedSAE, run: Run) -> list[str]:
    """Sentences on one SAE."""
    if sae.failed:
        where = f" Its last logged figures are from {tick(_tokens(sae))} tokens." if sae.history else ""
        return [f"<b>{escape(sae.label)} failed</b> and was left out from then on: {escape(sae.failed)}.{where}"]
    found = [part(sae) for part in (_quality, absorption, family, lost, meaning, weak)]
    return [sentence for sentence in (_reached(sae, run), *found) if sentence]


def _unfinished(run: Run) -> str:
    done = number(run.facts.get("tokens"))
    asked = number(run.setting("tokens"))
    so_far = f" after {tick(done)} of {tick(asked)} tokens" if done and asked else ""
    name = escape(run.name)
    if run.facts.get("status") == "running":
        return f"<b>Still running</b>: {name} was at work{so_far} when this page was written: interim figures."
    if run.facts.get("status") == "interrupted":
        folder = escape(run.path)
        return f"<b>Interrupted</b>{so_far}: {name} goes on with <code>sae-train resume {folder}</code>."
    return ""


def _tokens(sae: TrainedSAE) -> float:
    return max((number(row.get("tokens")) or 0 for row in sae.history), default=0)


def _reached(sae: TrainedSAE, run: Run) -> str:
    tokens = _tokens(sae) or number(run.facts.get("tokens"))
    trained = f" was trained on {tick(tokens)} tokens" if tokens else " has no logged steps yet"
    took = f" in {duration(run.facts['seconds'])}" if tokens and number(run.facts.get("seconds")) else ""
    start = f"<b>{escape(sae.label)}</b>{trained}{took}."
    if sae.l0_error is None:
        return f"{start} Its L0 was not measured."
    close = abs(sae.l0_error) <= CLOSE_L0
    care = "" if close else "; compare it with other SAEs only with care"
    off = f"{percent(abs(sae.l0_error))} off{care}"
    reached = short(sae.get("metrics/l0"))
    return f"{start} It was asked for L0 <b>{sae.l0:g}</b> and reached <b>{reached}</b> ({off})."


def _quality(sae: TrainedSAE) -> str:
    ev, score = sae.get("metrics/explained_variance"), sae.get("metrics/ce_loss_score")
    parts = []
    if ev is not None:
        parts.append(f"explains <b>{percent(ev)}</b> of the variance of the activations (EV {fixed(ev)})")
    if score is not None:
        parts.append(f"recovers <b>{percent(score)}</b> of the language model’s loss (CE score {fixed(score)})")
    if sae.dead is not None:
        parts.append(f"has <b>{percent(sae.dead)}</b> dead latents among its {sae.width:,}")
    return f"It {listed(parts)}." if parts else "Its quality was not measured."


def _compared(saes: list[TrainedSAE], runs: list[Run]) -> list[str]:
    whole = [sae for sae in saes if not sae.failed]
    sentences = [f"<b>{plural(len(saes), 'SAE')}</b> of {plural(len(runs), 'run')}."]
    failed = [f"{escape(sae.label)} ({escape(sae.failed)})" for sae in saes if sae.failed]
    if failed:
        sentences.append(f"<b>{len(failed)} failed</b>: {listed(failed)}.")
    ranges = {"Explained variance": "metrics/explained_variance", "CE loss recovered": "metrics/ce_loss_score"}
    sentences += [" ".join(filter(None, [_all_l0(whole), *(_range(whole, m, noun) for noun, m in ranges.items())]))]
    sentences += [_all_absorption(whole, measure) for measure in MEASURES]
    without = [sae for sae in whole if sae.invalid]
    if without:
        reasons = listed(sorted({escape(sae.invalid) for sae in without}), 2)
        sentences.append(f"{plural(len(without), 'SAE')} without a valid absorption score: {reasons}.")
    scored = [sae for sae in whole if sae.get(MEASURES["full"]) is not None and not sae.invalid]
    if scored:
        sentences.append(meaning(max(scored, key=lambda sae: sae.get(MEASURES["full"]) or 0)))
    return [sentence for sentence in sentences if sentence]


def _all_l0(saes: list[TrainedSAE]) -> str:
    known = [sae for sae in saes if sae.l0_error is not None]
    if not known:
        return "No L0 was measured yet."
    close = sum(abs(sae.l0_error or 0) <= CLOSE_L0 for sae in known)
    worst = max(known, key=lambda sae: abs(sae.l0_error or 0))
    return (
        f"<b>{close} of {len(known)}</b> reached their L0 within {percent(CLOSE_L0, 0)}; "
        f"furthest is {escape(worst.label)} ({short(worst.get('metrics/l0'))} for {worst.l0:g}, "
        f"{percent(abs(worst.l0_error or 0))} off)."
    )


def _range(saes: list[TrainedSAE], metric: str, noun: str) -> str:
    known = sorted((value, sae.label) for sae in saes if (value := sae.get(metric)) is not None)
    if not known:
        return ""
    (low, least), (high, most) = known[0], known[-1]
    return f"{noun} goes from <b>{fixed(low)}</b> ({escape(least)}) to <b>{fixed(high)}</b> ({escape(most)})."


def _all_absorption(saes: list[TrainedSAE], measure: str) -> str:
    metric = MEASURES[measure]
    known = sorted((s for s in saes if s.get(metric) is not None and not s.invalid), key=lambda s: s.get(metric) or 0)
    if not known:
        return "Absorption was not evaluated." if measure == "full" else ""
    ends = [f"<b>{fixed(s.get(metric))}</b> ({escape(s.label)}{_bracket(s, metric)})" for s in (known[0], known[-1])]
    low, high = known[-1].get(f"{metric}_low"), known[0].get(f"{metric}_high")
    apart = low is not None and high is not None and low > high
    judged = "these two are distinguishable" if apart else "even these two are not distinguishable"
    zero = sum(against_zero(sae, measure) is True for sae in known)
    random = [verdict for sae in known if (verdict := against_random(sae, measure)) is not None]
    beside = f"; from the random SAE beside it: {sum(random)} of {len(random)}" if random else ""
    between = f"{' to '.join(ends)}; {judged}" if len(known) > 1 else f"is {ends[0]}"
    return (
        f"Absorption ({measure}) {'goes from ' if len(known) > 1 else ''}{between}. "
        f"Distinguishable from 0: <b>{zero} of {len(known)}</b>{beside}."
    )


def _bracket(sae: TrainedSAE, metric: str) -> str:
    span = interval(sae.get(f"{metric}_low"), sae.get(f"{metric}_high"))
    return f", {span}" if span else ""
