"""The terms of the training losses as pure functions of tensors, each one scalar.

Squared errors are summed over d_in and averaged over the batch. Active latents come flat, with the Pattern that places
them, so that no term costs (batch, d_sae).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_train.kernels import ops
from sae_train.training.ranks import Mesh
from sae_train.training.selection import kth_largest

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def mse(x: Float[Tensor, "batch d_in"], recon: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """⟨‖x − x̂‖²⟩."""
    return (x - recon).square().sum(1).mean()


def nested_mse(x: Float[Tensor, "batch d_in"], prefixes: Float[Tensor, "batch n_prefixes d_in"]) -> Float[Tensor, ""]:
    """Mean over prefixes of ⟨‖x − x̂_prefix‖²⟩ (Bussmann et al. 2025)."""
    return (x[:, None] - prefixes).square().sum(2).mean()


def l1(values: Tensor, pattern: ops.Pattern, W_dec: Tensor) -> Float[Tensor, ""]:
    """⟨Σ_i f_i·‖W_dec,i‖⟩ over the active latents (Anthropic, April 2024 update)."""
    return (ops.totals_by_latent(values, pattern) * W_dec.norm(dim=1)).sum() / (pattern.offsets.numel() - 1)


def aux_k(
    x: Float[Tensor, "batch d_in"],
    recon: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    dead: Int[Tensor, " n_dead"],
    mesh: Mesh | None = None,
    n_dead: int | None = None,
) -> Float[Tensor, ""]:
    """⟨‖e − ê‖²⟩ / ⟨‖e‖²⟩, ê from the k_aux largest relu(pre) among the dead latents (Gao et al. 2024, A.2).

    e = x − x̂ is detached; ê has no b_dec (e is already centred); k_aux = min(power of two nearest d_in/2, n_dead).
    Of a batch that several processes share ⟨‖e‖²⟩ is the mean over all of it; `n_dead` is the number on all of them.
    """
    mesh = mesh or Mesh()
    error = (x - recon).detach()
    energy = mesh.data.mean(error.square().sum(1).mean()).clamp_min(1e-12)
    encoder = W_enc.t().index_select(0, dead), b_enc.index_select(0, dead)
    shared = mesh.width, len(dead) if n_dead is None else n_dead
    return _DeadError.apply(error, x - b_dec, *encoder, W_dec.index_select(0, dead), *shared) / (len(x) * energy)


class _DeadError(torch.autograd.Function):
    """Σ‖e − ê‖² with the latents of encoder rows W and decoder rows V (n_dead, d_in) alone.

    Written out, because one operation after another passes three times as often over (batch, n_dead).
    """

    @staticmethod
    def forward(ctx, error, centred, W, b, V, shards, n_dead):
        acts = torch.addmm(b, centred, W.t()).relu_()
        k = nearest_power_of_two(error.shape[1] / 2)
        if k < n_dead:
            acts.masked_fill_(acts < kth_largest(acts, k, shards)[:, None], 0)
        residual = shards.sum(torch.addmm(error, acts, V, beta=-1 if shards.is_first else 0))
        ctx.save_for_backward(centred, W, V, acts, residual)
        return residual.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        centred, W, V, acts, residual = ctx.saved_tensors
        along = residual * (2 * grad)
        d_V = acts.t() @ along
        d_pre = torch.ops.aten.threshold_backward(along @ V.t(), acts, 0)
        d_centred = d_pre @ W if ctx.needs_input_grad[1] else None
        return None, d_centred, d_pre.t() @ centred, d_pre.sum(0), d_V, None, None


def pre_activation(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    threshold: Tensor | float,
    dead: Int[Tensor, " n_dead"],
) -> Float[Tensor, ""]:
    """⟨Σ_dead relu(θ − pre)·‖W_dec,i‖⟩: pulls dead latents back to their threshold (Anthropic, January 2025 update).

    The decoder norms are weights here, not something to shrink: they are detached.
    """
    pre = torch.addmm(b_enc[dead], x - b_dec, W_enc.t()[dead].t())
    theta = threshold[dead] if isinstance(threshold, Tensor) else threshold
    return ((theta - pre).relu() * W_dec[dead].norm(dim=1).detach()).sum(1).mean()


def nearest_power_of_two(value: float) -> int:
    """Return the power of two nearest to value on the log scale, at least 1."""
    return 2 ** max(0, round(torch.tensor(float(value)).log2().item()))
