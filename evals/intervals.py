"""How far a mean could be off: bootstrap intervals over words, or over labels and training seeds, and the smallest
difference that would be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Z_VISIBLE = 2.8  # standard errors: a 5 % test finds such a difference with 80 % power


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; visible is the smallest difference from it that the design can see."""

    mean: float
    low: float
    high: float
    visible: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Float[Tensor, "n m"], groups: Int[Tensor, " n"], n_groups: int, n_draws: int, seed: int
) -> Float[Tensor, "draws groups m"]:
    """Means of each group in each of n_draws resamples of its rows, the columns together; NaN for an empty group."""
    g = torch.Generator().manual_seed(seed)
    out = torch.full((n_draws, n_groups, values.shape[1]), float("nan"), dtype=torch.float64)
    for group in range(n_groups):
        own = values[groups == group].double()
        if len(own):
            drawn = torch.randint(0, len(own), (n_draws, len(own)), generator=g)
            # How often each row was drawn, times the rows: no (draws, n, m) block.
            times = torch.zeros(n_draws, len(own), dtype=torch.float64)
            times.scatter_add_(1, drawn, torch.ones_like(times))
            out[:, group] = times @ own / len(own)
    return out


def letters_by_seeds(
    values: Float[Tensor, "seeds labels"], n_draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the mean over labels and training seeds, both drawn with replacement (two-way cluster bootstrap)."""
    return _summary(_two_way(values, *_draws(values.shape, n_draws, seed)), float(values.double().mean()), level)


def paired_difference(
    a: Float[Tensor, "seeds_a labels"], b: Float[Tensor, "seeds_b labels"], n_draws: int = 2000, seed: int = 0,
    level: float = 0.95,
) -> Interval:  # fmt: skip
    """Interval of mean(a) − mean(b): the same labels are drawn for both, the training seeds of each on their own."""
    seeds_a, labels = _draws(a.shape, n_draws, seed)
    seeds_b, _ = _draws(b.shape, n_draws, seed + 1)
    draws = _two_way(a, seeds_a, labels) - _two_way(b, seeds_b, labels)
    return _summary(draws, float(a.double().mean() - b.double().mean()), level)


def _draws(shape: tuple[int, ...], n_draws: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    seeds, labels = (torch.randint(0, n, (n_draws, n), generator=g) for n in shape)
    return seeds, labels


def _two_way(values: Tensor, seeds: Tensor, labels: Tensor) -> Float[Tensor, " draws"]:
    return values.double()[seeds[:, :, None], labels[:, None, :]].mean((1, 2))


def _summary(draws: Tensor, mean: float, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = torch.quantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return Interval(mean, low, high, Z_VISIBLE * float(draws.std()))
