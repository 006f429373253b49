"""L1-penalised one-vs-rest logistic regressions, solved to the optimum: sparse latents and a class per row come in,
weights per class go out.

For class c, minimise mean over rows of BCE with pos_weight_c = (N − n_c)/n_c, plus l1·Σ|w| + ½·l2·(‖w‖² + bias²). This
is the objective whose Adam iterate ranks latents in SAEBench (arXiv 2503.09532): it is strictly convex, so its
solution depends on no seed, order or start.

The method is Newton's on the few weights that are not zero or want to leave zero, each kept in its orthant, with a
backtracking line search (two-metric projection; Bertsekas 1982, Schmidt 2010, §2.5).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import one_hot, pad, softplus

from sae_train.evals.probes import positive_weight
from sae_train.evals.threads import one_thread

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_train.evals.latents import Latents

_NEW_PER_STEP = 16  # weights per class that may leave zero in one step
_MAX_STEPS = 200
_HALVINGS = 12


@dataclass(frozen=True)
class Solution:
    """Weights, biases and pull, minus the loss's gradient by the weight: within ±l1 where a weight is zero.

    residual is the largest violation of the optimality conditions, as a share of l1.
    """

    weight: Float[Tensor, "d_sae classes"]
    bias: Float[Tensor, " classes"]
    pull: Float[Tensor, "d_sae classes"]
    residual: float
    steps: int


@torch.no_grad()
def fit(
    latents: Latents, labels: Int[Tensor, " n_rows"], n_classes: int, l1: float, l2: float, tolerance: float = 1e-3
) -> Solution:
    """Solve all classes; done when each optimality condition holds to tolerance × l1."""
    problem = _Problem(latents, labels, n_classes, l1, l2)
    with one_thread():
        return problem.solve(tolerance)


class _Problem:
    """The objective, its derivatives and the state of the search."""

    def __init__(self, latents: Latents, labels: Tensor, n_classes: int, l1: float, l2: float):
        self.n, self.l1, self.l2, self.n_classes = latents.n_rows, l1, l2, n_classes
        self.by_row, self.by_column = _csr(latents), _csr_of_transpose(latents)
        self.column_ptr, self.column_rows = self.by_column.crow_indices(), self.by_column.col_indices()
        self.column_counts = self.column_ptr.diff()
        self.column_values = self.by_column.values().float()
        self.y = one_hot(labels, n_classes).double()
        self.b = positive_weight(self.y) * self.y
        # BCE is a·softplus(z) − b·z: its gradient is σ(z)·a − b, its curvature a·σ(z)·(1 − σ(z)).
        self.a = (1 - self.y) + self.b
        self.weight = self.y.new_zeros(latents.d_sae, n_classes)
        self.bias = self.y.new_zeros(n_classes)

    def solve(self, tolerance: float) -> Solution:
        logits, residual, n_steps = self.logits(self.weight, self.bias), float("inf"), 0
        value = self.objective(logits, self.weight, self.bias)
        while n_steps < _MAX_STEPS:
            p = logits.sigmoid()
            d_logits = (p * self.a - self.b) / self.n
            slope, d_bias = self.slope(d_logits), d_logits.sum(0) + self.l2 * self.bias
            wrong = torch.maximum(slope.abs().amax(0), d_bias.abs())
            residual = float(wrong.max()) / self.l1
            if residual <= tolerance:
                break
            unsolved = wrong > tolerance * self.l1
            direction = self.newton_direction(slope, d_bias, self.a * p * (1 - p) / self.n, unsolved)
            logits, value = self.line_search(slope, *direction, value)
            n_steps += 1
        return Solution(self.weight, self.bias, -(self.by_column @ d_logits), residual, n_steps)

    def logits(self, weight: Tensor, bias: Tensor) -> Tensor:
        return self.by_row @ weight + bias

    def objective(self, logits: Tensor, weight: Tensor, bias: Tensor) -> Float[Tensor, " classes"]:
        loss = softplus(logits) * self.a - logits * self.b
        penalty = self.l1 * weight.abs().sum(0) + self.l2 / 2 * (weight.square().sum(0) + bias.square())
        return loss.mean(0) + penalty

    def slope(self, d_logits: Tensor) -> Float[Tensor, "d_sae classes"]:
        """The subgradient of least size: 0 for a weight that rests at zero."""
        gradient = (self.by_column @ d_logits).add_(self.weight, alpha=self.l2)
        at_zero = torch.nn.functional.softshrink(gradient, self.l1)
        return torch.where(self.weight == 0, at_zero, gradient.add_(self.weight.sign(), alpha=self.l1))

    def newton_direction(
        self, slope: Tensor, d_bias: Tensor, curvature: Tensor, unsolved: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_weight, d_b = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        chosen, n_chosen = self.free_weights(slope)
        for c in unsolved.nonzero().squeeze(1).tolist():
            columns = chosen[c, : n_chosen[c]]
            columns, step = self._newton_step(c, columns, slope[columns, c], d_bias[c], curvature[:, c])
            d_weight[columns, c], d_b[c] = step[:-1], step[-1]
        return d_weight, d_b

    def free_weights(self, slope: Tensor) -> tuple[Int[Tensor, "classes m"], list[int]]:
        """Per class the weights that are not zero, then those that want most to leave it."""
        n_set = (self.weight != 0).sum(0)
        most = min(int(n_set.max()) + _NEW_PER_STEP, len(slope))
        urgency = torch.where(self.weight != 0, float("inf"), slope.abs())
        top, chosen = urgency.T.contiguous().topk(most)
        return chosen, torch.minimum((top > 0).sum(1), n_set + _NEW_PER_STEP).tolist()

    def _newton_step(
        self, c: int, columns: Tensor, slope: Tensor, d_bias: Tensor, curvature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Newton's step of some weights and the bias; weights that it would push from zero uphill are left out."""
        block = self.block(columns)
        # In float32, which only bends the step a little.
        hessian = (block.T @ (block * curvature[:, None].float())).double()
        hessian.diagonal().mul_(1 + 1e-6).add_(self.l2 + 1e-12)
        gradient, at_zero = torch.cat([slope, d_bias[None]]), pad(self.weight[columns, c] == 0, (0, 1))
        kept = torch.arange(len(gradient), device=slope.device)
        while True:
            step = -torch.linalg.solve_ex(hessian, gradient)[0].nan_to_num_()
            uphill = at_zero & (step * gradient >= 0)
            if not bool(uphill.any()):
                return columns[kept[:-1]], step
            left = (~uphill).nonzero().squeeze(1)
            hessian = hessian.index_select(0, left).index_select(1, left)
            gradient, at_zero, kept = gradient[left], at_zero[left], kept[left]

    def block(self, columns: Tensor) -> Float[Tensor, "n_rows m+1"]:
        """Some latents on every row, dense, and a column of ones."""
        counts, width = self.column_counts[columns], len(columns) + 1
        place = torch.repeat_interleave(counts)
        begin = self.column_ptr[columns] - counts.cumsum(0) + counts
        entries = begin.index_select(0, place).add_(torch.arange(len(place), device=place.device))
        out = self.column_values.new_zeros(self.n, width)
        out[:, -1] = 1
        into = self.column_rows.index_select(0, entries).mul_(width).add_(place)
        out.view(-1).scatter_(0, into, self.column_values.index_select(0, entries))
        return out

    def line_search(self, slope: Tensor, d_weight: Tensor, d_bias: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Halve the steps of the classes whose objective does not fall; weights that change sign stop at zero."""
        orthant = torch.where(self.weight == 0, -slope.sign(), self.weight.sign())
        scale = torch.ones_like(value)
        for halving in range(_HALVINGS + 1):
            weight = self.weight + scale * d_weight
            weight = torch.where(weight.sign() == orthant, weight, 0.0)
            bias = self.bias + scale * d_bias
            logits = self.logits(weight, bias)
            new = self.objective(logits, weight, bias)
            worse = ~(new <= value + 1e-12 * value.abs())
            if not bool(worse.any()):
                break
            # A class that finds nothing better stays where it is.
            scale = torch.where(worse, scale / 2 if halving < _HALVINGS - 1 else 0.0, scale)
        self.weight, self.bias = weight, bias
        return logits, new


def _csr(latents: Latents) -> Tensor:
    return _sparse(latents.row_ptr, latents.columns, latents.values.double(), (latents.n_rows, latents.d_sae))


def _csr_of_transpose(latents: Latents) -> Tensor:
    order = latents.columns.argsort(stable=True)
    counts = torch.bincount(latents.columns, minlength=latents.d_sae)
    ptr, rows = pad(counts.cumsum(0), (1, 0)), latents.row_of_entry[order]
    return _sparse(ptr, rows, latents.values[order].double(), (latents.d_sae, latents.n_rows))


def _sparse(ptr: Tensor, inner: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(ptr, inner, values, shape, check_invariants=False)
