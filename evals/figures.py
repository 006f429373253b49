"""How well read-outs tell their label from the rest: F1, precision, recall and AUROC per column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def f1_precision_recall(
    predicted: Bool[Tensor, "n c"], truth: Bool[Tensor, "n c"]
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Per column; 0 where nothing is predicted or nothing is true, as scikit-learn has it."""
    tp = (predicted & truth).sum(0).double()
    n_predicted, n_true = predicted.sum(0), truth.sum(0)
    precision, recall = tp / n_predicted.clamp(min=1), tp / n_true.clamp(min=1)
    return 2 * tp / (n_predicted + n_true).clamp(min=1), precision, recall


def auroc(scores: Float[Tensor, "n c"], truth: Bool[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Chance that a true row scores above a false one, ties counting half; NaN where a class is empty."""
    out = [_auroc_column(s, t) for s, t in zip(scores.T, truth.T, strict=True)]
    return torch.tensor(out, dtype=torch.float64)


def _auroc_column(scores: Tensor, truth: Tensor) -> float:
    positive, negative = scores[truth].contiguous(), scores[~truth].sort().values
    if not len(positive) or not len(negative):
        return float("nan")
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))
