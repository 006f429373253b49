"""One SAE in training: batches of scaled activations in, metric tensors out, and a finished SAE for raw activations.

A learner keeps its own optimiser, L0 control, dead-latent counters, random generator and failure flag, so that many can
train on one stream of batches without touching each other. A step never waits for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_train import losses, objectives
from sae_train.config import SAESpec, TrainSettings
from sae_train.l0 import L0Controller, level_for, level_on
from sae_train.metrics import held_out_metrics
from sae_train.ranks import Ranks
from sae_train.sae import SAE, SAEConfig, fold_decoder_norm, fold_scale
from sae_train.schedule import default_lr, lr_factor

if TYPE_CHECKING:
    from jaxtyping import Float

# The list of dead latents is rebuilt every so many steps: building it is the one place that waits for the device.
DEAD_REFRESH = 8
MAX_DEAD_TOKENS = 10_000_000
DEAD_SHARE = 0.05


# Where L0 starts, in targets, and how many pre-activations are looked at to find that level.
START_L0 = 2.0
QUANTILE_ELEMENTS = 2**24
# λ at the start; the controller takes it from there.
FIRST_COEFFICIENT = {"relu": 0.3, "jumprelu": 0.3}
# With Adam a parameter moves by at most lr a step: levels, of the size of x, need more than the weights do.
LR_FACTORS = {"b_enc": {"relu": 10.0}, "log_threshold": {"jumprelu": 10.0}}
# ReLU's bias is offset at the end only if the controller left L0 further than this from its target.
RELU_TOLERANCE = 0.02


class Learner:
    """Train one SAE on x with ⟨‖x‖²⟩ = d_in.

    With `ranks` of several processes each steps on its equal share of a batch; gradients, losses and counts are those
    of the whole batch, so that all processes hold the same weights.
    """

    def __init__(
        self,
        spec: SAESpec,
        settings: TrainSettings,
        d_in: int,
        n_steps: int,
        device: str | torch.device = "cpu",
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.spec, self.name, self.settings, self.n_steps = spec, spec.name, settings, n_steps
        self.d_in, self.device = d_in, torch.device(device)
        k = round(spec.l0) if spec.arch == "topk" else None
        self.sae = SAE(SAEConfig(spec.arch, d_in, spec.width, k=k), device=device)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.lr = settings.lr or default_lr(spec, n_steps)
        share = math.ceil(DEAD_SHARE * settings.tokens)
        self.dead_tokens = settings.dead_tokens or min(MAX_DEAD_TOKENS, share)
        self.trained = self._trained()
        self.optimiser = self._optimiser()
        self.control = None
        if spec.arch != "topk":
            first = round(settings.lr_warm_up * n_steps)
            self.control = L0Controller(spec.l0, FIRST_COEFFICIENT[spec.arch], first, device)
        self.step_count = 0
        self.last: dict[str, Tensor] = {}
        self.failed: str | None = None
        new = {"device": self.device, "dtype": torch.int64}
        self.idle_tokens = torch.zeros(spec.width, **new)
        self.dead = torch.zeros(0, **new)
        self.failure = torch.full((2,), -1, **new)

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "n d_in"]) -> None:
        """Set random decoder rows, W_enc to their transpose, b_dec to the sample's geometric median.

        relu and jumprelu start at the quantile of pre where L0 is START_L0 times the target.
        """
        sae = self.sae
        rows = torch.randn(sae.W_dec.shape, generator=self.generator)
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_dec.copy_(geometric_median(sample))
        if self.control:
            n = max(1, QUANTILE_ELEMENTS // sae.cfg.d_sae)
            pre = (sample[:n] - sae.b_dec) @ sae.W_enc
            level = level_for(pre, min(START_L0 * self.spec.l0, sae.cfg.d_sae / 2))
            self._set_level(level.clamp_min(1e-3))

    def step(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Tensor]:
        """Take one optimiser step; the returned tensors stay on the device."""
        self._set_lr()
        for p in (*self.sae.parameters(), *self.trained.values()):
            p.grad = None
        threshold = self._threshold()
        run = objectives.forward(self.sae, x, threshold, self.settings.jumprelu_bandwidth)
        terms = self._terms(x, run, threshold)
        sum(terms.values()).backward()
        terms = {name: self.ranks.mean(term) for name, term in terms.items()}
        norms = self._gradients()
        finite = torch.stack([x.isfinite().all(), *(t.isfinite() for t in terms.values()), *norms.isfinite()])
        bad = self._note_failure(finite)
        self._apply(norms, bad)
        fired, n_tokens = self.ranks.sum(run.fired()), len(x) * self.ranks.size
        l0 = fired.sum() / n_tokens
        self.idle_tokens = torch.where(fired > 0, 0, self.idle_tokens + n_tokens)
        metrics = self._metrics(terms, l0, norms)
        if self.control:
            self.control.update(l0, self.step_count, ~bad)
        self.step_count += 1
        return metrics

    def check(self) -> str | None:
        """Read the failure flag (waits for the device); return and keep in `failed` what happened, or None."""
        step, what = self.failure.tolist()
        if step >= 0 and self.failed is None:
            self.failed = f"step {step}: {self._watched()[what]} is not finite"
        return self.failed

    @torch.no_grad()
    def calibrate(self, held_out: Float[Tensor, "n d_in"]) -> None:
        """Bring L0 on held-out activations to the target: one offset of log θ (jumprelu) or of b_enc (relu).

        relu is moved only if its controller left it more than RELU_TOLERANCE off, which very short runs do (300
        steps: 9 %); the offset shrinks or grows every latent a little. topk needs nothing.
        """
        sae, target = self.sae, self.spec.l0
        if self.spec.arch == "jumprelu":
            share = level_on(lambda x: self._pre(x) / sae.threshold, held_out, target, (0.7, 0.3, 1e-3))
            self.log_threshold += math.log(share)
            sae.threshold.copy_(self.log_threshold.exp())
        elif self.spec.arch == "relu":
            l0 = held_out_metrics(sae, held_out)["metrics/l0"]
            if abs(l0 / target - 1) > RELU_TOLERANCE:
                sae.b_enc -= level_on(self._pre, held_out, target, (0.0, -0.5, -4.0))

    @torch.no_grad()
    def export(self, scale: float) -> SAE:
        """Return the SAE for raw activations, decoder rows of norm 1, of this one trained on scale · raw."""
        return fold_decoder_norm(fold_scale(self.sae, scale))

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-equal resume needs: nested dictionaries of tensors and JSON values."""
        return {
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "adam": {name: dict(self.optimiser.state[p]) for name, p in self.trained.items()},
            "control": self.control.state_dict() if self.control else {},
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
        for name, p in self.trained.items():
            p.copy_(state["weights"][name])
            saved = state["adam"].get(name, {})
            self.optimiser.state[p] = {key: value.to(p.device).clone() for key, value in saved.items()}
        if self.spec.arch == "jumprelu":
            self.sae.threshold.copy_(self.log_threshold.exp())
        if self.control:
            self.control.load_state_dict(state["control"])
        for name in ("idle_tokens", "dead", "failure"):
            setattr(self, name, state[name].to(self.device).clone())
        self.generator.set_state(state["generator"])
        self.step_count, self.failed = state["step_count"], state["failed"]

    def _pre(self, x: Tensor) -> Tensor:
        return torch.addmm(self.sae.b_enc, x - self.sae.b_dec, self.sae.W_enc)

    def _trained(self) -> dict[str, Tensor]:
        """Return what the optimiser updates: views of the weights, contiguous, and log θ in place of θ."""
        sae = self.sae
        views = {"W_enc": sae.W_enc.detach().t(), "W_dec": sae.W_dec.detach()}
        views |= {"b_enc": sae.b_enc.detach(), "b_dec": sae.b_dec.detach()}
        if self.spec.arch == "jumprelu":
            self.log_threshold = torch.zeros_like(sae.b_enc.detach())
            views["log_threshold"] = self.log_threshold
        return views

    def _optimiser(self) -> torch.optim.Adam:
        arch = self.spec.arch
        groups = [
            {"params": [p], "factor": LR_FACTORS.get(name, {}).get(arch, 1.0)} for name, p in self.trained.items()
        ]
        return torch.optim.Adam(groups, lr=self.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)

    def _set_lr(self) -> None:
        s = self.settings
        self.lr_now = self.lr * lr_factor(self.step_count, self.n_steps, s.lr_warm_up, s.lr_decay)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr_now * group["factor"]

    def _threshold(self) -> Tensor | None:
        if self.spec.arch != "jumprelu":
            return None
        self._leaf = self.log_threshold.detach().requires_grad_()
        return self._leaf.exp()

    @torch.no_grad()
    def _set_level(self, level: Tensor) -> None:
        if self.spec.arch == "jumprelu":
            self.log_threshold.fill_(level.log())
            self.sae.threshold.copy_(self.log_threshold.exp())
        else:
            self.sae.b_enc.fill_(-level)

    def _terms(self, x: Tensor, run: objectives.Forward, threshold: Tensor | None) -> dict[str, Tensor]:
        zero = torch.zeros((), device=self.device)
        terms = {"mse_loss": losses.mse(x, run.recon), "aux_loss": zero, "sparsity_loss": zero}
        if self.step_count % DEAD_REFRESH == 0:
            self.dead = (self.idle_tokens >= self.dead_tokens).nonzero().view(-1)
        if self.dead.numel() and self.settings.aux_coefficient:
            aux = objectives.revival(self.sae, x, run.recon, self.dead, threshold, self.ranks.mean)
            terms["aux_loss"] = aux * (self.settings.aux_coefficient if self.spec.arch == "topk" else 1.0)
        if self.control:
            terms["sparsity_loss"] = self.control.coefficient * run.sparsity
        return terms

    def _watched(self) -> list[str]:
        gradients = [f"the gradient of {name}" for name in self.trained]
        return ["the input", "mse_loss", "aux_loss", "sparsity_loss", *gradients]

    @torch.no_grad()
    def _gradients(self) -> Tensor:
        """Hand the gradients to the optimiser's views and return their norms.

        Decoder rows have norm 1, so of their gradient only what turns them is kept (Gao et al. 2024).
        """
        sae = self.sae
        along = torch.linalg.vecdot(sae.W_dec.grad, sae.W_dec)
        sae.W_dec.grad.addcmul_(along[:, None], sae.W_dec, value=-1)
        grads = {"W_enc": sae.W_enc.grad.t(), "W_dec": sae.W_dec.grad}
        grads |= {"b_enc": sae.b_enc.grad, "b_dec": sae.b_dec.grad}
        if self.spec.arch == "jumprelu":
            grads["log_threshold"] = self._leaf.grad
        for name, p in self.trained.items():
            p.grad = self.ranks.mean(grads[name])
        return torch.stack([p.grad.norm() for p in self.trained.values()])

    @torch.no_grad()
    def _note_failure(self, finite: Tensor) -> Tensor:
        """Remember step and tensor of the first value that is not finite; return whether there was one ever."""
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
        if self.spec.arch == "jumprelu":
            self.sae.threshold.copy_(self.log_threshold.exp())

    @torch.no_grad()
    def _metrics(self, terms: dict[str, Tensor], l0: Tensor, norms: Tensor) -> dict[str, Tensor]:
        terms = {name: term.detach() for name, term in terms.items()}
        extra = {"details/l0_coefficient": self.control.coefficient} if self.control else {}
        if self.spec.arch == "jumprelu":
            extra["details/threshold"] = self.sae.threshold.mean()
        return {
            "losses/loss": sum(terms.values()),
            **{f"losses/{name}": term for name, term in terms.items()},
            "metrics/l0": l0,
            "sparsity/dead_features": (self.idle_tokens >= self.dead_tokens).sum(),
            "details/lr": torch.tensor(self.lr_now),
            "details/grad_norm": norms.norm(),
            **extra,
        }


def geometric_median(x: Float[Tensor, "n d_in"], n_steps: int = 30) -> Float[Tensor, " d_in"]:
    """Return the point with the least summed distance to the rows of x (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(n_steps):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-8)
        median = (weights[:, None] * x).sum(0) / weights.sum()
    return median
