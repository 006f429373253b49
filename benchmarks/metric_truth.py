"""Is the absorption metric right? Its scores on the letter toy, held against what the planted dictionary says.

    python benchmarks/metric_truth.py --runs checkpoints/metric_truth

The script trains SAEs (three architectures × two widths × two L0 × three seeds; finished runs are reused), builds
some by hand whose absorption is known, and puts all through the first-letter eval with the toy's parents as letters: probe,
ranking, k-sparse probes and scores are those of `sae-train eval`, only the answer is read by a linear map of the word
in place of a language model. It prints Markdown and writes tables to benchmarks/results/metric_*.csv: correlations of
each score with the truth (over SAEs, over words), precision and recall as each threshold moves, and the scores of SAEs
built by hand.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agreement as ag
import pandas as pd
import planted
import torch

from sae_train.data.toy import N_PARENTS, Toy, held_out_sample, open_toy
from sae_train.evals import causal, k_sparse
from sae_train.evals.absorption import Encoded, Evaluation
from sae_train.evals.baselines import random_sae
from sae_train.evals.latents import Latents, encode, from_dense
from sae_train.evals.presets import SAEBENCH
from sae_train.evals.ranking import rank_latents
from sae_train.evals.scoring import score_entries
from sae_train.files import read_json
from sae_train.runs.run import Run, train

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.protocols import SAE

RESULTS = Path(__file__).resolve().parent / "results"
ARCHS, WIDTHS, TARGETS, SEEDS = ("topk", "matryoshka", "jumprelu"), (64, 512), (2, 4), (0, 1, 2)
TOKENS = 154_000
SCORES = ("full", "fraction", "full_family", "fraction_family", "causal")
HALF = 0.5  # of a fraction: from here on it is read as "absorbed"
NO_SECOND = 1e9
CURVES: dict[str, tuple[str, tuple[float, ...]]] = {
    "full_cos": ("full", (0.0, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    "absorbed_share": ("full", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)),
    "absorber_cos": ("fraction", (0.0, 0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    "f1_jump": ("full", (0.0, 0.01, 0.03, 0.06, 0.1, 0.2, NO_SECOND)),
    "min_margin": ("causal", (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)),
}
"""thresholds that are moved, one at a time, and the score that is read"""
COUNTS = ("right", "false", "missed", "quiet")


@dataclass(frozen=True)
class Bench:
    """What all SAEs are measured on."""

    toy: Toy
    rendered: planted.Rendered
    folds: list[Assets]
    answer: Float[Tensor, "labels d_in"]
    """per parent, what of the word moves the answer's margin"""


def main() -> None:
    args = _arguments()
    bench = make_bench()
    trained = [measure(bench, sae, about) for about, sae in trained_saes(args.runs)]
    scores, built = pd.concat([table for table, _ in trained], ignore_index=True), built_scores(bench)
    curves = pd.concat([table for _, table in trained], ignore_index=True)
    tables = {
        "toy_saes": by_sae(scores), "agreement": agreement_table(scores),
        "thresholds": threshold_table(curves), "built": built,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(args.out / f"metric_{name}.csv", index=False, float_format="%.4f")
    for name in ("agreement", "thresholds", "built"):
        print(f"\n{name}\n\n{markdown(tables[name])}")


def make_bench(n_answers: int = 16_384) -> Bench:
    toy = open_toy("letters")
    rendered = planted.render(toy)
    return Bench(toy, rendered, planted.folds(toy, rendered), answer_directions(toy, n_answers))


def answer_directions(toy: Toy, n: int) -> Float[Tensor, "labels d_in"]:
    """A softmax regression names the parent; its margin is the right logit minus the mean of the others'."""
    sample = held_out_sample(toy, n)
    is_parent = sample.features < N_PARENTS
    labels = torch.empty(n, dtype=torch.long).index_put_((sample.rows[is_parent],), sample.features[is_parent])
    weight = torch.zeros(N_PARENTS, toy.d_in, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(sample.x @ weight.T, labels) + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weight = weight.detach()
    return (weight - weight.mean(0)) * N_PARENTS / (N_PARENTS - 1)


def trained_saes(folder: Path) -> list[tuple[dict[str, Any], SAE]]:
    """Train all SAEs, one run an architecture, or read the runs where they are finished."""
    found = []
    for arch in ARCHS:
        path = folder / f"toy-{arch}"
        finished = (path / "run.json").exists() and read_json(path / "run.json").get("status") == "finished"
        run = Run(path) if finished else train(
            model="toy", arch=arch, width=list(WIDTHS), l0=list(TARGETS), seed=list(SEEDS), absorption_evals=1,
            tokens=TOKENS, name=path.name, out=str(folder),
        )  # fmt: skip
        found += [
            ({key: sae[key] for key in ("name", "arch", "width", "l0", "seed")}, run.saes[sae["name"]])
            for sae in run.info["saes"]
        ]
    return found


@torch.no_grad()
def measure(
    bench: Bench, sae: SAE, about: dict[str, Any], latents: Latents | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per rendering, each in the fold that tests it: scores and truth; and the alarms as thresholds move."""
    latents = latents or encode(sae, bench.rendered.x)
    truth = planted.truth(latents, sae.W_dec.detach().float(), bench.rendered, bench.toy)
    absorbed = truth.absorbed()
    scores, curves = [], []
    for assets in bench.folds:
        rows = assets.tp_rows
        fold = Fold(sae, assets, latents, bench.answer)
        table = {
            **fold.scores(), "parent": assets.tp_labels, "word": bench.rendered.word[rows],
            "absorbed": absorbed[rows], "gap": truth.gap[rows],
            "own_silent": truth.silent[rows], "others": truth.others[rows],
        }  # fmt: skip
        scores.append(pd.DataFrame({name: value.double().numpy() for name, value in table.items()}))
        for (threshold, value), flag in fold.curves().items():
            counts = ag.cluster_sums(ag.hits(flag, absorbed[rows]), torch.zeros_like(rows), assets.tp_labels)[0]
            curves += [(threshold, value, parent, *row) for parent, row in enumerate(counts.tolist())]
    counted = pd.DataFrame(curves, columns=["threshold", "value", "parent", *COUNTS])
    return pd.concat(scores, ignore_index=True).assign(**about), counted.assign(**about)


class Fold:
    """The eval of one SAE on one fold, with its thresholds free."""

    def __init__(self, sae: SAE, assets: Assets, latents: Latents, answer: Tensor):
        self.assets = assets
        self.e = Evaluation(sae, assets, SAEBENCH, 0, None, baseline=True)
        places = [(~assets.is_test).nonzero().squeeze(1), assets.is_test.nonzero().squeeze(1), assets.tp_rows]
        self.latents = Encoded(*(latents.pick(rows) for rows in places))
        labels = assets.labels[~assets.is_test]
        self.ranking, _ = rank_latents(self.latents.train, labels, N_PARENTS, SAEBENCH, 0)
        self.chosen = self._fit(SAEBENCH.f1_jump)
        self.rising = self._fit(0.0)
        self.scored = self.e.score(self.latents, self.chosen.is_main(latents.d_sae))
        s = self.scored
        self.norms = self.e.W_dec.norm(dim=1)[s.columns]
        self.effects = -s.acts * (self.e.W_dec[s.columns] * answer[assets.tp_labels][:, None]).sum(-1)

    def _fit(self, jump: float) -> k_sparse.KSparse:
        truth = self.assets.labels[:, None] == torch.arange(N_PARENTS)
        test, latents = self.assets.is_test, self.latents
        return k_sparse.fit(latents.train, truth[~test], latents.test, truth[test], self.ranking, jump)

    def scores(self) -> dict[str, Tensor]:
        s = self.scored
        return {
            "full": s.scores.full, "fraction": s.scores.fraction, "full_family": s.family.full,
            "fraction_family": s.family.fraction, "causal": self.causal(SAEBENCH.min_margin),
            "n_main": self.chosen.n_main[self.assets.tp_labels],
        }  # fmt: skip

    def causal(self, min_margin: float) -> Bool[Tensor, " t"]:
        """As arXiv 2409.14507 decides, on words that the k-probe misses and whose main latents are silent."""
        flag, *_ = causal.absorbed(self.effects, self.scored.cos, min_margin, SAEBENCH.full_cos)
        place = (self.assets.is_test.cumsum(0) - 1)[self.assets.tp_rows]
        missed = self.chosen.logits[place, self.assets.tp_labels] <= 0
        return flag & missed & (self.scored.scores.main_act < SAEBENCH.silent_below)

    def curves(self) -> dict[tuple[str, float], Bool[Tensor, " t"]]:
        """What is called absorbed as each threshold moves alone."""
        return {
            (name, value): self._flag(name, score, value)
            for name, (score, values) in CURVES.items()
            for value in values
        }

    def _flag(self, name: str, score: str, value: float) -> Bool[Tensor, " t"]:
        if name == "min_margin":
            return self.causal(value)
        s, is_main = self.scored, self.scored.is_main
        preset = replace(SAEBENCH, **{name: value})
        if name == "f1_jump":
            is_main = self._main(value)[self.assets.tp_labels[:, None], s.columns]
        proj = s.acts * s.cos * self.norms
        found = score_entries(s.acts, proj, s.cos, is_main, s.a, preset)
        return found.full if score == "full" else found.fraction >= HALF

    def _main(self, jump: float) -> Bool[Tensor, "labels d_sae"]:
        """Main latents by another jump: the first ones of those that are taken while F1 rises at all."""
        numbers = [k_sparse.split_features(row, jump) for row in self.rising.f1.tolist()]
        taken = [self.rising.ranking[label, :n].tolist() for label, n in enumerate(numbers)]
        return k_sparse.mark(taken, self.latents.tp.d_sae)


def by_sae(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over each SAE's words: its scores beside the share that is absorbed in truth."""
    columns = [*SCORES, "absorbed", "gap", "own_silent", "n_main"]
    return scores.groupby(["arch", "width", "l0", "seed"], sort=False)[columns].mean().reset_index()


def agreement_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Correlations of each score with the truth: over SAEs (drawn: cells of the grid × seeds), over words (SAEs ×
    parents), and precision and recall of a word's flag."""
    saes = by_sae(scores)
    cell = ag.clusters(list(zip(saes["arch"], saes["width"], saes["l0"], strict=True)))
    seed, sae, parent = ag.clusters(list(saes["seed"])), ag.clusters(list(scores["name"])), _long(scores["parent"])
    absorbed, gap = _floats(scores["absorbed"]), _floats(scores["gap"])
    rows = []
    for score in SCORES:
        mean, value = _floats(saes[score]), _floats(scores[score])
        flagged = ag.cluster_sums(ag.hits(value >= HALF, absorbed), sae, parent)
        truth = _floats(saes["absorbed"])
        found = {
            "saes, Spearman": ag.correlation(mean, truth, cell, seed, by_rank=True),
            "saes, Pearson": ag.correlation(mean, truth, cell, seed),
            "saes, Spearman minus full's": ag.correlation_gap(_floats(saes["full"]), mean, truth, cell, seed),
            "words, Spearman": ag.correlation(value, gap, sae, parent, by_rank=True),
            "words, Pearson": ag.correlation(value, gap, sae, parent),
            "words, precision": ag.two_way(flagged, ag.precision),
            "words, recall": ag.two_way(flagged, ag.recall),
            "mean": ag.mean(value, sae, parent),
            "mean truth": ag.mean(absorbed, sae, parent),
        }
        rows += [{"score": score, "measure": name, **vars(it)} for name, it in found.items()]
    return pd.DataFrame(rows)


def threshold_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Precision, recall and F1 of "absorbed" at each value of each threshold, over all SAEs' words."""
    rows = []
    for (threshold, value), part in curves.groupby(["threshold", "value"], sort=False):
        sums = ag.cluster_sums(
            torch.tensor(part[[*COUNTS]].to_numpy()), ag.clusters(list(part["name"])), _long(part["parent"])
        )
        found = {"precision": ag.precision, "recall": ag.recall, "f1": ag.f1, "false_rate": ag.false_rate}
        for name, statistic in found.items():
            rows.append({"threshold": threshold, "value": value, "measure": name, **vars(ag.two_way(sums, statistic))})
    return pd.DataFrame(rows)


def built_scores(bench: Bench) -> pd.DataFrame:
    """Scores of SAEs built by hand, three seeds each, and of random SAEs: what is seen where the answer is known."""
    rows, x = [], held_out_sample(bench.toy, 4096).x
    names = list(planted.built_saes(bench.toy, bench.rendered, 0))
    for name in [*names, *(f"random SAE, {w} latents, L0 4" for w in WIDTHS)]:
        parts = []
        for seed in SEEDS:
            if name in names:
                sae = planted.built_saes(bench.toy, bench.rendered, seed)[name]()
                latents = from_dense(sae.latents)
            else:
                like = planted.Built(torch.zeros(int(name.split()[2]), bench.toy.d_in), torch.empty(0))
                sae, latents = random_sae(like, x, l0=4.0, seed=seed), None
            parts.append(measure(bench, sae, {"name": f"{name} {seed}", "seed": seed}, latents)[0])
        table = pd.concat(parts, ignore_index=True)
        seeds, parent = _long(table["seed"]), _long(table["parent"])
        for score in ("absorbed", "gap", "n_main", *SCORES):
            rows.append({"sae": name, "score": score, **vars(ag.mean(_floats(table[score]), seeds, parent))})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """One line per key, one column per measure."""
    measure = "measure" if "measure" in table else "score"
    keys = [c for c in table.columns if c not in (measure, "mean", "low", "high", "visible")]
    kinds = list(dict.fromkeys(table[measure]))
    lines = [f"| {' | '.join([*keys, *kinds])} |", "|" + "---|" * (len(keys) + len(kinds))]
    for key, part in table.groupby(keys, sort=False):
        cells = {row[measure]: ag.shown(ag.Interval(row["mean"], row["low"], row["high"], row["visible"]))
                 for _, row in part.iterrows()}  # fmt: skip
        key = key if isinstance(key, tuple) else (key,)
        lines.append(f"| {' | '.join([*map(str, key), *(cells.get(kind, '–') for kind in kinds)])} |")
    return "\n".join(lines)


def _floats(column: pd.Series) -> Float[Tensor, " n"]:
    return torch.tensor(column.to_numpy(dtype=float))


def _long(column: pd.Series) -> Int[Tensor, " n"]:
    return torch.tensor(column.to_numpy(dtype=int))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("checkpoints/metric_truth"), help="where the SAEs are, or go")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
