"""Which figures over tokens a report shows, and how SAEs are told apart in them."""

from __future__ import annotations

import re

from sae_train.config import width_label
from sae_train.report.data import TrainedSAE, place_name
from sae_train.report.findings import MEASURES
from sae_train.report.shapes import Curves, HeatMap, Line
from sae_train.report.tables import own_names
from sae_train.report.text import nouns, number, tick

COLOURS, DASHES, STRENGTHS = 8, 4, 4
OWN_COLOUR = 6  # up to so many SAEs each has a colour of its own
TRAITS = {"architecture": "arch", "run": "run", "hook": "hook", "width": "width", "L0": "l0", "seed": "seed"}
CURVES = (  # key, title, note, metric, logarithmic, from zero
    ("loss", "Loss", "training loss, log scale", "losses/loss", True, False),
    ("l0", "L0", "active latents per token, log scale; dashed: target", "metrics/l0", True, False),
    ("ev", "Explained variance", "1 is perfect reconstruction", "metrics/explained_variance", False, False),
    ("dead", "Dead latents", "share of all latents", "sparsity/dead_fraction", False, True),
    ("fraction", "Absorption, fraction", "mean over letters, 95 % band", "absorption/mean_fraction", False, True),
    ("full", "Absorption, full", "mean over letters, 95 % band", "absorption/mean_full", False, True),
    ("family", "Absorption, full, family-corrected", "all latents of a label as one", "absorption/mean_full_family",
     False, True),
    ("recall", "Recall of the main latents", "mean over letters", "absorption/mean_recall_main", False, True),
    ("split", "Main latents per letter", "mean over letters", "absorption/mean_n_split", False, True),
    ("f1", "F1 of the letter latents", "mean over letters", "absorption/mean_f1", False, True),
    ("ce", "CE loss recovered", "1: as if the SAE were not there", "metrics/ce_loss_score", False, False),
    ("mcc", "MCC", "mean cosine with the true features, one to one", "toy/mcc", False, True),
    ("toy-f1", "F1 as detectors", "of the true features' latents", "toy/f1", False, True),
    ("toy", "True absorption", "words whose parent's latent is silent, carried by another", "toy/absorption", False,
     True),
    ("seen", "Absorption seen by a k-sparse probe", "its latents as the parent's", "toy/absorption_split", False, True),
    ("coefficient", "Sparsity coefficient", "what holds L0 (λ), log scale", "details/l0_coefficient", True, False),
    ("threshold", "Threshold", "mean JumpReLU threshold", "details/threshold", False, False),
)  # fmt: skip
GRIDS = {
    "Explained variance": "metrics/explained_variance",
    "Absorption, fraction": MEASURES["fraction"],
    "Absorption, full": MEASURES["full"],
    "MCC": "toy/mcc",
    "True absorption": "toy/absorption",
    "Absorption seen by a k-sparse probe": "toy/absorption_split",
}


def styles(saes: list[TrainedSAE]) -> tuple[list[str], str]:
    """CSS classes for each SAE, and what colour, dash and strength stand for."""
    if len(saes) <= OWN_COLOUR:
        return [f"c{i % COLOURS} d0 o0" for i in range(len(saes))], ""
    levels = {name: _levels([getattr(sae, trait) for sae in saes]) for name, trait in TRAITS.items()}
    varying = [name for name, values in levels.items() if len(values) > 1]
    chosen = varying[:3] + [None] * (3 - min(len(varying), 3))
    css = []
    for sae in saes:
        ranks = [levels[name].index(getattr(sae, TRAITS[name])) if name else 0 for name in chosen]
        css.append(f"c{ranks[0] % COLOURS} d{ranks[1] % DASHES} o{min(ranks[2], STRENGTHS - 1)}")
    words = [f"{way}: {name}" for way, name in zip(("colour", "dashes", "faintness"), chosen, strict=True) if name]
    return css, "; ".join(words)


def curves(saes: list[TrainedSAE], css: list[str]) -> list[Curves]:
    """Every figure over tokens that has a course: at least two points."""
    drawn, noun = [], saes[0].noun if saes else "letter"
    names = {"letter": noun, "letters": nouns(noun)}
    for key, *texts, metric, log, zero in CURVES:
        title, note = (_call_by(names, text) for text in texts)
        lines = [line for i, sae in enumerate(saes) if (line := _line(i, css[i], sae, metric, log))]
        if any(len(line.x) > 1 for line in lines):
            targets = sorted({sae.l0 for sae in saes if sae.l0}) if key == "l0" else []
            drawn.append(Curves(key, title, note, lines, log, zero, targets))
    for name in own_names(saes):
        lines = [line for i, sae in enumerate(saes) if (line := _line(i, css[i], sae, name, log=False))]
        if any(len(line.x) > 1 for line in lines):
            drawn.append(Curves(re.sub(r"\W+", "-", f"own-{name}"), name, "from a callback", lines))
    return drawn


def _call_by(names: dict[str, str], text: str) -> str:
    """The text with each word of `names` as it is called there."""
    return re.sub(r"\b(" + "|".join(names) + r")\b", lambda found: names[found[0]], text)


def letter_maps(sae: TrainedSAE) -> list[HeatMap]:
    """Absorption by letter over training, fraction and full; empty before two evaluations."""
    steps = sorted({(row["step"], number(row.get("tokens")) or 0) for row in sae.letters})
    if len(steps) < 2:
        return []
    letters = sorted({str(row["letter"]) for row in sae.letters})
    columns = [tick(tokens) for _, tokens in steps]
    maps = []
    for key, noun in (("fraction", "Absorption fraction"), ("full", "Full absorption")):
        scores = {(str(row["letter"]), row["step"]): number(row.get(key)) for row in sae.letters if row.get("counts")}
        most = max((value for value in scores.values() if value is not None), default=0)
        values = [[scores.get((letter, step)) for step, _ in steps] for letter in letters]
        title = f"{noun} by {sae.noun} and tokens (darkest: {most:.2f})"
        maps.append(HeatMap(f"{key}-over-tokens", title, "", letters, columns, values, 0, most))
    return maps


def width_maps(saes: list[TrainedSAE]) -> dict[str, list[tuple[str, HeatMap]]]:
    """Width × L0 maps with numbers (means over seeds) by metric, each with the architecture's name.

    All maps of one metric share a scale; there are none unless width or L0 varies.
    """
    maps: dict[str, list[tuple[str, HeatMap]]] = {}
    several = len({sae.run for sae in saes}) > 1
    for title, metric in GRIDS.items():
        known = [sae for sae in saes if sae.width and sae.l0 and not (sae.invalid and metric.startswith("absorption"))]
        widths, targets = (_levels([getattr(sae, trait) for sae in known]) for trait in ("width", "l0"))
        if len(widths) * len(targets) < 2:
            continue
        heads = ([width_label(width) for width in widths], [f"L0 {target:g}" for target in targets])
        cells = {}
        for place, arch in sorted({(sae.place, sae.arch) for sae in known if sae.get(metric) is not None}):
            own = [sae for sae in known if (sae.place, sae.arch) == (place, arch)]
            cells[place_name(place, several) + arch] = _means(own, metric, widths, targets)
        values = [value for rows in cells.values() for row in rows for value in row if value is not None]
        for name, rows in cells.items():
            names = (f"{metric.split('/')[1]}-{re.sub(' · |/', '-', name)}", f"{title}, {name}", "width, L0")
            chart = HeatMap(*names, *heads, rows, min(values), max(values), numbers=True)
            maps.setdefault(title, []).append((name, chart))
    return maps


def _means(saes: list[TrainedSAE], metric: str, widths: list, targets: list) -> list[list[float | None]]:
    return [
        [_mean([sae.get(metric) for sae in saes if (sae.width, sae.l0) == (w, t)]) for t in targets] for w in widths
    ]


def _line(index: int, css: str, sae: TrainedSAE, metric: str, log: bool) -> Line | None:
    x, y = sae.series(metric)
    if sae.invalid and metric.startswith("absorption"):
        return None
    kept = [(a, b) for a, b in zip(x, y, strict=True) if b > 0 or not log]
    if not kept:
        return None
    x, y = [a for a, _ in kept], [b for _, b in kept]
    lows, highs = (dict(zip(*sae.series(f"{metric}_{end}"), strict=True)) for end in ("low", "high"))
    if not all(a in lows and a in highs for a in x):
        return Line(index, css, x, y, name=sae.label)
    return Line(index, css, x, y, [lows[a] for a in x], [highs[a] for a in x], sae.label)


def _levels(values: list) -> list:
    return sorted({value for value in values if value is not None})


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
