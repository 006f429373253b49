"""What an evaluation found of one SAE, in plain sentences with numbers and 95 % intervals.

In: an SAE with its absorption figures. Out: HTML-safe sentences; "not distinguishable" where intervals overlap.
"""

from __future__ import annotations

from typing import Any

from sae_train.evals.outcomes import OUTCOMES
from sae_train.report.data import SILENT, TrainedSAE, carried
from sae_train.report.text import escape, fixed, interval, label_name, listed, nouns, number, percent

WEAK_F1 = 0.5
MEASURES = {"fraction": "absorption/mean_fraction", "full": "absorption/mean_full"}
FAMILY = "absorption/mean_full_family"
MEANING = {
    "recalled": "a main latent fires",
    "carried": "main latents are silent, one other latent carries the word: absorption",
    "below": "absorbers fire, none carries enough",
    "nobody": "no absorber fires",
}


def measure_name(sae: TrainedSAE, measure: str) -> str:
    """What a score is called: the paper's presets have another kind of full score."""
    return "causal rate" if sae.causal and measure == "full" else measure


def family_name(sae: TrainedSAE) -> str:
    """What the family-corrected full rate is called; it is by projections whatever full is."""
    return "full by projections, family" if sae.causal else "full, family"


def against_zero(sae: TrainedSAE, measure: str) -> bool | None:
    """Whether the interval of a measure excludes 0; None without an interval."""
    low = sae.get(f"{MEASURES[measure]}_low")
    return None if low is None or sae.invalid else low > 0


def against_random(sae: TrainedSAE, measure: str) -> bool | None:
    """Whether the interval lies above the random SAE's (its value, if that has no interval)."""
    low, key = sae.get(f"{MEASURES[measure]}_low"), f"mean_{measure}"
    random = number(sae.baseline.get(f"{key}_high", sae.baseline.get(key)))
    return None if low is None or random is None or sae.invalid else low > random


def absorption(sae: TrainedSAE) -> str:
    """The scores, beside those of a random SAE."""
    if sae.invalid:
        return f"There is no valid absorption score: {escape(sae.invalid)}."
    parts = [_score(sae, measure) for measure in MEASURES if sae.get(MEASURES[measure]) is not None]
    if not parts:
        return "Absorption was not evaluated."
    labels = sae.get("absorption/n_letters")
    over = f", as means over the {int(labels)} {escape(nouns(sae.noun))} that count" if labels is not None else ""
    text = f"Absorption is {' and '.join(parts)}{over}."
    random = [_random_score(sae, measure) for measure in MEASURES if f"mean_{measure}" in sae.baseline]
    if not random:
        return f"{text} No random SAE was evaluated beside it."
    above = [measure for measure in MEASURES if against_random(sae, measure)]
    than = (
        f"its {listed([measure_name(sae, measure) for measure in above])} is" if len(above) == 1 else "both scores are"
    )
    judged = f"{than} distinguishably above that" if above else "it is not distinguishable from that"
    return f"{text} A random SAE of the same width and L0 scores {' and '.join(random)}: {judged}."


def family(sae: TrainedSAE) -> str:
    """How much of the full rate is splitting: what is left once all latents of a label count as main ones."""
    full, left = sae.get(MEASURES["full"]), sae.get(FAMILY)
    if sae.invalid or left is None or full is None:
        return ""
    noun = escape(sae.noun)
    if sae.causal:
        return f"By projections, counting all latents that share a {noun} as its own, the full rate is {fixed(left)}."
    if full <= 0:
        return ""
    span = interval(sae.get(f"{FAMILY}_low"), sae.get(f"{FAMILY}_high"))
    return (
        f"Counting all latents that share a {noun} as its own (family correction) takes away "
        f"<b>{percent(1 - left / full, 0)}</b> of the full rate and leaves <b>{fixed(left)}</b>"
        f"{f' (95 % interval {span})' if span else ''}."
    )


def lost(sae: TrainedSAE) -> str:
    """Where the recall of the main latents goes."""
    if sae.invalid or (shares := sae.outcomes) is None:
        return ""
    recalled, taken, below, nobody = (percent(share) for share in shares)
    return (
        f"Of the words that the probe reads right, the main latents fire on <b>{recalled}</b>. They miss {taken} "
        f"because one other latent carries the {escape(sae.noun)}, {below} on which absorbers fire and none carries "
        f"enough, and {nobody} on which no absorber fires."
    )


def meaning(sae: TrainedSAE) -> str:
    """What absorption is, with a word of this SAE."""
    if sae.invalid or sae.get(MEASURES["full"]) is None:
        return ""
    noun = "letter" if sae.noun == "letter" else "label"
    what = "a first letter" if sae.noun == "letter" else f"a {escape(sae.noun)}"
    text = (
        f"Absorption means that the latent which stands for {what} stays silent, or weak, on some "
        f"words that have this {noun}, because a latent of the word itself carries the {noun} in its place"
    )
    shown = example(sae)
    return f"{text}: {shown}." if shown else f"{text}; no such word was found here."


def example(sae: TrainedSAE) -> str:
    """One absorbed word of this SAE, told as a sentence; empty if there is none."""
    absorbed = [row for row in sae.words if is_absorbed(row)]
    row = max(absorbed, key=_clearness, default=None)
    if row is None or not (row["absorbers"] and row["absorber_cos"] and row["main_latents"]):
        return ""
    noun = "letter" if sae.noun == "letter" else "label"
    word, main = escape(str(row["word"]).strip()), _numbered(row["main_latents"])
    share = carried(row)
    carries = f", and carries {percent(share, 0)} of the {noun}’s direction" if share is not None else ""
    several = len(row["main_latents"]) > 1
    silent = "are silent" if several else "is silent"
    if (number(row.get("main_act")) or 0) > SILENT:
        silent = "are weak" if several else "is weak"
    return (
        f"on “{word}” the {escape(label_name(row['letter']))}-{main} {silent}; "
        f"latent {int(row['absorbers'][0])} fires instead "
        f"(cosine {fixed(row['absorber_cos'][0], 2)} with the {noun}’s probe{carries})"
    )


def weak(sae: TrainedSAE) -> str:
    """Whether there are latents good enough for absorption to be judged."""
    f1 = sae.get("absorption/mean_f1")
    if f1 is None or sae.invalid:
        return ""
    noun = escape(sae.noun)
    start = f"The {noun} latents have mean F1 <b>{fixed(f1, 2)}</b>"
    if f1 >= WEAK_F1:
        return f"{start}, so there are {noun} latents for which absorption can be judged."
    return f"{start}: few {escape(nouns(sae.noun))} have a good latent, so a low absorption score says little."


def is_absorbed(row: dict[str, Any]) -> bool:
    """Whether a word is absorbed in part or in full."""
    return any((number(row.get(name)) or 0) > 0 for name in ("fraction", "full"))


def outcome_key() -> list[tuple[str, str]]:
    """Colour and meaning of each outcome."""
    return [(f"part out{i}", f"{name}: {MEANING[name]}") for i, name in enumerate(OUTCOMES)]


def _score(sae: TrainedSAE, measure: str) -> str:
    metric = MEASURES[measure]
    span = interval(sae.get(f"{metric}_low"), sae.get(f"{metric}_high"))
    apart = against_zero(sae, measure)
    judged = "no interval" if apart is None else f"95 % interval {span}"
    judged += ", not distinguishable from 0" if apart is False else ""
    name = measure_name(sae, measure)
    return f"<b>{fixed(sae.get(metric))}</b> ({'the ' if name != measure else ''}{name}; {judged})"


def _random_score(sae: TrainedSAE, measure: str) -> str:
    low, high = (sae.baseline.get(f"mean_{measure}_{end}") for end in ("low", "high"))
    span = interval(low, high)
    return f"{fixed(sae.baseline[f'mean_{measure}'])} ({measure_name(sae, measure)}{f'; {span}' if span else ''})"


def _numbered(latents: list[int]) -> str:
    numbers = ", ".join(str(int(latent)) for latent in latents)
    return f"latents {numbers}" if len(latents) > 1 else f"latent {numbers}"


def _clearness(row: dict) -> tuple[bool, float]:
    """Prefer full absorption by a latent that carries most, but no more than all, of the direction."""
    share = carried(row)
    return (number(row.get("full")) or 0) > 0, -abs(share - 0.9) if share is not None else -9.0
