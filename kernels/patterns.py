"""Which latents are active on which tokens, and sums over those entries, in plain PyTorch.

Entries are flat, in CSR form. The sums are of weighted table rows, by token or by latent; beside them stand the
products at the entries, the k largest of dense rows, and the k-th largest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Latents per group of the two-stage top-k: 16 measured best for d_sae 16,384 and k 50 (8: +6 %, 32: +40 %). Narrow rows
# take fewer, so that there are some groups for each entry: with less than 4 it no longer pays.
GROUP, GROUPS_PER_ENTRY = 16, 4
# Of one dense block of entries: 32 MB in float32.
DENSE_ELEMENTS = 8 * 2**20
# A latent's entries beyond this are summed in parts on a GPU, so that one that fires on half of all tokens is no tail.
SEGMENT = 256
# On one thread numpy's partition finds a k-th value 3 to 6 times as fast as torch.topk does (AVX-512).
PARTITION_THREADS = 4


@dataclass(frozen=True)
class Segments:
    """Sums by latent in parts: entries of latents with few (up to `light_ends`, none of a heavy one), and the parts.

    Part p holds the entries from starts[p] to ends[p] of latent owners[p], whose parts are edges[latent] to
    edges[latent + 1].
    """

    light_ends: Int[Tensor, " d_sae"]
    starts: Int[Tensor, " parts"]
    ends: Int[Tensor, " parts"]
    owners: Int[Tensor, " parts"]
    edges: Int[Tensor, " d_sae_plus_1"]


@dataclass(frozen=True)
class Pattern:
    """Which latents are active on which tokens: rows in CSR form (row r owns entries offsets[r] to offsets[r + 1]).

    What lies behind the last row is room that was not needed: its latent is 0, and its values and gradients count for
    nothing.
    """

    latents: Int[Tensor, " n"]
    offsets: Int[Tensor, " batch_plus_1"]
    d_sae: int
    # Whether every token is known to have the same number of entries.
    even: bool = False
    # Whether sums over the entries are made by dense products, which pays where many latents are active.
    dense: bool = False
    # How many entries were found, on the device, where the room for them was fixed beforehand.
    n_found: Int[Tensor, ""] | None = None

    @property
    def lost(self) -> Bool[Tensor, ""] | None:
        """Whether some entries found no room, on the device; None where there is always room."""
        return None if self.n_found is None else self.n_found > self.latents.numel()

    @cached_property
    def absent(self) -> Bool[Tensor, " n"]:
        """Where there is room and no entry."""
        return torch.arange(self.latents.numel(), device=self.offsets.device) >= self.offsets[-1]

    @cached_property
    def tokens(self) -> Int[Tensor, " n"]:
        counts = self.offsets.diff()
        if self.n_found is not None:  # what is absent counts for the last token
            at = torch.arange(self.latents.numel(), device=counts.device)
            return torch.searchsorted(self.offsets[1:], at, right=True).clamp_max_(counts.numel() - 1)
        index = torch.arange(counts.numel(), device=counts.device)
        if self.even:
            return index[:, None].expand(-1, self.latents.numel() // max(1, counts.numel())).flatten()
        return index.repeat_interleave(counts, output_size=self.latents.numel())

    @cached_property
    def segments(self) -> Segments | None:
        """How latents with more than SEGMENT entries are summed in parts; None where no latent can have so many.

        The number of parts is bounded on the host by the number of entries, so that nothing waits for the device.
        """
        limit, offsets = 2 * self.latents.numel() // SEGMENT, self.by_latent[2]
        if not limit:
            return None
        counts = offsets.diff()
        heavy = counts > SEGMENT
        n_parts = torch.where(heavy, (counts + SEGMENT - 1) // SEGMENT, 0)
        edges = nnf.pad(n_parts.cumsum(0), (1, 0))
        part = torch.arange(limit, device=edges.device)
        owner = torch.searchsorted(edges[1:], part, right=True).clamp_max_(self.d_sae - 1)
        starts = offsets[owner] + (part - edges[owner]) * SEGMENT
        # Parts beyond the last one belong to the last latent, and are empty.
        ends = torch.minimum(starts + SEGMENT, offsets[owner + 1]).where(part < edges[-1], starts)
        light = torch.where(heavy, offsets[:-1], offsets[1:])
        return Segments(light, starts, ends, owner, edges)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same entries sorted by latent: (entry order, token of each, offsets per latent)."""
        latents = self.latents.to(torch.int16 if self.d_sae < 2**15 else torch.int32)
        if self.n_found is not None:  # what is absent comes behind the last latent
            latents = latents.masked_fill(self.absent, self.d_sae)
        latents, order = latents.sort(stable=True)
        edges = torch.arange(self.d_sae + 1, device=latents.device, dtype=latents.dtype)
        return order, self.tokens.index_select(0, order), torch.searchsorted(latents, edges)


def sum_by_token(pattern: Pattern, weights: Tensor, table: Tensor) -> Tensor:
    """Return Σ weight · table[latent] over each token's entries: (batch, d)."""
    if pattern.dense:
        return torch.cat([grid @ table for _, grid in _grids(pattern, weights)])
    return _bag(pattern.latents, table, pattern.offsets, weights)


def sum_by_latent(pattern: Pattern, weights: Tensor, table: Tensor) -> Tensor:
    """Return Σ weight · table[token] over each latent's entries: (d_sae, d)."""
    if pattern.dense:
        out = table.new_zeros(pattern.d_sae, table.shape[1])
        for rows, grid in _grids(pattern, weights):
            out.addmm_(grid.t(), table[rows])
        return out
    order, tokens, offsets = pattern.by_latent
    return _bag(tokens, table, offsets, weights.index_select(0, order))


def dots(pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    """Return a[token] · b[latent] for every entry."""
    if pattern.dense:
        parts = [(a[rows] @ b.t()).view(-1)[at] for rows, _, at in _slabs(pattern)]
        return torch.cat(parts)
    shape = (a.shape[0], b.shape[0])
    zeros = torch.zeros_like(pattern.latents, dtype=a.dtype)
    with warnings.catch_warnings():  # CSR tensors announce that they are in beta, once a process
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        grid = torch.sparse_csr_tensor(pattern.offsets, pattern.latents, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(grid, a.contiguous(), b.t(), beta=0.0).values()


def sum_at(places: Int[Tensor, " n"], values: Float[Tensor, " n"], size: int) -> Float[Tensor, " size"]:
    """Return a vector with the values added up at their places, the same bits each time, on a GPU too."""
    zeros = values.new_zeros(size)
    if values.is_cuda:  # there index_add adds in any order, while index_put sorts first
        return zeros.index_put((places.long(),), values, accumulate=True)
    return zeros.index_add(0, places, values)


def _bag(rows: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sum, for each bag, of weights · table[rows]; deterministic: one bag is summed by one thread, in order."""
    return nnf.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _slabs(pattern: Pattern) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield some rows, their entries, and where these lie in the dense block of those rows, flat."""
    batch = pattern.offsets.numel() - 1
    n = max(1, DENSE_ELEMENTS // pattern.d_sae)
    starts = range(0, batch, n)
    ends = pattern.offsets[[min(start + n, batch) for start in starts]].tolist()
    first = 0
    for start, last in zip(starts, ends, strict=True):
        entries = slice(first, last)
        at = (pattern.tokens[entries] - start) * pattern.d_sae + pattern.latents[entries]
        yield slice(start, min(start + n, batch)), entries, at
        first = last


def _grids(pattern: Pattern, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows and their values as a dense block, 0 where there is no entry."""
    for rows, entries, at in _slabs(pattern):
        grid = values.new_zeros(rows.stop - rows.start, pattern.d_sae)
        grid.view(-1)[at] = values[entries]
        yield rows, grid


def top_k(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Tensor, Tensor]:
    """Exact k largest of each row, unsorted. Among exact ties for the last place, which is taken is unspecified.

    Two stages: the k largest lie in the k groups with the largest maxima. Groups are strided, {j, j + F/G, …}, so
    that the maximum runs down columns and vectorises.
    """
    n, d_sae = pre.shape
    size = group_size(d_sae, k)
    if size == 1:
        return _largest(pre, k)
    groups = d_sae // size
    group = _largest(pre.view(n, size, groups).amax(1), k)[1]
    members = torch.arange(size, device=pre.device).view(1, size, 1) * groups
    candidates = (group[:, None, :] + members).view(n, size * k)
    values, picked = _largest(pre.gather(1, candidates), k)
    return values, candidates.gather(1, picked)


def _largest(rows: Float[Tensor, "n m"], k: int) -> tuple[Tensor, Tensor]:
    """Return values and columns of the k largest of each row of a contiguous matrix, unsorted."""
    if _partitions(rows):
        at = (rows >= kth_largest(rows, k)[:, None]).view(-1).nonzero().view(-1)
        if len(at) == len(rows) * k:  # no ties for the last place, no NaN
            starts = torch.arange(len(rows))[:, None] * rows.shape[1]
            return rows.view(-1).take(at).view(-1, k), at.view(-1, k) - starts
    return rows.topk(k, dim=-1, sorted=False)


def group_size(d_sae: int, k: int) -> int:
    """Return how many latents a group has: GROUP, half or a quarter of it, so that there are enough groups; or 1."""
    for size in (GROUP, GROUP // 2, GROUP // 4):
        if d_sae % size == 0 and d_sae // size >= GROUPS_PER_ENTRY * k:
            return size
    return 1


def kth_largest(rows: Float[Tensor, "n m"], k: int) -> Float[Tensor, " n"]:
    """Return the k-th largest value of each row, of rows without NaN."""
    if _partitions(rows):
        return torch.from_numpy(np.partition(rows.numpy(), -k, axis=1)[:, -k].copy())
    return rows.topk(k, dim=1, sorted=False).values.amin(1)


def _partitions(rows: Tensor) -> bool:
    few_threads = rows.device.type == "cpu" and torch.get_num_threads() <= PARTITION_THREADS
    return few_threads and rows.dtype in (torch.float32, torch.float64)


def select_entries(pattern: Pattern, keep: Bool[Tensor, " n"]) -> Pattern:
    """Return the pattern of those of its entries that are to be kept."""
    counts = torch.bincount(pattern.tokens[keep], minlength=pattern.offsets.numel() - 1)
    return Pattern(pattern.latents[keep], nnf.pad(counts.cumsum(0), (1, 0)), pattern.d_sae)


def row_pattern(indices: Int[Tensor, "batch k"], d_sae: int) -> Pattern:
    """Return the Pattern of k latents on every token."""
    batch, k = indices.shape
    offsets = torch.arange(0, batch * k + 1, k, device=indices.device)
    return Pattern(indices.reshape(-1), offsets, d_sae, even=True)
