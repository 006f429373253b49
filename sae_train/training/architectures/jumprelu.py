"""jumprelu: latents pre·1[pre > θ], loss ⟨‖e‖²⟩ + λ·L0 with straight-through gradients (Rajamanoharan et al. 2024b).

Where L0 rests, λ is −∂⟨‖e‖²⟩/∂L0. The error falls about as a power of L0, so λ·L0/⟨‖e‖²⟩ is nearly the same at every
width, target and scale of activations, and that is what the controller steers: λ = coefficient·⟨‖e‖²⟩/L0*.
"""

from __future__ import annotations

import math

import torch

from sae_train.kernels import ops
from sae_train.training.architectures.base import (
    START_L0,
    Architecture,
    Forward,
    fit_scale,
    pre_activations,
    revival_by_aux_k,
    start_level,
    sum_excess,
)
from sae_train.training.l0 import level_on

# Learning rate of log θ at width 16k, in those of the weights.
THRESHOLD_FACTOR = 15.0
# No threshold is lowered below this to win more latents, where pre-activations are of order 1: the window of its
# gradient is a share of it.
LOWEST = 1e-3
# What stands for a threshold of 0, which has no logarithm.
NO_THRESHOLD = 1e-12


class JumpReLU(Architecture):
    """log θ is trained; L0 by the controller, at the end one offset of log θ on held-out activations."""

    form, base_lr = "jumprelu", 2e-4
    first_coefficient = 0.4
    splits_width = takes_bfloat16 = moves_levels = waits_for_nothing = counts_vary = True

    def make_leaves(self):
        # A step of log θ changes θ by a share: the rule that wide SAEs take small steps is not for it.
        self.lr_factors = {"log_threshold": THRESHOLD_FACTOR * math.sqrt(self.spec.width / 2**14)}
        log_threshold = torch.zeros_like(self.sae.b_enc, requires_grad=True)
        return {"b_enc": self.sae.b_enc, "b_dec": self.sae.b_dec, "log_threshold": log_threshold}

    def start(self, sample):
        level = start_level(self, sample, START_L0 * self.spec.l0)
        self.leaves["log_threshold"].copy_((level * fit_scale(self, sample, level)).log())
        self.settle()

    def inherit(self):
        self.leaves["log_threshold"].copy_(self.sae.threshold.clamp_min(NO_THRESHOLD).log())
        self.settle()

    def forward(self, x):
        sae, threshold = self.sae, self.leaves["log_threshold"].exp()
        width = self.settings.jumprelu_bandwidth * threshold.detach()
        # Every entry whose gradient is not zero: active, or inside the rectangle just below the threshold.
        pre, pattern = ops.active_above(
            x, sae.W_enc, sae.b_enc, sae.b_dec, threshold.detach() - width / 2, crossover=self.crossover
        )
        values, active = ops.jumprelu_active(pre, pattern, threshold, width)
        recon, error = self.decode_error(values, pattern, x)
        error = error / len(x)
        price = self.mesh.data.mean(error.detach()) / self.spec.l0
        # log θ is what moves, so that distances are shares of θ.
        excess = sum_excess(values.detach() / threshold.detach()[pattern.latents] - 1, pattern)
        return Forward(recon, values, pattern, error, self.shards.add_up(active / len(x)), price, excess=excess)

    def revival(self, run, x, recon, dead):
        return revival_by_aux_k(self, x, recon, dead)

    @torch.no_grad()
    def raise_levels(self, by, fired):
        # A latent that was silent stays where it is: moved one way alone, thresholds of latents that are often silent
        # run off. Raised with the others they were silent for good (12 % dead at L0 96 of 256 values, width 1k, not
        # .5 %); lowered alone they all came to fire, and the others' rose without end (EV .81 at L0 16 of 576 values,
        # width 4k, not .90).
        by = torch.where(fired > 0, by, 0.0)
        self.leaves["log_threshold"].add_(by).clamp_min_(math.log(LOWEST))
        self.settle()

    @torch.no_grad()
    def settle(self):
        self.sae.threshold.copy_(self.leaves["log_threshold"].exp())

    @torch.no_grad()
    def calibrate(self, held_out):
        sae = self.sae
        ratio = lambda x: pre_activations(sae, x, sae.b_enc) / sae.threshold  # noqa: E731
        share = level_on(ratio, held_out, self.spec.l0, (0.7, 0.3, 1e-3), self.shards)
        self.leaves["log_threshold"] += math.log(share)
        self.settle()
