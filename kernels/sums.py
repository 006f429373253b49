"""Sums over active entries by Triton: launches of what sparse.py has, by token and by latent.

Dense patterns go by dense products (grids.py). Values are float32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sae_train.kernels import grids, sparse
from sae_train.kernels.patterns import Pattern

# Entries and columns that a program gathers at a time, and its warps: for sums one, since several would have to add up
# theirs through shared memory (.25 ms in place of 1.95 for a weight gradient; kernels/README.md).
BAG_ENTRIES, BAG_COLUMNS, BAG_WARPS = 4, 128, 1
DOT_ENTRIES, DOT_COLUMNS = 16, 256
SUM_ENTRIES = 32


def _block(columns: int, d: int) -> int:
    return min(columns, triton.next_power_of_2(d))


def bag(rows, weights, table, starts, ends, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Σ weights·table[rows] (+ bias) for each bag (n_bags, d), and Σ weights of each bag, in float32."""
    n, d = len(starts), table.shape[1]
    out, sums = (table.new_empty(shape, dtype=torch.float32) for shape in ((n, d), (n,)))
    block = _block(BAG_COLUMNS, d)
    if n:
        sparse.bag_kernel[(n, triton.cdiv(d, block))](
            rows, weights, table, starts, ends, table if bias is None else bias, out, sums, d,
            bias is not None, True, BAG_ENTRIES, block, num_warps=BAG_WARPS,
        )  # fmt: skip
    return out, sums


def token_sums(pattern: Pattern, weights: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return Σ weight·table[latent] (+ bias) for each token (batch, d), in float32."""
    if pattern.dense:
        with torch.autocast(table.device.type, enabled=False):  # TF32, not bfloat16
            out = grids.sum_by_token(pattern, weights.float(), table.float())
        return out if bias is None else out + bias.float()
    starts, ends = pattern.offsets[:-1].contiguous(), pattern.offsets[1:].contiguous()
    return bag(pattern.latents, weights.contiguous(), table.contiguous(), starts, ends, bias)[0]


def latent_sums(pattern: Pattern, weights: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ weight·table[token] for each latent (d_sae, d), and Σ weight (d_sae,).

    Latents with more than patterns.SEGMENT entries are summed in parts of so many, the parts then in order.
    """
    if pattern.dense:
        weights = weights.float()
        return grids.sum_by_latent(pattern, weights, table.float()), weight_sums(pattern, weights)
    order, tokens, offsets = pattern.by_latent
    weights, table, parts = weights.index_select(0, order), table.contiguous(), pattern.segments
    out, sums = bag(tokens, weights, table, offsets[:-1], offsets[1:] if parts is None else parts.light_ends)
    if parts is not None:
        part_rows, part_sums = bag(tokens, weights, table, parts.starts, parts.ends)
        block = _block(BAG_COLUMNS, table.shape[1])
        sparse.join_kernel[(len(parts.owners), triton.cdiv(table.shape[1], block))](
            part_rows, part_sums, parts.owners, parts.edges, out, sums, table.shape[1], block, num_warps=4
        )
    return out, sums


def weight_sums(pattern: Pattern, weights: Tensor) -> Tensor:
    """Return Σ weight for each latent (d_sae,)."""
    order, _, offsets = pattern.by_latent
    return row_sums(weights.index_select(0, order), offsets)


def row_sums(weights: Tensor, offsets: Tensor) -> Tensor:
    """Return Σ weight for each bag, whatever lies behind the last one."""
    out = weights.new_empty(len(offsets) - 1)
    starts, ends = offsets[:-1].contiguous(), offsets[1:].contiguous()
    sparse.sum_kernel[(len(out),)](weights.contiguous(), starts, ends, out, SUM_ENTRIES, num_warps=1)
    return out


def dots(a: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
    """Return a[token] · table[latent] for every entry, 0 where there is none, in float32."""
    if pattern.dense:
        return grids.dots(pattern, a.float(), table.float())
    new = table.new_empty if pattern.n_found is None else table.new_zeros
    out, d = new(len(pattern.latents), dtype=torch.float32), table.shape[1]
    sparse.dots_kernel[(len(a),)](
        a.contiguous(),
        table.contiguous(),
        pattern.latents,
        pattern.offsets,
        out,
        d,
        DOT_ENTRIES,
        _block(DOT_COLUMNS, d),
        num_warps=4,
    )
    return out
