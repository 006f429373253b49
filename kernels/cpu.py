"""The way that needs no Triton: fast on a CPU, right on any device, gradients computed on the active latents only.

No (batch, d_sae) tensor outlives the selection. `impl="reference"` asks for it. What it has to equal is in naive.py;
derivations are in README.md.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_train.kernels import screen
from sae_train.kernels.crossover import Crossover
from sae_train.kernels.patterns import Pattern, dots, row_pattern, sum_at, sum_by_latent, sum_by_token, top_k
from sae_train.kernels.rows import normalise, remove_parallel

__all__ = ["normalise", "remove_parallel"]  # handed through

# One slab of pre-activations: 8 MB in float32. From 32 MB on glibc returns the memory to the system after every step,
# which then clears it anew (a quarter of a step at width 4k).
SLAB_ELEMENTS = 2 * 2**20


class _Encode(torch.autograd.Function):
    """pre at the pattern's entries, given already; the backward is the adjoint of (x − b_dec)·W_enc + b_enc there."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, centred, pre, pattern):
        ctx.save_for_backward(centred, W_enc)
        ctx.pattern = pattern
        return pre.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        centred, W_enc = ctx.saved_tensors
        pattern = ctx.pattern
        d_W = sum_by_latent(pattern, grad, centred).t()
        d_b = torch.zeros_like(W_enc[0]).scatter_add_(0, pattern.latents, grad)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = sum_by_token(pattern, grad, W_enc.t().contiguous())
        return d_x, d_W, d_b, -(W_enc @ d_b), None, None, None


class _Decode(torch.autograd.Function):
    """values · W_dec[latents] summed per token, + b_dec."""

    @staticmethod
    def forward(ctx, values, W_dec, b_dec, pattern):
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return sum_by_token(pattern, values, W_dec) + b_dec

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = dots(ctx.pattern, grad, W_dec) if ctx.needs_input_grad[0] else None
        d_W = sum_by_latent(ctx.pattern, values, grad) if ctx.needs_input_grad[1] else None
        return d_values, d_W, grad.sum(0), None


class _DecodeError(torch.autograd.Function):
    """The reconstruction and Σ (recon − x)²."""

    @staticmethod
    def forward(ctx, values, W_dec, b_dec, x, pattern):
        recon = sum_by_token(pattern, values, W_dec).add_(b_dec)
        residual = recon - x
        ctx.save_for_backward(values, W_dec, residual)
        ctx.pattern = pattern
        ctx.set_materialize_grads(False)
        return recon, residual.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_recon, d_error):
        values, W_dec, residual = ctx.saved_tensors
        along = residual * (0.0 if d_error is None else 2 * d_error)
        grad = along if d_recon is None else along + d_recon
        d_W = sum_by_latent(ctx.pattern, values, grad)
        d_x = -along if ctx.needs_input_grad[3] else None
        return dots(ctx.pattern, grad, W_dec), d_W, grad.sum(0), d_x, None


def _prefers_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies faster than MKL: on AVX2 and on AMD (53 ms against 71), not on a Xeon (197, 185)."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX2" or _is_amd()


@cache
def _is_amd() -> bool:
    return "AMD" in str(torch.cpu.get_capabilities().get("cpu_name", ""))


def _slabs(centred: Tensor, W_enc: Tensor, b_enc: Tensor):
    """Yield the pre-activations of a few rows at a time; the buffer is reused, so use each before the next."""
    rows = max(1, SLAB_ELEMENTS // W_enc.shape[1])
    if _prefers_onednn(centred):
        for chunk in centred.split(2 * rows):
            yield torch.ops.mkldnn._linear_pointwise(chunk, W_enc.t(), b_enc, "none", [], "")
        return
    buffer = centred.new_empty(min(rows, len(centred)), W_enc.shape[1])
    for chunk in centred.split(rows):
        yield torch.addmm(b_enc, chunk, W_enc, out=buffer[: chunk.shape[0]])


def _topk(centred, W_enc, b_enc, k: int) -> tuple[Tensor, Tensor]:
    """Return values and latents (batch, k) of the k largest pre-activations."""
    pays = screen.pays(centred, W_enc.shape[1], k)
    if pays and (selected := screen.topk(centred, W_enc.t().contiguous(), b_enc, k)):
        return selected
    parts = [top_k(pre, k) for pre in _slabs(centred, W_enc, b_enc)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def pre_topk(x, W_enc, b_enc, b_dec, k: int) -> tuple[Tensor, Pattern]:
    """Return the k largest pre-activations of each token, flat, differentiable, and their pattern."""
    with torch.no_grad():
        centred = x - b_dec
        pre, latents = _topk(centred, W_enc, b_enc, k)
        pattern = row_pattern(latents, W_enc.shape[1])
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, pre.view(-1), pattern), pattern


def pre_at(x, W_enc, b_enc, b_dec, pre, pattern: Pattern) -> Tensor:
    """Return the pre-activations at a pattern's entries, which are `pre`, as differentiable ones."""
    with torch.no_grad():
        centred = x - b_dec
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, pre, pattern)


def _above(centred, W_enc, b_enc, floor: Tensor | float, few: bool) -> tuple[Tensor, Pattern]:
    """Return the pre-activations above floor, row after row, and their pattern. NaN is above any floor."""
    pays = few and screen.pays(centred, W_enc.shape[1])
    if pays and (selected := screen.above(centred, W_enc.t().contiguous(), b_enc, floor)):
        return selected
    values, latents, counts = [], [], []
    for pre in _slabs(centred, W_enc, b_enc):
        flat = (~(pre <= floor)).view(-1).nonzero().view(-1)
        values.append(pre.view(-1)[flat])
        latents.append(flat % pre.shape[1])
        counts.append(torch.bincount(flat // pre.shape[1], minlength=len(pre)))
    offsets = nnf.pad(torch.cat(counts).cumsum(0), (1, 0))
    return torch.cat(values), Pattern(torch.cat(latents), offsets, W_enc.shape[1])


def pre_above(x, W_enc, b_enc, b_dec, floor: Tensor | float, crossover: Crossover | None = None):
    """Return the pre-activations above floor (scalar or (d_sae,)), flat, differentiable, and their pattern."""
    with torch.no_grad():
        few = crossover is None or not crossover.dense
        centred = x - b_dec
        pre, pattern = _above(centred, W_enc, b_enc, floor, few)
        pattern = crossover.choose(pattern) if crossover else pattern
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, pre, pattern), pattern


def decode_pattern(values: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return the reconstruction (batch, d_in) from flat values at the pattern's entries."""
    return _Decode.apply(values, W_dec, b_dec, pattern)


def decode_error(values: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstruction and Σ (recon − x)²."""
    return _DecodeError.apply(values, W_dec, b_dec, x, pattern)


def jumprelu_active(
    pre: Tensor, pattern: Pattern, threshold: Tensor, bandwidth: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return pre·1[pre > θ] at the entries and the number of entries above, both differentiable in θ."""
    # index_select, since several threads add up the gradient of threshold[…] in any order.
    theta = threshold.index_select(0, pattern.latents)
    bandwidth = bandwidth[pattern.latents] if isinstance(bandwidth, Tensor) else bandwidth
    return JumpReLU.apply(pre, theta, bandwidth), Step.apply(pre, theta, bandwidth).sum()


def totals_by_latent(values: Tensor, pattern: Pattern) -> Tensor:
    """Return Σ values of each latent, differentiable."""
    return sum_at(pattern.latents, values, pattern.d_sae)


def total(values: Tensor, pattern: Pattern) -> Tensor:
    """Return Σ values over all entries, differentiable."""
    return values.sum()


class JumpReLU(torch.autograd.Function):
    """pre·1[pre > θ]; straight-through to θ with a rectangle of width ε (Rajamanoharan et al. 2024, eq. 11).

    ∂/∂pre = 1[pre > θ];  ∂/∂θ = −(θ/ε)·1[|pre − θ| < ε/2]: the kernel looks at pre, never at the masked output.
    """

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        d_threshold = -(threshold / ctx.bandwidth) * near * grad
        return grad * (pre > threshold), d_threshold.sum_to_size(threshold.shape), None


class Step(torch.autograd.Function):
    """1[pre > θ], with ∂/∂θ = −(1/ε)·1[|pre − θ| < ε/2] and no gradient to pre (Rajamanoharan et al. 2024, eq. 12)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, (-near.to(grad.dtype) / ctx.bandwidth * grad).sum_to_size(threshold.shape), None
