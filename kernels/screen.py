"""Exact selection for the price of a bfloat16 product, on processors that multiply bfloat16 many times as fast.

Activations are centred, weights latent-major, both float32; selected are the k largest pre-activations of each row, or
those above a floor. A bfloat16 pre-activation comes with a proven bound on its error: it says which latents can be
among the selected, and only those are computed in float32. Proof: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from sae_train.kernels.patterns import GROUP, Pattern, dots, group_size, kth_largest

# One slab of bfloat16 pre-activations: 16 MB.
SLAB_ELEMENTS = 8 * 2**20
# Rows of the weights that are rounded at a time, so that what is left over is measured in cache.
BLOCK_ROWS = 256
# Of one rounding to bfloat16 (8 bits), and two of them: the sum and the bias may be rounded one after the other.
ROUNDING = 2**-8
# The minus signs of four bfloat16 numbers in one 64-bit word.
SIGNS = -0x7FFF_7FFF_7FFF_8000
# Smaller problems are not worth it.
MIN_D_IN, MIN_D_SAE = 128, 2048


def pays(x: Tensor, d_sae: int, k: int = 1) -> bool:
    """Whether selection is faster so: a float32 CPU problem of some size, on a processor that multiplies bfloat16.

    On others bfloat16 products are slower than float32 ones (8 times on an AVX2 machine).
    """
    fits = group_size(d_sae, k) == GROUP
    large = x.shape[1] >= MIN_D_IN and d_sae >= MIN_D_SAE
    return x.device.type == "cpu" and x.dtype == torch.float32 and fits and large and _multiplies_bfloat16()


def _multiplies_bfloat16() -> bool:
    """AMX has products some eight times as fast as float32, AVX-512 with BF16 two to three times."""
    used = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return used and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Screen:
    """bfloat16 u with |pre − u| ≤ slack[row] + 2·ROUNDING·|u| for pre = x·Wᵀ + b in float32 arithmetic."""

    x: Tensor
    W: Tensor
    b: Tensor
    slack: Tensor

    @classmethod
    def of(cls, x: Tensor, W: Tensor, b: Tensor) -> Screen:
        """Round the operands and bound what that changes: |x·w − x̂·ŵ| ≤ ‖x − x̂‖·‖w‖ + ‖x̂‖·‖w − ŵ‖."""
        x16, b16 = x.bfloat16(), b.bfloat16()
        W16 = W.new_empty(W.shape, dtype=torch.bfloat16)
        norms = []
        for rounded, rows in zip(W16.split(BLOCK_ROWS), W.split(BLOCK_ROWS), strict=True):
            rounded.copy_(rows)
            norms.append(torch.stack([rows.norm(dim=1).amax(), (rows - rounded).norm(dim=1).amax()]))
        W_norm, W_rest = torch.stack(norms).amax(0)
        x_norm, x_rest = x.norm(dim=1), (x - x16).norm(dim=1)
        b_rest = (b - b16).abs().amax()
        # Of float32 sums of d_in products and a bias, here and where candidates are computed.
        sums = (x.shape[1] + 2) * 2**-23 * ((x_norm + x_rest) * (W_norm + W_rest) + b.abs().amax())
        return cls(x16, W16, b16, x_rest * W_norm + (x_norm + x_rest) * W_rest + b_rest + sums)

    def raise_biases(self) -> Screen:
        """Make biases so high that u ≥ 0 for every entry with pre > 0 (a hundredth of slack for the sums with them)."""
        b = self.b.float() + 1.01 * self.slack.amax()
        return replace(self, b=(b + 2 * ROUNDING * b.abs()).bfloat16())

    def slabs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield u and slack of a few rows at a time; the buffer is reused, so use each before the next."""
        rows = max(1, SLAB_ELEMENTS // len(self.W))
        buffer = self.x.new_empty(min(rows, len(self.x)), len(self.W))
        for chunk, slack in zip(self.x.split(rows), self.slack.split(rows), strict=True):
            yield torch.addmm(self.b, chunk, self.W.t(), out=buffer[: len(chunk)]), slack


def topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Return the k largest pre-activations of each row, in no order: values (n, k), latents (n, k).

    The k largest group maxima belong to k entries, so the least they can be is a bound from below on the k-th value.
    None where something is not finite: nothing is proven then.
    """
    screen, candidates, counts = Screen.of(x, W, b), [], []
    if not screen.slack.isfinite().all():
        return None
    for u, slack in screen.slabs():
        maxima = _maxima(u)
        kth = kth_largest(_coarsen(maxima, 8 * k).float(), k)
        latents, n = _candidates(u, maxima, kth - 2 * ROUNDING * kth.abs() - slack, slack)
        candidates.append(latents)
        counts.append(n)
    counts = torch.cat(counts)
    pre, pattern = _exact(x, W, b, torch.cat(candidates), counts)
    # Rows side by side, padded to the longest; none has fewer than k.
    place = torch.arange(int(counts.max()), device=x.device) < counts[:, None]
    values, at = pre.new_full(place.shape, -torch.inf).masked_scatter_(place, pre).topk(k, dim=1, sorted=False)
    return values, pattern.latents[pattern.offsets[:-1, None] + at]


def above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor | float) -> tuple[Tensor, Pattern] | None:
    """Return the pre-activations above floor (a number or (d_sae,)), row after row, and their pattern.

    None where something is not finite.
    """
    screen, candidates, counts = Screen.of(x, W, b - floor), [], []
    if not screen.slack.isfinite().all():
        return None
    for u, _ in screen.raise_biases().slabs():
        latents, n = _not_negative(u)
        candidates.append(latents)
        counts.append(n)
    pre, pattern = _exact(x, W, b, torch.cat(candidates), torch.cat(counts))
    chosen = pre > (floor[pattern.latents] if isinstance(floor, Tensor) and floor.dim() else floor)
    ends = nnf.pad(chosen.cumsum(0), (1, 0))[pattern.offsets]
    return pre[chosen], Pattern(pattern.latents[chosen], ends, len(W))


def _maxima(u: Tensor) -> Tensor:
    """Largest of each group of latents {j, j + d_sae/GROUP, …}: (rows, d_sae/GROUP)."""
    return u.view(len(u), GROUP, -1).amax(1)


def _coarsen(maxima: Tensor, least: int) -> Tensor:
    """Merge groups while at least that many remain: fewer are sorted faster, and bound the k-th value as well."""
    merged = 1
    while maxima.shape[1] % (2 * merged) == 0 and maxima.shape[1] // (2 * merged) >= least:
        merged *= 2
    return maxima.view(len(maxima), merged, -1).amax(1)


def _candidates(u: Tensor, maxima: Tensor, level: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents that can be at level[row] or above, row after row, and how many of each row."""
    # u + 2·ROUNDING·|u| + slack ≥ level, solved for u and rounded down to bfloat16.
    low = level - slack
    low = (low - 4 * ROUNDING * low.abs()).bfloat16()
    rows, groups = (maxima >= low[:, None]).nonzero(as_tuple=True)
    members = u.view(len(u), GROUP, -1)[rows, :, groups]
    entries, places = (members >= low.index_select(0, rows)[:, None]).nonzero(as_tuple=True)
    latents = groups.index_select(0, entries).add_(places, alpha=maxima.shape[1])
    return latents, torch.bincount(rows.index_select(0, entries), minlength=len(u))


def _not_negative(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents without a minus sign, row after row, and how many of each row; u is overwritten."""
    words = u.view(-1).view(torch.int64).bitwise_and_(SIGNS).bitwise_xor_(SIGNS)
    some = words.nonzero().squeeze(1)
    lanes = words[some].view(torch.int16).nonzero().squeeze(1)
    places = some[lanes >> 2].mul_(4).add_(lanes & 3)
    edges = torch.arange(len(u) + 1, device=u.device) * u.shape[1]
    return places % u.shape[1], torch.searchsorted(places, edges).diff()


def _exact(x: Tensor, W: Tensor, b: Tensor, latents: Tensor, counts: Tensor) -> tuple[Tensor, Pattern]:
    """Return float32 pre-activations of candidates, and their pattern."""
    pattern = Pattern(latents, nnf.pad(counts.cumsum(0), (1, 0)), len(W))
    return dots(pattern, x, W) + b.index_select(0, latents), pattern
