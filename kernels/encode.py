"""The Triton encoder: it finds the few largest pre-activations of each row and group of latents.

A program computes a tile of pre-activations in registers and writes only candidates; the (batch, d_sae) block is never
stored. Groups are strided, {j, j + n_groups, j + 2·n_groups, …}, because neighbouring latents may be correlated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sae_train.kernels.keys import EMPTY, cut_key, to_key


@triton.jit
def tile(x, W, row, group, d_in: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
         PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Return x·Wᵀ in float32 for BLOCK_M rows from `row` on and one group; x and W are tensor descriptors."""
    acc = tl.zeros((BLOCK_M, GROUP), tl.float32)
    for start in range(0, d_in, BLOCK_K):
        a, b = x.load([row, start]), W.load([group * GROUP, start])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_tile(x, W, row, group, d_in: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
             PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """The same by pointers, for one row repeated BLOCK_M times: the same products in the same order, for the repair."""
    acc = tl.zeros((BLOCK_M, GROUP), tl.float32)
    columns = tl.arange(0, BLOCK_K)
    rows = row + tl.zeros((BLOCK_M,), tl.int64)
    members = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    for start in range(0, d_in, BLOCK_K):
        inside = columns < d_in - start
        a = tl.load(x + rows[:, None] * d_in + start + columns[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(W + members[None, :] * d_in + start + columns[:, None], mask=inside[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


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
def emit_packed(
    key, rows, group, batch, n_groups, keys, latents, rounds, R: tl.constexpr, GROUP: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The same for keys that are multiples of GROUP: a member's number travels in the bits below, at half the work.

    ALL: R rounds; else as many as `rounds` says.
    """
    packed = key | (GROUP - 1 - tl.arange(0, GROUP)[None, :])
    place = (rows.to(tl.int64) * n_groups + group) * R
    if ALL:
        for r in tl.static_range(R):
            packed = emit_best(packed, place + r, rows < batch, group, n_groups, keys, latents, GROUP)
    else:
        for r in range(rounds):
            packed = emit_best(packed, place + r, rows < batch, group, n_groups, keys, latents, GROUP)


@triton.jit
def emit_best(packed, place, stored, group, n_groups, keys, latents, GROUP: tl.constexpr):
    """Store the first of each row and return the others."""
    best = tl.max(packed, 1)
    tl.store(keys + place, best & -GROUP, mask=stored)
    tl.store(latents + place, (GROUP - 1 - (best & (GROUP - 1))) * n_groups + group, mask=stored)
    return tl.where(packed == best[:, None], EMPTY, packed)


@triton.jit
def encode_kernel(
    x, W, b_enc, floor, keys, latents, counts, batch, d_sae, n_groups, d_in: tl.constexpr,
    HAS_FLOOR: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile: BLOCK_M rows × the GROUP latents of one group. counts (batch, n_groups): entries above the floor.

    x (batch, d_in) and W (n_groups·GROUP, d_in) are tensor descriptors; W has the members of a group side by side.
    Tiles run through bands of BAND row blocks, so that the weights of a group are read from L2 by its whole band.
    With PACKED keys are cut by log2(GROUP) bits. Where there is a floor, slots beyond a group's count are not written.
    """
    pid, n_blocks = tl.program_id(0), tl.cdiv(batch, BLOCK_M)
    first = pid // (BAND * n_groups) * BAND
    height = tl.minimum(n_blocks - first, BAND)
    block = first + pid % (BAND * n_groups) % height
    group = pid % (BAND * n_groups) // height
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    members = group + tl.arange(0, GROUP) * n_groups
    inside = members < d_sae
    pre = tile(x, W, block * BLOCK_M, group, d_in, BLOCK_M, GROUP, BLOCK_K, PRECISION, UPCAST)
    pre += tl.load(b_enc + members, mask=inside, other=0.0).to(tl.float32)[None, :]
    key = tl.where(inside[None, :], cut_key(pre, GROUP if PACKED else 1), EMPTY)
    rounds = batch
    if HAS_FLOOR:
        # Not (pre <= floor) keeps NaN, for the loss to report.
        key = tl.where(pre <= tl.load(floor + members, mask=inside, other=float("inf"))[None, :], EMPTY, key)
        count = tl.sum((key != EMPTY).to(tl.int32), 1)
        tl.store(counts + rows.to(tl.int64) * n_groups + group, count, mask=rows < batch)
        rounds = tl.minimum(tl.max(count, 0), R)
    if PACKED:
        emit_packed(key, rows, group, batch, n_groups, keys, latents, rounds, R, GROUP, not HAS_FLOOR)
    else:
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
