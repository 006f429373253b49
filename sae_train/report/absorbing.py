"""How absorption came about in one SAE, from the event log, and how often its latents fire.

An event's tokens are those of the evaluation at which it was first seen: it happened since the one before.
"""

from __future__ import annotations

from collections import Counter
from statistics import median_low
from typing import Any

from sae_train.evals.outcomes import OUTCOMES
from sae_train.report.data import TrainedSAE
from sae_train.report.findings import OUTCOME_LEGEND
from sae_train.report.shapes import Bars, Chart, Curves, Line
from sae_train.report.text import number, percent, tick


def course(sae: TrainedSAE) -> dict[str, Any] | None:
    """When the words that end up absorbed fell silent, and whether the new latent was there before; None if unknown."""
    log: list[dict[str, Any]] = sae.event_log.get("events", [])
    if sae.invalid or not sae.event_log:
        return None
    fell = [row for row in log if number(row["recalled_tokens"]) is not None]  # the others were silent all the while
    return {
        "words": len(log),
        "recovered": sae.event_log["recovered"],
        "once": len(fell),
        "silent": median_low(row["silent_tokens"] for row in fell) if fell else 0,
        "order": Counter(_order(row) for row in fell),
    }


def event_charts(sae: TrainedSAE) -> list[Chart]:
    """Words taken over by evaluation, and the outcomes of all words over training; empty where nothing was followed."""
    if sae.invalid:
        return []
    return [chart for chart in (_takeovers(sae), _outcomes(sae)) if chart]


def _order(row: dict[str, Any]) -> str:
    first, silent = row["first_tokens"], row["silent_tokens"]
    return "before" if first < silent else "together" if first == silent else "after"


def _takeovers(sae: TrainedSAE) -> Bars | None:
    log = sae.event_log.get("events", [])
    if not log or len(sae.event_log["looks"]) < 2:
        return None
    counts = Counter(row["taken_tokens"] for row in log)
    bars = [(f"at {tick(tokens)} tokens", tick(tokens), float(counts[tokens]), "out1")
            for tokens in sae.event_log["looks"]]  # fmt: skip
    note = "words absorbed in the end, by the evaluation since which one latent carries them"
    return Bars("taken-over", "Words taken over", note, bars, "tokens", "words")


def _outcomes(sae: TrainedSAE) -> Curves | None:
    series = {name: sae.series(f"absorption/mean_lost_{name}") for name in OUTCOMES[1:]}
    x = series["carried"][0]
    if len(x) < 2 or any(part[0] != x for part in series.values()):
        return None
    lost = [values for _, values in series.values()]
    recalled = [1 - sum(values) for values in zip(*lost, strict=True)]
    lines = [
        Line(-1, f"out{i} d0 o0", x, y, name=name)
        for i, (name, y) in enumerate(zip(OUTCOMES, [recalled, *lost], strict=True))
    ]
    note = f"share of the words, mean over {sae.nouns}:"
    title = "Where recall goes over training"
    return Curves("recall-over-tokens", title, note, lines, zero=True, legend=OUTCOME_LEGEND)


def density(sae: TrainedSAE) -> list[Chart]:
    """How often latents fire on held-out tokens, in half-decades, silent ones apart; empty if not logged."""
    counts, silent = sae.final.get("sparsity/log10_density_histogram"), sae.get("sparsity/silent_fraction")
    if not isinstance(counts, list) or silent is None or not sae.width:
        return []
    never = round(silent * sae.width)
    bars = [("never", "never", float(never), "out1")]
    for i, count in enumerate(counts):
        low, high = (10 ** (-5 + (i + end) / 2) for end in (0, 1))
        bars.append((f"on {percent(low, 4 - i // 2)} to {percent(high, 4 - i // 2)} of tokens",
                     percent(low, max(0, 3 - i // 2)) if i % 2 == 0 and i else "", float(count), "c0"))  # fmt: skip
    note = f"latents by the share of held-out tokens they fire on; apart: {never:,} that never do there"
    return [Bars("density", "How often latents fire", note, bars, "share of tokens", "latents", apart=1)]
