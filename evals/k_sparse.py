"""k-sparse probes: how many of a label's best-ranked latents are its main latents. F1 decides, for k = 1, 2, …

A probe minimises ½‖w‖² + Σ_i s_i·logloss_i with s_i = N/(2·N_class(i)) and a free bias (scikit-learn's logistic
regression with C = 1 and balanced classes). The labels' problems of one k are solved together by Newton's method,
starting from the answer for k − 1; a label whose F1 stopped rising has its main latents and leaves the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from sae_train.evals.figures import f1_precision_recall
from sae_train.evals.threads import one_thread

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.latents import Latents


@dataclass(frozen=True)
class KSparse:
    """f1[c, k − 1] of label c's probe on its top k latents, NaN once the splitting rule has stopped; n_main[c] latents
    are its main ones, and logits its probe's on them, for the test words."""

    ranking: Int[Tensor, "labels k"]
    f1: Float[Tensor, "labels k"]
    n_main: Int[Tensor, " labels"]
    logits: Float[Tensor, "n_test labels"]

    def main_latents(self, label: int) -> list[int]:
        return self.ranking[label, : int(self.n_main[label])].tolist()

    def is_main(self, d_sae: int) -> Bool[Tensor, "labels d_sae"]:
        return mark([self.main_latents(label) for label in range(len(self.ranking))], d_sae)


def mark(latents: Sequence[Sequence[int]], d_sae: int) -> Bool[Tensor, "labels d_sae"]:
    """Say which latents are among each label's."""
    out = torch.zeros(len(latents), d_sae, dtype=torch.bool)
    for label, chosen in enumerate(latents):
        out[label, list(chosen)] = True
    return out


def split_features(f1: list[float], jump: float = 0.03) -> int:
    """Number of main latents: take one more as long as F1 rises above the best so far by more than the jump."""
    best, n_main = -100.0, 0
    for value in f1:
        if not value > best + jump:
            break
        best, n_main = value, n_main + 1
    return n_main


def fit(
    train: Latents, y_train: Bool[Tensor, "n labels"], test: Latents, y_test: Bool[Tensor, "m labels"],
    ranking: Int[Tensor, "labels k"], jump: float,
) -> KSparse:  # fmt: skip
    """Fit the probes that the splitting rule asks for and choose the main latents."""
    with one_thread():
        return _fit(train, y_train, test, y_test, ranking, jump)


def _fit(train: Latents, y_train: Tensor, test: Latents, y_test: Tensor, ranking: Tensor, jump: float) -> KSparse:
    n_labels, k = ranking.shape
    x_train, x_test = (table.take(ranking.flatten()).view(-1, n_labels, k) for table in (train, test))
    f1 = torch.full((n_labels, k), float("nan"), dtype=torch.float64, device=x_train.device)
    best, logits = f1.new_full((n_labels,), -100.0), f1.new_zeros(test.n_rows, n_labels)
    going, solution = torch.arange(n_labels, device=f1.device), f1.new_zeros(n_labels, 1)
    for size in range(1, k + 1):
        rows = _fold_silent_rows(x_train[:, going, :size], y_train[:, going])
        start = torch.cat([solution[:, :-1], solution.new_zeros(len(going), 1), solution[:, -1:]], 1)
        solution = newton(*rows, start)
        z = torch.einsum("nlk,lk->nl", x_test[:, going, :size].double(), solution[:, :-1]) + solution[:, -1]
        f1[going, size - 1] = f1_precision_recall(z > 0, y_test[:, going])[0]
        rises = f1[going, size - 1] > best[going] + jump
        going, solution = going[rises], solution[rises]
        best[going], logits[:, going] = f1[going, size - 1], z[:, rises]
        if not len(going):
            break
    n_main = [split_features(row, jump) for row in f1.tolist()]
    return KSparse(ranking.cpu(), f1.cpu(), torch.tensor(n_main), logits)


def _fold_silent_rows(x: Float[Tensor, "n labels k"], y: Bool[Tensor, "n labels"]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as (labels, rows, k + 1) with a column of ones, targets and weights s_i.

    Most words fire none of a label's latents; all such rows of one class are alike, so they become one row with their
    summed weight, which is exact. Labels have different numbers of other rows: weight 0 fills them up.
    """
    n, n_labels, k = x.shape
    n_true = y.sum(0).double()
    s = torch.where(y, n / (2 * n_true.clamp(min=1)), n / (2 * (n - n_true).clamp(min=1)))
    active = (x != 0).any(-1)
    width = int(active.sum(0).max())
    out = x.new_zeros(n_labels, width + 2, k + 1, dtype=torch.float64)
    targets, weight = out.new_zeros(n_labels, width + 2), out.new_zeros(n_labels, width + 2)
    label, row = active.T.nonzero(as_tuple=True)
    place = torch.arange(len(label), device=x.device) - (active.sum(0).cumsum(0) - active.sum(0))[label]
    out[label, place, :k], out[..., k] = x[row, label].double(), 1.0
    targets[label, place], weight[label, place] = y[row, label].double(), s[row, label]
    targets[:, width] = 1.0
    weight[:, width] = (s * (y & ~active)).sum(0)
    weight[:, width + 1] = (s * (~y & ~active)).sum(0)
    return out, targets, weight


def newton(
    x: Float[Tensor, "b n p"], y: Float[Tensor, "b n"], weight: Float[Tensor, "b n"], start: Float[Tensor, "b p"],
    max_steps: int = 100, tolerance: float = 1e-8,
) -> Float[Tensor, "b p"]:  # fmt: skip
    """Minimise ½‖w‖² + Σ weight·logloss for a batch; the last column of x is the bias, which is not penalised.

    Full Newton steps, halved for the problems whose objective would rise; done when every gradient is at most
    tolerance × (1 + Σ weight).
    """
    penalty = torch.ones_like(start)
    penalty[:, -1] = 0
    ridge = torch.diag_embed(penalty + 1e-10)
    w, value = start.clone(), _objective(x, y, weight, penalty, start)
    for _ in range(max_steps):
        p = torch.einsum("bnp,bp->bn", x, w).sigmoid()
        gradient = penalty * w + torch.einsum("bnp,bn->bp", x, weight * (p - y))
        if bool((gradient.abs().amax(1) <= tolerance * (1 + weight.sum(1))).all()):
            break
        hessian = torch.einsum("bnp,bn,bnq->bpq", x, weight * p * (1 - p), x) + ridge
        step = torch.linalg.solve_ex(hessian, gradient)[0].nan_to_num()
        w, value = _line_search(x, y, weight, penalty, w, step, value)
    return w


def _objective(x: Tensor, y: Tensor, weight: Tensor, penalty: Tensor, w: Tensor) -> Tensor:
    z = torch.einsum("bnp,bp->bn", x, w)
    return (penalty * w**2).sum(1) / 2 + (weight * (softplus(z) - y * z)).sum(1)


def _line_search(x, y, weight, penalty, w, step, value) -> tuple[Tensor, Tensor]:
    scale = torch.ones_like(value)
    for _ in range(30):
        tried = w - scale[:, None] * step
        new = _objective(x, y, weight, penalty, tried)
        worse = ~(new <= value + 1e-12 * value.abs())
        if not bool(worse.any()):
            break
        scale = torch.where(worse, scale / 2, scale)
    return torch.where(worse[:, None], w, tried), torch.where(worse, value, new)
