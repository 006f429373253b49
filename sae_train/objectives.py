"""Each architecture on a training batch: activations in; reconstruction, active latents and loss terms out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train import losses
from sae_train.kernels import ops

if TYPE_CHECKING:
    from sae_train.sae import SAE

# λ_P of the pre-activation loss (Anthropic, January 2025 update).
PRE_ACTIVATION_COEFFICIENT = 3e-6


@dataclass
class Forward:
    """One forward pass in training: flat values at a pattern, the reconstruction, and the sparsity to be paid for."""

    recon: Tensor
    values: Tensor
    pattern: ops.Pattern
    sparsity: Tensor | None

    @torch.no_grad()
    def fired(self) -> Tensor:
        """Return how many tokens of the batch each latent was active on."""
        active = (self.values > 0).to(self.values.dtype)
        return active.new_zeros(self.pattern.d_sae).index_add_(0, self.pattern.latents, active)


def forward(sae: SAE, x: Tensor, threshold: Tensor | None, bandwidth: float) -> Forward:
    """Run the SAE's training forward; threshold (differentiable) and bandwidth are jumprelu's."""
    weights = sae.W_enc, sae.b_enc, sae.b_dec
    sparsity = None
    if sae.cfg.architecture == "topk":
        pre, pattern = ops.active_topk(x, *weights, sae.cfg.k)
        values = pre.relu()
    elif sae.cfg.architecture == "relu":
        values, pattern = ops.active_above(x, *weights, 0.0)
        sparsity = losses.l1(values, pattern.latents, sae.W_dec, len(x))
    else:
        # Every entry whose gradient is not zero: active, or inside the rectangle just below the threshold.
        pre, pattern = ops.active_above(x, *weights, threshold.detach() - bandwidth / 2)
        theta = threshold[pattern.latents]
        values = ops.jumprelu(pre, theta, bandwidth)
        sparsity = losses.step_l0(pre, theta, bandwidth, len(x))
    recon = ops.decode_active(values, pattern, sae.W_dec, sae.b_dec)
    return Forward(recon, values, pattern, sparsity)


# Entries (tokens × dead latents) that the loss on dead latents looks at in one step. Where most latents are dead it
# would cost more than all the rest (2.5 times, with 60 % of 16k dead), so it then takes every n-th token of the batch.
MAX_REVIVAL_ENTRIES = 5 * 2**20


def revival(
    sae: SAE, x: Tensor, recon: Tensor, dead: Tensor, threshold: Tensor | None, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the loss that brings dead latents back: AuxK for topk, else the weighted pre-activation loss."""
    stride = -(-len(x) * dead.numel() // MAX_REVIVAL_ENTRIES)
    x, recon = x[::stride], recon[::stride]
    weights = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
    if sae.cfg.architecture == "topk":
        return losses.aux_k(x, recon, *weights, dead, mean)
    level = 0.0 if threshold is None else threshold
    return PRE_ACTIVATION_COEFFICIENT * losses.pre_activation(x, *weights, level, dead)
