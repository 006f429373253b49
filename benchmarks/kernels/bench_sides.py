"""Our sides of the benchmark, each an object with `step(x)` and `reconstruct(x)` on the given weights.

`ours` is the learner that sae-train trains with; the two baselines are what a skilled user writes in plain PyTorch.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks.kernels.bench_problem import BANDWIDTH, LR, Problem, on_gpu
from sae_train.kernels import cpu, ops

CLIP = 1.0
# Long enough that no latent counts as dead: no side pays for reviving any.
DEAD_TOKENS = 10_000_000


class Ours:
    """sae-train's Learner."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        from sae_train.training.learner import Learner

        settings = self._settings(p, level)
        spec = SimpleNamespace(arch=p.arch, width=p.d_sae, l0=float(p.k), seed=0, name="bench")
        self.learner = Learner(spec, settings, p.d_in, 10**6, p.device)
        with torch.no_grad():
            self.learner.sae.W_dec.copy_(rows)
            self.learner.sae.W_enc.copy_(rows.t())
        self._set_level(p.arch, level)

    @torch.no_grad()
    def _set_level(self, arch: str, level: float) -> None:
        """Let the pre-activations above level be active: what `Architecture.start` finds from a sample."""
        if arch == "relu":
            self.learner.sae.b_enc.fill_(-level)
        elif arch == "jumprelu":
            self.learner.arch.leaves["log_threshold"].fill_(math.log(level))
            self.learner.arch.settle()

    @staticmethod
    def _settings(p: Problem, level: float) -> Any:
        values = {"tokens": 10**9, "batch_tokens": p.batch, "lr": LR, "lr_warm_up": 0.0, "lr_decay": 0.0}
        values |= {"grad_clip": CLIP, "aux_coefficient": 1 / 32, "dead_tokens": DEAD_TOKENS}
        values |= {"precision": "auto"}
        values |= {"jumprelu_bandwidth": BANDWIDTH / level if p.arch == "jumprelu" else BANDWIDTH}
        try:
            from sae_train.config import TrainSettings
        except ImportError:  # a machine with torch and triton alone has no pydantic
            return SimpleNamespace(**values)
        return TrainSettings(**{name: v for name, v in values.items() if name not in ("lr_warm_up", "lr_decay")})

    def step(self, x: Tensor) -> None:
        from sae_train.training.loop import tf32_products

        with tf32_products([self.learner]):
            self.learner.step(x)

    def unrecorded_step(self, x: Tensor) -> None:
        """A step launched kernel by kernel, also on a GPU: what is to be looked at from within."""
        records, self.learner.records = self.learner.records, False
        self.step(x)
        self.learner.records = records

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.learner.sae(x)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.learner.optimiser]


class OursPlain(Ours):
    """The same without Triton, in float32."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        ops.DEFAULTS[p.device] = "reference"
        super().__init__(p, rows, level, equalised)


class Baseline:
    """Plain autograd with fused Adam, projection, clipping and renormalisation."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        self.p, self.bf16 = p, on_gpu(p, equalised)
        new = {"device": p.device}
        self.W_enc = rows.t().contiguous().requires_grad_()
        self.W_dec = rows.clone().requires_grad_()
        start = -level if p.arch == "relu" else 0.0
        self.b_enc = torch.full((p.d_sae,), start, **new).requires_grad_()
        self.b_dec = torch.zeros(p.d_in, **new).requires_grad_()
        self.parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        if p.arch == "jumprelu":
            self.threshold = torch.full((p.d_sae,), level, **new).requires_grad_()
            self.parameters.append(self.threshold)
        self.optimiser = torch.optim.Adam(self.parameters, lr=LR, fused=True)

    def loss(self, x: Tensor) -> Tensor:
        recon, sparsity = self.forward(x)
        return (x - recon).square().sum(1).mean() + sparsity

    def step(self, x: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(x)
        loss.backward()
        with torch.no_grad():
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.forward(x)[0]

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.optimiser]

    def _pre(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)


class StrongDense(Baseline):
    """Dense latents all the way; compiled on a GPU, where that pays."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        super().__init__(p, rows, level, equalised)
        if p.device != "cpu":
            self.loss = torch.compile(self.loss)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        pre, sparsity = self._pre(x), 0.0
        if self.p.arch == "topk":
            values, indices = pre.topk(self.p.k, dim=1, sorted=False)
            latents = torch.zeros_like(pre).scatter(1, indices, values.relu())
        elif self.p.arch == "relu":
            latents = pre.relu()
            sparsity = (latents * self.W_dec.norm(dim=1)).sum() / len(x)
        else:
            latents = cpu.JumpReLU.apply(pre, self.threshold, BANDWIDTH)
            sparsity = cpu.Step.apply(pre, self.threshold, BANDWIDTH).sum() / len(x)
        return latents @ self.W_dec + self.b_dec, sparsity


class StrongSparse(Baseline):
    """torch.topk and embedding_bag: a sparse decoder, a dense encoder gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        values, indices = self._pre(x).topk(self.p.k, dim=1, sorted=False)
        return nnf.embedding_bag(
            indices, self.W_dec, per_sample_weights=values.relu().float(), mode="sum"
        ) + self.b_dec, 0.0


class Floor:
    """The dense encoder product alone; below it goes only who selects by a cheaper product (kernels/screen.py)."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        dtype = torch.bfloat16 if on_gpu(p, equalised) else torch.float32
        self.W_enc, self.b_enc = rows.t().to(dtype).contiguous(), torch.zeros(p.d_sae, device=p.device, dtype=dtype)
        self.out = torch.zeros(p.batch, p.d_sae, device=p.device, dtype=dtype)

    def step(self, x: Tensor) -> None:
        torch.addmm(self.b_enc, x.to(self.out.dtype), self.W_enc, out=self.out)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return []


SIDES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sae-train": (Ours, ("topk", "relu", "jumprelu")),
    "sae-train, plain": (OursPlain, ("topk", "relu", "jumprelu")),
    "strong dense": (StrongDense, ("topk", "relu", "jumprelu")),
    "strong sparse": (StrongSparse, ("topk",)),
    "encoder GEMM": (Floor, ("topk", "relu", "jumprelu")),
}
CUDA_ONLY = ("sae-train, plain",)
