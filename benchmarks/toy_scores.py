"""The first-letter eval of one SAE on the letter toy, with its thresholds free, beside the toy's truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import agreement as ag
import pandas as pd
import planted
import torch

from sae_train.data.toy import N_PARENTS, Toy, held_out_sample, open_toy
from sae_train.evals import causal, k_sparse
from sae_train.evals.absorption import Encoded, Evaluation
from sae_train.evals.latents import Latents, encode
from sae_train.evals.presets import SAEBENCH
from sae_train.evals.ranking import rank_latents
from sae_train.evals.scoring import score_entries

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.protocols import SAE

HALF = 0.5  # of a fraction: from here on it is read as "absorbed"
NO_SECOND = 2.0  # F1 never rises by so much: one main latent
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
