"""Exact selection for the price of a bfloat16 product, on processors that multiply bfloat16 many times as fast.

Activations are centred, weights latent-major, both float32; selected are the k largest pre-activations of each row, or
those above a floor. A bfloat16 pre-activation comes with a proven bound on its error: it says which latents can be
among the selected, and only those are computed in float32. Proof: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """Operands of a bfloat16 product u, and how far pre = x·Wᵀ + b in float32 arithmetic can be from it.

    `of`: |pre − u| ≤ slack[row] + 2·ROUNDING·|u|. `raised`: u ≥ 0 for every entry with pre > floor.
    """

    x: Tensor
    W: Tensor
    b: Tensor
    slack: Tensor

    @classmethod
    def of(cls, x: Tensor, W: Tensor, b: Tensor) -> Screen:
        """Round the operands and bound what that changes: |x·w − x̂·ŵ| ≤ ‖x − x̂‖·‖w‖ + ‖x̂‖·‖w − ŵ‖."""
        (x16, x_norm, x_rest), (W16, W_norms, W_rests), b16 = _round(x), _round(W), b.bfloat16()
        W_norm, W_rest, b_rest = W_norms.amax(), W_rests.amax(), (b - b16).abs().amax()
        # Of float32 sums of d_in products and a bias, here and where candidates are computed.
        sums = (x.shape[1] + 2) * 2**-23 * ((x_norm + x_rest) * (W_norm + W_rest) + b.abs().amax())
        return cls(x16, W16, b16, x_rest * W_norm + (x_norm + x_rest) * W_rest + b_rest + sums)

    @classmethod
    def raised(cls, x: Tensor, W: Tensor, b: Tensor, floor: Tensor | float) -> Screen:
        """Add to each entry its own bound: two more columns of the operands are its factors, rounded up.

        One bound for a whole row or for all would be that of the longest w and x: thirty times as many candidates on
        a language model, where some tokens are ten times as long as others.
        """
        (x16, x_norm, x_rest), (W16, W_norm, W_rest) = _round(x, more=2), _round(W, more=2)
        sums = (x.shape[1] + 4) * 2**-23  # with those of the two columns
        x16[:, -2], x16[:, -1] = _round_up(1.01 * x_rest), _round_up(1.01 * (x_norm + x_rest))
        W16[:, -2], W16[:, -1] = _round_up(W_norm), _round_up(W_rest + sums * (W_norm + W_rest))
        floor = torch.as_tensor(floor, dtype=b.dtype)
        b = b - floor + sums * (b.abs() + floor.abs())
        return cls(x16, W16, _round_up(b), x_norm * W_norm.amax() + b.abs().amax())

    def slabs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield u and slack of a few rows at a time; the buffer is reused, so use each before the next."""
        rows = max(1, SLAB_ELEMENTS // len(self.W))
        buffer = self.x.new_empty(min(rows, len(self.x)), len(self.W))
        for chunk, slack in zip(self.x.split(rows), self.slack.split(rows), strict=True):
            yield torch.addmm(self.b, chunk, self.W.t(), out=buffer[: len(chunk)]), slack


def _round(rows: Tensor, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows in bfloat16, with so many columns to be filled, each row's norm and that of what is left over."""
    out = rows.new_empty(len(rows), rows.shape[1] + more, dtype=torch.bfloat16)
    norms = []
    for rounded, exact in zip(out[:, : rows.shape[1]].split(BLOCK_ROWS), rows.split(BLOCK_ROWS), strict=True):
        rounded.copy_(exact)
        norms.append(torch.stack([exact.norm(dim=1), (exact - rounded).norm(dim=1)]))
    return out, *torch.cat(norms, 1)


def _round_up(numbers: Tensor) -> Tensor:
    """Return bfloat16 numbers that are not below the given ones."""
    return (numbers + 2 * ROUNDING * numbers.abs()).bfloat16()


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
    screen, candidates, counts = Screen.raised(x, W, b, floor), [], []
    if not screen.slack.isfinite().all():
        return None
    for u, _ in screen.slabs():
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
