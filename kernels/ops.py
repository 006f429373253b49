"""The one public door to the kernels: encoders and decoder, all differentiable, with a choice of implementation.

What they compute is written down in naive.py. "reference" is the way that needs no Triton (cpu.py), "triton" the fused
kernels (fused.py). Other packages import this module alone.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.errors import UserError
from sae_train.kernels import batch_topk, cpu
from sae_train.kernels.crossover import Crossover
from sae_train.kernels.patterns import Pattern, kth_largest, row_pattern, select_entries, sum_at

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Crossover", "Pattern", "kth_largest", "select_entries", "sum_at"]  # handed through; the rest is below
IMPLEMENTATIONS = ("triton", "reference")


# What runs where none is asked for and triton is installed.
DEFAULTS = {"cpu": "reference", "cuda": "triton"}


def choose(impl: str | None, device: torch.device | str) -> str:
    """Return the implementation to run on a device; None means the default there.

    An implementation that was asked for and cannot run there is refused.
    """
    if impl not in (None, *IMPLEMENTATIONS):
        raise UserError(f"impl={impl!r} is unknown; allowed: {', '.join(IMPLEMENTATIONS)}.")
    kind, present = torch.device(device).type, find_spec("triton") is not None
    if impl == "triton" and not present:
        raise UserError("impl='triton' needs the package triton, which is not installed; use impl='reference'.")
    if impl == "triton" and kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"impl='triton' runs on CUDA, not on {kind} (TRITON_INTERPRET=1 interprets it, slowly, there).")
    return impl or (DEFAULTS.get(kind, "reference") if present else "reference")


def _twin(impl: str | None, x: Tensor) -> ModuleType:
    """Return the module that runs: kernels/cpu.py or kernels/fused.py, which have the same functions."""
    if choose(impl, x.device) == "reference" or (impl is None and x.dtype == torch.float64):
        return cpu
    from sae_train.kernels import fused

    return fused


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    impl: str | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return values and indices of the k largest of relu((x − b_dec)·W_enc + b_enc), in no particular order."""
    pre, pattern = _twin(impl, x).pre_topk(x, W_enc, b_enc, b_dec, k)
    return pre.view(-1, k).relu(), pattern.latents.view(-1, k).long()


def encode_relu(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    impl: str | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Return relu((x − b_dec)·W_enc + b_enc)."""
    if _twin(impl, x) is cpu:
        return torch.addmm(b_enc, x - b_dec, W_enc).relu()
    return _dense(*active_above(x, W_enc, b_enc, b_dec, 0.0, impl))


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
    if _twin(impl, x) is cpu:
        return cpu.JumpReLU.apply(torch.addmm(b_enc, x - b_dec, W_enc), threshold, bandwidth)
    pre, pattern = active_above(x, W_enc, b_enc, b_dec, threshold.detach() - bandwidth / 2, impl)
    return _dense(jumprelu_active(pre, pattern, threshold, bandwidth, impl)[0], pattern)


def decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    impl: str | None = None,
) -> Float[Tensor, "batch d_in"]:
    """Return Σ_j values[:, j]·W_dec[indices[:, j]] + b_dec."""
    pattern = row_pattern(indices, W_dec.shape[0])
    return _twin(impl, values).decode_pattern(values.reshape(-1), pattern, W_dec, b_dec)


def active_topk(x, W_enc, b_enc, b_dec, k: int, impl: str | None = None) -> tuple[Tensor, Pattern]:
    """Return the k largest pre-activations of each token, flat and before relu, and their pattern (for training)."""
    return _twin(impl, x).pre_topk(x, W_enc, b_enc, b_dec, k)


def active_at(x, W_enc, b_enc, b_dec, pre, pattern: Pattern, impl: str | None = None) -> Tensor:
    """Return pre-activations that were selected before, `pre` at a pattern's entries, as differentiable (training)."""
    return _twin(impl, x).pre_at(x, W_enc, b_enc, b_dec, pre, pattern)


def active_above(
    x, W_enc, b_enc, b_dec, floor, impl: str | None = None, crossover: Crossover | None = None
) -> tuple[Tensor, Pattern]:
    """Return the pre-activations above floor (a number or (d_sae,)), flat, and their pattern (for training).

    `crossover` chooses between sparse sums and dense products for all that is done at the pattern; without, sparse. Its
    `room`, where it has one and Triton runs, is how many entries there is room for, so that nothing waits for the
    device; the pattern then says how many were found.
    """
    return _twin(impl, x).pre_above(x, W_enc, b_enc, b_dec, floor, crossover)


def decode_active(values, pattern: Pattern, W_dec, b_dec, impl: str | None = None) -> Tensor:
    """Return reconstructions from flat values at a pattern's entries (for training)."""
    return _twin(impl, values).decode_pattern(values, pattern, W_dec, b_dec)


def decode_error(values, pattern: Pattern, W_dec, b_dec, x, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Return reconstructions and Σ (recon − x)² over the batch; in one gather where tokens have up to 128 entries."""
    return _twin(impl, values).decode_error(values, pattern, W_dec, b_dec, x)


def jumprelu_active(pre, pattern: Pattern, threshold, bandwidth: Tensor | float, impl: str | None = None):
    """Return pre·1[pre > θ] at a pattern's entries and how many are above, with straight-through gradients to θ.

    bandwidth, the rectangle's width, is a number or one for each latent, (d_sae,).
    """
    return _twin(impl, pre).jumprelu_active(pre, pattern, threshold, bandwidth)


def totals_by_latent(values, pattern: Pattern, impl: str | None = None) -> Tensor:
    """Return the sum of each latent's values, (d_sae,) (for training)."""
    return _twin(impl, values).totals_by_latent(values, pattern)


def total(values, pattern: Pattern, impl: str | None = None) -> Tensor:
    """Return the sum of the values at a pattern's entries, the same bits however much room there was (for training)."""
    return _twin(impl, values).total(values, pattern)


def _dense(values: Tensor, pattern: Pattern) -> Tensor:
    """Return (batch, d_sae) with the values at the pattern's entries and 0 elsewhere."""
    out = values.new_zeros(pattern.offsets.numel() - 1, pattern.d_sae)
    return out.index_put((pattern.tokens, pattern.latents.long()), values)


def jumprelu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return pre·1[pre > threshold], elementwise, with the straight-through gradient to the threshold."""
    return cpu.JumpReLU.apply(pre, threshold, bandwidth)


def remove_parallel(grad: Tensor, rows: Tensor, impl: str | None = None) -> None:
    """Take from each gradient (d_sae, d_in), in place, what would change its row's length: rows have norm 1.

    Gao et al. 2024.
    """
    _twin(impl, grad).remove_parallel(grad, rows)


def normalise(rows: Tensor, unless: Tensor, impl: str | None = None) -> None:
    """Divide each row by its norm, in place; `unless` true leaves every bit as it is."""
    _twin(impl, rows).normalise(rows, unless)


def active_batch_topk(x, W_enc, b_enc, b_dec, count: int, floor: Tensor, impl: str | None = None):
    """Return the `count` largest positive pre-activations of the batch, their pattern and the smallest (training).

    The result does not depend on floor, a guess from below of the smallest; a good guess saves time.
    """
    _plain_only(impl, "active_batch_topk")
    return batch_topk.pre_batch_topk(x, W_enc, b_enc, b_dec, count, floor)


def batch_candidates(x, W_enc, b_enc, b_dec, count: int, floor: Tensor, impl: str | None = None):
    """Return the `count` largest pre-activations above floor and 0, or all if fewer: values, and their pattern.

    What of a batch that is split is among the largest of all of it (training). Nothing is differentiable.
    """
    _plain_only(impl, "batch_candidates")
    return batch_topk.candidates(x, W_enc, b_enc, b_dec, count, floor)


def decode_blocks(values, pattern: Pattern, edges: Tensor, W_dec, impl: str | None = None) -> Tensor:
    """Return (batch, n_blocks, d_in): what the latents from edges[i] up to edges[i + 1] add to a reconstruction.

    The pattern's rows must ascend by latent.
    """
    _plain_only(impl, "decode_blocks")
    n_blocks, zero = edges.numel() - 1, W_dec.new_zeros(W_dec.shape[1])
    flat = cpu.decode_pattern(values, batch_topk.blocks_of(pattern, edges), W_dec, zero)
    return flat.view(-1, n_blocks, W_dec.shape[1])


def _plain_only(impl: str | None, name: str) -> None:
    """Refuse a fused kernel where there is none."""
    if impl not in (None, "reference"):
        raise UserError(f"{name} has no implementation {impl!r}: leave impl out or give 'reference'.")
