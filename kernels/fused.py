"""The Triton twins of kernels/reference.py: same functions, same arguments, gradients on the active latents only.

In: float32, bfloat16 or float16 activations and weights on a CUDA device (or on the CPU under TRITON_INTERPRET=1).
Out: float32 values and int32 latents at a Pattern, reconstructions and loss pieces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_train.errors import UserError
from sae_train.kernels import encoders, patterns, sparse
from sae_train.kernels.crossover import Crossover
from sae_train.kernels.patterns import Pattern, row_pattern

# A latent's entries beyond this are summed in parts, so that one that fires on half of all tokens is no tail.
SEGMENT = 256
# Entries of a token that the one-gather decode holds in registers, with a chunk of their decoder rows.
MAX_ONE_GATHER = 128
BLOCK_E = 16


def _block_d(d: int) -> int:
    return min(256, triton.next_power_of_2(d))


def bag(rows, weights, table, starts, ends, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Σ weights·table[rows] (+ bias) for each bag (n_bags, d), and Σ weights of each bag, in float32."""
    n, d = len(starts), table.shape[1]
    out, sums = (table.new_empty(shape, dtype=torch.float32) for shape in ((n, d), (n,)))
    block = _block_d(d)
    if n:
        sparse.bag_kernel[(n, triton.cdiv(d, block))](
            rows, weights, table, starts, ends, table if bias is None else bias, out, sums, d,
            bias is not None, True, BLOCK_E, block, num_warps=4,
        )  # fmt: skip
    return out, sums


def token_sums(pattern: Pattern, weights: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Σ weight·table[latent] (+ bias) for each token (batch, d), in float32."""
    if pattern.dense:
        out = patterns.sum_by_token(pattern, weights.float(), table.float())
        return out if bias is None else out + bias.float()
    starts, ends = pattern.offsets[:-1].contiguous(), pattern.offsets[1:].contiguous()
    return bag(pattern.latents, weights.contiguous(), table.contiguous(), starts, ends, bias)[0]


def latent_sums(pattern: Pattern, weights: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ weight·table[token] for each latent (d_sae, d), and Σ weight (d_sae,).

    Latents with more than SEGMENT entries are summed in parts of SEGMENT, the parts then in order. The number of parts
    is bounded on the host by the number of entries, so that nothing waits for the device.
    """
    if pattern.dense:
        weights = weights.float()
        sums = weights.new_zeros(pattern.d_sae).index_add_(0, pattern.latents, weights)
        return patterns.sum_by_latent(pattern, weights, table.float()), sums
    order, tokens, offsets = pattern.by_latent
    weights, table = weights[order], table.contiguous()
    counts, limit = offsets.diff(), 2 * len(weights) // SEGMENT
    heavy = counts > SEGMENT
    ends = torch.where(heavy, offsets[:-1], offsets[1:])
    out, sums = bag(tokens, weights, table, offsets[:-1].contiguous(), ends.contiguous())
    if limit:
        n_parts = torch.where(heavy, (counts + SEGMENT - 1) // SEGMENT, 0)
        edges = nnf.pad(n_parts.cumsum(0), (1, 0))
        part = torch.arange(limit, device=edges.device)
        owner = torch.searchsorted(edges[1:], part, right=True)
        real, owner = owner < pattern.d_sae, owner.clamp_max(pattern.d_sae - 1)
        starts = offsets[owner] + (part - edges[owner]) * SEGMENT
        starts, ends = (
            torch.where(real, starts, 0),
            torch.where(real, (starts + SEGMENT).minimum(offsets[owner + 1]), 0),
        )
        parts, part_sums = bag(tokens, weights, table, starts.contiguous(), ends.contiguous())
        for source, target in ((parts, out), (part_sums[:, None], sums[:, None])):
            block = _block_d(source.shape[1])
            grid = pattern.d_sae, triton.cdiv(source.shape[1], block)
            sparse.join_kernel[grid](source, edges, target, source.shape[1], block, num_warps=4)
    return out, sums


def dots(a: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
    """Return a[token] · table[latent] for every entry, in float32."""
    if pattern.dense:
        return patterns.dots(pattern, a.float(), table.float())
    out = table.new_empty(len(pattern.latents), dtype=torch.float32)
    d = table.shape[1]
    sparse.dots_kernel[(len(a),)](
        a.contiguous(), table.contiguous(), pattern.latents, pattern.offsets, out, d, BLOCK_E, _block_d(d), num_warps=4
    )
    return out


class _Encode(torch.autograd.Function):
    """pre at the pattern's entries, given already; the backward is the adjoint of (x − b_dec)·W_enc + b_enc there."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, pre, pattern):
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.pattern = pattern
        return pre.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W_enc, b_dec = ctx.saved_tensors
        pattern, grad = ctx.pattern, grad.contiguous()
        d_W, d_b = latent_sums(pattern, grad, x - b_dec)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = token_sums(pattern, grad, W_enc.t()).to(x.dtype)
        d_b_dec = -(W_enc.float() @ d_b)
        return d_x, d_W.t().to(W_enc.dtype), d_b, d_b_dec.to(b_dec.dtype), None, None


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
        ctx.pattern = pattern
        ctx.set_materialize_grads(False)
        return recon, error.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_recon, d_error):
        values, W_dec, x, recon, along = ctx.saved_tensors
        residual = (recon - x) * (0.0 if d_error is None else 2 * d_error)
        grad = residual if d_recon is None else residual + d_recon
        d_values = along * (2 * d_error) if d_recon is None else dots(grad, W_dec, ctx.pattern)
        d_W = latent_sums(ctx.pattern, values, grad)[0].to(W_dec.dtype)
        return d_values, d_W, grad.sum(0), -residual if ctx.needs_input_grad[3] else None, None


class _JumpReLU(torch.autograd.Function):
    """pre·1[pre > θ] and Σ 1[pre > θ] over all entries, with the straight-through gradients of both to θ."""

    @staticmethod
    def forward(ctx, pre, threshold, pattern, bandwidth):
        n, block = len(pre), 1024
        values = pre.new_empty(n)
        counts = pattern.latents.new_empty(triton.cdiv(n, block), dtype=torch.int32)
        if n:
            sparse.jumprelu_kernel[(len(counts),)](pre, pattern.latents, threshold, values, counts, n, block)
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
        d_pre, d_threshold = torch.empty_like(pre), torch.empty_like(threshold)
        sparse.jumprelu_backward_kernel[(len(threshold),)](
            pre, order, offsets[:-1].contiguous(), offsets[1:].contiguous(), threshold, d_values.contiguous(), d_count,
            ctx.widths, d_pre, d_threshold, 32, num_warps=1,
        )  # fmt: skip
        return d_pre, d_threshold, None, None


def _prepared(x: Tensor, W_enc: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Return x − b_dec and latent-major weights, in the dtype of the product (the autocast one where that is on)."""
    if W_enc.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"impl='triton' takes float32, bfloat16 or float16 weights, not {W_enc.dtype}.")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W_enc.dtype
    return (x - b_dec).to(dtype).contiguous(), W_enc.t().to(dtype).contiguous()


def pre_topk(x, W_enc, b_enc, b_dec, k: int) -> tuple[Tensor, Pattern]:
    """Return the k largest pre-activations of each token, flat, differentiable, and their pattern."""
    with torch.no_grad():
        values, latents = encoders.topk(*_prepared(x, W_enc, b_dec), b_enc, k)
        pattern = row_pattern(latents, W_enc.shape[1])
    return _Encode.apply(x, W_enc, b_enc, b_dec, values.view(-1), pattern), pattern


def pre_above(x, W_enc, b_enc, b_dec, floor: Tensor | float, crossover: Crossover | None = None):
    """Return the pre-activations above floor (scalar or (d_sae,)), flat, differentiable, and their pattern."""
    with torch.no_grad():
        floors = torch.as_tensor(floor, dtype=torch.float32, device=x.device).expand(W_enc.shape[1]).contiguous()
        values, latents, offsets = encoders.above(*_prepared(x, W_enc, b_dec), b_enc, floors)
        pattern = Pattern(latents, offsets, W_enc.shape[1])
        pattern = crossover.choose(pattern) if crossover else pattern
    return _Encode.apply(x, W_enc, b_enc, b_dec, values, pattern), pattern


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
