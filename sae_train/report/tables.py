"""Which columns the report's tables have; templates/tables.html writes them."""

from __future__ import annotations

from sae_train.files import own_figures
from sae_train.report.data import TrainedSAE
from sae_train.report.findings import MEASURES, family_name, measure_name

TRUTH = {
    "mcc": "MCC",
    "recovered": "recovered",
    "f1": "F1",
    "absorption": "absorption",
    "absorption_weighted": "by frequency",
    "absorption_split": "to a k-sparse probe",
    "parent_precision": "precision, parent",
    "parent_recall": "recall, parent",
    "encoder_child": "child in parent’s encoder",
    "decoder_parent": "parent in child’s decoder",
}
BASELINES = {
    "random": ("random SAE", "random directions, same width and L0"),
    "random_words": ("random SAE, on words", "the same, as sparse as this SAE on the words"),
    "shuffled_labels": ("shuffled labels", "this SAE, asked for labels dealt at random"),
    "random_directions": ("random directions", "this SAE, random vectors for the probe"),
    "probe": ("probe", "its read-outs as latents: upper bound of recall"),
}
PROJECTED = ("shuffled_labels", "random_directions", "probe")  # scored so by every preset
COLUMNS = {
    "mean_fraction": "fraction",
    "mean_full": "full",
    "mean_full_family": "full, family",
    "mean_recall_main": "recall, main latents",
    "mean_f1": "F1, best latent",
}


def truth_columns(saes: list[TrainedSAE]) -> dict[str, str]:
    return {name: title for name, title in TRUTH.items() if any(sae.get(f"toy/{name}") is not None for sae in saes)}


def own_names(saes: list[TrainedSAE]) -> list[str]:
    """Figures that a user's callbacks gave and that are numbers."""
    names = dict.fromkeys(name for sae in saes for name in own_figures(sae.final))
    return [name for name in names if any(sae.get(name) is not None for sae in saes)]


def baselines_beside(saes: list[TrainedSAE]) -> list[str]:
    """Baselines that stand beside some SAE, the random SAE always; that of the words stands with each SAE alone."""
    shown = [name for name in BASELINES if name != "random_words"]
    return [name for name in shown if name == "random" or any(sae.baselines.get(name) for sae in saes)]


def score_heads(saes: list[TrainedSAE], with_family: bool) -> list[str]:
    """Heads of the overview's columns that need a valid score."""
    first = saes[0]
    ways = {name: ", by projections" if first.causal and name in PROJECTED else "" for name in baselines_beside(saes)}
    heads = [f"absorption, {measure_name(first, measure)}" for measure in MEASURES]
    heads += [family_name(first)] if with_family else []
    return [*heads, *(BASELINES[name][0] + way for name, way in ways.items()), first.nouns, "mean F1"]


def baseline_columns(sae: TrainedSAE, whole: bool) -> dict[str, str]:
    """Columns of the SAE beside its baselines: all if whole, else those with a value; none without a baseline."""
    if sae.invalid or not any(sae.baselines.get(name) for name in BASELINES):
        return {}
    titles = COLUMNS | {"mean_full": measure_name(sae, "full"), "mean_full_family": family_name(sae)}
    known = {name for figures in sae.baselines.values() for name, value in figures.items() if value is not None}
    known |= {name for name in titles if sae.get(f"absorption/{name}") is not None}
    return {name: title for name, title in titles.items() if whole or name in known}
