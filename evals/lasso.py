"""L1-penalised one-vs-rest logistic regressions on sparse latents, solved to the optimum.

For class c, minimise mean over rows of BCE with pos_weight_c = (N − n_c)/n_c, plus l1·Σ|w| + ½·l2·(‖w‖² + bias²). This
is the objective whose Adam iterate ranks latents in SAEBench (arXiv 2503.09532): it is strictly convex, so its
solution depends on no seed, order or start.

The method is Newton's on the few weights that are not zero or want to leave zero, each kept in its orthant, with a
backtracking line search (two-metric projection; Bertsekas 1982, Schmidt 2010, §2.5).
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import one_hot, pad, softplus

from sae_train.evals.contexts import show_nothing
from sae_train.evals.probes import positive_weight
from sae_train.evals.threads import one_thread

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.contexts import Progress
    from sae_train.evals.latents import Latents

_NEW_PER_STEP = 64  # weights per class that may leave zero in one step, or as many as have left it
_CLASSES_AT_ONCE = 4  # for a thread
_TURNS = 2  # of each thread in a step
_BLOCK = 128  # columns of a Gram matrix that are multiplied at a time
_PAIRS = 2  # as many pairs of latents on one row, per element of a dense block, cost what the block costs (measured)
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
    latents: Latents, labels: Int[Tensor, " n_rows"], n_classes: int, l1: float, l2: float, tolerance: float = 1e-3,
    progress: Progress = show_nothing,
) -> Solution:  # fmt: skip
    """Solve all classes; done when each optimality condition holds to tolerance × l1.

    On a CPU some classes are solved after the others, and `progress` hears how many are.
    """
    n_threads = torch.get_num_threads()
    at_once = n_classes if labels.is_cuda else _CLASSES_AT_ONCE * _TURNS * n_threads
    y, parts, n_solved = one_hot(labels, n_classes).double(), [], 0
    with one_thread(), warnings.catch_warnings(), ThreadPoolExecutor(n_threads, "lasso") as pool:
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        problem = _Problem(latents, l1, l2, pool)
        for part in y.tensor_split(-(-n_classes // at_once), dim=1):
            progress("ranking latents", n_solved, n_classes)
            parts.append(problem.solve(part, tolerance))
            n_solved += part.shape[1]
    return Solution(
        *(torch.cat([getattr(part, name) for part in parts], -1) for name in ("weight", "bias", "pull")),
        *(max(getattr(part, name) for part in parts) for name in ("residual", "steps")),
    )


class _Problem:
    """The objective, its derivatives and the state of the search for the classes that are not solved yet.

    weight (classes, m) are the weights of `columns`: per class those that are not zero and more; all others are zero.
    The threads of `pool` each take some classes of a step: they meet once a step, so that a busy machine does not make
    them wait for each other.
    """

    def __init__(self, latents: Latents, l1: float, l2: float, pool: ThreadPoolExecutor):
        self.pool = pool
        self.n, self.d_sae, self.l1, self.l2 = latents.n_rows, latents.d_sae, l1, l2
        self.by_row, self.by_column = _csr(latents), _csr_of_transpose(latents)
        self.column_ptr, self.column_rows = self.by_column.crow_indices(), self.by_column.col_indices()
        self.column_counts = self.column_ptr.diff()
        self.column_values = self.by_column.values().float()

    def begin(self, y: Float[Tensor, "n_rows classes"]) -> None:
        """Take classes by their indicators, with all weights at zero."""
        # A row's share of the mean BCE is a·softplus(z) − b·z: gradient σ(z)·a − b, curvature a·σ(z)·(1 − σ(z)).
        self.b = positive_weight(y) * y / self.n
        self.a = (1 - y) / self.n + self.b
        self.columns = torch.zeros(y.shape[1], 0, dtype=torch.long, device=y.device)
        self.weight = y.new_zeros(y.shape[1], 0)
        self.bias = y.new_zeros(y.shape[1])
        self.logits = torch.zeros_like(y)
        self.value = self.objective(self.logits, self.weight, self.bias)

    def solve(self, y: Float[Tensor, "n_rows classes"], tolerance: float) -> Solution:
        self.begin(y)
        going, residual = torch.arange(len(self.bias), device=self.bias.device), 0.0
        weight, bias = self.spread(), self.bias.clone()
        pull = torch.zeros_like(weight)
        for n_steps in range(_MAX_STEPS + 1):
            p = self.logits.sigmoid()
            d_logits = torch.addcmul(-self.b, p, self.a)
            d_loss, d_bias = (self.by_column @ d_logits).T.contiguous(), d_logits.sum(0) + self.l2 * self.bias
            is_free = self.choose(d_loss)
            slope = self.slope(d_loss)
            wrong = torch.maximum(slope.abs().amax(1), d_bias.abs()) / self.l1
            done = ~(wrong > tolerance) | (n_steps == _MAX_STEPS)
            if bool(done.any()):
                solved, left = going[done], ~done
                weight[:, solved], bias[solved] = self.spread()[:, done], self.bias[done]
                pull[:, solved] = -d_loss[done].T
                residual, going = max(residual, float(wrong[done].max())), going[left]
                if not len(going):
                    break
                self.keep(left)
                p, slope, d_bias, is_free = p[:, left], slope[left], d_bias[left], is_free[left]
            self.line_search(slope, *self.newton_direction(is_free, slope, d_bias, self.a * (p - p.square())))
        return Solution(weight, bias, pull, residual, n_steps)

    def keep(self, classes: Bool[Tensor, " classes"]) -> None:
        self.a, self.b, self.logits = (t[:, classes] for t in (self.a, self.b, self.logits))
        self.columns, self.weight = self.columns[classes], self.weight[classes]
        self.bias, self.value = self.bias[classes], self.value[classes]

    def spread(self) -> Float[Tensor, "d_sae classes"]:
        """The weights of all latents."""
        return _spread(self.columns, self.weight, self.d_sae)

    def choose(self, d_loss: Float[Tensor, "classes d_sae"]) -> Bool[Tensor, "classes m"]:
        """Set the columns: weights that are not zero, then those that want most to leave it. Return which are free."""
        is_set, wish = self.weight != 0, d_loss.abs()
        wish.scatter_(1, self.columns, torch.where(is_set, float("inf"), wish.gather(1, self.columns)))
        n_set = is_set.sum(1, keepdim=True)
        n_chosen = n_set + n_set.clamp(min=_NEW_PER_STEP)
        most = min(int(n_chosen.max()), self.d_sae)
        wish, columns = wish.topk(most)
        place = torch.arange(most, device=columns.device)
        self.weight, self.columns = self.spread().gather(0, columns.T).T, columns
        return (wish > self.l1) & (place < n_chosen)

    def objective(
        self, logits: Tensor, weight: Tensor, bias: Tensor, classes: Tensor | slice = slice(None)
    ) -> Float[Tensor, " classes"]:
        loss = softplus(logits).mul_(self.a[:, classes]).addcmul_(logits, self.b[:, classes], value=-1)
        penalty = self.l1 * weight.abs().sum(1) + self.l2 / 2 * (weight.square().sum(1) + bias.square())
        return loss.sum(0) + penalty

    def slope(self, d_loss: Float[Tensor, "classes d_sae"]) -> Float[Tensor, "classes m"]:
        """The objective's subgradient of least size by the columns' weights: 0 for one that rests at zero."""
        gradient = d_loss.gather(1, self.columns).add_(self.weight, alpha=self.l2)
        at_zero = torch.nn.functional.softshrink(gradient, self.l1)
        return torch.where(self.weight == 0, at_zero, gradient.add_(self.weight.sign(), alpha=self.l1))

    def newton_direction(
        self, is_free: Bool[Tensor, "classes m"], slope: Tensor, d_bias: Tensor, curvature: Tensor
    ) -> tuple[Float[Tensor, "classes m"], Float[Tensor, " classes"]]:
        """Newton's steps on the free weights and the bias, for some classes with about as many at a time."""
        step, sizes = pad(torch.zeros_like(slope), (1, 0)), is_free.sum(1)
        gradient = torch.cat([d_bias[:, None], slope * is_free], 1)
        at_zero = pad((self.weight == 0) & is_free, (1, 0))
        curvature = curvature.T.float().contiguous()

        def solve(classes: Int[Tensor, " some"]) -> None:
            m = int(sizes[classes[-1]]) + 1
            hessian = self.hessian(self.columns[classes, : m - 1], sizes[classes].tolist(), curvature[classes])
            step[classes, :m] = _step_in_orthant(hessian, gradient[classes, :m], at_zero[classes, :m])

        list(self.pool.map(solve, reversed(sizes.argsort().split(_CLASSES_AT_ONCE))))  # the largest first
        return step[:, 1:], step[:, 0]

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
        """Xᵀ·diag(curvature)·[1, X] of some latents X.

        Sparse times sparse where few of them fire on the same row, else dense times dense, as where torch has no MKL.
        """
        counts, m = self.column_counts[columns], len(columns)
        column, end = torch.repeat_interleave(counts), counts.cumsum(0)
        begin = self.column_ptr[columns] - end + counts
        entries = begin.index_select(0, column).add_(torch.arange(len(column), device=column.device))
        rows, values = self.column_rows.index_select(0, entries), self.column_values.index_select(0, entries)
        weighted = values * curvature.index_select(0, rows)
        per_row = torch.bincount(rows, minlength=self.n)
        can_sparse = values.is_cuda or torch.backends.mkl.is_available()
        if can_sparse and per_row.square().sum() < _PAIRS * m * self.n:
            order, ptr = rows.argsort(stable=True), pad(per_row.cumsum(0), (1, 0))
            transposed = _sparse(pad(end, (1, 0)), rows, values, (m, self.n))
            products = _dense_product(transposed, _sparse(ptr, column[order], weighted[order], (self.n, m)))
        else:
            dense, root = values.new_zeros(m, self.n), curvature.sqrt()
            dense.view(-1).scatter_(0, (column * self.n).add_(rows), values * root.index_select(0, rows))
            products = _gram(dense)
        return torch.cat([values.new_zeros(m).index_add_(0, column, weighted)[:, None], products], 1)

    def line_search(self, slope: Tensor, d_weight: Tensor, d_bias: Tensor) -> None:
        """Halve the steps of the classes whose objective does not fall; weights that change sign stop at zero."""
        sign = self.weight.sign()
        orthant = torch.where(sign == 0, -slope.sign(), sign)
        weight, bias = _step_within(orthant, self.weight, d_weight), self.bias + d_bias
        logits = self.by_row @ _spread(self.columns, weight, self.d_sae) + bias
        value = self.objective(logits, weight, bias)
        for halving in range(1, _HALVINGS + 1):
            worse = (~(value <= self.value + 1e-12 * self.value.abs())).nonzero().squeeze(1)
            if not len(worse):
                break
            # A class that finds nothing better stays where it is.
            scale = 0.5**halving if halving < _HALVINGS else 0.0
            w = _step_within(orthant[worse], self.weight[worse], scale * d_weight[worse])
            weight[worse], bias[worse] = w, self.bias[worse] + scale * d_bias[worse]
            z = self.by_row @ _spread(self.columns[worse], w, self.d_sae) + bias[worse]
            logits[:, worse], value[worse] = z, self.objective(z, w, bias[worse], worse)
        self.weight, self.bias, self.logits, self.value = weight, bias, logits, value


def _spread(columns: Tensor, weight: Tensor, d_sae: int) -> Float[Tensor, "d_sae classes"]:
    return weight.new_zeros(d_sae, len(weight)).scatter_(0, columns.T, weight.T)


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


def _dense_product(a: Tensor, b: Tensor) -> Float[Tensor, "n m"]:
    """a·b of two sparse matrices.

    On a CPU straight into a dense block: a sparse result takes longer there, and torch (2.13) never frees its memory.
    On a GPU only sparse results exist.
    """
    if a.is_cuda:
        return (a @ b).to_dense()
    return torch.addmm(a.values().new_zeros(a.shape[0], b.shape[1]), a, b, beta=0)


def _gram(x: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """x·xᵀ from what lies below the diagonal, which takes little more than half the time."""
    out = x.new_empty(len(x), len(x))
    for begin in range(0, len(x), _BLOCK):
        torch.mm(x[begin:], x[begin : begin + _BLOCK].T, out=out[begin:, begin : begin + _BLOCK])
    return out.tril() + out.tril(-1).T


def _sparse(ptr: Tensor, inner: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # The library behind the products takes 32-bit indices.
    return torch.sparse_csr_tensor(ptr.int(), inner.int(), values, shape, check_invariants=False)
