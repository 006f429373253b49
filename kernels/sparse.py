"""Triton sums over active entries: reconstructions, gradients and losses.

Every sum is made by one program in a fixed order: no atomics, the same bits each time for a fixed configuration.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_sum(rows, weights, table, start, end, columns, d: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return Σ over entries start to end of weight · table[row], at the given columns, and of weight, in float32."""
    acc, total = tl.zeros((BLOCK_E, columns.shape[0]), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    for first in range(start, end, BLOCK_E):
        at = first + tl.arange(0, BLOCK_E)
        row = tl.load(rows + at, mask=at < end, other=0).to(tl.int64)
        weight = tl.load(weights + at, mask=at < end, other=0.0).to(tl.float32)
        inside = (at < end)[:, None] & (columns < d)[None, :]
        line = tl.load(table + row[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += weight[:, None] * line
        total += weight
    return tl.sum(acc, 0), tl.sum(total, 0)


@triton.jit
def bag_kernel(
    rows, weights, table, starts, ends, bias, out, sums, d: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[bag] = Σ weight·table[row] (+ bias), sums[bag] = Σ weight, over entries starts[bag] to ends[bag]."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + bag), tl.load(ends + bag)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    line, total = gather_sum(rows, weights, table, start, end, columns, d, BLOCK_E)
    if HAS_BIAS:
        line += tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(out + bag * d + columns, line, mask=columns < d)
    if HAS_SUMS:
        tl.store(sums + bag, total, mask=tl.program_id(1) == 0)


@triton.jit
def sum_kernel(weights, starts, ends, out, BLOCK: tl.constexpr):
    """out[bag] = Σ weight over entries starts[bag] to ends[bag]."""
    bag = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + bag), tl.load(ends + bag)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        acc += tl.load(weights + at, mask=at < end, other=0.0)
    tl.store(out + bag, tl.sum(acc, 0))


@triton.jit
def join_kernel(parts, part_sums, owners, edges, out, sums, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[bag] = Σ of its parts, sums[bag] = Σ of their sums, in order: by the program of the bag's first part."""
    part = tl.program_id(0).to(tl.int64)
    bag = tl.load(owners + part)
    start, end = tl.load(edges + bag), tl.load(edges + bag + 1)
    if part == start:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc, total = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((1,), tl.float32)
        for at in range(start, end):
            acc += tl.load(parts + at * d + columns, mask=columns < d, other=0.0)
            total += tl.load(part_sums + at)
        tl.store(out + bag * d + columns, acc, mask=(columns < d) & (end > start))
        tl.store(sums + bag + tl.arange(0, 1), total, mask=(end > start) & (tl.program_id(1) == 0))


@triton.jit
def dots_kernel(
    a, table, latents, offsets, out, d: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[entry] = a[token] · table[latent] for the entries of one token."""
    token = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    for first in range(start, end, BLOCK_E):
        at = first + tl.arange(0, BLOCK_E)
        latent = tl.load(latents + at, mask=at < end, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for chunk in range(0, d, BLOCK_D):
            columns = chunk + tl.arange(0, BLOCK_D)
            inside = (at < end)[:, None] & (columns < d)[None, :]
            line = tl.load(table + latent[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            acc += line * tl.load(a + token * d + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, tl.sum(acc, 1), mask=at < end)


@triton.jit
def decode_loss_kernel(
    values, latents, offsets, W_dec, b_dec, x, recon, error, dots, d: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token with at most BLOCK_E entries: recon, Σ (recon − x)², and (recon − x) · W_dec[latent] of each entry.

    Each decoder row is read once: a chunk of it is in registers while the chunk's residual is formed and used.
    """
    token = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    at = start + tl.arange(0, BLOCK_E)
    latent = tl.load(latents + at, mask=at < end, other=0).to(tl.int64)
    value = tl.load(values + at, mask=at < end, other=0.0).to(tl.float32)
    dot, loss = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for chunk in range(0, d, BLOCK_D):
        columns = chunk + tl.arange(0, BLOCK_D)
        inside = (at < end)[:, None] & (columns < d)[None, :]
        line = tl.load(W_dec + latent[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(value[:, None] * line, 0)
        total += tl.load(b_dec + columns, mask=columns < d, other=0.0).to(tl.float32)
        residual = total - tl.load(x + token * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(recon + token * d + columns, total, mask=columns < d)
        loss += tl.where(columns < d, residual * residual, 0.0)
        dot += tl.sum(line * tl.where(columns < d, residual, 0.0)[None, :], 1)
    tl.store(error + token, tl.sum(loss, 0))
    tl.store(dots + at, dot, mask=at < end)


@triton.jit
def jumprelu_kernel(
    pre, latents, threshold, values, counts, last, n, BLOCK: tl.constexpr,
):  # fmt: skip
    """values = pre·1[pre > θ] of the entries up to *last, 0 from there to n; counts[program] = how many are above."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.load(last)
    value = tl.load(pre + at, mask=there, other=float("-inf"))
    theta = tl.load(threshold + tl.load(latents + at, mask=there, other=0), mask=there, other=0.0)
    # NaN is no number above θ, but must reach the loss.
    tl.store(values + at, tl.where(value <= theta, 0.0, value), mask=at < n)
    tl.store(counts + tl.program_id(0), tl.sum((value > theta).to(tl.int32), 0))


@triton.jit
def jumprelu_backward_kernel(
    pre, order, starts, ends, threshold, d_values, d_count, widths, d_pre, d_threshold, BLOCK: tl.constexpr,
):  # fmt: skip
    """One latent, its entries in token order: d_pre = d_value·1[pre > θ], dθ = −Σ (θ·d_value + d_count)/ε near θ."""
    latent = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + latent), tl.load(ends + latent)
    theta, width, up = tl.load(threshold + latent), tl.load(widths + latent), tl.load(d_count)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        entry = tl.load(order + at, mask=at < end, other=0)
        value = tl.load(pre + entry, mask=at < end, other=0.0)
        grad = tl.load(d_values + entry, mask=at < end, other=0.0)
        near = (tl.abs(value - theta) < width / 2) & (at < end)
        acc -= tl.where(near, (theta * grad + up) / width, 0.0)
        tl.store(d_pre + entry, tl.where(value > theta, grad, 0.0), mask=at < end)
    tl.store(d_threshold + latent, tl.sum(acc, 0))


@triton.jit
def remove_parallel_kernel(grad, rows, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row: grad −= (grad · row) row."""
    start, columns = tl.program_id(0).to(tl.int64) * d, tl.arange(0, BLOCK_D)
    g = tl.load(grad + start + columns, mask=columns < d, other=0.0)
    w = tl.load(rows + start + columns, mask=columns < d, other=0.0)
    tl.store(grad + start + columns, g - tl.sum(g * w, 0) * w, mask=columns < d)


@triton.jit
def normalise_kernel(rows, unless, d: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row, divided by its norm unless told otherwise."""
    start, columns = tl.program_id(0).to(tl.int64) * d, tl.arange(0, BLOCK_D)
    w = tl.load(rows + start + columns, mask=columns < d, other=0.0)
    tl.store(rows + start + columns, w / tl.sqrt(tl.sum(w * w, 0)), mask=(columns < d) & (tl.load(unless) == 0))
