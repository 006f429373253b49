"""One SAE in training: batches of scaled activations in, metric tensors out, and a finished SAE for raw activations.

A learner keeps its own optimiser, L0 control, dead-latent counters, random generator and failure flag, so that many can
train on one stream of batches without touching each other. A step never waits for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_train import losses
from sae_train.config import SAESpec, TrainSettings
from sae_train.kernels import ops
from sae_train.sae import SAE, SAEConfig, fold_decoder_norm, fold_scale

if TYPE_CHECKING:
    from jaxtyping import Float

# The list of dead latents is rebuilt every so many steps: building it is the one place that waits for the device.
DEAD_REFRESH = 8
MAX_DEAD_TOKENS = 10_000_000
DEAD_SHARE = 0.05


class Learner:
    """Train one SAE on x with ⟨‖x‖²⟩ = d_in."""

    def __init__(
        self,
        spec: SAESpec,
        settings: TrainSettings,
        d_in: int,
        n_steps: int,
        device: str | torch.device = "cpu",
    ):
        self.spec, self.name, self.settings, self.n_steps = spec, spec.name, settings, n_steps
        self.d_in, self.device = d_in, torch.device(device)
        k = round(spec.l0) if spec.arch == "topk" else None
        self.sae = SAE(SAEConfig(spec.arch, d_in, spec.width, k=k), device=device)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.lr = settings.lr or default_lr(spec, n_steps)
        self.dead_tokens = settings.dead_tokens or min(
            MAX_DEAD_TOKENS, math.ceil(DEAD_SHARE * settings.tokens)
        )
        self.optimiser = torch.optim.Adam(list(self.sae.parameters()), lr=self.lr, eps=6.25e-10, fused=True)
        self.step_count = 0
        self.failed: str | None = None
        new = {"device": self.device, "dtype": torch.int64}
        self.idle_tokens = torch.zeros(spec.width, **new)
        self.dead = torch.zeros(0, **new)
        self.failure = torch.full((2,), -1, **new)

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "n d_in"]) -> None:
        """Set random decoder rows of norm 1, W_enc to their transpose, b_dec to the sample's geometric median."""
        sae = self.sae
        rows = torch.randn(sae.W_dec.shape, generator=self.generator)
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_dec.copy_(geometric_median(sample))

    def step(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Tensor]:
        """Take one optimiser step; the returned tensors stay on the device."""
        lr = self._set_lr()
        self.optimiser.zero_grad(set_to_none=True)
        terms, l0, fired = self._objective(x)
        sum(terms.values()).backward()
        self._remove_parallel_gradient()
        norms = torch.stack([p.grad.norm() for p in self._parameters().values()])
        finite = torch.stack([x.isfinite().all(), *(t.isfinite() for t in terms.values()), *norms.isfinite()])
        bad = self._note_failure(finite)
        self._apply(norms, bad)
        self._count_dead(fired, len(x))
        self.step_count += 1
        return self._metrics(terms, l0, lr, norms)

    def check(self) -> str | None:
        """Read the failure flag (waits for the device); return and keep in `failed` what happened, or None."""
        step, what = self.failure.tolist()
        if step >= 0 and self.failed is None:
            self.failed = f"step {step}: {self._watched()[what]} is not finite"
        return self.failed

    def calibrate(self, held_out: Float[Tensor, "n d_in"]) -> None:
        """Bring L0 on held-out activations to the target exactly where the architecture allows it."""

    @torch.no_grad()
    def export(self, scale: float) -> SAE:
        """Return the SAE for raw activations, decoder rows of norm 1, of this one trained on scale · raw."""
        return fold_decoder_norm(fold_scale(self.sae, scale))

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-equal resume needs: nested dictionaries of tensors and JSON values."""
        return {
            "weights": {name: p.detach() for name, p in self._parameters().items()},
            "adam": {name: dict(self.optimiser.state[p]) for name, p in self._parameters().items()},
            "idle_tokens": self.idle_tokens,
            "dead": self.dead,
            "failure": self.failure,
            "generator": self.generator.get_state(),
            "step_count": self.step_count,
            "failed": self.failed,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""
        for name, p in self._parameters().items():
            p.copy_(state["weights"][name])
            saved = state["adam"].get(name, {})
            layout = {
                key: torch.zeros_like(p) if v.ndim else torch.zeros((), device=p.device)
                for key, v in saved.items()
            }
            self.optimiser.state[p] = {key: layout[key].copy_(value) for key, value in saved.items()}
        for name in ("idle_tokens", "dead", "failure"):
            setattr(self, name, state[name].to(self.device).clone())
        self.generator.set_state(state["generator"])
        self.step_count, self.failed = state["step_count"], state["failed"]

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.sae.named_parameters())

    def _watched(self) -> list[str]:
        gradients = [f"the gradient of {name}" for name in self._parameters()]
        return ["the input", "mse_loss", "aux_loss", "sparsity_loss", *gradients]

    def _objective(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the terms of the loss, the batch's L0, and how often each latent fired."""
        sae = self.sae
        pre, pattern = ops.active_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, sae.cfg.k)
        values = pre.relu()
        recon = ops.decode_active(values, pattern, sae.W_dec, sae.b_dec)
        zero = torch.zeros((), device=self.device)
        terms = {"mse_loss": losses.mse(x, recon), "aux_loss": zero, "sparsity_loss": zero}
        if self._refreshed_dead().numel() and self.settings.aux_coefficient:
            weights = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
            terms["aux_loss"] = self.settings.aux_coefficient * losses.aux_k(x, recon, *weights, self.dead)
        active = (values.detach() > 0).to(values.dtype)
        fired = torch.zeros_like(sae.b_enc).index_add_(0, pattern.latents, active)
        return terms, active.sum() / len(x), fired

    def _set_lr(self) -> float:
        lr = self.lr * lr_factor(
            self.step_count, self.n_steps, self.settings.lr_warm_up, self.settings.lr_decay
        )
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        return lr

    @torch.no_grad()
    def _remove_parallel_gradient(self) -> None:
        """Keep of each decoder row's gradient what turns the row: its norm is fixed at 1 (Gao et al. 2024)."""
        W_dec = self.sae.W_dec
        along = torch.linalg.vecdot(W_dec.grad, W_dec)
        W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)

    @torch.no_grad()
    def _note_failure(self, finite: Tensor) -> Tensor:
        """Remember step and tensor of the first value that is not finite; return whether this learner has failed."""
        now = torch.stack([torch.tensor(self.step_count, device=self.device), finite.long().argmin()])
        self.failure = torch.where((self.failure[0] < 0) & ~finite.all(), now, self.failure)
        return self.failure[0] >= 0

    @torch.no_grad()
    def _apply(self, norms: Tensor, bad: Tensor) -> None:
        """Clip, step and renormalise; a learner that has failed keeps its weights bit for bit."""
        self.optimiser.grad_scale = (norms.norm() / self.settings.grad_clip).clamp_min(1.0)
        self.optimiser.found_inf = bad.to(torch.float32)
        self.optimiser.step()
        length = self.sae.W_dec.norm(dim=1, keepdim=True)
        self.sae.W_dec.div_(torch.where(bad, 1.0, length))

    @torch.no_grad()
    def _count_dead(self, fired: Tensor, batch: int) -> None:
        self.idle_tokens = torch.where(fired > 0, 0, self.idle_tokens + batch)

    def _refreshed_dead(self) -> Tensor:
        if self.step_count % DEAD_REFRESH == 0:
            self.dead = (self.idle_tokens >= self.dead_tokens).nonzero().view(-1)
        return self.dead

    def _metrics(self, terms: dict[str, Tensor], l0: Tensor, lr: float, norms: Tensor) -> dict[str, Tensor]:
        terms = {name: term.detach() for name, term in terms.items()}
        return {
            "losses/loss": sum(terms.values()),
            **{f"losses/{name}": term for name, term in terms.items()},
            "metrics/l0": l0,
            "sparsity/dead_features": (self.idle_tokens >= self.dead_tokens).sum(),
            "details/lr": torch.tensor(lr),
            "details/grad_norm": norms.norm(),
        }


def default_lr(spec: SAESpec, n_steps: int) -> float:
    """2e-4·√(2^14/width) (Gao et al. 2024)."""
    return 2e-4 * math.sqrt(2**14 / spec.width)


def lr_factor(step: int, n_steps: int, warm_up: float, decay: float) -> float:
    """Rise linearly over the first share of the steps, stay at 1, fall linearly to 0 over the last share."""
    rise = (step + 1) / max(1.0, warm_up * n_steps)
    fall = (n_steps - step) / max(1.0, decay * n_steps)
    return min(1.0, rise, fall)


def geometric_median(x: Float[Tensor, "n d_in"], n_steps: int = 30) -> Float[Tensor, " d_in"]:
    """Return the point with the least summed distance to the rows of x (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(n_steps):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-8)
        median = (weights[:, None] * x).sum(0) / weights.sum()
    return median
