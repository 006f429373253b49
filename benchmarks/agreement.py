"""How well a score agrees with a truth: correlations, precision and recall, each with a two-way bootstrap interval.

Everything is a function of sums within clusters (an SAE and a label, a cell of a grid and a seed), so that a resample
of clusters costs one product of matrices, however many words there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals.intervals import Z_VISIBLE, Interval

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Statistic = Callable[["Float[Tensor, '... m']"], "Float[Tensor, '...']"]


def cluster_sums(
    values: Float[Tensor, "n m"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]
) -> Float[Tensor, "rows columns m"]:
    """Sums of the values in each pair of clusters, in float64; of no values one pair with sums of 0."""
    n_rows, n_columns = (int(of.max()) + 1 if len(of) else 1 for of in (rows, columns))
    out = torch.zeros(n_rows * n_columns, values.shape[1], dtype=torch.float64)
    return out.index_add_(0, rows * n_columns + columns, values.double()).view(n_rows, n_columns, -1)


def two_way(
    sums: Float[Tensor, "rows columns m"], statistic: Statistic, n_draws: int = 2000, seed: int = 0
) -> Interval:
    """Interval of a statistic of the total, rows and columns of clusters both drawn with replacement."""
    g = torch.Generator().manual_seed(seed)
    weights = [_times_drawn(n, n_draws, g) for n in sums.shape[:2]]
    totals = torch.einsum("dr,rcm,dc->dm", weights[0], sums, weights[1])
    return interval(statistic(sums.sum((0, 1))), statistic(totals))


def interval(value: Float[Tensor, ""], draws: Float[Tensor, " draws"]) -> Interval:
    """Interval of a value by its draws; draws in which it does not exist are left out."""
    draws = draws[draws.isfinite()]
    if not len(draws) or not bool(value.isfinite()):
        nan = float("nan")
        return Interval(nan, nan, nan, nan)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(float(value), low, high, Z_VISIBLE * float(draws.std()))


def _times_drawn(n: int, n_draws: int, generator: torch.Generator) -> Float[Tensor, "draws n"]:
    drawn = torch.randint(0, n, (n_draws, n), generator=generator)
    return torch.zeros(n_draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(n_draws, n).double())


def clusters(keys: Sequence[Any]) -> Int[Tensor, " n"]:
    """Number keys by first appearance."""
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([order[key] for key in keys], dtype=torch.int64)


def correlation(
    x: Float[Tensor, " n"], y: Float[Tensor, " n"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"],
    by_rank: bool = False, n_draws: int = 2000,
) -> Interval:  # fmt: skip
    """Pearson's correlation, or Spearman's: of ranks (ties share their mean), which a resample keeps."""
    x, y = (_ranks(v) if by_rank else v.double() for v in (x, y))
    x, y = x - x.mean(), y - y.mean()
    return two_way(cluster_sums(_moments(x, y), rows, columns), pearson, n_draws)


def correlation_gap(
    first: Float[Tensor, " n"], second: Float[Tensor, " n"], y: Float[Tensor, " n"], rows: Int[Tensor, " n"],
    columns: Int[Tensor, " n"], n_draws: int = 2000,
) -> Interval:  # fmt: skip
    """Spearman's correlation of `second` with y minus that of `first`, both in the same resamples."""
    a, b, y = (_ranks(v) - (len(y) + 1) / 2 for v in (first, second, y))
    sums = cluster_sums(torch.cat([_moments(a, y), _moments(b, y)], 1), rows, columns)
    return two_way(sums, lambda s: pearson(s[..., 6:]) - pearson(s[..., :6]), n_draws)


def _moments(x: Tensor, y: Tensor) -> Float[Tensor, "n 6"]:
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], 1)


def pearson(s: Float[Tensor, "... 6"]) -> Float[Tensor, ...]:
    """Correlation by the sums of 1, x, y, x², y², xy; NaN where one of both does not vary."""
    n, x, y, xx, yy, xy = s.unbind(-1)
    spread = (xx - x * x / n).clamp(min=0) * (yy - y * y / n).clamp(min=0)
    return torch.where(spread > 1e-18, (xy - x * y / n) / spread.sqrt(), torch.nan)


def _ranks(values: Tensor) -> Float[Tensor, " n"]:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.double().numpy()))


def hits(flag: Tensor, truth: Tensor) -> Float[Tensor, "n 4"]:
    """Columns: right alarms, false alarms, misses, rightly silent."""
    flag, truth = flag.bool(), truth.bool()
    return torch.stack([flag & truth, flag & ~truth, ~flag & truth, ~flag & ~truth], 1).double()


def precision(s: Float[Tensor, "... 4"]) -> Float[Tensor, ...]:
    return s[..., 0] / (s[..., 0] + s[..., 1])


def recall(s: Float[Tensor, "... 4"]) -> Float[Tensor, ...]:
    return s[..., 0] / (s[..., 0] + s[..., 2])


def f1(s: Float[Tensor, "... 4"]) -> Float[Tensor, ...]:
    return 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2])


def false_rate(s: Float[Tensor, "... 4"]) -> Float[Tensor, ...]:
    """Share of what is not absorbed that is called absorbed."""
    return s[..., 1] / (s[..., 1] + s[..., 3])


def mean_of(s: Float[Tensor, "... 2"]) -> Float[Tensor, ...]:
    """Mean by the sums of 1 and x."""
    return s[..., 1] / s[..., 0]


def mean(values: Float[Tensor, " n"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]) -> Interval:
    """Interval of a mean; NaN values are left out."""
    kept = values.double().isfinite()
    values, rows, columns = values.double()[kept], rows[kept], columns[kept]
    if not len(values):
        nan = float("nan")
        return Interval(nan, nan, nan, nan)
    return two_way(cluster_sums(torch.stack([torch.ones_like(values), values], 1), rows, columns), mean_of)


def shown(it: Interval, digits: int = 2) -> str:
    """Write .50 [.40, .60]."""
    if it.mean != it.mean:
        return "–"
    mean, low, high = (f"{v:.{digits}f}".replace("0.", ".", 1) for v in (it.mean, it.low, it.high))
    return f"{mean} [{low}, {high}]"
