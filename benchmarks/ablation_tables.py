"""Tables of what exact ablation says of the absorption scores: agreement, thresholds, nulls, words that disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import agreement as ag
import pandas as pd
import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

OWED = 0.4  # share of the letter's effect that one latent must have: the metric's own share, of effect not projection
OWED_CURVE = (0.2, 0.4, 0.6)
SCORES = ("full", "fraction", "full_family", "fraction_family", "causal")
COUNTS = ("right", "false", "missed", "quiet")
N_DISAGREE = 10


def summary(words: pd.DataFrame) -> list[dict[str, Any]]:
    """Agreement of each score with ablation; SAEs and letters are drawn."""
    sae, label = ag.clusters(list(words["sae"])), _long(words["label"])
    rows: list[dict[str, Any]] = []

    def add(what: str, measure: str, it: ag.Interval) -> None:
        rows.append({"part": what, "value": "", "measure": measure, **vars(it)})

    gap, truth = _floats(words["gap"]), _floats(words[f"absorbed_{OWED}"])
    add("truth", "absorbed", ag.mean(truth, sae, label))
    for owed in OWED_CURVE:
        add("truth", f"absorbed, owed {owed}", ag.mean(_floats(words[f"absorbed_{owed}"]), sae, label))
    owing = (truth > 0).numpy()
    silent_of = _floats(words["silent"])[truth > 0]
    add("truth", "main latents silent, of the absorbed", ag.mean(silent_of, sae[owing], label[owing]))
    for score in SCORES:
        value = _floats(words[score])
        if score == "causal" and not float(value.sum()):
            continue
        add(score, "mean", ag.mean(value, sae, label))
        add(score, "Spearman with the gap", ag.correlation(value, gap, sae, label, by_rank=True))
        add(score, "Pearson with the gap", ag.correlation(value, gap, sae, label))
        for owed in OWED_CURVE:
            sums = ag.cluster_sums(ag.hits(value >= 0.5, _floats(words[f"absorbed_{owed}"])), sae, label)
            add(score, f"precision, owed {owed}", ag.two_way(sums, ag.precision))
            add(score, f"recall, owed {owed}", ag.two_way(sums, ag.recall))
    silent = words["silent"] == 1
    quiet = silent.to_numpy().copy()
    sums = ag.cluster_sums(ag.hits(_floats(words["full"]), truth)[quiet], sae[quiet], label[quiet])
    add("full", "precision on silent words", ag.two_way(sums, ag.precision))
    add("full", "recall on silent words", ag.two_way(sums, ag.recall))
    some = silent & (words["share"] > 0)
    part, s, c = words[some], sae[some.to_numpy().copy()], label[some.to_numpy().copy()]
    for by_rank, name in ((True, "Spearman"), (False, "Pearson")):
        it = ag.correlation(_floats(part["share"]).clamp(0, 2), _floats(part["effect"]).clamp(-1, 2), s, c, by_rank)
        add("silent words", f"{name} of projected share and effect", it)
    full = words["full"] == 1
    for what, rows_of in (("full words", full), ("silent, not full", silent & ~full)):
        part, s, c = words[rows_of], sae[rows_of.to_numpy().copy()], label[rows_of.to_numpy().copy()]
        for name in ("effect", "control"):
            value = _floats(part[name])
            add(what, f"{name}, mean share of the letter", ag.mean(value.clamp(-1, 2), s, c))
            add(what, f"{name}, at least {OWED}", ag.mean((value >= OWED).double(), s, c))
    return rows


def thresholds(curves: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for (threshold, value), part in curves.groupby(["threshold", "value"], sort=False):
        counts = torch.tensor(part[[*COUNTS]].to_numpy())
        sums = ag.cluster_sums(counts, ag.clusters(list(part["sae"])), _long(part["label"]))
        for name, statistic in (("precision", ag.precision), ("recall", ag.recall), ("f1", ag.f1)):
            rows.append({"part": threshold, "value": value, "measure": name, **vars(ag.two_way(sums, statistic))})
    return rows


def mean_nulls(nulls: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Means over SAEs, which are drawn."""
    table = pd.DataFrame(nulls)
    n = torch.arange(len(table))
    return [
        {"part": "nulls", "value": "", "measure": name, **vars(ag.mean(_floats(table[name]), n, torch.zeros_like(n)))}
        for name in table
    ]


def disagreements(words: pd.DataFrame) -> pd.DataFrame:
    """Five words that count as full and whose absorber the answer owes least, and five whose main latents are silent,
    that do not count, and whose other latents the answer owes most."""
    words = words[words["word"].str.strip().str.len() > 2]
    columns = ["sae", "word", "full", "silent", "absorber", "cos", "share", "effect", "most", "control", "letter"]
    full = words[words["full"] == 1].sort_values("effect")
    missed = words[(words["full"] == 0) & (words["silent"] == 1)].sort_values("most", ascending=False)
    most = (each.drop_duplicates("word").head(N_DISAGREE // 2) for each in (full, missed))  # of all SAEs
    return pd.concat(most)[columns].round(2)


def markdown(table: pd.DataFrame) -> str:
    """One line a figure."""
    lines = ["| | | mean [95 %] |", "|---|---|---|"]
    for _, row in table.iterrows():
        it = ag.Interval(row["mean"], row["low"], row["high"], row["visible"])
        lines.append(f"| {row['part']} {row['value']} | {row['measure']} | {ag.shown(it)} |")
    return "\n".join(lines)


def words_table(table: pd.DataFrame) -> str:
    """The words on which projection and ablation disagree most."""
    lines = [f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in table.itertuples(index=False))])


def _floats(column: pd.Series) -> Float[Tensor, " n"]:
    return torch.tensor(column.to_numpy(dtype=float, copy=True))


def _long(column: pd.Series) -> Int[Tensor, " n"]:
    return torch.tensor(column.to_numpy(dtype=int))
