"""Are the kernels right, before anybody times them: relative RMS differences from kernels/naive.py.

That truth is taken in float64 on the same weights: selected values, reconstruction, error, and every gradient.
Memory that an op does not write holds NaN meanwhile, so that a forgotten element is seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_train.kernels import naive, ops
from sae_train.kernels.crossover import Crossover

# (batch, d_in, d_sae, k): group-friendly, dividing by nothing, k = 1, k = d_sae, one token, screened where that pays.
SHAPES = ((96, 64, 4096, 20), (37, 19, 301, 7), (5, 8, 64, 1), (6, 5, 24, 24), (1, 3, 17, 2), (40, 128, 2048, 9))
KINDS = ("random", "ties", "all negative", "empty rows")
WAYS = ("topk", "relu", "relu, dense", "jumprelu", "batchtopk", "public topk", "public relu", "public jumprelu")
REFERENCE_ONLY = ("batchtopk",)
BANDWIDTH, THRESHOLD = 0.5, 0.8
# Relative RMS. float32 sums of up to 128 products differ from float64 by a few 1e-7; a wrong entry differs by 1e-2.
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6}
NAMES = ("x", "W_enc", "b_enc", "b_dec", "W_dec", "threshold")


@dataclass(frozen=True)
class Difference:
    """One tensor of one case against the truth."""

    case: str
    tensor: str
    relative_rms: float
    limit: float

    @property
    def good(self) -> bool:
        return self.relative_rms <= self.limit  # false for NaN


def differences(
    device: str = "cpu", impl: str | None = None, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[Difference]:
    """Return every comparison; all must be `good` before a time means anything."""
    with poisoned():
        return list(_differences(device, impl, shapes))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: their largest value); operations without a fixed order warn."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that an operation returns, views included.

    Raw bytes are left out: Triton's interpreter looks at whole storages through them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        made = [t for t in made if isinstance(t, Tensor) and t.layout == torch.strided]
        self.seen |= {tuple(t.shape) for t in made if t.dtype not in (torch.uint8, torch.int8)}
        return out


def dense_blocks(run: Callable[[], object], batch: int, d_in: int, d_sae: int) -> set[tuple[int, ...]]:
    """Return the shapes of tensors of at least batch·d_sae numbers, other than weights, that a run makes."""
    with _Shapes() as shapes:
        run()
    weights = {(d_sae, d_in), (d_in, d_sae)}
    return {shape for shape in shapes.seen if math.prod(shape) >= batch * d_sae} - weights


def _differences(device: str, impl: str | None, shapes) -> Iterator[Difference]:
    for dtype, limit in LIMITS.items():
        if impl == "triton" and dtype == torch.float64:
            continue
        for shape in shapes:
            for kind in KINDS:
                tensors = _tensors(kind, shape, dtype, device)
                for way in WAYS:
                    if impl == "triton" and way in REFERENCE_ONLY:
                        continue
                    case = f"{way}, {kind} {'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                    ours, mask = _run(way, tensors, shape[3], impl)
                    truth = _truth(way, [t.double() for t in tensors], shape[3], mask)
                    for name, value in truth.items():
                        yield Difference(case, name, _relative_rms(ours[name], value), limit)


def _tensors(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return x, W_enc, b_enc, b_dec, W_dec, threshold, rounded to float32, so that all precisions see the same."""
    batch, d_in, d_sae, _ = shape
    g = torch.Generator().manual_seed(batch)
    sizes = [(batch, d_in), (d_sae, d_in), (d_sae,), (d_in,), (d_sae, d_in)]
    x, enc, b_enc, b_dec, dec = (torch.randn(s, generator=g) for s in sizes)
    enc, dec = enc / d_in**0.5, dec / d_in**0.5
    if kind == "ties":  # whole numbers and the second half of the latents like the first: exact in any precision
        x, b_dec, enc, b_enc = x.round(), b_dec.round(), (2 * enc).round(), b_enc.round()
        half = d_sae // 2
        enc[half : 2 * half], b_enc[half : 2 * half] = enc[:half], b_enc[:half]
    if kind == "all negative":
        b_enc = b_enc - 100
    if kind == "empty rows":
        b_enc = -b_enc.abs() - 0.1
        x[::2] = b_dec
    threshold = torch.full((d_sae,), THRESHOLD)
    return [t.to(device, dtype) for t in (x, enc, b_enc, b_dec, dec, threshold)]


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Return leaves in the public orientation, W_enc with contiguous columns as an SAE has it."""
    x, enc, *rest = (t.clone() for t in tensors)
    return [t.requires_grad_() for t in (x, enc.t(), *rest)]


def _run(way: str, tensors: list[Tensor], k: int, impl: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return outputs and gradients of our ops, and which latents were selected, (batch, d_sae)."""
    leaves = _leaves(tensors)
    x, W_enc, b_enc, b_dec, W_dec, threshold = leaves
    pre, pattern, out = None, None, {}
    if way.startswith("public"):
        latents = _public(way, leaves, k, impl)
        out = {"reconstruction": latents @ W_dec + b_dec if isinstance(latents, Tensor) else latents[1]}
        mask = latents.detach() != 0 if isinstance(latents, Tensor) else latents[0]
        return _with_gradients(out, leaves), mask
    if way == "topk":
        pre, pattern = ops.active_topk(x, W_enc, b_enc, b_dec, k, impl)
    elif way.startswith("relu"):
        always = Crossover(mean=1.0, dense=True) if way == "relu, dense" else None
        pre, pattern = ops.active_above(x, W_enc, b_enc, b_dec, 0.0, impl, always)
    elif way == "batchtopk":
        pre, pattern, _ = ops.active_batch_topk(x, W_enc, b_enc, b_dec, k * len(x), x.new_tensor(0.3), impl)
    else:
        pre, pattern = ops.active_above(x, W_enc, b_enc, b_dec, threshold.detach() - BANDWIDTH / 2, impl)
    values = pre.relu()
    if way == "jumprelu":
        values, out["count"] = ops.jumprelu_active(pre, pattern, threshold, BANDWIDTH, impl)
    out["reconstruction"], out["error"] = ops.decode_error(values, pattern, W_dec, b_dec, x, impl)
    if way == "batchtopk":
        edges = torch.tensor([0, W_dec.shape[0] // 3, W_dec.shape[0]], device=x.device)
        out["blocks"] = ops.decode_blocks(values, pattern, edges, W_dec, impl)
    mask = torch.zeros(len(x), W_dec.shape[0], dtype=torch.bool, device=x.device)
    mask[pattern.tokens, pattern.latents.long()] = True
    tensors = _with_gradients(out, leaves)
    if way in ("topk", "batchtopk"):
        tensors["selected, sorted"] = values.detach().sort().values
    return tensors, mask


def _public(way: str, leaves: list[Tensor], k: int, impl: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """Return dense latents of the public encoders; for topk which are selected, and decode's reconstruction."""
    *encoder, W_dec, threshold = leaves
    if way == "public relu":
        return ops.encode_relu(*encoder, impl)
    if way == "public jumprelu":
        return ops.encode_jumprelu(*encoder, threshold, BANDWIDTH, impl)
    values, latents = ops.encode_topk(*encoder, k, impl)
    mask = torch.zeros(len(values), len(W_dec), dtype=torch.bool, device=W_dec.device).scatter_(1, latents, True)
    return mask, ops.decode(values, latents, W_dec, leaves[3], impl)


def _truth(way: str, tensors: list[Tensor], k: int, mask: Tensor) -> dict[str, Tensor]:
    """Return the same by kernels/naive.py; among equal values the selection is ours: `selected, sorted` judges it."""
    leaves = _leaves(tensors)
    *encoder, W_dec, threshold = leaves
    x, _, _, b_dec = encoder
    if way.endswith("jumprelu"):
        latents = naive.encode_jumprelu(*encoder, threshold, BANDWIDTH)
    else:
        latents = naive.encode_relu(*encoder)
    dense, out = latents.detach(), {}
    if way.endswith("topk"):
        latents = latents * mask
    if way == "jumprelu":
        out["count"] = naive.step(naive.pre_activations(*encoder), threshold, BANDWIDTH).sum()
    out["reconstruction"] = latents @ W_dec + b_dec
    if not way.startswith("public"):
        out["error"] = (out["reconstruction"] - x).square().sum()
    if way == "batchtopk":
        first = len(W_dec) // 3
        out["blocks"] = torch.stack([latents[:, :first] @ W_dec[:first], latents[:, first:] @ W_dec[first:]], 1)
    truth = _with_gradients(out, leaves)
    if way == "topk":
        truth["selected, sorted"] = naive.encode_topk(*encoder, k)[0].detach().flatten().sort().values
    if way == "batchtopk":
        best = dense.flatten().topk(k * len(x)).values
        truth["selected, sorted"] = best[best > 0].sort().values
    return truth


def _with_gradients(out: dict[str, Tensor], leaves: list[Tensor]) -> dict[str, Tensor]:
    """Add the gradients of a weighted sum of all outputs."""
    total = sum((value * _probe(value)).sum() for value in out.values())
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    named = {f"gradient of {n}": g for n, g in zip(NAMES, grads, strict=True) if g is not None}
    return {name: value.detach() for name, value in {**out, **named}.items()}


def _probe(value: Tensor) -> Tensor:
    """Weights of all sizes and both signs, so that no two mistakes cancel."""
    return torch.linspace(-1, 1.5, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)


def _relative_rms(value: Tensor, truth: Tensor) -> float:
    if value.shape != truth.shape:
        return float("inf")
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))
