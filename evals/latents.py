"""SAE latents of the eval's words as a sparse table (row pointers, columns, values). Words are encoded once; everything
later in the eval reads the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sae_train.protocols import SparseSAE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.protocols import SAE

_CHUNK_ELEMENTS = 2**23  # of a dense (rows, d_sae) block: 32 MB in float32


@dataclass(frozen=True)
class Latents:
    """Compressed rows: entry e of row r, for row_ptr[r] <= e < row_ptr[r + 1], is values[e] at latent columns[e]."""

    row_ptr: Tensor
    columns: Tensor
    values: Tensor
    d_sae: int

    @property
    def n_rows(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def l0(self) -> float:
        return len(self.values) / max(self.n_rows, 1)

    @property
    def counts(self) -> Int[Tensor, " n_rows"]:
        return self.row_ptr.diff()

    @property
    def row_of_entry(self) -> Int[Tensor, " n_entries"]:
        rows = torch.arange(self.n_rows, device=self.values.device)
        return rows.repeat_interleave(self.counts)

    def fires(self) -> Bool[Tensor, " d_sae"]:
        """Latents active on at least one row."""
        out = torch.zeros(self.d_sae, dtype=torch.bool, device=self.values.device)
        out[self.columns] = True
        return out

    def frequency(self) -> Float[Tensor, " d_sae"]:
        """On which share of the rows each latent is active."""
        counts = torch.bincount(self.columns[self.values > 0], minlength=self.d_sae)
        return counts / max(self.n_rows, 1)

    def restrict(self, keep: Bool[Tensor, " d_sae"]) -> Latents:
        """Renumber to the kept columns; entries elsewhere must not exist."""
        new = keep.cumsum(0) - 1
        return Latents(self.row_ptr, new[self.columns], self.values, int(keep.sum()))

    def head(self, n: int) -> Latents:
        """The first n rows."""
        end = int(self.row_ptr[n])
        return Latents(self.row_ptr[: n + 1], self.columns[:end], self.values[:end], self.d_sae)

    def pick(self, rows: Int[Tensor, " n"]) -> Latents:
        """Some rows, in the order in which they are asked for."""
        counts = self.counts[rows]
        ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        begin = (self.row_ptr[rows] - ptr[:-1]).repeat_interleave(counts)
        entries = begin + torch.arange(int(ptr[-1]), device=begin.device)
        return Latents(ptr, self.columns[entries], self.values[entries], self.d_sae)

    def take(self, columns: Int[Tensor, " n_columns"]) -> Float[Tensor, "n_rows n_columns"]:
        """Dense block of some columns (repeats allowed)."""
        unique, back = columns.unique(return_inverse=True)
        slot = torch.full((self.d_sae,), -1, dtype=torch.long, device=self.values.device)
        slot[unique] = torch.arange(len(unique), device=slot.device)
        hit = slot[self.columns] >= 0
        block = torch.zeros(self.n_rows, len(unique), device=self.values.device)
        block[self.row_of_entry[hit], slot[self.columns[hit]]] = self.values[hit]
        return block[:, back]

    def dense(self) -> Float[Tensor, "n_rows d_sae"]:
        out = torch.zeros(self.n_rows, self.d_sae, device=self.values.device)
        out[self.row_of_entry, self.columns] = self.values
        return out

    def padded(self) -> tuple[Float[Tensor, "n_rows m"], Int[Tensor, "n_rows m"]]:
        """Rectangular (values, columns), filled up with value 0 at column 0; m is at least 1."""
        width = max(int(self.counts.max()) if self.n_rows else 0, 1)
        rows = self.row_of_entry
        place = torch.arange(len(rows), device=rows.device) - self.row_ptr[rows]
        values = torch.zeros(self.n_rows, width, device=rows.device)
        columns = torch.zeros(self.n_rows, width, dtype=torch.long, device=rows.device)
        values[rows, place], columns[rows, place] = self.values, self.columns
        return values, columns


def from_dense(latents: Float[Tensor, "n_rows d_sae"]) -> Latents:
    # One long row searches faster than many short ones.
    flat = latents.reshape(-1).nonzero().squeeze(1)
    rows, columns = flat // latents.shape[1], flat % latents.shape[1]
    return _from_entries(rows, columns, latents.reshape(-1)[flat].float(), latents.shape)


def encode(sae: SAE, x: Float[Tensor, "n_rows d_in"]) -> Latents:
    """Encode once, in blocks, keeping what fires; an SAE with `encode_entries` never builds the dense block."""
    d_sae = sae.W_dec.shape[0]
    rows_per_block = max(16, _CHUNK_ELEMENTS // d_sae)
    parts = [_encode_block(sae, block, d_sae) for block in x.split(rows_per_block)]
    counts = torch.cat([p.counts for p in parts])
    row_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    columns = torch.cat([p.columns for p in parts])
    return Latents(row_ptr, columns, torch.cat([p.values for p in parts]), d_sae)


def _encode_block(sae: SAE, x: Tensor, d_sae: int) -> Latents:
    if not isinstance(sae, SparseSAE):
        return from_dense(sae.encode(x))
    values, columns, counts = sae.encode_entries(x)
    return Latents(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), columns.long(), values.float(), d_sae)


def _from_entries(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Latents:
    counts = torch.bincount(rows, minlength=shape[0])
    return Latents(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), columns, values, shape[1])
