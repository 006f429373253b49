"""k-sparse probes: for each letter its ranked latents come in; F1 for k = 1, 2, … and the main latents go out.

A probe minimises ½‖w‖² + Σ_i s_i·logloss_i with s_i = N/(2·N_class(i)) and a free bias (scikit-learn's logistic
regression with C = 1 and balanced classes). The letters' problems of one k are solved together by Newton's method,
starting from the answer for k − 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from sae_train.evals.figures import f1_precision_recall

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.latents import Latents


@dataclass(frozen=True)
class KSparse:
    """f1[c, k − 1] of letter c's probe on its top k latents; n_main[c] latents are its main ones."""

    ranking: Int[Tensor, "letters k"]
    f1: Float[Tensor, "letters k"]
    n_main: Int[Tensor, " letters"]

    def main_latents(self, letter: int) -> list[int]:
        return self.ranking[letter, : int(self.n_main[letter])].tolist()


def split_features(f1: list[float], jump: float = 0.03) -> int:
    """Number of main latents: take one more as long as F1 rises above the best so far by more than the jump."""
    best, n_main = -100.0, 0
    for value in f1:
        if not value > best + jump:
            break
        best, n_main = value, n_main + 1
    return n_main


def fit(
    train: Latents, y_train: Bool[Tensor, "n letters"], test: Latents, y_test: Bool[Tensor, "m letters"],
    ranking: Int[Tensor, "letters k"], jump: float,
) -> KSparse:  # fmt: skip
    """Fit all probes and choose the main latents."""
    n_letters, k = ranking.shape
    flat = ranking.flatten()
    x_test = test.take(flat).view(test.n_rows, n_letters, k).permute(1, 0, 2).double()
    x, y, weight = _fold_silent_rows(train.take(flat).view(train.n_rows, n_letters, k), y_train)
    solution = x.new_zeros(n_letters, k + 1)
    f1 = []
    for size in range(1, k + 1):
        used = [*range(size), k]
        solution[:, used] = newton(x[..., used], y, weight, solution[:, used])
        logits = torch.einsum("lnk,lk->nl", x_test[..., :size], solution[:, :size]) + solution[:, k]
        f1.append(f1_precision_recall(logits > 0, y_test)[0])
    table = torch.stack(f1, dim=1)
    n_main = [split_features(row, jump) for row in table.tolist()]
    return KSparse(ranking.cpu(), table.cpu(), torch.tensor(n_main))


def _fold_silent_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as (letters, rows, k + 1) with a column of ones, targets and weights s_i.

    Most words fire none of a letter's k latents; all such rows of one class are alike, so they become one row with
    their summed weight, which is exact. Letters have different numbers of other rows: weight 0 fills them up.
    """
    n, n_letters, k = x.shape
    n_true = y.sum(0).double()
    s = torch.where(y, n / (2 * n_true.clamp(min=1)), n / (2 * (n - n_true).clamp(min=1)))
    active = (x != 0).any(-1)
    width = int(active.sum(0).max())
    out = x.new_zeros(n_letters, width + 2, k + 1, dtype=torch.float64)
    targets, weight = out.new_zeros(n_letters, width + 2), out.new_zeros(n_letters, width + 2)
    letter, row = active.T.nonzero(as_tuple=True)
    place = torch.arange(len(letter), device=x.device) - (active.sum(0).cumsum(0) - active.sum(0))[letter]
    out[letter, place, :k], out[..., k] = x[row, letter].double(), 1.0
    targets[letter, place], weight[letter, place] = y[row, letter].double(), s[row, letter]
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
