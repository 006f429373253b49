"""Are the kernels right, before anybody times them: a device in; relative RMS differences from dense autograd out.

The truth is dense autograd in float64 on the same weights, for the reconstruction and every gradient of
Σ recon·probe (+ the sparsity term, for jumprelu's thresholds).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.kernels import ops, reference

# (batch, d_in, d_sae, k): one group-friendly, one that divides by nothing, k = 1 and k = d_sae.
SHAPES = ((96, 64, 4096, 20), (37, 19, 301, 7), (5, 8, 64, 1), (6, 5, 24, 24))
BANDWIDTH = 0.5
# Relative RMS. float32 sums of up to 64 products differ from float64 by a few 1e-7; a wrong entry differs by 1e-2.
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6}


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


def differences(device: str = "cpu", impl: str | None = None) -> list[Difference]:
    """Return every comparison; all must be `good` before a time means anything."""
    out = []
    for dtype, limit in LIMITS.items():
        for shape in SHAPES:
            for arch in ("topk", "relu", "jumprelu"):
                x, *weights = _weights(shape, dtype, device)
                case = f"{arch} {'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                ours = _run(arch, _sparse, x, weights, shape[3], impl)
                doubles = [w.double() for w in weights]
                truth = _run(arch, _dense, x.double(), doubles, shape[3], impl)
                for name, value in truth.items():
                    out.append(Difference(case, name, _relative_rms(ours[name], value), limit))
    return out


def _weights(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    batch, d_in, d_sae, _ = shape
    g = torch.Generator().manual_seed(batch)
    sizes = [(batch, d_in), (d_sae, d_in), (d_sae,), (d_in,), (d_sae, d_in)]
    # Rounded to float32 at once, so that both precisions see the same numbers.
    x, enc, b_enc, b_dec, dec = (torch.randn(s, generator=g).to(device, dtype) for s in sizes)
    return [x, (enc / d_in**0.5).t(), b_enc, b_dec, dec / d_in**0.5]


def _run(arch: str, forward, x: Tensor, weights: list[Tensor], k: int, impl: str | None) -> dict[str, Tensor]:
    leaves = [x.clone(), *(w.clone() for w in weights), torch.full_like(weights[1], 0.8)]
    for leaf in leaves:
        leaf.requires_grad_()
    recon, sparsity = forward(arch, leaves, k, impl)
    probe = torch.linspace(-1, 1, recon.numel(), dtype=recon.dtype, device=recon.device).view(recon.shape)
    names = ("x", "W_enc", "b_enc", "b_dec", "W_dec", "threshold")
    grads = torch.autograd.grad((recon * probe).sum() + sparsity, leaves, allow_unused=True)
    named = {f"gradient of {n}": g for n, g in zip(names, grads, strict=True) if g is not None}
    return {"reconstruction": recon.detach(), **named}


def _sparse(arch: str, leaves: list[Tensor], k: int, impl: str | None) -> tuple[Tensor, Tensor | float]:
    x, W_enc, b_enc, b_dec, W_dec, threshold = leaves
    sparsity: Tensor | float = 0.0
    if arch == "topk":
        values, pattern = ops.active_topk(x, W_enc, b_enc, b_dec, k, impl)
        values = values.relu()
    elif arch == "relu":
        values, pattern = ops.active_above(x, W_enc, b_enc, b_dec, 0.0, impl)
    else:
        pre, pattern = ops.active_above(x, W_enc, b_enc, b_dec, threshold.detach() - BANDWIDTH / 2, impl)
        theta = threshold[pattern.latents]
        values = ops.jumprelu(pre, theta, BANDWIDTH)
        sparsity = reference.Step.apply(pre, theta, BANDWIDTH).sum()
    return ops.decode_active(values, pattern, W_dec, b_dec, impl), sparsity


def _dense(arch: str, leaves: list[Tensor], k: int, impl: str | None) -> tuple[Tensor, Tensor | float]:
    x, W_enc, b_enc, b_dec, W_dec, threshold = leaves
    pre = (x - b_dec) @ W_enc + b_enc
    if arch == "topk":
        values, indices = pre.relu().topk(k, dim=-1)
        return torch.zeros_like(pre).scatter(1, indices, values) @ W_dec + b_dec, 0.0
    if arch == "relu":
        return pre.relu() @ W_dec + b_dec, 0.0
    # Both straight-through terms by their formulas, as functions of θ whose derivative they are.
    near = ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype).detach()
    active = (pre > threshold).to(pre.dtype)
    ramp = near * (threshold.detach() - threshold) / BANDWIDTH
    latents = pre * active + ramp * threshold.detach()
    return latents @ W_dec + b_dec, (active + ramp).sum()


def _relative_rms(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))
