"""Which latents tell a label, best first: the ranking from which k-sparse probes take theirs.

Both ways rank by the signed weights of one L1-penalised probe on all latents. `optimum` solves its objective, which is
strictly convex, so the ranking has no seed; `adam` stops where SAEBench 0.6.0 stops, some 1,500 steps from the start,
where two seeds still disagree about the first latents of a letter in five (docs/absorption.md).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals import lasso
from sae_train.evals.contexts import show_nothing
from sae_train.evals.probes import fit_sparse, ranking_schedule

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from sae_train.evals.contexts import Progress
    from sae_train.evals.latents import Latents
    from sae_train.evals.presets import Preset


def rank_latents(
    latents: Latents, labels: Int[Tensor, " n_rows"], n_labels: int, preset: Preset, seed: int,
    progress: Progress = show_nothing,
) -> tuple[Int[Tensor, "n_labels k"], dict[str, Any]]:  # fmt: skip
    """Latents with the largest signed weight per label, and how they were found; fewer than max_k where fewer fire.

    A latent that fires on no training word gets no gradient from the data: only L1 and weight decay act on it, which
    hold it at zero, and no k-sparse probe can use it. Leaving those columns out changes no other weight.
    """
    fires = latents.fires()
    kept = fires.nonzero().squeeze(1)
    weigh = {"optimum": _optimum, "adam": _adam}[preset.ranking]
    key, how = weigh(latents.restrict(fires), labels, n_labels, preset, seed, progress)
    top = key.topk(min(preset.max_k, len(kept)), dim=0).indices
    return kept[top].T, {"method": preset.ranking, "n_firing": len(kept), **how}


def _optimum(
    latents: Latents, labels: Tensor, n_labels: int, preset: Preset, seed: int, progress: Progress
) -> tuple[Tensor, dict]:
    # The reference's loss is a mean over labels while its weight decay is not: for one label it counts n_labels-fold.
    l2 = preset.l1_weight_decay * n_labels
    fitted = lasso.fit(latents, labels, n_labels, preset.l1_coefficient, l2, preset.l1_tolerance, progress)
    # Weights at zero follow the positive ones in the order in which a smaller penalty would let them in.
    waiting, below = fitted.pull - preset.l1_coefficient, fitted.weight - 2 * preset.l1_coefficient
    key = torch.where(fitted.weight > 0, fitted.weight, torch.where(fitted.weight == 0, waiting, below))
    return key, {"steps": fitted.steps, "residual": fitted.residual}


def _adam(
    latents: Latents, labels: Tensor, n_labels: int, preset: Preset, seed: int, progress: Progress
) -> tuple[Tensor, dict]:
    p = preset
    schedule = ranking_schedule(
        latents.n_rows, epochs=p.l1_epochs, max_batch=p.l1_max_batch, min_steps=p.l1_min_steps, lr=p.l1_lr,
        end_lr=p.l1_end_lr, weight_decay=p.l1_weight_decay, l1=p.l1_coefficient,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tell = partial(progress, "ranking latents")
    return fit_sparse(latents, labels, n_labels, schedule, generator, tell).weight, vars(schedule)
