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
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.latents import Latents

_NEW_PER_STEP = 16  # weights per class that may leave zero in one step
_CLASSES_AT_ONCE = 13
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
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return _Problem(latents, labels, n_classes, l1, l2).solve(tolerance)


class _Problem:
    """The objective, its derivatives and the state of the search for the classes that are not solved yet."""

    def __init__(self, latents: Latents, labels: Tensor, n_classes: int, l1: float, l2: float):
        self.n, self.l1, self.l2 = latents.n_rows, l1, l2
        self.by_row, self.by_column = _csr(latents), _csr_of_transpose(latents)
        self.column_ptr, self.column_rows = self.by_column.crow_indices(), self.by_column.col_indices()
        self.column_counts = self.column_ptr.diff()
        self.column_values = self.by_column.values().float()
        y = one_hot(labels, n_classes).double()
        # A row's share of the mean BCE is a·softplus(z) − b·z: gradient σ(z)·a − b, curvature a·σ(z)·(1 − σ(z)).
        self.b = positive_weight(y) * y / self.n
        self.a = (1 - y) / self.n + self.b
        self.weight = y.new_zeros(latents.d_sae, n_classes)
        self.bias = y.new_zeros(n_classes)
        self.logits = y.new_zeros(self.n, n_classes)
        self.value = self.objective(self.logits, self.weight, self.bias)

    def solve(self, tolerance: float) -> Solution:
        weight, bias, pull = self.weight.clone(), self.bias.clone(), torch.zeros_like(self.weight)
        going, residual = torch.arange(len(bias), device=bias.device), 0.0
        for n_steps in range(_MAX_STEPS + 1):
            p = self.logits.sigmoid()
            d_logits = torch.addcmul(-self.b, p, self.a)
            gradient, d_bias = self.by_column @ d_logits, d_logits.sum(0) + self.l2 * self.bias
            slope = self.slope(gradient)
            wrong = torch.maximum(slope.abs().amax(0), d_bias.abs()) / self.l1
            done = ~(wrong > tolerance) | (n_steps == _MAX_STEPS)
            if bool(done.any()):
                solved, left = going[done], ~done
                weight[:, solved], bias[solved], pull[:, solved] = (
                    self.weight[:, done],
                    self.bias[done],
                    -gradient[:, done],
                )
                residual, going = max(residual, float(wrong[done].max())), going[left]
                if not len(going):
                    break
                self.keep(left)
                p, slope, d_bias = p[:, left], slope[:, left], d_bias[left]
            self.line_search(slope, *self.newton_direction(slope, d_bias, self.a * (p - p.square())))
        return Solution(weight, bias, pull, residual, n_steps)

    def keep(self, classes: Bool[Tensor, " classes"]) -> None:
        self.a, self.b, self.weight, self.logits = (t[:, classes] for t in (self.a, self.b, self.weight, self.logits))
        self.bias, self.value = self.bias[classes], self.value[classes]

    def objective(
        self, logits: Tensor, weight: Tensor, bias: Tensor, classes: Tensor | slice = slice(None)
    ) -> Float[Tensor, " classes"]:
        loss = softplus(logits).mul_(self.a[:, classes]).addcmul_(logits, self.b[:, classes], value=-1)
        penalty = self.l1 * weight.abs().sum(0) + self.l2 / 2 * (weight.square().sum(0) + bias.square())
        return loss.sum(0) + penalty

    def slope(self, d_loss: Float[Tensor, "d_sae classes"]) -> Float[Tensor, "d_sae classes"]:
        """The objective's subgradient of least size: 0 for a weight that rests at zero."""
        gradient = torch.add(d_loss, self.weight, alpha=self.l2)
        at_zero = torch.nn.functional.softshrink(gradient, self.l1)
        return torch.where(self.weight == 0, at_zero, gradient.add_(self.weight.sign(), alpha=self.l1))

    def newton_direction(self, slope: Tensor, d_bias: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's steps on the free weights and the bias, for some classes with about as many at a time."""
        d_weight, d_b = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        chosen, n_chosen = self.free_weights(slope)
        curvature = curvature.T.float().contiguous()
        for classes in n_chosen.argsort().split(_CLASSES_AT_ONCE):
            sizes = n_chosen[classes]
            columns = chosen[classes, : int(sizes.max())]
            is_free = torch.arange(columns.shape[1], device=columns.device) < sizes[:, None]
            hessian = self.hessian(columns, sizes.tolist(), curvature[classes])
            gradient = torch.cat([d_bias[classes, None], slope[columns, classes[:, None]] * is_free], 1)
            at_zero = pad((self.weight[columns, classes[:, None]] == 0) & is_free, (1, 0))
            step = _step_in_orthant(hessian, gradient, at_zero)
            d_weight[columns[is_free], classes.repeat_interleave(sizes)] = step[:, 1:][is_free]
            d_b[classes] = step[:, 0]
        return d_weight, d_b

    def free_weights(self, slope: Tensor) -> tuple[Int[Tensor, "classes m"], Int[Tensor, " classes"]]:
        """Per class the weights that are not zero, then those that want most to leave it; and how many these are."""
        is_set = self.weight != 0
        n_set = is_set.sum(0)
        most = min(int(n_set.max()) + _NEW_PER_STEP, len(slope))
        top, chosen = torch.where(is_set, float("inf"), slope.abs()).T.contiguous().topk(most)
        return chosen, torch.minimum((top > 0).sum(1), n_set + _NEW_PER_STEP)

    def hessian(
        self, chosen: Int[Tensor, "classes m"], n_chosen: list[int], curvature: Float[Tensor, "classes n_rows"]
    ) -> Float[Tensor, "classes m+1 m+1"]:
        """Second derivatives by the bias and the chosen weights; ones on the diagonal fill smaller classes up.

        The products are taken in float32, which only bends the step a little.
        """
        m = chosen.shape[1] + 1
        out = torch.eye(m, dtype=torch.float64, device=chosen.device).repeat(len(chosen), 1, 1)
        for c, size in enumerate(n_chosen):
            out[c, 1 : size + 1, : size + 1] = self._weighted_products(chosen[c, :size], curvature[c])
        out[:, 0, 1:] = out[:, 1:, 0]
        out[:, 0, 0] = curvature.sum(1)
        out.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(self.l2 + 1e-12)
        return out

    def _weighted_products(
        self, columns: Int[Tensor, " m"], curvature: Float[Tensor, " n_rows"]
    ) -> Float[Tensor, "m m+1"]:
        """Xᵀ·diag(curvature)·[1, X] of some latents X: sparse times dense."""
        counts, width = self.column_counts[columns], len(columns) + 1
        place, end = torch.repeat_interleave(counts), counts.cumsum(0)
        begin = self.column_ptr[columns] - end + counts
        entries = begin.index_select(0, place).add_(torch.arange(len(place), device=place.device))
        rows, values = self.column_rows.index_select(0, entries), self.column_values.index_select(0, entries)
        dense = values.new_zeros(self.n, width)
        dense[:, 0] = curvature
        into = (rows * width).add_(place).add_(1)
        dense.view(-1).scatter_(0, into, values * curvature.index_select(0, rows))
        return _sparse(pad(end, (1, 0)), rows, values, (len(columns), self.n)) @ dense

    def line_search(self, slope: Tensor, d_weight: Tensor, d_bias: Tensor) -> None:
        """Halve the steps of the classes whose objective does not fall; weights that change sign stop at zero."""
        sign = self.weight.sign()
        orthant = torch.where(sign == 0, -slope.sign(), sign)
        weight, bias = _step_within(orthant, self.weight, d_weight), self.bias + d_bias
        logits = self.by_row @ weight + bias
        value = self.objective(logits, weight, bias)
        for halving in range(1, _HALVINGS + 1):
            worse = (~(value <= self.value + 1e-12 * self.value.abs())).nonzero().squeeze(1)
            if not len(worse):
                break
            # A class that finds nothing better stays where it is.
            scale = 0.5**halving if halving < _HALVINGS else 0.0
            w = _step_within(orthant[:, worse], self.weight[:, worse], scale * d_weight[:, worse])
            weight[:, worse], bias[worse] = w, self.bias[worse] + scale * d_bias[worse]
            logits[:, worse] = z = self.by_row @ w + bias[worse]
            value[worse] = self.objective(z, w, bias[worse], worse)
        self.weight, self.bias, self.logits, self.value = weight, bias, logits, value


def _step_within(orthant: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    moved = weight + step
    return moved.mul_(moved * orthant > 0)


def _step_in_orthant(hessian: Tensor, gradient: Tensor, at_zero: Tensor) -> Tensor:
    """Newton's steps without the weights that they would push from zero uphill. Changes its arguments."""
    step, again = torch.zeros_like(gradient), torch.arange(len(gradient), device=gradient.device)
    while len(again):
        step[again] = -torch.linalg.solve_ex(hessian[again], gradient[again])[0].nan_to_num_()
        uphill = at_zero & (step * gradient >= 0)
        again = uphill.any(1).nonzero().squeeze(1)
        stays = (~uphill[again]).double()
        hessian[again] *= stays[:, :, None] * stays[:, None]
        hessian.diagonal(dim1=1, dim2=2).add_(uphill)
        gradient, at_zero = gradient.masked_fill(uphill, 0), at_zero & ~uphill
    return step


def _csr(latents: Latents) -> Tensor:
    return _sparse(latents.row_ptr, latents.columns, latents.values.double(), (latents.n_rows, latents.d_sae))


def _csr_of_transpose(latents: Latents) -> Tensor:
    order = latents.columns.argsort(stable=True)
    counts = torch.bincount(latents.columns, minlength=latents.d_sae)
    ptr, rows = pad(counts.cumsum(0), (1, 0)), latents.row_of_entry[order]
    return _sparse(ptr, rows, latents.values[order].double(), (latents.d_sae, latents.n_rows))


def _sparse(ptr: Tensor, inner: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # The library behind the products takes 32-bit indices.
    return torch.sparse_csr_tensor(ptr.int(), inner.int(), values, shape, check_invariants=False)
