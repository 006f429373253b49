"""Encoders by Triton, made of the kernels for encoding and selecting: active pre-activations, and nothing dense kept.

x (batch, d_in) has b_dec already taken off and is float32, bfloat16 or float16: products are made in its dtype; W
(d_sae, d_in) is contiguous. Pre-activations are float32 and latents int32: exact for the pre-activations as computed,
ties to the lowest latent. The fused path cuts those of 2-byte products to 17 significant bits.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import torch.nn.functional as nnf
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_train.kernels.encode import encode_kernel, group_kernel
from sae_train.kernels.select import compact_kernel, refill_kernel, repair_kernel, select_kernel
from sae_train.kernels.shapes import Plan, plan, warps_for

# Pre-activations of one slab: 128 MB in float32. Smaller ones would stay in L2, but a product then fills no GPU.
SLAB_ELEMENTS = 32 * 2**20
# Neighbouring groups of a row that one program of the slab path takes.
GROUPS_A_PROGRAM = 32
# Rows of a tensor descriptor begin at multiples of 16 bytes: numbers that they are padded to.
ALIGNED = 8
# The least inner size of a product.
MIN_BLOCK_K = 16
# Rows of tiles that share the weights of a group through L2.
BAND = 8
# Programs of the kernels that repair and refill: each walks through rows and stops at those that need it.
REPAIR_PROGRAMS = 512


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def precision() -> str:
    """Return tl.dot's precision for float32, as torch.set_float32_matmul_precision sets it for all matmuls."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def topk(x: Tensor, W: Tensor, b_enc: Tensor, k: int, how: Plan | None = None) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of x·Wᵀ + b_enc: values (batch, k), latents (batch, k), in no order."""
    how = how or plan(k, W.shape[0], x.element_size(), _path(x), _capability(x.device))
    if how.path == "fused":
        x, W_grouped = _align(x), _regroup(W, x.dtype, how)
        keys, latents, _ = _candidates(x, W_grouped, b_enc, None, how)
        return _select(k, keys, latents, how, (x, W_grouped, b_enc))
    parts = [_topk_dense(pre, k, how) for pre in _slabs(x, W, b_enc)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def above(
    x: Tensor, W: Tensor, b_enc: Tensor, floor: Tensor, how: Plan | None = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entries of x·Wᵀ + b_enc above floor (d_sae,): values, latents, offsets (batch + 1) of the rows.

    Waits for the device for the number of entries (on the slab path once a slab), and without a plan for whether the
    fused path is the right one. With `capacity` it does not: values and latents then have that length, are 0 where
    there is no entry, and lack the entries from place `capacity` on, of which offsets (not cut) tell.
    """
    unplanned, how = how is None, how or plan_above(x, W.shape[0])
    if how.path == "sort":
        return _above_dense(x, W, b_enc, floor) if capacity is None else _place_dense(x, W, b_enc, floor, capacity)
    if how.path == "fused":
        source = _align(x), _regroup(W, x.dtype, how), b_enc
        parts = [(_candidates(*source, floor, how), source)]
        if unplanned and capacity is None and _is_crowded(parts[0][0][2], how):
            return above(x, W, b_enc, floor, plan_above(x, W.shape[0], crowded=True))
    else:
        parts = ((_group(pre, floor, how), (pre,)) for pre in _slabs(x, W, b_enc))
    return _entries(parts, floor, how, capacity)


def plan_above(x: Tensor, d_sae: int, crowded: bool = False) -> Plan:
    """Return how to find entries above a floor; `crowded`: where many groups are expected to have more than R."""
    return plan(None, d_sae, x.element_size(), "slab" if crowded else _path(x), _capability(x.device))


def _is_crowded(counts: Tensor, how: Plan) -> bool:
    """Whether computing the groups with more than R again, one row a tile, costs more than the encoder did. Waits."""
    return bool((counts > how.R).sum() * how.block_m > counts.numel())


def _entries(parts, floor: Tensor, how: Plan, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `above` does from the candidates of some rows after others, each with the source of its members."""
    n, values, latents, edges = None, floor.new_zeros(capacity or 0), None, []
    for (keys, candidates, counts), source in parts:
        n = counts.new_zeros(1, dtype=torch.int64) if n is None else n
        latents = candidates.new_zeros(capacity or 0) if latents is None else latents
        offsets = torch.cat([n, n + counts.sum(1).cumsum(0)])
        edges.append(offsets[:-1])
        n = offsets[-1:]
        if capacity is None:
            more = int(n) - len(values)
            values, latents = nnf.pad(values, (0, more)), nnf.pad(latents, (0, more))
        _write(keys, candidates, counts, offsets, floor, values, latents, how, source)
    return values, latents, torch.cat([*edges, n])


def _write(keys, candidates, counts, offsets, floor, values, latents, how: Plan, source: tuple[Tensor, ...]) -> None:
    """Write entries at their places: candidates, and all members above the floor of groups with more than R of them."""
    block = triton.next_power_of_2(keys.shape[1])
    compact_kernel[(len(keys),)](
        keys, candidates, counts, offsets, values, latents, keys.shape[1], len(values), how.R, block,
        num_warps=warps_for(block),
    )  # fmt: skip
    dense = len(source) == 1
    x, W, b_enc = source * 3 if dense else source
    refill_kernel[(min(len(keys), REPAIR_PROGRAMS),)](
        counts, offsets, floor, values, latents, len(values), x, x, W, b_enc, len(keys), len(floor), counts.shape[1],
        1 if dense else x.shape[1], dense, how.R, triton.next_power_of_2(counts.shape[1]), how.block_m, how.group,
        _block_k(x.shape[1], how), not dense and _cuts_keys(x), precision(), interpreted(),
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip


@cache
def _capability(device: torch.device) -> int:
    """Return a GPU's compute capability, 90 for 9.0, as that of the interpreter too."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _path(x: Tensor) -> str:
    """Triton's products are near cuBLAS's on tensor cores, which do not take float32 as it is."""
    return "slab" if x.dtype == torch.float32 and precision() == "ieee" else "fused"


def _align(x: Tensor) -> Tensor:
    """Pad rows with zeros, where needed, so that a tensor descriptor takes them."""
    return nnf.pad(x, (0, -x.shape[1] % ALIGNED))


def _regroup(W: Tensor, dtype: torch.dtype, how: Plan) -> Tensor:
    """Copy W in the dtype of the product, the members of a group side by side: (n_groups·group, d_in, aligned)."""
    d_sae, n_groups = W.shape[0], how.n_groups(W.shape[0])
    W = _align(W)
    if d_sae < n_groups * how.group:
        W = nnf.pad(W, (0, 0, 0, n_groups * how.group - d_sae))
    out = W.new_empty(n_groups, how.group, W.shape[1], dtype=dtype)
    return out.copy_(W.view(how.group, n_groups, -1).transpose(0, 1)).view(-1, W.shape[1])


def _candidates(x: Tensor, W: Tensor, b_enc: Tensor, floor: Tensor | None, how: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Run the fused encoder on aligned x and grouped W: keys, latents (batch, n_groups·R), and counts above the floor
    (batch, n_groups)."""
    (batch, d_in), d_sae = x.shape, len(b_enc)
    n_groups = how.n_groups(d_sae)
    keys, latents = (x.new_empty(batch, n_groups * how.R, dtype=torch.int32) for _ in range(2))
    counts = x.new_empty(batch, n_groups if floor is not None else 0, dtype=torch.int32)
    block_k = _block_k(d_in, how)
    encode_kernel[(triton.cdiv(batch, how.block_m) * n_groups,)](
        TensorDescriptor.from_tensor(x, [how.block_m, block_k]), TensorDescriptor.from_tensor(W, [how.group, block_k]),
        b_enc, b_enc if floor is None else floor, keys, latents, counts, batch, d_sae, n_groups, d_in,
        floor is not None, how.R, how.block_m, how.group, block_k, BAND, _cuts_keys(x), precision(), interpreted(),
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return keys, latents, counts


def _block_k(d_in: int, how: Plan) -> int:
    return max(MIN_BLOCK_K, min(how.block_k, triton.next_power_of_2(d_in)))


def _cuts_keys(x: Tensor) -> bool:
    """Whether keys are cut, to carry a latent's number: products of 2-byte numbers are not known that precisely."""
    return x.element_size() == 2


def _group(pre: Tensor, floor: Tensor | None, how: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return what _candidates does, from dense pre-activations."""
    batch, d_sae = pre.shape
    n_groups = how.n_groups(d_sae)
    keys, latents = (pre.new_empty(batch, n_groups * how.R, dtype=torch.int32) for _ in range(2))
    counts = pre.new_empty(batch, n_groups if floor is not None else 0, dtype=torch.int32)
    block = min(GROUPS_A_PROGRAM, triton.next_power_of_2(n_groups))
    group_kernel[(batch, triton.cdiv(n_groups, block))](
        pre, pre if floor is None else floor, keys, latents, counts, batch, d_sae, n_groups,
        floor is not None, how.R, how.group, block, num_warps=4,
    )  # fmt: skip
    return keys, latents, counts


def _select(k: int, keys: Tensor, latents: Tensor, how: Plan, source: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the exact top k from candidates; source is (x, W, b_enc), or (pre,) to read members again."""
    batch, n = keys.shape
    values, chosen = keys.new_empty(batch, k, dtype=torch.float32), keys.new_empty(batch, k)
    flags = keys.new_empty(batch)
    block = triton.next_power_of_2(n)
    select_kernel[(batch,)](keys, latents, values, chosen, flags, n, k, how.R, block, num_warps=warps_for(block))
    dense = len(source) == 1
    x, W, b_enc = source * 3 if dense else source
    d_sae, n_groups = x.shape[1] if dense else len(b_enc), n // how.R
    block_k = _block_k(x.shape[1], how)
    repair_kernel[(min(batch, REPAIR_PROGRAMS),)](
        flags, keys, latents, values, chosen, x, x, W, b_enc, batch, d_sae, n_groups, k,
        1 if dense else x.shape[1], dense, how.R, triton.next_power_of_2(k), triton.next_power_of_2(n_groups),
        how.block_m, how.group, block_k, not dense and _cuts_keys(x), precision(), interpreted(),
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return values, chosen


def _topk_dense(pre: Tensor, k: int, how: Plan) -> tuple[Tensor, Tensor]:
    if how.path == "sort":  # stable, so that ties go to the lowest latent
        values, order = pre.sort(dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), order[:, :k].int()
    return _select(k, *_group(pre, None, how)[:2], how, (pre,))


def _slabs(x: Tensor, W: Tensor, b_enc: Tensor):
    """Yield dense float32 pre-activations of a few rows at a time; the buffer is reused: use each before the next."""
    W = W.to(x.dtype)
    rows = max(1, SLAB_ELEMENTS // W.shape[0])
    buffer = x.new_empty(min(rows, len(x)), W.shape[0], dtype=torch.float32)
    for chunk in x.split(rows):
        out = buffer[: len(chunk)]
        if x.dtype == torch.float32:
            yield torch.addmm(b_enc, chunk, W.t(), out=out)
        elif x.is_cuda:
            yield torch.mm(chunk, W.t(), out_dtype=torch.float32, out=out).add_(b_enc)
        else:
            yield torch.addmm(b_enc, chunk.float(), W.t().float(), out=out)


def _above_dense(x: Tensor, W: Tensor, b_enc: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what above does in plain PyTorch, where a plan has no candidates. Waits for the device per slab."""
    values, latents, counts = [], [], []
    for pre in _slabs(x, W, b_enc):
        active = ~(pre <= floor)
        counts.append(active.sum(1))
        latents.append(active.nonzero()[:, 1].int())
        values.append(pre[active])
    return torch.cat(values), torch.cat(latents), nnf.pad(torch.cat(counts).cumsum(0), (1, 0))


def _place_dense(x: Tensor, W: Tensor, b_enc: Tensor, floor: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same with a fixed capacity, without a wait: the last place of what is written to is thrown away."""
    values, latents = x.new_zeros(capacity + 1, dtype=torch.float32), x.new_zeros(capacity + 1, dtype=torch.int32)
    n, edges = torch.zeros(1, dtype=torch.int64, device=x.device), []
    columns = torch.arange(len(floor), device=x.device, dtype=torch.int32)
    for pre in _slabs(x, W, b_enc):
        active = ~(pre <= floor)
        offsets = torch.cat([n, n + active.sum(1).cumsum(0)])
        place = (offsets[:-1, None] + active.cumsum(1) - 1).masked_fill_(~active, capacity).clamp_max_(capacity)
        values.scatter_(0, place.view(-1), pre.reshape(-1))
        latents.scatter_(0, place.view(-1), columns.expand_as(pre).reshape(-1))
        edges.append(offsets[:-1])
        n = offsets[-1:]
    return values[:-1], latents[:-1], torch.cat([*edges, n])
