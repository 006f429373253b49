"""What to read a score against: the scores of SAEs that have learnt nothing, and of the best possible one.

Nulls: random SAEs as wide and as sparse, on text and on the eval's words; the SAE itself with the words' labels
shuffled, or with random directions in the probe's place. Upper bound: an SAE whose latents are the probe's own
read-outs, which absorbs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals import assets as assets_module
from sae_train.evals.absorption import Evaluation, evaluate
from sae_train.evals.contexts import show_nothing
from sae_train.evals.presets import Preset, get_preset
from sae_train.evals.scoring import unit
from sae_train.sae import model

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.evals.absorption import Encoded
    from sae_train.evals.assets import Assets
    from sae_train.evals.contexts import Progress
    from sae_train.evals.result import AbsorptionResult
    from sae_train.protocols import SAE, LanguageModel

TEXT, WORDS = "held-out text", "the eval's words"
"""what random SAEs are fitted on: the activations of text, or of the words"""
_CHUNK_ELEMENTS = 2**24
_DRAWS = 3


@torch.no_grad()
def random_sae(like: SAE, x: Float[Tensor, "n d_in"], l0: float | None = None, seed: int = 0) -> SAE:
    """Random SAE as wide as `like`; its L0 on x is l0, or else what `like` has there.

    latents = act(s·(x − b_dec)·W_decᵀ), with random unit rows W_dec. act keeps the k largest positive values where
    `like` has a k, else all above the one threshold that reaches the L0 on x; s is the one number fitted to x, so that
    the explained variance is the best that random directions reach this way.
    """
    d_sae, d_in = like.W_dec.shape
    x = x.to(like.W_dec.device, torch.float32)
    k = getattr(getattr(like, "cfg", None), "k", None)
    k = round(l0) if k and l0 else k
    sae = model.SAE(model.SAEConfig("topk" if k else "jumprelu", d_in, d_sae, k), x.device).requires_grad_(False)
    rows = unit(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)).to(x.device))
    for weight, value in ((sae.W_dec, rows), (sae.W_enc, rows.T), (sae.b_dec, x.mean(0))):
        weight.copy_(value)
    sample = x[:: max(1, len(x) * d_sae // _CHUNK_ELEMENTS)]
    if not k:
        sae.threshold.fill_(_threshold((sample - sae.b_dec) @ sae.W_enc, l0 if l0 is not None else _l0(like, sample)))
    gain = _gain(sae, sample)
    sae.W_enc.mul_(gain)
    if not k:
        sae.threshold.mul_(gain)
    return sae


def all_scores(
    sae: SAE, text: Float[Tensor, "n d_in"] | None, assets: Assets, result: AbsorptionResult,
    lm: LanguageModel | None = None, progress: Progress = show_nothing,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Figures of every baseline by name, beside the result of the SAE itself, whose preset and seed they take.

    `random` SAEs are fitted on the activations of `text`, on which they have the L0 of `sae`; without text on those of
    the words. Their figures say which by `fitted_on`. `random_words` are fitted on the words in any case: what a study
    takes for chance. `progress` hears what is being measured.
    """
    preset, seed = result.thresholds, result.seed
    latents = Evaluation(sae, assets, preset, seed, lm).encode()

    def random(x: Tensor, fitted_on: str) -> dict[str, Any]:
        score = random_score(sae, x, assets, preset, seed, lm=lm, progress=progress, fitted_on=fitted_on)
        ev = explained_variance(random_sae(sae, x, seed=seed * _DRAWS), x)
        return score.figures() | {"explained_variance": ev, "fitted_on": fitted_on}

    on_words = random(assets.x, WORDS)
    return {
        "random": on_words if text is None else random(text, TEXT),
        "random_words": on_words,
        "shuffled_labels": shuffled_labels_score(sae, assets, preset, seed, latents, progress).figures(),
        "random_directions": random_directions_score(sae, assets, result, latents),
        "probe": probe_score(assets, preset, seed).figures(),
    }


def random_score(
    like: SAE, x: Float[Tensor, "n d_in"], assets: Assets, preset: str | Preset = "saebench", seed: int = 0,
    draws: int = _DRAWS, lm: LanguageModel | None = None, progress: Progress = show_nothing, fitted_on: str = TEXT,
) -> AbsorptionResult:  # fmt: skip
    """Score of random SAEs as wide and as sparse as `like`: the mean over several draws, word by word.

    One draw scores 0 or 1 on many words; averaging draws narrows the interval to what other words would change.
    """
    results = []
    for draw in range(draws):
        progress(f"measuring random SAEs fitted on {fitted_on}", draw, draws)
        sae = random_sae(like, x, seed=seed * draws + draw)
        results.append(evaluate(sae, assets, preset=preset, seed=seed, lm=lm, baseline=True))
    if not all(result.valid for result in results):
        return next(result for result in results if not result.valid)

    def mean(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
        return tables[0].assign(**{name: sum(t[name].astype(float) for t in tables) / draws for name in columns})

    scores = ["fraction", "full", "fraction_family", "full_family"]
    figures = [*scores, "f1_k1", "recall_main", "lost_carried", "lost_below", "lost_nobody"]
    return replace(
        results[0],
        l0=sum(result.l0 for result in results) / draws,
        words=mean([result.words for result in results], scores),
        by_letter=mean([result.by_letter for result in results], figures),
    )


@torch.no_grad()
def shuffled_labels_score(
    sae: SAE, assets: Assets, preset: str | Preset = "saebench", seed: int = 0, latents: Encoded | None = None,
    progress: Progress = show_nothing,
) -> AbsorptionResult:  # fmt: skip
    """Score of an SAE for labels dealt out at random: what the metric finds where there is no concept.

    Probe, true positives, ranking and main latents are made anew from the shuffled labels; every label counts, however
    bad its probe. The true positives' activations are those of their test prompts. `latents` are the SAE's on the
    assets' words, where they are at hand.
    """
    chosen = get_preset(preset)
    ungated = replace(chosen, min_probe_f1=-1.0, min_letters=0, attribution=None)
    a, n_labels = assets.to("cpu"), len(assets.label_names)
    g, labels = torch.Generator().manual_seed(seed), a.labels.clone()
    for side in (~a.is_test, a.is_test):
        rows = side.nonzero().squeeze(1)
        labels[rows] = a.labels[rows[torch.randperm(len(rows), generator=g)]]

    def tell(doing: str, done: int = 0, of: int = 1) -> None:
        progress(f"measuring shuffled labels, {doing}", done, of)

    device = sae.W_dec.device
    probe, figures = assets_module.ground_truth(a.x, labels, a.is_test, n_labels, chosen, seed, device, tell)
    tp_rows = assets_module.true_positives(probe, a.x, labels, a.is_test)
    settings = {**a.settings, "preset": {**a.settings["preset"], "min_probe_f1": -1.0}}
    dealt = replace(
        a, labels=labels, tp_rows=tp_rows, tp_x=a.x[tp_rows], tp_tokens=a.tp_tokens[:0], probe_weight=probe.weight,
        probe_bias=probe.bias, probe_figures=figures.nan_to_num(), settings=settings,
    )  # fmt: skip
    e = Evaluation(sae, dealt, ungated, seed, None, tell, baseline=True)
    if latents is not None:
        places = (a.is_test.cumsum(0) - 1)[tp_rows].to(e.device)
        latents = replace(latents, tp=latents.test.pick(places))
    return e.run(latents)


@torch.no_grad()
def random_directions_score(
    sae: SAE, assets: Assets, result: AbsorptionResult, latents: Encoded | None = None, draws: int = 10
) -> dict[str, float]:
    """Mean scores of an SAE, its main latents as `result` has them, with random directions in the probe's place."""
    e = Evaluation(sae, assets, result.thresholds, result.seed, None)
    latents = latents or e.encode()
    if e.find_fault(latents):
        return {}
    is_main = result.is_main(latents.tp.d_sae).to(e.device)
    counts = e.assets.letters_that_count & (e.assets.tp_labels.bincount(minlength=e.n_labels) > 0)
    g, sums = torch.Generator().manual_seed(result.seed), torch.zeros(2, dtype=torch.float64)
    for _ in range(draws):
        e.directions = unit(torch.randn(e.directions.shape, generator=g)).to(e.device)
        scores = e.score(latents, is_main).scores
        for i, values in enumerate((scores.fraction, scores.full)):
            by_label = torch.zeros(e.n_labels, device=e.device).index_add_(0, e.assets.tp_labels, values.float())
            sums[i] += float((by_label / e.assets.tp_labels.bincount(minlength=e.n_labels))[counts].mean())
    return dict(zip(("mean_fraction", "mean_full"), (sums / draws).tolist(), strict=True))


@dataclass(frozen=True)
class ProbeSAE:
    """latents = relu(x·w_c + b_c), one latent a label, decoded along the probe's directions."""

    weight: Float[Tensor, "d_in n_labels"]
    bias: Float[Tensor, " n_labels"]

    @property
    def W_dec(self) -> Float[Tensor, "n_labels d_in"]:
        return unit(self.weight.T)

    @property
    def W_enc(self) -> Float[Tensor, "d_in n_labels"]:
        return self.weight

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n n_labels"]:
        return (x @ self.weight + self.bias).relu()

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        return torch.zeros_like(self.weight[:, 0])

    def decode(self, latents: Float[Tensor, "n n_labels"]) -> Float[Tensor, "n d_in"]:
        return latents @ self.W_dec


def probe_score(assets: Assets, preset: str | Preset = "saebench", seed: int = 0) -> AbsorptionResult:
    """Score of the probe's read-outs as an SAE: what main latents could reach."""
    projections = replace(get_preset(preset), attribution=None)
    return evaluate(ProbeSAE(assets.probe_weight, assets.probe_bias), assets, preset=projections, seed=seed)


@torch.no_grad()
def explained_variance(sae: SAE, x: Float[Tensor, "n d_in"]) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    error = sum((part - sae(part)).square().sum() for part in x.split(256))
    return float(1 - error / (x - x.mean(0)).square().sum())


def _threshold(pre: Tensor, l0: float) -> float:
    n_active = min(max(1, round(l0 * len(pre))), pre.numel())
    return max(float(pre.flatten().topk(n_active).values[-1]), 0.0)


def _gain(sae: SAE, x: Tensor) -> float:
    """Least squares of x − b_dec on its reconstruction."""
    recon, centred = sae(x) - sae.b_dec, x - sae.b_dec
    return float((recon * centred).sum() / recon.square().sum().clamp(min=1e-12))


def _l0(sae: SAE, x: Tensor) -> float:
    return float(sum((sae.encode(part) != 0).sum() for part in x.split(256)) / max(len(x), 1))
