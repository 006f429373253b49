"""Triton selection from candidates: the exact top k of each row, or all entries above a floor, compacted.

The top k of the candidates is the top k of the row if no group's last candidate is in it; a row where one is gets
flagged and repaired. Proof: kernels/README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sae_train.kernels.encode import row_tile
from sae_train.kernels.keys import EMPTY, cut_key, in_top, kth_key, last_latent, to_key, to_value


@triton.jit
def select_kernel(
    keys, latents, out_values, out_latents, flags, n_candidates, k,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the k first candidates in candidate order; flags the row if a group's last candidate is one of them."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n_candidates
    key = tl.load(keys + row * n_candidates + at, mask=inside, other=EMPTY)
    latent = tl.load(latents + row * n_candidates + at, mask=inside, other=0x7FFFFFFF)
    none = tl.full((1,), EMPTY, tl.int32)
    kth = kth_key(key, none, k)
    chosen = inside & in_top(key, latent, kth, last_latent(key, latent, none, none, kth, k))
    place = row * k + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out_values + place, to_value(key), mask=chosen)
    tl.store(out_latents + place, latent, mask=chosen)
    tl.store(flags + row, tl.max((chosen & (at % R == R - 1)).to(tl.int32), 0))


@triton.jit
def next_group(keys, latents, row, n_groups, after, kth, last, R: tl.constexpr, N_GROUPS: tl.constexpr):
    """Return the first group behind `after` whose last candidate is in the top k, or n_groups."""
    group = tl.arange(0, N_GROUPS)
    inside = (group < n_groups) & (group > after)
    place = (row * n_groups + group) * R + R - 1
    key = tl.load(keys + place, mask=inside, other=EMPTY)
    latent = tl.load(latents + place, mask=inside, other=0)
    return tl.min(tl.where(inside & in_top(key, latent, kth, last), group, n_groups), 0)


@triton.jit
def unseen(key, member, latents, row, n_groups, group, R: tl.constexpr):
    """Return the keys of a group's members with those that were candidates taken out."""
    seen = tl.load(latents + (row * n_groups + group) * R + tl.arange(0, R))
    return tl.where(tl.max((member[:, None] == seen[None, :]).to(tl.int32), 1) > 0, EMPTY, key)


@triton.jit
def merge(values, latents, row, k, key, member, K_PAD: tl.constexpr):
    """Replace a row's k entries by the k first of them and the given ones; return the new k-th key and last latent."""
    at = tl.arange(0, K_PAD)
    old = to_key(tl.load(values + row * k + at, mask=at < k, other=0.0))
    old = tl.where(at < k, old, EMPTY)
    old_latent = tl.load(latents + row * k + at, mask=at < k, other=0x7FFFFFFF)
    kth = kth_key(old, key, k)
    last = last_latent(old, old_latent, key, member, kth, k)
    keep, add = (at < k) & in_top(old, old_latent, kth, last), (key != EMPTY) & in_top(key, member, kth, last)
    place = row * k + tl.cumsum(keep.to(tl.int32), 0) - 1
    new_place = row * k + tl.sum(keep.to(tl.int32), 0) + tl.cumsum(add.to(tl.int32), 0) - 1
    tl.debug_barrier()  # all threads have read the old row before any writes the new one
    tl.store(values + place, to_value(old), mask=keep)
    tl.store(latents + place, old_latent, mask=keep)
    tl.store(values + new_place, to_value(key), mask=add)
    tl.store(latents + new_place, member, mask=add)
    tl.debug_barrier()
    return kth, last


@triton.jit
def repair_kernel(
    flags, keys, latents, out_values, out_latents, pre, x, W, b_enc, batch, d_sae, n_groups, k,
    d_in: tl.constexpr, DENSE: tl.constexpr, R: tl.constexpr, K_PAD: tl.constexpr, N_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Merge all members of every group whose last candidate is in the top k, for the flagged rows, row by row.

    The k-th entry only rises while groups are merged, so one walk through the groups in order misses none. Members
    are read from `pre` (DENSE) or computed again by the encoder's own tile, all of whose rows are then this row.
    """
    none = tl.full((1,), EMPTY, tl.int32)
    number = tl.program_id(0)
    while number < batch:
        if tl.load(flags + number) > 0:
            row = number.to(tl.int64)
            kth, last = merge(out_values, out_latents, row, k, none, none, K_PAD)
            group = next_group(keys, latents, row, n_groups, -1, kth, last, R, N_GROUPS)
            while group < n_groups:
                member = group + tl.arange(0, GROUP) * n_groups
                if DENSE:
                    value = tl.load(pre + row * d_sae + member, mask=member < d_sae, other=0.0).to(tl.float32)
                else:
                    values = row_tile(x, W, row, group, d_in, BLOCK_M, GROUP, BLOCK_K, PRECISION, UPCAST)
                    value = tl.sum(tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, values, 0.0), 0)
                    value += tl.load(b_enc + member, mask=member < d_sae, other=0.0).to(tl.float32)
                key = tl.where(member < d_sae, cut_key(value, GROUP if PACKED else 1), EMPTY)
                key = unseen(key, member, latents, row, n_groups, group, R)
                kth, last = merge(out_values, out_latents, row, k, key, member, K_PAD)
                group = next_group(keys, latents, row, n_groups, group, kth, last, R, N_GROUPS)
        number += tl.num_programs(0)


@triton.jit
def compact_kernel(
    keys, latents, counts, offsets, out_values, out_latents, n_candidates, room, R: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: the candidates of every group that counts no more than R, at their places from offsets[row] on.

    Groups with more leave their places free, for refill_kernel. Nothing is written from place `room` on.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n_candidates
    count = tl.load(counts + row * (n_candidates // R) + at // R, mask=inside, other=0)
    before = tl.cumsum(tl.where(at % R == 0, count, 0), 0) - count
    place = tl.load(offsets + row) + before + at % R
    there = inside & (at % R < count) & (count <= R) & (place < room)
    key = tl.load(keys + row * n_candidates + at, mask=there, other=EMPTY)
    latent = tl.load(latents + row * n_candidates + at, mask=there, other=0)
    tl.store(out_values + place, to_value(key), mask=there)
    tl.store(out_latents + place, latent, mask=there)


@triton.jit
def first_crowded(counts, row, n_groups, after, R: tl.constexpr, N_GROUPS: tl.constexpr):
    """Return the first group behind `after` that counts more than R, or n_groups; its count; what is before it."""
    group = tl.arange(0, N_GROUPS)
    count = tl.load(counts + row * n_groups + group, mask=group < n_groups, other=0)
    first = tl.min(tl.where((count > R) & (group > after), group, n_groups), 0)
    return first, tl.sum(tl.where(group == first, count, 0), 0), tl.sum(tl.where(group < first, count, 0), 0)


@triton.jit
def above_key(value, floor):
    """A key by which what is above its floor comes before all that is not, the further above the earlier."""
    key = to_key(value - floor)
    return tl.where((value <= floor) & (key > 0), 0, key)


@triton.jit
def refill_kernel(
    counts, offsets, floor, out_values, out_latents, room, pre, x, W, b_enc, batch, d_sae, n_groups,
    d_in: tl.constexpr, DENSE: tl.constexpr, R: tl.constexpr, N_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the entries of every group that counts more than R, row by row, in order of latents.

    Members are read from `pre` (DENSE) or computed again as in repair_kernel. As many are taken as were counted, those
    furthest above their floors: were a member's last bit another, there would still be no gap and nothing too much.
    """
    none = tl.full((1,), EMPTY, tl.int32)
    number = tl.program_id(0)
    while number < batch:
        row = number.to(tl.int64)
        group, count, before = first_crowded(counts, row, n_groups, -1, R, N_GROUPS)
        while group < n_groups:
            member = group + tl.arange(0, GROUP) * n_groups
            inside = member < d_sae
            if DENSE:
                value = tl.load(pre + row * d_sae + member, mask=inside, other=0.0).to(tl.float32)
            else:
                values = row_tile(x, W, row, group, d_in, BLOCK_M, GROUP, BLOCK_K, PRECISION, UPCAST)
                value = tl.sum(tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, values, 0.0), 0)
                value += tl.load(b_enc + member, mask=inside, other=0.0).to(tl.float32)
            key = above_key(value, tl.load(floor + member, mask=inside, other=0.0))
            key = tl.where(inside, key, EMPTY)
            kth = kth_key(key, none, count)
            chosen = inside & in_top(key, member, kth, last_latent(key, member, none, none, kth, count))
            place = tl.load(offsets + row) + before + tl.cumsum(chosen.to(tl.int32), 0) - 1
            stored = chosen & (place < room)
            tl.store(out_values + place, to_value(cut_key(value, GROUP if PACKED else 1)), mask=stored)
            tl.store(out_latents + place, member, mask=stored)
            group, count, before = first_crowded(counts, row, n_groups, group, R, N_GROUPS)
        number += tl.num_programs(0)
