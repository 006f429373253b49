"""Learning rates: a spec and a number of steps in, the peak rate and its factor at each step out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_train.architectures import TRAINED

if TYPE_CHECKING:
    from sae_train.config import SAESpec


def default_lr(spec: SAESpec, n_steps: int) -> float:
    """base·√(2^14/width)·min(8, max(1, √(30,000/n_steps))), base by architecture.

    The last factor is for short runs and measured at 500 steps, where it is 7.7.
    """
    short = min(8.0, max(1.0, math.sqrt(30_000 / n_steps)))
    return TRAINED[spec.arch].base_lr * math.sqrt(2**14 / spec.width) * short


def lr_factor(step: int, n_steps: int, warm_up: float, decay: float) -> float:
    """Rise linearly over the first share of the steps, stay at 1, fall linearly to 0 over the last share."""
    rise = (step + 1) / max(1.0, warm_up * n_steps)
    fall = (n_steps - step) / max(1.0, decay * n_steps)
    return min(1.0, rise, fall)
