"""relu: latents relu(pre), loss ⟨‖e‖²⟩ + λ⟨Σ f·‖W_dec‖⟩ with λ under control (Anthropic, April 2024 update)."""

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
from sae_train.training.metrics import held_out_metrics

# The bias is offset at the end only if the controller left L0 further than this from its target.
TOLERANCE = 0.01


class ReLU(Architecture):
    """L0 by the controller; the bias starts at the level that START_L0 targets exceed."""

    form, base_lr = "relu", 6e-4
    lr_factors, first_coefficient = {"b_enc": 10.0}, 0.3
    splits_width = takes_bfloat16 = waits_for_nothing = counts_vary = True

    def make_leaves(self):
        return {"b_enc": self.sae.b_enc, "b_dec": self.sae.b_dec}

    def start(self, sample):
        self.sae.b_enc.fill_(-start_level(self, sample, START_L0 * self.spec.l0))

    def forward(self, x):
        sae = self.sae
        values, pattern = ops.active_above(x, sae.W_enc, sae.b_enc, sae.b_dec, 0.0, crossover=self.crossover)
        sparsity = self.shards.add_up(losses.l1(values, pattern, sae.W_dec))
        recon, error = self.decode_error(values, pattern, x)
        return Forward(recon, values, pattern, error / len(x), sparsity)

    def revival(self, run, x, recon, dead):
        return revival_by_level(self, x, self.sae.b_enc, dead)

    def settle(self):
        """The SAE is what is trained: nothing to bring in line."""

    @torch.no_grad()
    def calibrate(self, held_out):
        """Offset b_enc, which shrinks or grows every latent a little, where L0 is more than TOLERANCE off."""
        sae, target = self.sae, self.spec.l0
        l0 = sum(self.shards.gather(held_out_metrics(sae, held_out)["metrics/l0"]))
        if abs(l0 / target - 1) > TOLERANCE:
            margin, floors = lambda x: pre_activations(sae, x, sae.b_enc), (0.0, -0.5, -4.0)
            sae.b_enc -= level_on(margin, held_out, target, floors, self.shards)
