"""One SAE in training: its steps, the state that a resume needs, and the finished SAE for raw activations.

A learner keeps its own optimiser, L0 control, dead-latent counters, random generator and failure flag, so that many can
train on one stream of batches without touching each other. A step never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_train.kernels import ops
from sae_train.sae.model import SAE, fold_decoder_norm, fold_scale
from sae_train.training import shards
from sae_train.training.architectures import TRAINED, Forward
from sae_train.training.l0 import L0Controller, LevelController
from sae_train.training.precision import matmul_precision, takes_bfloat16
from sae_train.training.ranks import Mesh
from sae_train.training.recording import Late, Recorder, Room
from sae_train.training.start import as_trained, geometric_median, lr_factor, lr_of, new_adam, new_sae

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_train.config import SAESpec, TrainSettings

# The list of dead latents is rebuilt every so many steps: building it is the one place that waits for the device.
DEAD_REFRESH = 8
MAX_DEAD_TOKENS = 10_000_000
DEAD_SHARE = 0.05

# Entries (tokens × dead latents) that the loss on dead latents looks at in one step. Where most latents are dead it
# would cost more than all the rest (2.5 times, with 60 % of 16k dead), so it then takes every n-th token of the batch.
MAX_REVIVAL_ENTRIES = 5 * 2**20


class Learner:
    """Train one SAE on x with ⟨‖x‖²⟩ = d_in.

    With a `mesh` of several processes each steps on its equal share of a batch; gradients, losses and counts are those
    of the whole batch, so that all processes hold the same weights. Along the mesh's `width` each holds some of the
    latents, their vectors and moments, and b_dec; it sees the same rows as the others there.
    """

    def __init__(
        self,
        spec: SAESpec,
        settings: TrainSettings,
        d_in: int,
        n_steps: int,
        device: str | torch.device = "cpu",
        mesh: Mesh | None = None,
        begun: int = 0,
    ):
        """`begun` is the step from which a finished run goes on: the learning rate then rises and falls once more."""
        self.mesh = mesh or Mesh()
        self.spec, self.name, self.settings, self.n_steps, self.begun = spec, spec.name, settings, n_steps, begun
        self.d_in, self.device = d_in, torch.device(device)
        self.sae = new_sae(spec, d_in, device, self.mesh.width.size)
        self.arch = TRAINED[spec.arch](self.sae, spec, settings, self.mesh)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.lr = lr_of(spec, settings, n_steps)
        share = math.ceil(DEAD_SHARE * settings.tokens)
        self.bfloat16 = takes_bfloat16(settings, self.device)
        self.dead_tokens = settings.dead_tokens or min(MAX_DEAD_TOKENS, share)
        self.leaves = {"W_enc": self.sae.W_enc, "W_dec": self.sae.W_dec} | self.arch.leaves
        self.trained = {name: leaf.detach() for name, leaf in self.leaves.items()}
        # Contiguous, as the optimiser wants it.
        self.trained["W_enc"] = self.trained["W_enc"].t()
        self.optimiser = new_adam(self.trained, self.arch.lr_factors, self.lr)
        self.control = None
        if self.arch.first_coefficient is not None:
            first = begun or round(settings.lr_warm_up * n_steps)
            kind = LevelController if self.arch.moves_levels else L0Controller
            self.control = kind(spec.l0, self.arch.first_coefficient, first, device)
        self.step_count = 0
        self.last: dict[str, Tensor] = {}
        self.failed: str | None = None
        new = {"device": self.device, "dtype": torch.int64}
        self.idle_tokens = torch.zeros(self.sae.cfg.d_sae, **new)
        self.dead = torch.zeros(0, **new)
        self.failure = torch.full((2,), -1, **new)
        self.now = torch.zeros((), **new)
        self.records = self.device.type == "cuda" and self.arch.waits_for_nothing and self.mesh.size == 1
        self.first_latent = self.mesh.width.rank * self.sae.cfg.d_sae
        self._whole: SAE | None = None
        self.recorder = Recorder()
        self.room = Room()
        self.n_found = torch.zeros((), **new)
        self.unsettled: tuple[Tensor, int, Late, str] | None = None

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "n d_in"]) -> None:
        """Set random decoder rows, W_enc to their transpose, b_dec to the geometric median; then the levels."""
        sae = self.sae
        rows = shards.draw_rows(*sae.W_dec.shape, self.generator, self.mesh.width)
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_dec.copy_(geometric_median(sample))
        self.arch.start(sample)

    @torch.no_grad()
    def inherit(self, source: SAE, scale: float, mean: Float[Tensor, " d_in"] | None = None) -> None:
        """Start from a finished SAE for raw activations instead, where this one sees scale · (raw − mean)."""
        sae = as_trained(source, scale, mean, self.generator)
        for name, p in self.sae.named_parameters():
            p.copy_(shards.take(name, getattr(sae, name), self.mesh.width))
        self.arch.inherit()

    def step(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Tensor]:
        """Take one optimiser step; the returned tensors stay on the device.

        On a GPU the steps of an architecture that never waits for it are recorded, and played while no latent is dead.
        Where the number of active latents varies they get room for some more than of late, and x must stay as it is
        until the next step: `catch_up`. Products that are not in bfloat16 are as precise as the process has it
        (`loop.tf32_products`).
        """
        self.catch_up()
        if self.step_count % DEAD_REFRESH == 0:
            self._set_dead((self.idle_tokens >= self.dead_tokens).nonzero().view(-1))
        metrics = self._make(x, self.room.size if self.records else None)
        self.step_count += 1
        return metrics

    def catch_up(self) -> None:
        """Make the last step again if it found more active latents than it had room for: it has then changed nothing.

        Whoever reads a learner between steps comes here first; `check`, `calibrate`, `export` and `state_dict` do.
        """
        if self.unsettled is None:
            return
        (x, room, found, precision), self.unsettled = self.unsettled, None
        n = found.read()
        self.room.take_in(n)
        if n <= room:
            self.arch.crossover.take_in(n, len(x) * self.spec.width, self.device)
            return
        self.step_count -= 1
        with matmul_precision(precision), torch.enable_grad():
            self.last = self._make(x, None)
        self.step_count += 1

    def _make(self, x: Tensor, room: int | None) -> dict[str, Tensor]:
        """Make the step that is due: with room for so many active latents and no wait, or for as many as there are."""
        self._set_lr()
        self.now.fill_(self.step_count)
        crossover = self.arch.crossover
        crossover.room = room
        may_play = self.records and not self._revives() and (room is not None or not self.arch.counts_vary)
        kind = room, crossover.dense, crossover.crowded
        metrics = self.recorder.make(self._step, x, may_play, kind)
        if room is not None:
            self.unsettled = x, room, Late(self.n_found), torch.get_float32_matmul_precision()
        return metrics | {"details/lr": torch.tensor(self.lr_now)}

    def _revives(self) -> bool:
        return bool(self.arch.n_dead and self.settings.aux_coefficient)

    def _set_dead(self, dead: Tensor) -> None:
        """Take these latents for dead; how many others have is asked where there are any."""
        self.dead = dead
        self.arch.n_dead = sum(self.mesh.width.gather(dead.numel()))

    def _step(self, x: Tensor) -> dict[str, Tensor]:
        """What of a step happens on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16 and self.arch.takes_bfloat16):
            run = self.arch.forward(x)
        terms = self._terms(x, run)
        sum(terms.values()).backward()
        terms = {name: self.mesh.data.mean(term) for name, term in terms.items()}
        norms = self._gradients()
        lost = self._note_count(run.pattern)
        bad = self._note_failure(torch.stack([x.abs().amax(), *terms.values(), *norms]), lost)
        void = bad if lost is None else bad | lost
        self._apply(norms, run, void)
        for p in (*self.leaves.values(), *self.trained.values()):
            p.grad = None
        fired, n_tokens = self.mesh.data.sum(run.count_fired()), len(x) * self.mesh.data.size
        l0 = self.mesh.width.sum(fired.sum()) / n_tokens
        idle = (self.idle_tokens + n_tokens).masked_fill_(fired > 0, 0)
        self.idle_tokens.copy_(idle if lost is None else torch.where(lost, self.idle_tokens, idle))
        metrics = self._metrics(run, terms, l0, norms)
        if self.control:
            self.control.update(l0, self.now, ~void)
        if self.arch.moves_levels:
            excess, n_active = self.mesh.sum(run.excess)
            rise = self.control.rise(l0, excess / n_active.clamp_min(1))
            self.arch.raise_levels(rise.masked_fill(void, 0.0), fired)
        return metrics

    def check(self) -> str | None:
        """Read the failure flag (waits for the device); return and keep in `failed` what happened, or None."""
        self.catch_up()
        step, what = self.failure.tolist()
        if step >= 0 and self.failed is None:
            gradients = [f"the gradient of {name}" for name in self.trained]
            watched = ["the input", "mse_loss", "aux_loss", "sparsity_loss", *gradients]  # in the order of `_step`
            self.failed = f"step {step}: {watched[what]} is not finite"
        return self.failed

    @torch.no_grad()
    def calibrate(self, held_out: Float[Tensor, "n d_in"]) -> None:
        """Bring L0 on held-out activations to the target, as the architecture does it."""
        self.catch_up()
        self.arch.calibrate(held_out)

    @torch.no_grad()
    def export(self, scale: float, mean: Float[Tensor, " d_in"] | None = None) -> SAE:
        """Return the SAE for raw activations, decoder rows of norm 1, of this one trained on scale · (raw − mean)."""
        self.catch_up()
        return fold_decoder_norm(fold_scale(self.whole, scale, mean))

    @property
    def leads(self) -> bool:
        """Whether this process looks at the SAE for all that hold latents of it."""
        return self.mesh.width.is_first

    @property
    def whole(self) -> SAE:
        """The SAE with all latents: where they are split, inside of `gathered` on the first process of a team alone."""
        return self.sae if self.mesh.width.size == 1 else self._whole

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let the first process of the team see the `whole` SAE meanwhile; all of the team come here."""
        self.catch_up()
        self._whole = shards.gather(self.sae, self.mesh.width)
        try:
            yield
        finally:
            self._whole = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-equal resume needs: nested dictionaries of tensors and JSON values."""
        self.catch_up()
        return {
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "adam": {name: dict(self.optimiser.state[p]) for name, p in self.trained.items()},
            "control": self.control.state_dict() if self.control else {},
            "architecture": dict(self.arch.state),
            "crossover": self.arch.crossover.state_dict(),
            "idle_tokens": self.idle_tokens,
            "dead": self.dead + self.first_latent,
            "failure": self.failure,
            "generator": self.generator.get_state(),
            "step_count": self.step_count,
            "failed": self.failed,
            "last": [[name, float(value)] for name, value in self.last.items()],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""
        for name, p in self.trained.items():
            p.copy_(state["weights"][name])
            saved = state["adam"].get(name, {})
            self.optimiser.state[p] = {key: value.to(p.device).clone() for key, value in saved.items()}
        self.arch.state = {name: value.to(self.device).clone() for name, value in state["architecture"].items()}
        self.arch.settle()
        self.arch.crossover.load_state_dict(state["crossover"])
        if self.control:
            self.control.load_state_dict(state["control"])
        for name in ("idle_tokens", "failure"):
            setattr(self, name, state[name].to(self.device).clone())
        self._set_dead(state["dead"].to(self.device) - self.first_latent)
        self.generator.set_state(state["generator"])
        self.step_count, self.failed = state["step_count"], state["failed"]
        self.last = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.get("last", ())}
        self.recorder.forget()
        self.room, self.unsettled = Room(), None

    def _set_lr(self) -> None:
        s, done, n_steps = self.settings, self.step_count - self.begun, self.n_steps - self.begun
        self.lr_now = self.lr * lr_factor(done, n_steps, s.lr_warm_up, s.lr_decay)
        for group in self.optimiser.param_groups:
            lr = self.lr_now * group["factor"]
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

    def _terms(self, x: Tensor, run: Forward) -> dict[str, Tensor]:
        zero = torch.zeros((), device=self.device)
        terms = {"mse_loss": run.error, "aux_loss": zero, "sparsity_loss": zero}
        if self._revives():
            stride = -(-len(x) * self.arch.n_dead // MAX_REVIVAL_ENTRIES)
            terms["aux_loss"] = self.arch.revival(run, x[::stride], run.recon[::stride], self.dead)
        if run.extra is not None:
            terms["aux_loss"] = terms["aux_loss"] + run.extra
        if self.control:
            terms["sparsity_loss"] = self.control.coefficient * run.price * run.sparsity
        return terms

    @torch.no_grad()
    def _gradients(self) -> Tensor:
        """Hand the gradients to the optimiser's views and return their norms.

        Decoder rows have norm 1, so of their gradient only what turns them is kept (Gao et al. 2024).
        """
        sae = self.sae
        ops.remove_parallel(sae.W_dec.grad, sae.W_dec)
        for name, p in self.trained.items():
            grad = self.leaves[name].grad
            p.grad = self.mesh.data.mean(grad.t() if name == "W_enc" else grad)
            if name == shards.WHOLE:
                p.grad = self.mesh.width.sum(p.grad)
        return shards.norms({name: p.grad for name, p in self.trained.items()}, self.mesh.width)

    def _note_count(self, pattern: ops.Pattern) -> Tensor | None:
        """Keep how many entries there were; return whether some found no room: the step must then change nothing."""
        if pattern.n_found is not None:
            self.n_found.copy_(pattern.n_found)
        elif self.arch.counts_vary:
            self.room.take_in(pattern.latents.numel())
        return pattern.lost

    @torch.no_grad()
    def _note_failure(self, watched: Tensor, lost: Tensor | None) -> Tensor:
        """Remember step and tensor of the first value that is not finite; return whether there was one ever."""
        finite = watched.isfinite()
        now = torch.stack([self.now, finite.long().argmin()])
        new = (self.failure[0] < 0) & ~finite.all()
        self.failure.copy_(torch.where(new if lost is None else new & ~lost, now, self.failure))
        return self.failure[0] >= 0

    @torch.no_grad()
    def _apply(self, norms: Tensor, run: Forward, void: Tensor) -> None:
        """Clip, step and renormalise; a learner that has failed, and a void step, keep the weights bit for bit."""
        # Fused Adam reads these two for mixed precision: it divides gradients by grad_scale and skips the step where
        # found_inf is set. Here that clips and stops in the optimiser's own kernel, without a wait for the device.
        self.optimiser.grad_scale = (norms.norm() / self.settings.grad_clip).clamp_min(1.0).float()
        self.optimiser.found_inf = void.to(torch.float32)
        self.optimiser.step()
        ops.normalise(self.sae.W_dec, unless=void)
        for name, value in run.state.items():
            self.arch.state[name] = torch.where(void, self.arch.state[name], value)
        self.arch.settle()

    @torch.no_grad()
    def _metrics(self, run: Forward, terms: dict[str, Tensor], l0: Tensor, norms: Tensor) -> dict[str, Tensor]:
        terms = {name: term.detach() for name, term in terms.items()}
        extra = {}
        if self.control:
            dense = torch.full_like(l0, float(run.pattern.dense))
            extra = {"details/l0_coefficient": self.control.coefficient * run.price, "details/dense_products": dense}
        if "threshold" in self.sae.form.vectors:
            extra["details/threshold"] = self.mesh.width.mean(self.sae.threshold.mean())
        return {
            "losses/loss": sum(terms.values()),
            **{f"losses/{name}": term for name, term in terms.items()},
            "metrics/l0": l0,
            "sparsity/dead_features": self.mesh.width.sum((self.idle_tokens >= self.dead_tokens).sum()),
            "details/grad_norm": norms.norm(),
            **extra,
        }
