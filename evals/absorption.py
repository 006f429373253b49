"""The absorption eval of one SAE: `evaluate` and its steps, each timed. What a step computes is in the modules beside
this one (latents, ranking, k_sparse, scoring, tables).

The SAE is anything that fits protocols.SAE; the active latents alone are asked for where it fits SparseSAE. It is only
read: no gradient mode, weight, dtype or global random state changes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError
from sae_train.evals import k_sparse, tables
from sae_train.evals.contexts import show_nothing
from sae_train.evals.figures import f1_precision_recall
from sae_train.evals.latents import Latents, encode
from sae_train.evals.presets import ASSET_FIELDS, Preset, get_preset
from sae_train.evals.ranking import rank_latents
from sae_train.evals.result import AbsorptionResult
from sae_train.evals.scoring import WordScores, score_entries, score_projections, score_words, unit
from sae_train.protocols import SparseSAE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.evals.causal_rate import CausalRate
    from sae_train.evals.contexts import Progress
    from sae_train.protocols import SAE, LanguageModel

MOST_SILENT = 0.5  # of the test words
LEAST_ABOVE_NULL = 0.05  # of F1; random directions are further above it

__all__ = ["AbsorptionResult", "evaluate", "score_projections", "score_words"]


@torch.no_grad()
def evaluate(
    sae: SAE, assets: Assets, preset: str | Preset = "saebench", seed: int = 0, lm: LanguageModel | None = None,
    progress: Progress = show_nothing, baseline: bool = False,
) -> AbsorptionResult:  # fmt: skip
    """Evaluate one SAE; whatever is wrong with it or with the assets ends in valid = False and a reason.

    An SAE that does nothing absorbs nothing: unless it is a `baseline`, which may have learnt nothing, its latents must
    be active on words and its main latents tell letters apart. Presets of the paper ask the language model, so they
    need lm. `progress` hears what is being done. UserError if lm is missing, or if the assets were built for a preset
    with other prompts or another probe.
    """
    chosen = get_preset(preset)
    stored = assets.settings["preset"]
    differ = [name for name in ASSET_FIELDS if stored[name] != getattr(chosen, name)]
    if differ:
        raise UserError(
            f"the assets were built with {differ[0]} = {stored[differ[0]]} and the preset {chosen.name} has "
            f"{getattr(chosen, differ[0])}: build them for this preset."
        )
    if chosen.attribution and lm is None:
        raise UserError(f"the preset {chosen.name} asks the language model about each word: give it as lm.")
    return Evaluation(sae, assets, chosen, seed, lm, progress, baseline).run()


@dataclass(frozen=True)
class Encoded:
    """Latents of the three groups of words, in the order of the assets."""

    train: Latents
    test: Latents
    tp: Latents


@dataclass(frozen=True)
class Scored:
    """The true positives' entries (latents that fire on each, one row per word) and scores.

    family holds the scores with all latents of the label's family taken as main latents.
    """

    acts: Float[Tensor, "t m"]
    columns: Int[Tensor, "t m"]
    cos: Float[Tensor, "t m"]
    is_main: Bool[Tensor, "t m"]
    a: Float[Tensor, " t"]
    scores: WordScores
    family: WordScores
    causal: CausalRate | None = None


class Evaluation:
    """The steps of one evaluation, in order, with the time each one took."""

    def __init__(
        self, sae: SAE, assets: Assets, preset: Preset, seed: int, lm: LanguageModel | None,
        progress: Progress = show_nothing, baseline: bool = False,
    ):  # fmt: skip
        self.progress, self.baseline = progress, baseline
        self.sae, self.preset, self.seed, self.lm = sae, preset, seed, lm
        self.device, self.dtype = sae.W_dec.device, sae.W_dec.dtype
        self.assets = assets.to(self.device)
        self.n_labels = len(assets.label_names)
        self.W_dec = sae.W_dec.detach().float()
        self.directions = unit(self.assets.probe_weight.T.float())
        self.timings: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def run(self, latents: Encoded | None = None) -> AbsorptionResult:
        """Evaluate, on the latents of the assets' words where they are at hand."""
        latents = latents or self.encode()
        self.lap("encode")
        if fault := self.find_fault(latents):
            return self.invalid_result(fault)
        train_labels = self.assets.labels[~self.assets.is_test]
        self.progress("ranking latents")
        ranking, how = rank_latents(latents.train, train_labels, self.n_labels, self.preset, self.seed, self.progress)
        self.lap("rank latents")
        self.progress("choosing main latents")
        chosen = self.probe_latents(latents, ranking)
        self.lap("k-sparse probes")
        scored = self.score(latents, chosen.is_main(latents.tp.d_sae).to(self.device))
        self.lap("score")
        if self.preset.attribution:
            if not len(self.assets.answer_ids):
                return self.invalid_result(
                    "the prompt asks for no answer, so the model cannot be asked for its reasons"
                )
            self.progress("asking the model about absorbed words")
            scored = self.ask_model(scored, chosen)
            self.lap("ask the model")
        result = self.result(latents, chosen, scored, how)
        self.lap("tables")
        return replace(result, seconds=time.perf_counter() - self._start)

    def encode(self) -> Encoded:
        self.progress("encoding words")
        x, test = self.assets.x.to(self.dtype), self.assets.is_test
        return Encoded(
            encode(self.sae, x[~test]), encode(self.sae, x[test]), encode(self.sae, self.assets.tp_x.to(self.dtype))
        )

    def find_fault(self, latents: Encoded) -> str:
        parts = (latents.train, latents.test, latents.tp)
        if not all(bool(p.values.isfinite().all()) for p in parts):
            return "the SAE's latents are not finite"
        if not bool(self.W_dec.isfinite().all()):
            return "the SAE's decoder is not finite"
        if not len(latents.train.values):
            return "no latent of the SAE fires on any training word"
        return ""

    def probe_latents(self, latents: Encoded, ranking: Tensor) -> k_sparse.KSparse:
        truth = self.assets.labels[:, None] == torch.arange(self.n_labels, device=self.device)
        test = self.assets.is_test
        return k_sparse.fit(latents.train, truth[~test], latents.test, truth[test], ranking, self.preset.f1_jump)

    def score(self, latents: Encoded, main: Bool[Tensor, "labels d_sae"]) -> Scored:
        label = self.assets.tp_labels
        acts, columns = latents.tp.padded()
        # Only the latents that fire on a true positive have cosines to compute.
        used, place = columns.unique(return_inverse=True)
        rows = self.W_dec[used]
        cos = (self.directions @ unit(rows).T)[label[:, None], place]
        proj = acts * cos * rows.norm(dim=1)[place]
        a = (self.assets.tp_x.float() * self.directions[label]).sum(1)
        family = main | self.family(latents.train)
        is_main, is_family = main[label[:, None], columns], family[label[:, None], columns]
        scores = score_entries(acts, proj, cos, is_main, a, self.preset)
        return Scored(
            acts, columns, cos, is_main, a, scores, score_entries(acts, proj, cos, is_family, a, self.preset)
        )  # fmt: skip

    def family(self, train: Latents) -> Bool[Tensor, "n_labels d_sae"]:
        """Latents that share a label between them: they fire on many of its training words and on few others."""
        p, labels = self.preset, self.assets.labels[~self.assets.is_test]
        fired = torch.zeros(self.n_labels * train.d_sae, device=self.device)
        place = labels[train.row_of_entry] * train.d_sae + train.columns
        fired = fired.index_add_(0, place, torch.ones_like(train.values)).view(self.n_labels, -1)
        enough = (p.family_recall * labels.bincount(minlength=self.n_labels)).clamp(min=p.family_words)
        return (fired >= enough[:, None]) & (fired >= p.family_precision * fired.sum(0))

    def ask_model(self, scored: Scored, chosen: k_sparse.KSparse) -> Scored:
        from sae_train.evals.causal_rate import causal_rate

        test_place = self.assets.is_test.cumsum(0) - 1
        missed = chosen.logits[test_place[self.assets.tp_rows], self.assets.tp_labels] <= 0
        silent = scored.scores.main_act < self.preset.silent_below
        rate = causal_rate(self.sae, self.lm, self.assets, scored, missed & silent, self.preset, self.seed)
        return replace(scored, causal=rate)

    def result(self, latents: Encoded, chosen: k_sparse.KSparse, scored: Scored, how: dict) -> AbsorptionResult:
        words = tables.word_table(self.assets, scored, chosen, self.preset)
        letters = tables.letter_table(self.assets, scored, chosen, self.preset)
        letters = letters.assign(
            precision_main=tables.main_precision(self.assets, latents.test, chosen),
            **tables.top_latents(self.sae, self.assets, latents.test, self.directions),
        )
        n_letters, needed = int(letters["counts"].sum()), self.assets.n_needed(self.preset)
        reason = "" if n_letters >= needed else (
            f"only {n_letters} of {self.n_labels} labels can be read off the model by a linear probe (F1 above "
            f"{self.preset.min_probe_f1} on test words); the eval needs {needed}"
        )  # fmt: skip
        reason = reason or ("" if self.baseline else self.find_idleness(latents.test, chosen))
        details = {**self.details(), "ranking": how}
        return replace(
            self.invalid_result(reason), valid=not reason, by_letter=letters, words=words, l0=latents.test.l0,
            ev=self.explained_variance(latents.test), details=details,
        )  # fmt: skip

    def find_idleness(self, test: Latents, chosen: k_sparse.KSparse) -> str:
        """Why the SAE does too little on test words for a score to mean anything: an idle one has no absorption.

        Its main latents' F1 is held against what they get for labels dealt out at random, 2pr/(p + r) where a share p
        of the words has the label and they name a share r.
        """
        silent = float((test.counts == 0).float().mean())
        if silent > MOST_SILENT:
            return f"the SAE is silent on {silent:.0%} of the test words (its L0 there is {test.l0:.2f})"
        counting = self.assets.letters_that_count.to(chosen.logits.device)
        truth = self.assets.labels[self.assets.is_test][:, None] == torch.arange(self.n_labels, device=self.device)
        truth, named = truth.to(chosen.logits.device)[:, counting], (chosen.logits > 0)[:, counting]
        p, r = truth.double().mean(0), named.double().mean(0)
        null = float((2 * p * r / (p + r).clamp_min(1e-12)).mean())
        f1 = float(f1_precision_recall(named, truth)[0].mean())
        if f1 > null + LEAST_ABOVE_NULL:
            return ""
        return f"the SAE's latents tell no labels apart: the main ones have F1 {f1:.3f}, by chance {null:.3f}"

    def explained_variance(self, test: Latents) -> float:
        """On at most 1,024 test words."""
        x = self.assets.x[self.assets.is_test][:1024].to(self.dtype)
        active = test.head(len(x))
        if isinstance(self.sae, SparseSAE):
            recon = self.sae.decode_entries(active.values.to(self.dtype), active.columns, active.counts)
        else:
            recon = torch.cat([self.sae.decode(part) for part in active.dense().to(self.dtype).split(256)])
        residual = (x - recon).float().square().sum()
        return float(1 - residual / (x - x.mean(0)).float().square().sum())

    def invalid_result(self, reason: str) -> AbsorptionResult:
        import pandas as pd

        return AbsorptionResult(
            preset=self.preset.name, seed=self.seed, asset_hash=self.assets.hash, valid=False, reason=reason,
            by_letter=pd.DataFrame(), words=pd.DataFrame(columns=list(tables.WORD_COLUMNS)), details=self.details(),
            seconds=time.perf_counter() - self._start, timings=self.timings, thresholds=self.preset,
        )  # fmt: skip

    def details(self) -> dict[str, Any]:
        """Settings and sizes worth keeping; the gates' standard deviations are those of a random cosine, 1/√d."""
        a, sd = self.assets, self.W_dec.shape[1] ** 0.5
        return {
            "assets": a.settings, "n_words": len(a.words), "sampled_from": a.sampled_from,
            "n_true_positives": len(a.tp_rows), "model_accuracy": a.model_accuracy,
            "full_cos_in_sd": self.preset.full_cos * sd, "absorber_cos_in_sd": self.preset.absorber_cos * sd,
        }  # fmt: skip

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.timings[name], self._last = now - self._last, now
