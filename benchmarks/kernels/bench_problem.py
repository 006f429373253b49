"""What every side of the benchmark is given for a problem's sizes: the same weights, activations and level.

Activations are sparse sums of decoder rows with skewed frequencies and a little noise, scaled to ⟨‖x‖²⟩ = d_in, so that
latents fire as unevenly as trained ones do. Learning rates are tiny: L0 must not move while it is timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

LR = 1e-6
# Of jumprelu's straight-through rectangle, on every side; sae-train's default.
BANDWIDTH = 0.5
N_BATCHES = 3
# Terms of each activation vector, and the share of its energy that is noise.
N_TERMS, NOISE = 50, 0.05
LEVEL_ELEMENTS = 2**23


@dataclass(frozen=True)
class Problem:
    """Sizes of one SAE and its batches; k is the L0 for relu and jumprelu."""

    arch: str
    d_in: int
    d_sae: int
    batch: int
    k: int
    device: str = "cpu"

    @classmethod
    def of(cls, request: dict[str, Any]) -> Problem:
        """Read a problem out of a request."""
        return cls(**{f.name: request[f.name] for f in fields(cls)})

    @property
    def encoder_flops(self) -> float:
        """Floating-point operations of the dense encoder product."""
        return 2.0 * self.batch * self.d_in * self.d_sae


def decoder_rows(p: Problem) -> Tensor:
    """Return (d_sae, d_in) rows of norm 1, the same for every side."""
    rows = torch.randn(p.d_sae, p.d_in, generator=torch.Generator().manual_seed(0))
    return (rows / rows.norm(dim=1, keepdim=True)).to(p.device)


def batches(p: Problem, rows: Tensor) -> list[Tensor]:
    """Return N_BATCHES batches; latent i is a term with a probability that falls like 1/√i."""
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(N_BATCHES):
        terms = (torch.rand(p.batch, N_TERMS, generator=g).square() * p.d_sae).long().clamp_max(p.d_sae - 1)
        weights = torch.rand(p.batch, N_TERMS, generator=g) + 0.5
        x = nnf.embedding_bag(terms.to(p.device), rows, per_sample_weights=weights.to(p.device), mode="sum")
        noise = torch.randn(p.batch, p.d_in, generator=g).to(p.device)
        x = x / x.square().mean().sqrt() + math.sqrt(NOISE) * noise
        out.append(x / x.square().mean().sqrt())
    return out


def level(p: Problem, rows: Tensor, x: Tensor) -> float:
    """Return the pre-activation above which each token has k latents on average; 0 for topk, which needs none."""
    if p.arch == "topk":
        return 0.0
    n = max(1, min(len(x), LEVEL_ELEMENTS // p.d_sae))
    return float((x[:n] @ rows.t()).view(-1).topk(n * p.k, sorted=False).values.min())


def on_gpu(p: Problem, equalised: bool) -> bool:
    """Whether a side is to use TF32 and bfloat16 autocast: what every side gets on a GPU where all else is equal."""
    if equalised and p.device != "cpu":
        torch.set_float32_matmul_precision("high")
        return True
    return False
