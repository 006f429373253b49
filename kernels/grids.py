"""Triton's dense products in place of sparse sums, a few rows at a time: where many latents are active.

The twins of what patterns.py does for dense patterns. They never wait for the device: entries find their places in a
dense block, and are read from one, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_train.kernels import patterns
from sae_train.kernels.patterns import Pattern

# Entries of a row that a program moves at a time.
BLOCK = 256


@triton.jit
def move_kernel(values, latents, offsets, grid, first, d_sae, TO_GRID: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its values to their places in the grid, or what is at these places to its values."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + first + row), tl.load(offsets + first + row + 1)
    for at in range(start, end, BLOCK):
        entry = at + tl.arange(0, BLOCK)
        place = grid + row * d_sae + tl.load(latents + entry, mask=entry < end, other=0)
        if TO_GRID:
            tl.store(place, tl.load(values + entry, mask=entry < end, other=0.0), mask=entry < end)
        else:
            tl.store(values + entry, tl.load(place, mask=entry < end, other=0.0), mask=entry < end)


def sum_by_token(pattern: Pattern, weights: Tensor, table: Tensor) -> Tensor:
    """Return Σ weight · table[latent] over each token's entries: (batch, d)."""
    return torch.cat([grid @ table for _, grid in _grids(pattern, weights)])


def sum_by_latent(pattern: Pattern, weights: Tensor, table: Tensor) -> Tensor:
    """Return Σ weight · table[token] over each latent's entries: (d_sae, d)."""
    out = table.new_zeros(pattern.d_sae, table.shape[1])
    for rows, grid in _grids(pattern, weights):
        out.addmm_(grid.t(), table[rows])
    return out


def dots(pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    """Return a[token] · b[latent] for every entry, 0 where there is none."""
    out = a.new_zeros(len(pattern.latents))
    for rows in _rows(pattern):
        _move(pattern, out, (a[rows] @ b.t()).contiguous(), rows, to_grid=False)
    return out


def _grids(pattern: Pattern, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows and their values as a dense block, 0 where there is no entry."""
    for rows in _rows(pattern):
        grid = values.new_zeros(rows.stop - rows.start, pattern.d_sae)
        _move(pattern, values, grid, rows, to_grid=True)
        yield rows, grid


def _rows(pattern: Pattern) -> Iterator[slice]:
    batch, n = pattern.offsets.numel() - 1, max(1, patterns.DENSE_ELEMENTS // pattern.d_sae)
    return (slice(start, min(start + n, batch)) for start in range(0, batch, n))


def _move(pattern: Pattern, values: Tensor, grid: Tensor, rows: slice, to_grid: bool) -> None:
    move_kernel[(len(grid),)](
        values, pattern.latents, pattern.offsets, grid, rows.start, pattern.d_sae, to_grid, BLOCK, num_warps=4
    )
