"""Null models to read a score against: an SAE and activations in, a random SAE like it, or the score of such, out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals.absorption import evaluate
from sae_train.evals.scoring import unit

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.evals.result import AbsorptionResult

_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class RandomSAE:
    """latents = s·act((x − b_dec)·W_enc), recon = latents·W_dec + b_dec, with W_enc the transpose of random unit rows.

    act keeps the k largest positive values, or all above one threshold; s is the one number fitted to the data, so
    that its explained variance is the best that random directions reach this way.
    """

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    k: int | None = None
    threshold: float = 0.0
    gain: float = 1.0

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.W_dec.T

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        pre = (x - self.b_dec) @ self.W_enc
        if self.k is None:
            return torch.where(pre > self.threshold, pre, 0.0) * self.gain
        values, columns = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter_(1, columns, values.relu() * self.gain)

    def decode(self, latents: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return latents @ self.W_dec + self.b_dec

    def __call__(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        return self.decode(self.encode(x))


@torch.no_grad()
def random_sae(like: Any, x: Float[Tensor, "n d_in"], l0: float | None = None, seed: int = 0) -> RandomSAE:
    """Random SAE as wide as `like`; its L0 on x is l0, or else what `like` has there.

    A topk SAE keeps its k; others get the threshold that reaches the L0 on x.
    """
    d_sae, d_in = like.W_dec.shape
    x = x.to(like.W_dec.device, torch.float32)
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)).to(x.device)
    b_dec = x.mean(0)
    cfg = getattr(like, "cfg", None)
    k = getattr(cfg, "k", None) if getattr(cfg, "architecture", None) == "topk" else None
    sae = RandomSAE(unit(rows), b_dec, round(l0) if k and l0 else k)
    sample = x[:: max(1, len(x) * d_sae // _CHUNK_ELEMENTS)]
    if sae.k is None:
        target = l0 if l0 is not None else _l0(like, sample)
        sae = RandomSAE(sae.W_dec, b_dec, threshold=_threshold((sample - b_dec) @ sae.W_enc, target))
    return RandomSAE(sae.W_dec, b_dec, sae.k, sae.threshold, _gain(sae, sample))


def random_score(
    like: Any, x: Float[Tensor, "n d_in"], assets: Assets, preset: str = "saebench", seed: int = 0, draws: int = 3
) -> AbsorptionResult:
    """Score of random SAEs as wide and as sparse as `like`: the mean over several draws, word by word.

    One draw scores 0 or 1 on many words; averaging draws narrows the interval to what other words would change.
    """
    saes = [random_sae(like, x, seed=seed * draws + i) for i in range(draws)]
    results = [evaluate(sae, assets, preset=preset, seed=seed) for sae in saes]
    if not all(result.valid for result in results):
        return next(result for result in results if not result.valid)

    def mean(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
        return tables[0].assign(**{name: sum(t[name].astype(float) for t in tables) / draws for name in columns})

    return replace(
        results[0],
        words=mean([result.words for result in results], ["fraction", "full"]),
        by_letter=mean([result.by_letter for result in results], ["fraction", "full", "f1_k1"]),
    )


@torch.no_grad()
def explained_variance(sae: Any, x: Float[Tensor, "n d_in"]) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    error = sum((part - sae(part)).square().sum() for part in x.split(256))
    return float(1 - error / (x - x.mean(0)).square().sum())


def _threshold(pre: Tensor, l0: float) -> float:
    n_active = min(max(1, round(l0 * len(pre))), pre.numel())
    return max(float(pre.flatten().topk(n_active).values[-1]), 0.0)


def _gain(sae: RandomSAE, x: Tensor) -> float:
    """Least squares of x − b_dec on its reconstruction."""
    recon, centred = sae(x) - sae.b_dec, x - sae.b_dec
    return float((recon * centred).sum() / recon.square().sum().clamp(min=1e-12))


def _l0(sae: Any, x: Tensor) -> float:
    return float(sum((sae.encode(part) != 0).sum() for part in x.split(256)) / max(len(x), 1))
