"""What the architectures share in training: the interface that the learner drives, and helpers of several of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.errors import UserError
from sae_train.kernels import ops
from sae_train.training import losses
from sae_train.training.l0 import level_for

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_train.config import SAESpec, Settings, TrainSettings
    from sae_train.sae.model import SAE
    from sae_train.training.ranks import Mesh

# λ_P of the pre-activation loss. Anthropic's 3e-6 (January 2025 update) is for runs of billions of tokens: in one of
# 1 M (relu, width 16k, SmolLM2) it left 43 % dead, this 9 %, at the same EV.
PRE_ACTIVATION_COEFFICIENT = 3e-4
# Where L0 starts under a controller, in targets, and how many pre-activations are looked at to find that level.
START_L0 = 2.0
QUANTILE_ELEMENTS = 2**24


@dataclass
class Forward:
    """One forward pass in training: flat latents at a pattern, the reconstruction, and what is to be paid.

    `error` is the squared error to be lowered, `sparsity` is multiplied by `price` and the controller's coefficient,
    `extra` is what else the architecture's loss has. `excess` is by how much active latents are above their levels in
    sum, in the units of `raise_levels`, and how many. `state` replaces entries of the architecture's state if the step
    is taken.
    """

    recon: Tensor
    values: Tensor
    pattern: ops.Pattern
    error: Tensor
    sparsity: Tensor | None = None
    price: Tensor | float = 1.0
    extra: Tensor | None = None
    excess: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def count_fired(self) -> Tensor:
        """Return how many tokens of the batch each latent was active on."""
        active = (self.values > 0).to(self.values.dtype)
        return active.new_zeros(self.pattern.d_sae).scatter_add_(0, self.pattern.latents.long(), active)


class Architecture(ABC):
    """One kind of SAE in training. An instance belongs to one learner: `sae` is what it trains, `leaves` what the
    optimiser moves beside the two matrices, and `state` what else a resumed run needs.

    `form` is what the finished SAE is; `base_lr` the learning rate at width 16k; `lr_factors` multiply it for some
    leaves: with Adam a parameter moves by at most lr a step, and levels, of the size of x, need more than weights do;
    `first_coefficient` is where the L0 controller's λ starts, None where L0 needs no controller.
    """

    form: str
    base_lr: float
    lr_factors: dict[str, float]
    first_coefficient: float | None
    moves_levels = False
    """whether L0 is also held by moving levels (`raise_levels`, from `Forward.excess`), which is fast"""
    splits_width = False
    """whether processes can each hold some of the latents; said in the class itself, since it depends on `forward`"""
    takes_bfloat16 = False
    """whether its step may run under autocast to bfloat16"""
    waits_for_nothing = False
    """whether nothing on the host depends on what a step finds on the device, so that it can be recorded there"""
    counts_vary = False
    """whether batches differ in how many latents are active: then that holds for steps given `crossover.room`"""

    def __init__(self, sae: SAE, spec: SAESpec, settings: TrainSettings, mesh: Mesh):
        self.check_split(spec.arch, mesh.width.size)
        self.sae, self.spec, self.settings, self.mesh = sae, spec, settings, mesh
        self.shards = mesh.width
        self.state: dict[str, Tensor] = {}
        self.n_dead = 0
        """dead latents, on all processes, that `revival` is asked about"""
        self.crossover = ops.Crossover()
        self.leaves: dict[str, Tensor] = self.make_leaves()

    @classmethod
    def check_split(cls, name: str, n_shards: int) -> None:
        """UserError where the latents are to be split and cannot be."""
        if n_shards > 1 and not vars(cls).get("splits_width"):
            raise UserError(f"the width of {name} cannot be split over processes: leave --shard-width out")

    @classmethod
    def problems(cls, settings: Settings) -> list[str]:
        """Return a sentence for each setting that this architecture cannot do."""
        return []

    @classmethod
    def step_bytes(cls, settings: TrainSettings, d_in: int) -> float:
        """Return what a step holds beside pre-activations and active latents."""
        return 0.0

    @abstractmethod
    def make_leaves(self) -> dict[str, Tensor]:
        """Return the vectors that are trained, by name."""

    @abstractmethod
    def start(self, sample: Float[Tensor, "n d_in"]) -> None:
        """Set the levels before the first step; W_enc, W_dec and b_dec are set already."""

    def inherit(self) -> None:  # noqa: B027
        """Take over, in the place of `start`, the levels of `sae`, which holds another SAE's weights already; nothing
        to do where the leaves are the SAE's own."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch d_in"]) -> Forward:
        """Run the training forward pass."""

    def decode(self, values: Tensor, pattern: ops.Pattern, frozen: bool = False) -> Float[Tensor, "batch d_in"]:
        """Return the reconstruction from the active latents of all processes; `frozen`: without gradient to W_dec and
        b_dec."""
        W_dec, b_dec = self.sae.W_dec, self.own_b_dec
        if frozen:
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        return self.shards.add_up(ops.decode_active(values, pattern, W_dec, b_dec))

    def decode_error(self, values: Tensor, pattern: ops.Pattern, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction from the active latents of all processes, and Σ (recon − x)²."""
        if self.shards.size == 1:
            return ops.decode_error(values, pattern, self.sae.W_dec, self.sae.b_dec, x)
        recon = self.decode(values, pattern)
        return recon, (recon - x).square().sum()

    @property
    def own_b_dec(self) -> Tensor:
        """What this process adds to a reconstruction beside its latents, so that all together add b_dec.

        Its gradient is then one of the parts that add up to b_dec's, as is the encoder's.
        """
        return self.sae.b_dec if self.shards.size == 1 else self.sae.b_dec / self.shards.size

    @abstractmethod
    def revival(self, run: Forward, x: Tensor, recon: Tensor, dead: Int[Tensor, " n_dead"]) -> Tensor:
        """Return the weighted loss that brings dead latents back, from some rows of x and x̂."""

    def raise_levels(self, by: Tensor, fired: Float[Tensor, " d_sae"]) -> None:
        """Raise (or, below 0, lower) what latents must exceed, of those that fired, so often, in the batch; asked only
        where `moves_levels`."""
        raise NotImplementedError

    @abstractmethod
    def settle(self) -> None:
        """Bring the SAE in line with leaves and state, after a step and after loading."""

    @abstractmethod
    def calibrate(self, held_out: Float[Tensor, "n d_in"]) -> None:
        """Bring the finished SAE's L0 on held-out activations to the target."""


@torch.no_grad()
def sum_excess(excess: Tensor, pattern: ops.Pattern) -> Float[Tensor, 2]:
    """Sum and number of the positive ones of the distances to their levels, of the latents at a pattern."""
    above = excess.detach().clamp_min(0.0)
    return torch.stack([ops.total(above, pattern), (above > 0).sum()])


def pre_activations(sae: SAE, x: Float[Tensor, "n d_in"], bias: Tensor) -> Float[Tensor, "n d_sae"]:
    """(x − b_dec)·W_enc + bias."""
    return torch.addmm(bias, x - sae.b_dec, sae.W_enc)


def start_level(arch: Architecture, sample: Float[Tensor, "n d_in"], l0: float) -> Float[Tensor, ""]:
    """Return the positive level that on average l0 (at most half) of a token's (x − b_dec)·W_enc exceed."""
    sae, width = arch.sae, arch.spec.width
    pre = (sample[: max(1, QUANTILE_ELEMENTS // width)] - sae.b_dec) @ sae.W_enc
    return level_for(pre, min(l0, width / 2), arch.shards).clamp_min(1e-3)


def fit_scale(arch: Architecture, sample: Float[Tensor, "n d_in"], level: Tensor) -> Float[Tensor, ""]:
    """Multiply W_enc so that the latents above level reconstruct best, and return the factor.

    Encoder rows of norm 1 overshoot many times over where many latents are active; what the first steps then do against
    it silences them (from L0 240 to 4 within 30 steps at width 16k).
    """
    sae = arch.sae
    x = sample[: max(1, QUANTILE_ELEMENTS // arch.spec.width)] - sae.b_dec
    pre = x @ sae.W_enc
    recon = arch.shards.sum((pre * (pre > level)) @ sae.W_dec)
    scale = ((x * recon).sum() / recon.square().sum()).nan_to_num(1.0)
    sae.W_enc.mul_(scale)
    return scale


def revival_by_aux_k(arch: Architecture, x: Tensor, recon: Tensor, dead: Tensor) -> Tensor:
    """AuxK with its coefficient (Gao et al. 2024), who divide the error beside it by ⟨‖x‖²⟩, here d_in.

    Were it smaller beside the error, Adam would not care while a latent is dead, but throw it far with the first token
    on which it is active again (at width 16k on SmolLM2, 1 M tokens: 22 % dead at the end, not 15 %).
    """
    sae, weight = arch.sae, arch.settings.aux_coefficient * arch.sae.cfg.d_in
    weights = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
    return weight * losses.aux_k(x, recon, *weights, dead, arch.mesh, arch.n_dead)


def revival_by_level(arch: Architecture, x: Tensor, bias: Tensor, dead: Tensor) -> Tensor:
    """The pre-activation loss with its coefficient, for latents that are active above 0 (Anthropic, January 2025
    update)."""
    sae = arch.sae
    loss = losses.pre_activation(x, sae.W_enc, bias, sae.W_dec, sae.b_dec, 0.0, dead)
    return PRE_ACTIVATION_COEFFICIENT * arch.shards.add_up(loss)
