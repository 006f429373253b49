"""What a training step does to each decoder row beside the optimiser, in place: its gradient is kept at right angles to
it, its norm at 1.

On a CPU a few rows at a time go through all operations while they are in cache; on a GPU all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Numbers of one matrix that are worked on at a time: 512 KB in float32.
BLOCK_ELEMENTS = 2**17


@torch.no_grad()
def remove_parallel(grad: Float[Tensor, "d_sae d_in"], rows: Float[Tensor, "d_sae d_in"]) -> None:
    """Take from each gradient what would change its row's length: rows have norm 1 (Gao et al. 2024)."""
    for g, w in _blocks(grad, rows):
        g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)


@torch.no_grad()
def normalise(rows: Float[Tensor, "d_sae d_in"], unless: Bool[Tensor, ""]) -> None:
    """Divide each row by its norm; `unless` true leaves every bit as it is."""
    for (w,) in _blocks(rows):
        w.div_(torch.where(unless, 1.0, w.norm(dim=1, keepdim=True)))


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of every matrix, block by block."""
    n, d = matrices[0].shape
    n_rows = max(1, BLOCK_ELEMENTS // d) if matrices[0].device.type == "cpu" else n
    return zip(*(m.split(n_rows) for m in matrices), strict=True)
