"""The last words of a run: a few lines of numbers, from what run.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sae_train.files import own_figures
from sae_train.report.text import leaves_out, left_out, noun_of, nouns

Baselines = Mapping[str, Mapping[str, Any]]
NO_BASELINES: Baselines = MappingProxyType({})


def summary_lines(info: dict[str, Any]) -> list[str]:
    """For each SAE: L0 asked and reached, EV, loss recovered, dead, absorption with intervals, F1."""
    lines = []
    for sae in info["saes"]:
        if sae["failed"]:
            lines.append(f"{sae['name']}: ended early, {sae['failed']}")
            continue
        lines += _one(sae, info.get("settings", {}).get("hierarchy"))
    return [*lines, f"left out as outliers: {left_out(info)}"] if leaves_out(info) else lines


def _one(sae: dict[str, Any], hierarchy: str | None) -> list[str]:
    final, random_ev = sae["final"], sae["baseline"].get("random", {}).get("explained_variance")
    beside = "" if random_ev is None else f" (random SAE {random_ev:.2f})"
    figures = [
        f"L0 asked {sae['l0']:g}, reached {_number(final, 'metrics/l0', '.2f')}",
        f"EV {_number(final, 'metrics/explained_variance', '.4f')}{beside}",
        *([f"loss recovered {recovered:.4f}"] if (recovered := final.get("metrics/ce_loss_score")) is not None else []),
        _unused(final),
    ]
    lines = [
        f"{sae['name']}: " + ", ".join(figures),
        "  " + measured_line(final, sae["baseline"], hierarchy),
    ]
    own = [f"{name} {value:.4g}" for name, value in own_figures(final).items() if isinstance(value, int | float)]
    return [*lines, "  " + ", ".join(own)] if own else lines


def _unused(final: dict[str, Any]) -> str:
    """The share of dead latents, or, where none could count as dead, of those that are silent on held-out data."""
    if final.get("sparsity/dead_fraction") is None and final.get("sparsity/silent_fraction") is not None:
        return f"silent on held-out data {final['sparsity/silent_fraction']:.1%}"
    return f"dead {_number(final, 'sparsity/dead_fraction', '.1%')}"


def epochs_note(epochs: int) -> str:
    """Say that training data came up more than once."""
    times = "once" if epochs == 1 else f"{epochs:,} times"
    return f"the training data was used up and begun anew {times}: fewer tokens, or more data, would not repeat it"


def measured_line(final: dict[str, Any], baselines: Baselines = NO_BASELINES, hierarchy: str | None = None) -> str:
    """A toy's truth where there is one, else the absorption eval's result."""
    return truth_line(final) if "toy/mcc" in final else absorption_line(final, baselines, hierarchy)


def truth_line(final: dict[str, Any]) -> str:
    """Recovery, and absorption where the toy has parents and children, in one line."""
    parts = [f"MCC {_number(final, 'toy/mcc', '.4f')}", f"recovered {_number(final, 'toy/recovered', '.1%')}"]
    parts.append(f"F1 {_number(final, 'toy/f1', '.3f')}")
    if final.get("toy/absorption") is not None:
        parts.append(
            f"absorption {_number(final, 'toy/absorption', '.3f')} per word, "
            f"{_number(final, 'toy/absorption_weighted', '.3f')} by frequency, "
            f"{_number(final, 'toy/absorption_split', '.3f')} to a k-sparse probe"
        )
        parts.append(f"parents' recall {_number(final, 'toy/parent_recall', '.3f')}")
    return "truth: " + ", ".join(parts)


def absorption_line(final: dict[str, Any], baselines: Baselines = NO_BASELINES, hierarchy: str | None = None) -> str:
    """Absorption in one line: both scores with intervals over words, those of the random SAEs beside them, letters (or
    a hierarchy's labels by their name) and F1."""
    if final.get("absorption/valid") is None:
        return "absorption: not measured"
    if not final["absorption/valid"]:
        return f"absorption: no valid result, {final.get('absorption/reason')}"
    parts = []
    for name, label in (("mean_fraction", "fraction"), ("mean_full", "full")):
        key = f"absorption/{name}"
        parts.append(f"{label} {_estimate(final, key)}{_chance(baselines, name)}")
    n_labels, f1 = final.get("absorption/n_letters"), _number(final, "absorption/mean_f1", ".3f")
    letters = f"{n_labels} {nouns(noun_of(hierarchy))} count, mean F1 {f1}"
    return "absorption, 95 % intervals over words: " + ", ".join([*parts, letters])


def _chance(baselines: Baselines, name: str) -> str:
    """The random SAE's score, and that of the one which is as sparse on the words, where they are valid."""
    random, on_words = (baselines.get(kind, {}) for kind in ("random", "random_words"))
    said = [] if random.get(name) is None else [_estimate(random, name)]
    said += [] if on_words.get(name) is None else [f"on the words {on_words[name]:.4f}"]
    return f" (random SAE {', '.join(said)})" if said else ""


def _estimate(values: Mapping[str, Any], name: str) -> str:
    """A mean with its 95 % interval."""
    low, high = (_number(values, f"{name}_{end}", ".4f") for end in ("low", "high"))
    return f"{_number(values, name, '.4f')} [{low}, {high}]"


def _number(values: Mapping[str, Any], name: str, form: str) -> str:
    value = values.get(name)
    return "–" if value is None else format(value, form)
