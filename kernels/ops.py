"""The one public door to the kernels: encoders and decoder, all differentiable, with a choice of implementation.

In: activations x (batch, d_in) and weights in the public orientation. Out: values and indices of the active latents
(topk), dense latents (relu, jumprelu), or reconstructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.errors import UserError
from sae_train.kernels import batch_topk, reference
from sae_train.kernels.reference import Pattern

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IMPLEMENTATIONS = ("reference",)


def choose(impl: str | None) -> str:
    """Return the implementation to run; None means the best one present, and an absent one is refused."""
    if impl == "triton":
        raise UserError("impl='triton': this version has no fused kernels; use impl='reference' or leave it out.")
    if impl not in (None, *IMPLEMENTATIONS):
        raise UserError(f"impl={impl!r} is unknown; allowed: {', '.join(IMPLEMENTATIONS)}.")
    return impl or "reference"


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    impl: str | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return values and indices of the k largest of relu((x − b_dec)·W_enc + b_enc), in no particular order."""
    choose(impl)
    pre, pattern = reference.pre_topk(x, W_enc, b_enc, b_dec, k)
    return pre.view(-1, k).relu(), pattern.latents.view(-1, k)


def encode_relu(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    impl: str | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Return relu((x − b_dec)·W_enc + b_enc)."""
    choose(impl)
    return torch.addmm(b_enc, x - b_dec, W_enc).relu()


def encode_jumprelu(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    impl: str | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Return pre·1[pre > threshold]; the threshold's gradient is the straight-through one of that bandwidth."""
    choose(impl)
    pre = torch.addmm(b_enc, x - b_dec, W_enc)
    return reference.JumpReLU.apply(pre, threshold, bandwidth)


def decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    impl: str | None = None,
) -> Float[Tensor, "batch d_in"]:
    """Return Σ_j values[:, j]·W_dec[indices[:, j]] + b_dec."""
    choose(impl)
    pattern = reference.row_pattern(indices, W_dec.shape[0])
    return reference.decode_pattern(values.reshape(-1), pattern, W_dec, b_dec)


def active_topk(x, W_enc, b_enc, b_dec, k: int, impl: str | None = None) -> tuple[Tensor, Pattern]:
    """Return the k largest pre-activations of each token, flat and before relu, and their pattern (for training)."""
    choose(impl)
    return reference.pre_topk(x, W_enc, b_enc, b_dec, k)


def active_above(x, W_enc, b_enc, b_dec, floor, impl: str | None = None) -> tuple[Tensor, Pattern]:
    """Return the pre-activations above floor (a number or (d_sae,)), flat, and their pattern (for training)."""
    choose(impl)
    return reference.pre_above(x, W_enc, b_enc, b_dec, floor)


def decode_active(values, pattern: Pattern, W_dec, b_dec, impl: str | None = None) -> Tensor:
    """Return reconstructions from flat values at a pattern's entries (for training)."""
    choose(impl)
    return reference.decode_pattern(values, pattern, W_dec, b_dec)


def jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return pre·1[pre > threshold], elementwise, with the straight-through gradient to the threshold."""
    return reference.JumpReLU.apply(pre, threshold, bandwidth)


def active_batch_topk(x, W_enc, b_enc, b_dec, count: int, floor: Tensor, impl: str | None = None):
    """Return the `count` largest positive pre-activations of the batch, their pattern and the smallest (training).

    The result does not depend on floor, a guess from below of the smallest; a good guess saves time.
    """
    choose(impl)
    return batch_topk.pre_batch_topk(x, W_enc, b_enc, b_dec, count, floor)


def decode_blocks(values, pattern: Pattern, edges: Tensor, W_dec, impl: str | None = None) -> Tensor:
    """Return (batch, n_blocks, d_in): what the latents from edges[i] up to edges[i + 1] add to a reconstruction.

    The pattern's rows must ascend by latent.
    """
    choose(impl)
    n_blocks, zero = edges.numel() - 1, W_dec.new_zeros(W_dec.shape[1])
    flat = reference.decode_pattern(values, batch_topk.blocks_of(pattern, edges), W_dec, zero)
    return flat.view(-1, n_blocks, W_dec.shape[1])
