"""gated: a gate says whether a latent is on, a magnitude with shared weights how much (Rajamanoharan et al. 2024a).

With s = (x − b_dec)·W_enc and π = s + b_gate: f = 1[π > 0]·relu(exp(r_mag)·s + b_mag); loss ⟨‖x − x̂(f)‖²⟩ +
λ⟨Σ relu(π)·‖W_dec‖⟩ + ⟨‖x − x̂_frozen(relu(π))‖²⟩, frozen: no gradient to W_dec and b_dec as decoder.
"""

from __future__ import annotations

import torch

from sae_train.kernels import ops
from sae_train.training import losses
from sae_train.training.architectures.base import (
    START_L0,
    Architecture,
    Forward,
    pre_activations,
    revival_by_level,
    start_level,
)
from sae_train.training.l0 import level_on


class Gated(Architecture):
    """L0 by the controller, at the end one offset of b_gate on held-out activations, which leaves magnitudes alone."""

    form, base_lr = "gated", 1e-4
    lr_factors, first_coefficient = {"b_gate": 10.0, "b_mag": 10.0}, 0.3
    splits_width = True

    def make_leaves(self):
        sae = self.sae
        return {"b_gate": sae.b_gate, "b_mag": sae.b_mag, "r_mag": sae.r_mag, "b_dec": sae.b_dec}

    def start(self, sample):
        self.sae.b_gate.fill_(-start_level(self, sample, START_L0 * self.spec.l0))

    def forward(self, x):
        sae = self.sae
        # Where the gate is shut neither latents nor relu(π) have a gradient, so open entries are all that is needed.
        zero = torch.zeros_like(sae.b_gate)
        s, pattern = ops.active_above(x, sae.W_enc, zero, sae.b_dec, -sae.b_gate.detach(), crossover=self.crossover)
        # index_select, since several threads add up the gradient of b_gate[…] in any order.
        b_gate, r_mag, b_mag = (p.index_select(0, pattern.latents) for p in (sae.b_gate, sae.r_mag.exp(), sae.b_mag))
        gate = s + b_gate
        values = (r_mag * s + b_mag).relu()
        recon, frozen = self.decode(values, pattern), self.decode(gate, pattern, frozen=True)
        sparsity = self.shards.add_up(losses.l1(gate, pattern, sae.W_dec))
        return Forward(
            recon, values, pattern, losses.mse(x, recon),
            sparsity=sparsity, extra=losses.mse(x, frozen),
        )  # fmt: skip

    def revival(self, run, x, recon, dead):
        return revival_by_level(self, x, self.sae.b_gate, dead)

    def settle(self):
        """The SAE is what is trained: nothing to bring in line."""

    @torch.no_grad()
    def calibrate(self, held_out):
        sae = self.sae

        def margin(x):
            s = pre_activations(sae, x, torch.zeros_like(sae.b_gate))
            return torch.where(sae.r_mag.exp() * s + sae.b_mag > 0, s + sae.b_gate, -torch.inf)

        sae.b_gate -= level_on(margin, held_out, self.spec.l0, (0.0, -0.5, -4.0), self.shards)
