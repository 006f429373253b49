"""Word-level absorption scores, the fraction and the full flag, as pure functions of tensors that know no SAE and no
model.

With p̂ the probe's direction: cos_i = cos(p̂, W_dec,i), proj_i = f_i·cos_i·‖W_dec,i‖, A = x·p̂, M = Σ proj over the
main latents. Written over entries (latents that fire on a word), so dense and sparse tables use the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.evals.presets import Preset, get_preset

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class WordScores:
    """Scores of n words and, per word, the entries of its absorbers, largest projection first (0 where none)."""

    fraction: Float[Tensor, " n"]
    full: Bool[Tensor, " n"]
    main_act: Float[Tensor, " n"]
    absorber_entry: Tensor
    absorber_proj: Float[Tensor, "n absorbers"]


def score_words(
    latents: Float[Tensor, "n d_sae"], W_dec: Float[Tensor, "d_sae d_in"], probe_direction: Float[Tensor, " d_in"],
    x: Float[Tensor, "n d_in"], main_latents: list[int], preset: str | Preset = "saebench",
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:  # fmt: skip
    """Score words of one letter: (fraction, full)."""
    direction = unit(probe_direction)
    cos = unit(W_dec) @ direction
    return score_projections(latents, cos, x @ direction, main_latents, preset, W_dec.norm(dim=-1))


def score_projections(
    latents: Float[Tensor, "n d_sae"], cos: Float[Tensor, " d_sae"], a: Float[Tensor, " n"], main_latents: list[int],
    preset: str | Preset = "saebench", norms: Float[Tensor, " d_sae"] | None = None,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:  # fmt: skip
    """Score words of one letter from cosines and A; decoder rows have norm 1 unless norms are given."""
    is_main = torch.zeros_like(cos, dtype=torch.bool)
    is_main[main_latents] = True
    proj = latents * (cos if norms is None else cos * norms)
    scores = score_entries(latents, proj, cos.expand_as(proj), is_main.expand_as(proj), a, get_preset(preset))
    return scores.fraction, scores.full


def score_entries(
    acts: Float[Tensor, "n m"], proj: Float[Tensor, "n m"], cos: Float[Tensor, "n m"], is_main: Bool[Tensor, "n m"],
    a: Float[Tensor, " n"], preset: Preset,
) -> WordScores:  # fmt: skip
    """Score n words by the m entries of each; entries with activation 0 count for nothing."""
    main_act = torch.where(is_main, acts, 0).sum(1)
    main = torch.where(is_main, proj, 0).sum(1)
    absorbs = ~is_main & (cos >= preset.absorber_cos) & (proj > 0)
    n_top = min(preset.n_absorbers, proj.shape[1])
    top, entry = torch.where(absorbs, proj, 0).topk(n_top, dim=1)
    fraction = _total_fraction if preset.fraction == "total" else _top_fraction
    share = fraction(main, top.sum(1) if preset.fraction == "top3" else proj.sum(1), a, preset)
    silent = (torch.where(is_main, acts, 0) < preset.silent_below).all(1)
    return WordScores(share, silent & _is_carried(proj, cos, a, preset), main_act, entry, top)


def _top_fraction(main: Tensor, absorbed: Tensor, a: Tensor, preset: Preset) -> Tensor:
    part = torch.minimum(absorbed, a - main)
    share = torch.where(main <= 0, 1.0, part / (part + main)).clamp(0, 1)
    none = (main >= a) | (absorbed / a < preset.absorbed_share) | (a == 0)
    return torch.where(none, 0.0, share)


def _total_fraction(main: Tensor, total: Tensor, a: Tensor, preset: Preset) -> Tensor:
    return torch.where((main >= a) | (total <= 0), 0.0, (total - main) / total)


def _is_carried(proj: Tensor, cos: Tensor, a: Tensor, preset: Preset) -> Tensor:
    """One latent, whichever has the largest projection, points along the probe and carries enough of the word."""
    largest, entry = proj.max(1)
    along = cos.gather(1, entry[:, None]).squeeze(1) >= preset.full_cos
    return along & (a >= 0) & (largest / a >= preset.absorbed_share)


def unit(rows: Tensor) -> Tensor:
    """Rows at norm 1; a zero row stays zero, so its cosine is 0."""
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, rows / norm, 0.0)
