"""Triton encoder: activations and weights in, the few largest pre-activations of each row and group of latents out.

A program computes a tile of pre-activations in registers and writes only candidates; the (batch, d_sae) block is never
stored. Groups are strided, {j, j + n_groups, j + 2·n_groups, …}, because neighbouring latents may be correlated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sae_train.kernels.keys import EMPTY, to_key


@triton.jit
def tile(
    x, W, b_enc, rows, latents, batch, d_sae, d_in: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return pre-activations (len(rows), len(latents)) in float32. The repair calls it too, for the same bits."""
    acc = tl.zeros((rows.shape[0], latents.shape[0]), tl.float32)
    columns = tl.arange(0, BLOCK_K)
    x_ptrs = x + rows.to(tl.int64)[:, None] * d_in + columns[None, :]
    W_ptrs = W + latents.to(tl.int64)[None, :] * d_in + columns[:, None]
    row_in, latent_in = (rows < batch)[:, None], (latents < d_sae)[None, :]
    for start in range(0, d_in, BLOCK_K):
        inside = columns < d_in - start
        a = tl.load(x_ptrs + start, mask=row_in & inside[None, :], other=0.0)
        b = tl.load(W_ptrs + start, mask=latent_in & inside[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc + tl.load(b_enc + latents, mask=latents < d_sae, other=0.0).to(tl.float32)[None, :]


@triton.jit
def emit(
    key, rows, group, batch, n_groups, keys, latents,
    R: tl.constexpr, RANKED_AXIS: tl.constexpr,
):  # fmt: skip
    """Store the R first (key, latent) of each row's group: R rounds of arg-max, ties to the lowest latent.

    key is (rows, members), all of one group, and RANKED_AXIS 1; or (members, groups), all of one row, and 0.
    """
    member = tl.arange(0, key.shape[RANKED_AXIS])
    member = member[None, :] if RANKED_AXIS == 1 else member[:, None]
    place = (rows.to(tl.int64) * n_groups + group) * R
    stored = (rows < batch) & (group < n_groups)
    for r in tl.static_range(R):
        best, at = tl.max(key, RANKED_AXIS, return_indices=True, return_indices_tie_break_left=True)
        tl.store(keys + place + r, best, mask=stored)
        tl.store(latents + place + r, at.to(tl.int32) * n_groups + group, mask=stored)
        if r + 1 < R:
            taken = at[:, None] if RANKED_AXIS == 1 else at[None, :]
            key = tl.where(member == taken, EMPTY, key)


@triton.jit
def encode_kernel(
    x, W, b_enc, floor, keys, latents, counts, batch, d_sae, n_groups, d_in: tl.constexpr,
    HAS_FLOOR: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows × the GROUP latents of one group. counts (batch, n_groups): entries above the floor.

    Tiles run through bands of BAND row blocks, so that the weights of a group are read from L2 by its whole band.
    """
    pid, n_blocks = tl.program_id(0), tl.cdiv(batch, BLOCK_M)
    first = pid // (BAND * n_groups) * BAND
    height = tl.minimum(n_blocks - first, BAND)
    block = first + pid % (BAND * n_groups) % height
    group = pid % (BAND * n_groups) // height
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    members = group + tl.arange(0, GROUP) * n_groups
    pre = tile(x, W, b_enc, rows, members, batch, d_sae, d_in, BLOCK_K, PRECISION, UPCAST)
    key = tl.where((members < d_sae)[None, :], to_key(pre), EMPTY)
    if HAS_FLOOR:
        # Not (pre <= floor) keeps NaN, for the loss to report.
        floors = tl.load(floor + members, mask=members < d_sae, other=float("inf"))
        key = tl.where(pre <= floors[None, :], EMPTY, key)
        count = tl.sum((key != EMPTY).to(tl.int32), 1)
        tl.store(counts + rows.to(tl.int64) * n_groups + group, count, mask=rows < batch)
    emit(key, rows, group, batch, n_groups, keys, latents, R, 1)


@triton.jit
def group_kernel(
    pre, floor, keys, latents, counts, batch, d_sae, n_groups,
    HAS_FLOOR: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same candidates from dense pre-activations: one program takes one row and BLOCK neighbouring groups."""
    row, group = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    members = tl.arange(0, GROUP)[:, None] * n_groups + group[None, :]
    inside = (members < d_sae) & (group < n_groups)[None, :]
    value = tl.load(pre + row.to(tl.int64) * d_sae + members, mask=inside, other=0.0).to(tl.float32)
    key = tl.where(inside, to_key(value), EMPTY)
    if HAS_FLOOR:
        floors = tl.load(floor + members, mask=inside, other=float("inf"))
        key = tl.where(value <= floors, EMPTY, key)
        count = tl.sum((key != EMPTY).to(tl.int32), 0)
        tl.store(counts + row.to(tl.int64) * n_groups + group, count, mask=group < n_groups)
    emit(key, row + tl.zeros((BLOCK,), tl.int32), group, batch, n_groups, keys, latents, R, 0)
