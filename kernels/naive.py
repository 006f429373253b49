"""The truth: what an SAE's encoders and decoder are, written as their formulas, dense and without a thought for speed.

Same names, arguments and results as in ops.py, less `impl`; gradients are autograd's. Every fast path is tested against
these few lines, outputs and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pre_activations(x, W_enc, b_enc, b_dec) -> Tensor:
    """pre = (x − b_dec)·W_enc + b_enc."""
    return (x - b_dec) @ W_enc + b_enc


def encode_topk(x, W_enc, b_enc, b_dec, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of relu(pre) of each token."""
    return pre_activations(x, W_enc, b_enc, b_dec).relu().topk(k, dim=1)


def encode_relu(x, W_enc, b_enc, b_dec) -> Tensor:
    """relu(pre)."""
    return pre_activations(x, W_enc, b_enc, b_dec).relu()


def encode_jumprelu(x, W_enc, b_enc, b_dec, threshold, bandwidth) -> Tensor:
    """jumprelu(pre)."""
    return jumprelu(pre_activations(x, W_enc, b_enc, b_dec), threshold, bandwidth)


def decode(values, indices, W_dec, b_dec) -> Tensor:
    """Σ_j values[:, j]·W_dec[indices[:, j]] + b_dec."""
    latents = torch.zeros(len(values), len(W_dec), dtype=values.dtype, device=values.device)
    return latents.scatter_add(1, indices, values) @ W_dec + b_dec


def jumprelu(pre, threshold, bandwidth) -> Tensor:
    """pre·1[pre > θ], with ∂/∂θ = −(θ/ε)·1[|pre − θ| < ε/2] (Rajamanoharan et al. 2024, eq. 11)."""
    return pre * (pre > threshold) + threshold.detach() * _straight_through(pre, threshold, bandwidth)


def step(pre, threshold, bandwidth) -> Tensor:
    """1[pre > θ], with ∂/∂θ = −(1/ε)·1[|pre − θ| < ε/2] (eq. 12)."""
    return (pre > threshold) + _straight_through(pre, threshold, bandwidth)


def _straight_through(pre, threshold, bandwidth) -> Tensor:
    """0, with ∂/∂θ = −(1/ε)·1[|pre − θ| < ε/2]."""
    return ((pre - threshold).abs() < bandwidth / 2) * (threshold.detach() - threshold) / bandwidth
