"""The verdict: what the runs found, in plain sentences with numbers and 95 % intervals.

In: runs. Out: HTML-safe sentences; "not distinguishable" where an interval holds the compared value.
"""

from __future__ import annotations

from sae_train.report.data import SILENT, Run, TrainedSAE, carried
from sae_train.report.text import (
    duration,
    escape,
    fixed,
    interval,
    listed,
    number,
    percent,
    plural,
    short,
    tick,
)

CLOSE_L0 = 0.02
WEAK_F1 = 0.5
MEASURES = {"fraction": "absorption/mean_fraction", "full": "absorption/mean_full"}


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
    return [s for s in (_reached(sae, run), _quality(sae), _absorption(sae), _meaning(sae), _weak(sae)) if s]


def against_zero(sae: TrainedSAE, measure: str) -> bool | None:
    """Whether the interval of a measure excludes 0; None without an interval."""
    low = sae.get(f"{MEASURES[measure]}_low")
    return None if low is None or sae.invalid else low > 0


def against_random(sae: TrainedSAE, measure: str) -> bool | None:
    """Whether the interval lies above the random SAE's (its value, if that has no interval)."""
    low, key = sae.get(f"{MEASURES[measure]}_low"), f"mean_{measure}"
    random = number(sae.baseline.get(f"{key}_high", sae.baseline.get(key)))
    return None if low is None or random is None or sae.invalid else low > random


def example(sae: TrainedSAE) -> str:
    """One absorbed word of this SAE, told as a sentence; empty if there is none."""
    row = max(sae.words, key=_clearness, default=None)
    if row is None or not (row["absorbers"] and row["absorber_cos"] and row["main_latents"]):
        return ""
    word, main = escape(str(row["word"]).strip()), plural_latents(row["main_latents"])
    share = carried(row)
    carries = f", and carries {percent(share, 0)} of the letter’s direction" if share is not None else ""
    several = len(row["main_latents"]) > 1
    silent = "are silent" if several else "is silent"
    if (number(row.get("main_act")) or 0) > SILENT:
        silent = "are weak" if several else "is weak"
    return (
        f"on “{word}” the {escape(str(row['letter']).upper())}-{main} {silent}; "
        f"latent {int(row['absorbers'][0])} fires instead "
        f"(cosine {fixed(row['absorber_cos'][0], 2)} with the letter’s probe{carries})"
    )


def plural_latents(latents: list[int]) -> str:
    numbers = ", ".join(str(int(latent)) for latent in latents)
    return f"latents {numbers}" if len(latents) > 1 else f"latent {numbers}"


def _unfinished(run: Run) -> str:
    done = number(run.facts.get("tokens"))
    asked = number(run.setting("train", "tokens"))
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


def _absorption(sae: TrainedSAE) -> str:
    if sae.invalid:
        return f"There is no valid absorption score: {escape(sae.invalid)}."
    parts = [_score(sae, measure) for measure in MEASURES if sae.get(MEASURES[measure]) is not None]
    if not parts:
        return "Absorption was not evaluated."
    letters = sae.get("absorption/n_letters")
    over = f", as means over the {int(letters)} letters that count" if letters is not None else ""
    random = [_random_score(sae, measure) for measure in MEASURES if f"mean_{measure}" in sae.baseline]
    text = f"Absorption is {' and '.join(parts)}{over}."
    if not random:
        return f"{text} No random SAE was evaluated beside it."
    above = [measure for measure in MEASURES if against_random(sae, measure)]
    than = f"its {listed(above)} score is" if len(above) == 1 else "both scores are"
    judged = f"{than} above that" if above else "it is not distinguishable from that"
    return f"{text} A random SAE of the same width and L0 scores {' and '.join(random)}: {judged}."


def _score(sae: TrainedSAE, measure: str) -> str:
    metric = MEASURES[measure]
    span = interval(sae.get(f"{metric}_low"), sae.get(f"{metric}_high"))
    apart = against_zero(sae, measure)
    judged = "no interval" if apart is None else f"95 % interval {span}"
    judged += ", not distinguishable from 0" if apart is False else ""
    return f"<b>{fixed(sae.get(metric))}</b> ({measure}; {judged})"


def _random_score(sae: TrainedSAE, measure: str) -> str:
    low, high = (sae.baseline.get(f"mean_{measure}_{end}") for end in ("low", "high"))
    span = interval(low, high)
    return f"{fixed(sae.baseline[f'mean_{measure}'])} ({measure}{f'; {span}' if span else ''})"


def _meaning(sae: TrainedSAE) -> str:
    if sae.invalid or sae.get(MEASURES["full"]) is None:
        return ""
    text = (
        "Absorption means that the latent which stands for a first letter stays silent, or weak, on some "
        "words that have this letter, because a latent of the word itself carries the letter in its place"
    )
    shown = example(sae)
    return f"{text}: {shown}." if shown else f"{text}; no such word was found here."


def _weak(sae: TrainedSAE) -> str:
    f1 = sae.get("absorption/mean_f1")
    if f1 is None or sae.invalid:
        return ""
    start = f"The letter latents have mean F1 <b>{fixed(f1, 2)}</b>"
    if f1 >= WEAK_F1:
        return f"{start}, so there are letter latents for which absorption can be judged."
    return f"{start}: few letters have a good latent, so a low absorption score says little."


def _clearness(row: dict) -> tuple[bool, float]:
    """Prefer full absorption by a latent that carries most, but no more than all, of the direction."""
    share = carried(row)
    return number(row.get("full")) == 1, -abs(share - 0.9) if share is not None else -9.0


def _compared(saes: list[TrainedSAE], runs: list[Run]) -> list[str]:
    whole = [sae for sae in saes if not sae.failed]
    sentences = [f"<b>{plural(len(saes), 'SAE')}</b> of {plural(len(runs), 'run')}."]
    failed = [f"{escape(sae.label)} ({escape(sae.failed)})" for sae in saes if sae.failed]
    if failed:
        sentences.append(f"<b>{len(failed)} failed</b>: {listed(failed)}.")
    sentences += [_all_l0(whole), _range(whole, "metrics/explained_variance", "Explained variance")]
    sentences += [_range(whole, "metrics/ce_loss_score", "CE loss recovered")]
    sentences += [_all_absorption(whole, measure) for measure in MEASURES]
    without = [sae for sae in whole if sae.invalid]
    if without:
        reasons = listed(sorted({escape(sae.invalid) for sae in without}), 2)
        sentences.append(f"{plural(len(without), 'SAE')} without a valid absorption score: {reasons}.")
    scored = [sae for sae in whole if sae.get(MEASURES["full"]) is not None and not sae.invalid]
    if scored:
        sentences.append(_meaning(max(scored, key=lambda sae: sae.get(MEASURES["full"]) or 0)))
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
    apart = (known[-1].get(f"{metric}_low") or 0) > (known[0].get(f"{metric}_high") or 1)
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
