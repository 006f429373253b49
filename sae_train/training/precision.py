"""In which precision products are made in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sae_train.errors import UserError
from sae_train.kernels import ops

if TYPE_CHECKING:
    from sae_train.config import TrainSettings


def takes_bfloat16(settings: TrainSettings, device: torch.device) -> bool:
    """Whether products are made in bfloat16: on a GPU that has it, unless float32 was asked for.

    UserError where it was asked for and cannot be.
    """
    asked, fused = settings.precision, ops.choose(None, device) == "triton"
    if asked == "bfloat16" and not fused:
        raise UserError("precision bfloat16 is for GPUs with the package triton: take auto or float32")
    return fused and (asked == "bfloat16" or (asked == "auto" and torch.cuda.is_bf16_supported()))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Let the process make float32 products in the precision of that name, and as before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
