"""The largest pre-activations of a whole batch, as flat values with their Pattern: batchtopk's and matryoshka's
selection.

The batch is read slab by slab, and of what was read only candidates are kept, so memory stays near that of one slab.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from sae_train.kernels.cpu import Pattern, _Encode, _slabs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float, Int

# Candidates are cut back to the count whenever there are so many times as many.
SPARE = 4


def pre_batch_topk(x, W_enc, b_enc, b_dec, count: int, floor: Float[Tensor, ""]) -> tuple[Tensor, Pattern, Tensor]:
    """Return the `count` largest positive pre-activations of the batch, flat, their pattern, and the smallest of them.

    Exact for any floor; one just below the smallest that will be kept saves time, one above it costs a second pass.
    Ties for the last place go to the earlier token, then to the smaller latent; rows of the pattern ascend by latent.
    Where fewer are positive all of those are returned: the rest of the batch's k largest of relu(pre) is 0 (Bussmann et
    al. 2024).
    """
    with torch.no_grad():
        centred = x - b_dec
        values, flat = largest(_slabs(centred, W_enc, b_enc), count, floor)
        if values.numel() < count and floor > 0:
            values, flat = largest(_slabs(centred, W_enc, b_enc), count, torch.zeros_like(floor))
        pattern = _pattern_of(flat, x.shape[0], W_enc.shape[1])
        smallest = values.amin() if values.numel() else torch.zeros_like(floor)
    return _Encode.apply(x, W_enc, b_enc, b_dec, centred, values, pattern), pattern, smallest


@torch.no_grad()
def candidates(x, W_enc, b_enc, b_dec, count: int, floor: Float[Tensor, ""]) -> tuple[Tensor, Pattern]:
    """Return the `count` largest pre-activations above floor and 0, or all if fewer, flat, and their pattern.

    Ties and order are as in `pre_batch_topk`.
    """
    values, flat = largest(_slabs(x - b_dec, W_enc, b_enc), count, floor)
    return values, _pattern_of(flat, x.shape[0], W_enc.shape[1])


def _pattern_of(flat: Int[Tensor, " n"], batch: int, d_sae: int) -> Pattern:
    """The pattern of ascending positions token·d_sae + latent."""
    counts = torch.bincount(flat // d_sae, minlength=batch)
    return Pattern(flat % d_sae, nnf.pad(counts.cumsum(0), (1, 0)), d_sae)


def largest(slabs: Iterable[Tensor], count: int, floor: Float[Tensor, ""]) -> tuple[Tensor, Int[Tensor, " n"]]:
    """Return values and ascending flat positions of the `count` largest entries above floor, or of all if fewer.

    Once `count` candidates are known, a later entry must exceed the smallest of them: the floor rises to it.
    """
    values, positions, start, floor = [], [], 0, floor.clamp_min(0)
    for slab in slabs:
        flat = (slab > floor).view(-1).nonzero().view(-1)
        values.append(slab.view(-1)[flat])
        positions.append(flat + start)
        start += slab.numel()
        if sum(v.numel() for v in values) > SPARE * count:
            kept = _cut(torch.cat(values), torch.cat(positions), count)
            floor, values, positions = kept[0].amin(), [kept[0]], [kept[1]]
    return _cut(torch.cat(values), torch.cat(positions), count)


def _cut(values: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, in their order; of equal ones the first."""
    n = values.numel()
    if n <= count:
        return values, positions
    smallest = values.kthvalue(n - count + 1).values
    above, equal = values > smallest, values == smallest
    keep = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return values[keep], positions[keep]


def blocks_of(pattern: Pattern, edges: Int[Tensor, " n_blocks_plus_1"]) -> Pattern:
    """Return the pattern with one row per token and block of latents: row token·n_blocks + block, 0 = edges[0] < ….

    The entries and their order are the same, which needs rows that ascend by latent.
    """
    n_blocks = edges.numel() - 1
    block = torch.bucketize(pattern.latents, edges[1:], right=True)
    rows = (pattern.offsets.numel() - 1) * n_blocks
    counts = torch.bincount(pattern.tokens * n_blocks + block, minlength=rows)
    return Pattern(pattern.latents, nnf.pad(counts.cumsum(0), (1, 0)), pattern.d_sae)
