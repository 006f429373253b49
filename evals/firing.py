"""How every latent of an SAE fires over a text: how often, how strongly, and in which contexts.

The text comes in batches of rows and may be of any length: what is kept of it are its tokens and, for each latent, a
fixed number of contexts and of bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.latents import Latents

N_TOP, N_ANY = 20, 10  # contexts of a latent: those where it fires the most, and any others
WINDOW = 128  # tokens of a context at most, around the one that fires the most
N_BINS = 64
N_INTERVALS = 4  # that the other contexts are told apart by
_CHUNK_ELEMENTS = 2**24  # of a block of contexts: 64 MB


@dataclass(frozen=True)
class Context:
    """Tokens with a latent's activations on them; `place` is where it fires the most.

    `interval` is (least, most, share of all activations in between), None for one of the strongest contexts.
    """

    row: int
    tokens: list[int]
    values: list[float]
    place: int
    interval: tuple[float, float, float] | None


class Firing:
    """What is kept of a text for one SAE; `add` takes in rows of it."""

    def __init__(self, d_sae: int, context: int, device: torch.device | str = "cpu", seed: int = 0):
        self.d_sae, self.context = d_sae, context
        self.n_tokens = 0
        self.counts = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.strongest = _Kept(d_sae, N_TOP, context, device)
        self.others = _Kept(d_sae, N_ANY, context, device)
        self.histogram = _Histogram(d_sae, device)
        self._rows: list[Tensor] = []
        self._n_rows = 0
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def n_rows(self) -> int:
        """Rows of text so far."""
        return self._n_rows

    @torch.no_grad()
    def add(self, tokens: Int[Tensor, "rows context"], seen: Bool[Tensor, "rows context"], latents: Latents) -> None:
        """Take in rows of text with the latents of the tokens that are `seen`, in reading order."""
        active = latents.values > 0
        row, place = (where[latents.row_of_entry[active]] for where in seen.nonzero().unbind(1))
        fired = _Fired(row, place, latents.columns[active], latents.values[active], len(tokens), self.d_sae)
        self.n_tokens += latents.n_rows
        self.counts += torch.bincount(fired.latent, minlength=self.d_sae)
        peaks = fired.peaks()
        self.histogram.add(fired, peaks.amax(0))
        self.strongest.add(torch.where(peaks > 0, peaks, -1), peaks, fired, self._n_rows)
        drawn = torch.rand(peaks.shape, generator=self._generator, device=peaks.device) + 1e-6
        self.others.add(torch.where(peaks > 0, drawn, -1), peaks, fired, self._n_rows)
        self._rows.append(tokens.int().cpu())
        self._n_rows += len(tokens)

    def frequency(self) -> Float[Tensor, " d_sae"]:
        """On which share of the tokens each latent fires."""
        return self.counts / max(self.n_tokens, 1)

    def bars(self, latent: int) -> tuple[list[int], list[float]]:
        """A latent's activations counted in equal intervals from 0 on: how many in each, and their middles."""
        heights, width = self.histogram.of(latent)
        return heights, [(i + 0.5) * width for i in range(len(heights))]

    def contexts(self, latent: int) -> Iterator[Context]:
        """The contexts that are kept of a latent: the strongest, then others by interval, the strongest first."""
        strongest = list(self.strongest.of(latent))
        yield from (self._context(kept, None) for kept in strongest)
        heights, width = self.histogram.of(latent)
        known = {kept.row for kept in strongest}
        for kept in self.others.of(latent, by_peak=True):
            if kept.row not in known:
                yield self._context(kept, _interval(kept.peak, heights, width))

    def _context(self, kept: _One, interval: tuple[float, float, float] | None) -> Context:
        tokens = self._tokens_of(kept.row)[kept.start : kept.start + len(kept.values)].tolist()
        return Context(kept.row, tokens, kept.values, kept.values.index(max(kept.values)), interval)

    def _tokens_of(self, row: int) -> Tensor:
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0][row]


def memory_of(d_sae: int, context: int) -> int:
    """Bytes that one SAE's contexts and bins take, whatever the length of the text."""
    return d_sae * ((N_TOP + N_ANY) * (4 * min(context, WINDOW) + 24) + 8 * N_BINS)


def _interval(peak: float, heights: list[int], width: float) -> tuple[float, float, float]:
    """In which of N_INTERVALS about equal ones, made of whole bins, an activation lies, with its share of all."""
    n = min(N_INTERVALS, len(heights))
    edges = [round(i * len(heights) / n) for i in range(n + 1)]
    i = next((i for i in range(n) if peak <= edges[i + 1] * width), n - 1)
    return edges[i] * width, edges[i + 1] * width, sum(heights[edges[i] : edges[i + 1]]) / sum(heights)


@dataclass(frozen=True)
class _Fired:
    """Active latents of some rows: entry e is latent[e] with value[e] at row[e] and place[e]."""

    row: Tensor
    place: Tensor
    latent: Tensor
    value: Tensor
    n_rows: int
    d_sae: int

    @property
    def cell(self) -> Tensor:
        return self.row * self.d_sae + self.latent

    def peaks(self) -> Float[Tensor, "rows d_sae"]:
        """The largest value of each latent in each row."""
        flat = torch.zeros(self.n_rows * self.d_sae, device=self.value.device)
        return flat.scatter_reduce_(0, self.cell, self.value, "amax").view(self.n_rows, self.d_sae)

    def along(self, row: Tensor, latent: Tensor, context: int) -> Float[Tensor, "n context"]:
        """The values of latents along rows, for pairs of them."""
        number = torch.full((self.n_rows * self.d_sae,), -1, device=self.row.device)
        number[row * self.d_sae + latent] = torch.arange(len(row), device=self.row.device)
        of_entry = number[self.cell]
        wanted = of_entry >= 0
        out = torch.zeros(len(row), context, device=self.value.device)
        out[of_entry[wanted], self.place[wanted]] = self.value[wanted]
        return out


@dataclass(frozen=True)
class _One:
    """A context that is kept."""

    row: int
    start: int
    peak: float
    values: list[float]


class _Kept:
    """The contexts with the largest keys, n for each latent; empty places have the key 0."""

    def __init__(self, d_sae: int, n: int, context: int, device: torch.device | str):
        self.context, self.window = context, min(context, WINDOW)
        self.keys = torch.zeros(d_sae, n, device=device)
        self.peaks = torch.zeros(d_sae, n, device=device)
        self.rows = torch.zeros(d_sae, n, dtype=torch.long, device=device)
        self.starts = torch.zeros(d_sae, n, dtype=torch.long, device=device)
        self.values = torch.zeros(d_sae, n, self.window, device=device)

    def add(self, keys: Float[Tensor, "rows d_sae"], peaks: Tensor, fired: _Fired, first_row: int) -> None:
        """Let new contexts take the places of those with smaller keys; a key of -1 is no context."""
        n = self.keys.shape[1]
        both = torch.cat([self.keys, keys.T], 1)
        chosen = torch.zeros_like(both, dtype=torch.bool).scatter_(1, both.topk(n).indices, True)
        # Both are in the order of latents, and as many of one latent go as come.
        latent, slot = (~chosen[:, :n]).nonzero().unbind(1)
        row = chosen[:, n:].nonzero()[:, 1]
        self.keys[latent, slot], self.peaks[latent, slot] = keys[row, latent], peaks[row, latent]
        self.rows[latent, slot] = first_row + row
        for part in torch.arange(len(row), device=row.device).split(max(1, _CHUNK_ELEMENTS // self.context)):
            self._keep(fired, row[part], latent[part], slot[part])

    def _keep(self, fired: _Fired, row: Tensor, latent: Tensor, slot: Tensor) -> None:
        """Keep a window around where each latent fires the most."""
        along = fired.along(row, latent, self.context)
        start = (along.argmax(1) - self.window // 2).clamp(0, self.context - self.window)
        self.starts[latent, slot] = start
        window = start[:, None] + torch.arange(self.window, device=start.device)
        self.values[latent, slot] = along.gather(1, window)

    def of(self, latent: int, by_peak: bool = False) -> Iterator[_One]:
        """The contexts of a latent, by falling keys or peaks."""
        kept = (self.keys, self.peaks, self.rows, self.starts, self.values)
        keys, peaks, rows, starts, values = (each[latent].tolist() for each in kept)
        by = peaks if by_peak else keys
        for slot in sorted(range(len(keys)), key=by.__getitem__, reverse=True):
            if keys[slot] > 0:
                yield _One(rows[slot], starts[slot], peaks[slot], values[slot])


class _Histogram:
    """Counts of activations in N_BINS equal bins from 0 to a power of two, which is doubled where one is above it."""

    def __init__(self, d_sae: int, device: torch.device | str):
        self.bins = torch.zeros(d_sae, N_BINS, dtype=torch.long, device=device)
        self.upper = torch.zeros(d_sae, device=device)

    def add(self, fired: _Fired, most: Float[Tensor, " d_sae"]) -> None:
        """Count activations, of which `most` are the largest of each latent."""
        needed = torch.where(most > 0, torch.exp2(most.log2().ceil()), 0)
        self.upper = torch.where(self.upper > 0, self.upper, needed)
        while len(narrow := (needed > self.upper).nonzero()[:, 0]):
            merged = self.bins[narrow].view(len(narrow), -1, 2).sum(2)
            self.bins[narrow] = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.upper[narrow] *= 2
        # A bin holds its upper end, so that two of them are one of twice the width.
        bin_ = (fired.value / self.upper[fired.latent] * N_BINS).ceil().long().clamp(1, N_BINS) - 1
        self.bins += torch.bincount(fired.latent * N_BINS + bin_, minlength=self.bins.numel()).view_as(self.bins)

    def of(self, latent: int) -> tuple[list[int], float]:
        """The bins of a latent up to its largest activation, and their width."""
        bins = self.bins[latent].tolist()
        used = max((i + 1 for i, count in enumerate(bins) if count), default=0)
        return bins[:used], float(self.upper[latent]) / N_BINS
