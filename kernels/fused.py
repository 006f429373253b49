"""The Triton way, the twin of kernels/cpu.py: same functions, same arguments, gradients on the active latents only.

It takes float32, bfloat16 or float16 activations and weights on a CUDA device (or on the CPU under TRITON_INTERPRET=1);
values are float32, latents int32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_train.errors import UserError
from sae_train.kernels import encoders, sparse
from sae_train.kernels.crossover import Crossover
from sae_train.kernels.patterns import Pattern, row_pattern
from sae_train.kernels.sums import dots, latent_sums, row_sums, token_sums, weight_sums

# Entries of a token that the one-gather decode holds in registers, with a chunk of their decoder rows.
MAX_ONE_GATHER = 128


class _Encode(torch.autograd.Function):
    """pre at the pattern's entries, given already; the backward is the adjoint of (x − b_dec)·W_enc + b_enc there."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, centred, pre, pattern):
        ctx.save_for_backward(centred, W_enc)
        ctx.pattern, ctx.dtypes = pattern, (x.dtype, b_dec.dtype)
        return pre.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        centred, W_enc = ctx.saved_tensors
        pattern, grad, (x_dtype, b_dtype) = ctx.pattern, grad.contiguous(), ctx.dtypes
        d_W, d_b = latent_sums(pattern, grad, centred)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = token_sums(pattern, grad, W_enc.t()).to(x_dtype)
        d_b_dec = -(W_enc.float() @ d_b)
        return d_x, d_W.t().to(W_enc.dtype), d_b, d_b_dec.to(b_dtype), None, None, None


class _Decode(torch.autograd.Function):
    """values · W_dec[latents] summed per token, + b_dec."""

    @staticmethod
    def forward(ctx, values, W_dec, b_dec, pattern):
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return token_sums(pattern, values, W_dec, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, W_dec = ctx.saved_tensors
        d_values = dots(grad, W_dec, ctx.pattern) if ctx.needs_input_grad[0] else None
        d_W = latent_sums(ctx.pattern, values, grad)[0].to(W_dec.dtype) if ctx.needs_input_grad[1] else None
        return d_values, d_W, grad.sum(0), None


class _DecodeError(torch.autograd.Function):
    """The reconstruction and Σ (recon − x)², with the values' gradient made in the same gather."""

    @staticmethod
    def forward(ctx, values, W_dec, b_dec, x, pattern):
        batch, d = x.shape
        recon, error = (x.new_empty(shape, dtype=torch.float32) for shape in ((batch, d), (batch,)))
        along = values.new_empty(values.shape)
        block = triton.next_power_of_2(max(1, len(values) // batch))
        sparse.decode_loss_kernel[(batch,)](
            values.contiguous(), pattern.latents, pattern.offsets, W_dec.contiguous(), b_dec, x.contiguous(),
            recon, error, along, d, block, min(64, triton.next_power_of_2(d)), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(values, W_dec, x, recon, along)
        ctx.pattern, ctx.dtype = pattern, _product_dtype(W_dec)
        ctx.set_materialize_grads(False)
        return recon, error.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_recon, d_error):
        values, W_dec, x, recon, along = ctx.saved_tensors
        twice = 0.0 if d_error is None else 2 * d_error
        residual = (recon - x) * twice
        grad = residual if d_recon is None else residual + d_recon
        d_values = along * twice if d_recon is None else dots(grad, W_dec, ctx.pattern)
        d_W = latent_sums(ctx.pattern, values, grad.to(ctx.dtype))[0].to(W_dec.dtype)
        return d_values, d_W, grad.sum(0), -residual if ctx.needs_input_grad[3] else None, None


class _JumpReLU(torch.autograd.Function):
    """pre·1[pre > θ] and Σ 1[pre > θ] over all entries, with the straight-through gradients of both to θ."""

    @staticmethod
    def forward(ctx, pre, threshold, pattern, bandwidth):
        n, block = len(pre), 1024
        values = pre.new_empty(n)
        counts = pattern.latents.new_empty(triton.cdiv(n, block), dtype=torch.int32)
        if n:
            last = pattern.offsets[-1:]
            sparse.jumprelu_kernel[(len(counts),)](pre, pattern.latents, threshold, values, counts, last, n, block)
        ctx.save_for_backward(pre, threshold)
        ctx.pattern = pattern
        widths = torch.as_tensor(bandwidth, dtype=threshold.dtype, device=pre.device)
        ctx.widths = widths.expand_as(threshold).contiguous()
        return values, counts.sum().to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values, d_count):
        pre, threshold = ctx.saved_tensors
        order, _, offsets = ctx.pattern.by_latent
        d_pre, d_threshold = torch.zeros_like(pre), torch.empty_like(threshold)
        sparse.jumprelu_backward_kernel[(len(threshold),)](
            pre, order, offsets[:-1].contiguous(), offsets[1:].contiguous(), threshold, d_values.contiguous(), d_count,
            ctx.widths, d_pre, d_threshold, 32, num_warps=1,
        )  # fmt: skip
        return d_pre, d_threshold, None, None


class _Sums(torch.autograd.Function):
    """Σ values of each latent, or of all entries (`latents` false)."""

    @staticmethod
    def forward(ctx, values, pattern, latents):
        ctx.pattern, ctx.latents = pattern, latents
        return weight_sums(pattern, values) if latents else row_sums(values, pattern.offsets).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pattern = ctx.pattern
        out = grad.index_select(0, pattern.latents) if ctx.latents else grad.repeat(len(pattern.latents))
        return out if pattern.n_found is None else out.masked_fill_(pattern.absent, 0.0), None, None


def _product_dtype(W: Tensor) -> torch.dtype:
    """The dtype in which products with these weights are made: the autocast one where that is on."""
    if W.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"impl='triton' takes float32, bfloat16 or float16 weights, not {W.dtype}.")
    device = W.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype


def _centre(x: Tensor, W_enc: Tensor, b_dec: Tensor) -> Tensor:
    """Return x − b_dec in the dtype of the product."""
    return (x - b_dec).to(_product_dtype(W_enc)).contiguous()


def pre_topk(x, W_enc, b_enc, b_dec, k: int) -> tuple[Tensor, Pattern]:
    """Return the k largest pre-activations of each token, flat, differentiable, and their pattern."""
    with torch.no_grad():
        centred = _centre(x, W_enc, b_dec)
        values, latents = encoders.topk(centred, W_enc.t().contiguous(), b_enc, k)
        pattern = row_pattern(latents, W_enc.shape[1])
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, values.view(-1), pattern), pattern


def pre_at(x, W_enc, b_enc, b_dec, pre, pattern: Pattern) -> Tensor:
    """Return the pre-activations at a pattern's entries, which are `pre`, as differentiable ones."""
    with torch.no_grad():
        centred = _centre(x, W_enc, b_dec)
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, pre, pattern)


def pre_above(x, W_enc, b_enc, b_dec, floor: Tensor | float, crossover: Crossover | None = None):
    """Return the pre-activations above floor (scalar or (d_sae,)), flat, differentiable, and their pattern."""
    with torch.no_grad():
        floors = floor if isinstance(floor, Tensor) else torch.full((), floor, device=x.device)
        floors = floors.float().expand(W_enc.shape[1]).contiguous()
        centred, d_sae = _centre(x, W_enc, b_dec), W_enc.shape[1]
        how, room = None, crossover.room if crossover else None
        if crossover and crossover.mean is not None:
            how = encoders.plan_above(centred, d_sae, crossover.crowded)
        values, latents, offsets = encoders.above(centred, W_enc.t().contiguous(), b_enc, floors, how, room)
        pattern = Pattern(latents, offsets, d_sae)
        if room is not None:
            pattern = replace(pattern, offsets=offsets.clamp_max(room), n_found=offsets[-1])
        pattern = crossover.choose(pattern, late=True) if crossover else pattern
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, values, pattern), pattern


def decode_pattern(values: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return the reconstruction (batch, d_in) from flat values at the pattern's entries."""
    return _Decode.apply(values, W_dec, b_dec, pattern)


def decode_error(values: Tensor, pattern: Pattern, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstruction and Σ (recon − x)²; one gather where every token has the same few entries."""
    each, rest = divmod(len(pattern.latents), len(x))
    if rest == 0 and 0 < each <= MAX_ONE_GATHER and pattern.even:
        return _DecodeError.apply(values, W_dec, b_dec, x, pattern)
    recon = decode_pattern(values, pattern, W_dec, b_dec)
    return recon, (recon - x).square().sum()


def jumprelu_active(
    pre: Tensor, pattern: Pattern, threshold: Tensor, bandwidth: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return pre·1[pre > θ] at the entries and the number of entries above, both differentiable in θ."""
    return _JumpReLU.apply(pre, threshold, pattern, bandwidth)


def totals_by_latent(values: Tensor, pattern: Pattern) -> Tensor:
    """Return Σ values of each latent, differentiable."""
    return _Sums.apply(values, pattern, True)


def total(values: Tensor, pattern: Pattern) -> Tensor:
    """Return Σ values over all entries, token by token, differentiable."""
    return _Sums.apply(values, pattern, False)


@torch.no_grad()
def remove_parallel(grad: Tensor, rows: Tensor) -> None:
    """What kernels/rows.py does, one program a row."""
    sparse.remove_parallel_kernel[(len(rows),)](grad, rows, rows.shape[1], triton.next_power_of_2(rows.shape[1]))


@torch.no_grad()
def normalise(rows: Tensor, unless: Tensor) -> None:
    """What kernels/rows.py does, one program a row."""
    d = rows.shape[1]
    sparse.normalise_kernel[(len(rows),)](rows, unless.to(torch.int32), d, triton.next_power_of_2(d))
