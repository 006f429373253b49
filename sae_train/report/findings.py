"""What an evaluation found of an SAE: which scores are distinguishable, and which word shows it best.

templates/sentences.html puts it into words.
"""

from __future__ import annotations

from typing import Any

from sae_train.evals.outcomes import OUTCOMES
from sae_train.report.data import SILENT, TrainedSAE, carried_share
from sae_train.report.text import number

MEASURES = {"fraction": "absorption/mean_fraction", "full": "absorption/mean_full"}
FULL = MEASURES["full"]
FAMILY = "absorption/mean_full_family"
MEANING = {
    "recalled": "a main latent fires",
    "carried": "main latents are silent, one other latent carries the word: absorption",
    "below": "absorbers fire, none carries enough",
    "nobody": "no absorber fires",
}
OUTCOME_LEGEND = [(f"part out{i}", f"{name}: {MEANING[name]}") for i, name in enumerate(OUTCOMES)]


def measure_name(sae: TrainedSAE, measure: str) -> str:
    """What a score is called: the paper's presets have another kind of full score."""
    return "causal rate" if sae.causal and measure == "full" else measure


def family_name(sae: TrainedSAE) -> str:
    """What the family-corrected full rate is called; it is by projections whatever full is."""
    return "full by projections, family" if sae.causal else "full, family"


def usable_measures(sae: TrainedSAE) -> list[str]:
    return [measure for measure, metric in MEASURES.items() if sae.usable(metric) is not None]


def against_zero(sae: TrainedSAE, measure: str) -> bool | None:
    """Whether the interval of a measure excludes 0; None without an interval."""
    low = sae.usable(f"{MEASURES[measure]}_low")
    return None if low is None else low > 0


def beyond_chance(sae: TrainedSAE, measure: str) -> bool | None:
    """Whether the interval of a measure lies above what chance gives; None where either is unknown.

    For full that is what random latents would carry of the words that this SAE's main latents miss: a random SAE's own
    full says little, since that misses most words. Else, and where that was not measured, it is the random SAEs' scores
    (the upper ends of their intervals, if these have any).
    """
    low, key = sae.usable(f"{MEASURES[measure]}_low"), f"mean_{measure}"
    random = [number(figures.get(f"{key}_high", figures.get(key))) for figures in (sae.baseline, sae.chance)]
    levels = [sae.full_by_chance] if judged_by_misses(sae, measure) else random
    known = [value for value in levels if value is not None]
    return low > max(known) if known and low is not None else None


def judged_measures(sae: TrainedSAE) -> list[str]:
    return [measure for measure in usable_measures(sae) if beyond_chance(sae, measure) is not None]


def judged_by_misses(sae: TrainedSAE, measure: str) -> bool:
    return measure == "full" and sae.full_by_chance is not None


def chance_level(sae: TrainedSAE, measure: str) -> float | None:
    """What a measure is held against; of random SAEs fitted on text and on the words the higher one."""
    if judged_by_misses(sae, measure):
        return sae.full_by_chance
    means = [number(figures.get(f"mean_{measure}")) for figures in (sae.baseline, sae.chance)]
    return max((mean for mean in means if mean is not None), default=None)


def chance_name(sae: TrainedSAE, measure: str) -> str:
    return "chance" if judged_by_misses(sae, measure) else "a random SAE"


def count_distinguishable(saes: list[TrainedSAE], measure: str) -> tuple[int, int, int]:
    """How many SAEs are distinguishable from 0 and from chance, and of how many that is known."""
    beside = [above for sae in saes if (above := beyond_chance(sae, measure)) is not None]
    return sum(against_zero(sae, measure) is True for sae in saes), sum(beside), len(beside)


def intervals_apart(least: TrainedSAE, most: TrainedSAE, metric: str) -> bool:
    """Whether the intervals of two SAEs do not overlap."""
    low, high = most.get(f"{metric}_low"), least.get(f"{metric}_high")
    return low is not None and high is not None and low > high


def rank(saes: list[TrainedSAE], metric: str) -> list[TrainedSAE]:
    """SAEs with a usable value of a metric, from the least to the most."""
    known = [sae for sae in saes if sae.usable(metric) is not None]
    return sorted(known, key=lambda sae: (sae.get(metric), sae.label))


def example(sae: TrainedSAE) -> dict[str, Any] | None:
    """The word of this SAE that shows absorption most clearly."""
    row = max((row for row in sae.words if is_absorbed(row)), key=_clearness, default=None)
    return row if row and row["absorbers"] and row["absorber_cos"] and row["main_latents"] else None


def is_silent(row: dict[str, Any]) -> bool:
    """Whether a word's main latents do not fire at all."""
    return (number(row.get("main_act")) or 0) <= SILENT


def is_absorbed(row: dict[str, Any]) -> bool:
    """Whether a word is absorbed in part or in full."""
    return any((number(row.get(name)) or 0) > 0 for name in ("fraction", "full"))


def _clearness(row: dict[str, Any]) -> tuple[bool, float]:
    """Prefer full absorption by a latent that carries most, but no more than all, of the direction."""
    share = carried_share(row)
    return (number(row.get("full")) or 0) > 0, -abs(share - 0.9) if share is not None else -9.0
