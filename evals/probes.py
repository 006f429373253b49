"""Linear one-vs-rest probes by mini-batch Adam: the ground truth on activations, and the ranking on latents of presets
that stop where SAEBench stops.

Both minimise the mean over rows and classes of BCE with pos_weight_c = (N − n_c)/n_c, plus an L1 term for latents.
Gradients are written out, so that neither autograd nor a global random state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import embedding_bag, one_hot
from torch.optim.adam import adam

from sae_train.evals.latents import Latents
from sae_train.evals.threads import flushed_denormals, one_thread

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# rows of a batch, W ↦ X·W, and (into, G) ↦ into += Xᵀ·G
_Batch = tuple["Tensor", Callable[["Tensor"], "Tensor"], Callable[["Tensor", "Tensor"], object]]
_Tell = Callable[[int, int], object]  # hears each epoch's number and how many there are
_DENSE_SHARE = 0.1  # above this share of non-zeros two dense products beat two embedding bags (measured)


@dataclass(frozen=True)
class Schedule:
    """Adam's schedule: the rate decays exponentially from lr towards end_lr, once per epoch."""

    lr: float
    end_lr: float
    weight_decay: float
    epochs: int
    batch: int
    l1: float = 0.0

    def rate(self, epoch: int) -> float:
        return self.lr * (self.end_lr / self.lr) ** (epoch / self.epochs)


class Probe:
    """logits = x·weight + bias, weight (n_inputs, n_classes): input-major, so that a sparse row gathers whole rows."""

    def __init__(self, n_inputs: int, n_classes: int, device: torch.device):
        # The problem is convex: starting at zero adds nothing random, unlike the usual uniform start.
        self.weight = torch.zeros(n_inputs, n_classes, device=device)
        self.bias = torch.zeros(n_classes, device=device)

    def logits(self, x: Float[Tensor, "n n_inputs"]) -> Float[Tensor, "n n_classes"]:
        return x @ self.weight + self.bias


def _unheard(epoch: int, of: int) -> None:
    pass


def fit_dense(
    x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], n_classes: int, s: Schedule, g: torch.Generator,
    tell: _Tell = _unheard,
) -> Probe:  # fmt: skip
    """Fit a probe on dense rows."""

    def batches() -> Iterator[_Batch]:
        for order in _shuffle(len(x), s, g, x.device, tell):
            for rows in order.split(s.batch):
                block = x.index_select(0, rows)
                yield rows, block.matmul, lambda into, d_logits, block=block: into.addmm_(block.T, d_logits)

    return _descend(Probe(x.shape[1], n_classes, x.device), batches(), labels, s)


def fit_sparse(
    latents: Latents, labels: Int[Tensor, " n"], n_classes: int, s: Schedule, g: torch.Generator,
    tell: _Tell = _unheard,
) -> Probe:  # fmt: skip
    """Fit a probe on latents; inputs are the columns of the table, which should all fire somewhere."""
    if len(latents.values) > _DENSE_SHARE * latents.n_rows * latents.d_sae:
        return fit_dense(latents.dense(), labels, n_classes, s, g, tell)

    def batches() -> Iterator[_Batch]:
        for order in _shuffle(latents.n_rows, s, g, labels.device, tell):
            yield from _sparse_batches(latents, order, s.batch)

    return _descend(Probe(latents.d_sae, n_classes, labels.device), batches(), labels, s)


def ranking_schedule(n_rows: int, *, epochs: int, max_batch: int, min_steps: int, **rest: float) -> Schedule:
    """Batches of min(max_batch, N/30), and as many epochs as min_steps asks for."""
    batch = max(1, min(max_batch, n_rows // 30))
    steps_per_epoch = math.ceil(n_rows / batch)
    return Schedule(epochs=max(epochs, math.ceil(min_steps / steps_per_epoch)), batch=batch, **rest)


@dataclass(frozen=True)
class _Targets:
    labels: Tensor
    n_classes: int

    def __post_init__(self):
        positive = one_hot(self.labels, self.n_classes).float()
        weight = positive_weight(positive)
        # BCE's gradient is (1 − y)·σ(z) + w·y·(σ(z) − 1) = σ(z)·a − b, with a and b fixed per row and class.
        object.__setattr__(self, "a", 1 - positive + weight * positive)
        object.__setattr__(self, "b", weight * positive)

    def gradient(self, logits: Float[Tensor, "batch c"], rows: Tensor) -> Float[Tensor, "batch c"]:
        """Gradient of the mean loss over this batch's rows and classes."""
        return (
            logits.sigmoid_().mul_(self.a.index_select(0, rows)).sub_(self.b.index_select(0, rows)).div_(logits.numel())
        )


def positive_weight(positive: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """(N − n_c)/n_c; a class without rows has no positive term to weight, so any finite number will do."""
    n = positive.sum(0)
    return (len(positive) - n) / n.clamp(min=1)


def _shuffle(n: int, s: Schedule, g: torch.Generator, device: torch.device, tell: _Tell) -> Iterator[Tensor]:
    for epoch in range(s.epochs):
        tell(epoch, s.epochs)
        yield torch.randperm(n, generator=g).to(device)


def _descend(probe: Probe, batches: Iterator[_Batch], labels: Tensor, s: Schedule) -> Probe:
    targets, steps_per_epoch = _Targets(labels, len(probe.bias)), math.ceil(len(labels) / s.batch)
    take_step = _adam([probe.weight, probe.bias], s.weight_decay)
    gradient = torch.zeros_like(probe.weight)  # one buffer: a fresh one each step costs page faults
    with one_thread(), flushed_denormals():
        for step, (rows, times, add_transposed) in enumerate(batches):
            d_logits = targets.gradient(times(probe.weight).add_(probe.bias), rows)
            if s.l1:
                torch.sign(probe.weight, out=gradient).mul_(s.l1 / len(probe.bias))
            else:
                gradient.zero_()
            add_transposed(gradient, d_logits)
            take_step([gradient, d_logits.sum(0)], s.rate(step // steps_per_epoch))
    return probe


def _adam(weights: list[Tensor], weight_decay: float) -> Callable[[list[Tensor], float], None]:
    """Return Adam's step by gradients and rate: torch's function, without torch's Optimizer, which takes longer than
    the step of so few weights."""
    mean, square = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    count = [torch.zeros((), device=w.device) for w in weights]

    def take_step(gradients: list[Tensor], lr: float) -> None:
        adam(
            weights, gradients, mean, square, [], count, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr,
            weight_decay=weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip

    return take_step


def _sparse_batches(latents: Latents, order: Tensor, batch: int) -> Iterator[_Batch]:
    """Each batch of an epoch; X·W is an embedding bag over the rows, Xᵀ·G is added entry by entry."""
    # index_select throughout: six times faster than square brackets on a CPU
    counts = latents.counts.index_select(0, order)
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.arange(len(order), device=order.device).repeat_interleave(counts)
    shift = latents.row_ptr.index_select(0, order) - ptr[:-1]
    entries = shift.repeat_interleave(counts) + torch.arange(len(row), device=row.device)
    columns, values = latents.columns.index_select(0, entries), latents.values.index_select(0, entries)
    edges = ptr.tolist()
    for start in range(0, len(order), batch):
        stop = min(start + batch, len(order))
        span, offsets = slice(edges[start], edges[stop]), ptr[start : stop + 1] - edges[start]
        yield order[start:stop], *_products(columns[span], values[span], offsets, row[span] - start)


def _products(columns: Tensor, values: Tensor, offsets: Tensor, row: Tensor) -> tuple[Callable, Callable]:
    def times(table: Tensor) -> Tensor:
        return embedding_bag(columns, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)

    def add_transposed(into: Tensor, d_logits: Tensor) -> None:
        into.index_add_(0, columns, d_logits.index_select(0, row).mul_(values[:, None]))

    return times, add_transposed
