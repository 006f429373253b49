"""batchtopk: the B·k largest of relu(pre) of a batch, loss ⟨‖e‖²⟩ + α·AuxK (Bussmann et al. 2024).

A finished SAE cannot see a batch: it has one threshold for all latents, and so it is a jumprelu SAE.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from sae_train.training.architectures.base import Architecture, Forward, pre_activations, revival_by_aux_k, start_level
from sae_train.training.l0 import level_on
from sae_train.training.selection import batch_topk

# Memory of the running mean of thresholds, and how far below it the next batch's is looked for at first.
SMOOTHING = 0.9
MARGIN = 0.9


class BatchSelection(Architecture):
    """Selection over the batch. `state["threshold"]` is a running mean of the smallest value that a batch kept; at the
    end it is set to the level that L0 held-out pre-activations of a token exceed on average.
    """

    form, base_lr = "jumprelu", 2e-4
    lr_factors, first_coefficient = {}, None

    def make_leaves(self):
        return {"b_enc": self.sae.b_enc, "b_dec": self.sae.b_dec}

    def start(self, sample):
        self.state["threshold"] = start_level(self, sample, self.spec.l0)
        self.settle()

    def inherit(self):
        """Until the first step the SAE keeps its thresholds, which may differ by latent; from then on it has one."""
        self.state["threshold"] = self.sae.threshold.mean()

    def forward(self, x):
        count, threshold = max(1, round(self.spec.l0 * len(x) * self.mesh.data.size)), self.state["threshold"]
        values, pattern, smallest = batch_topk(x, self.sae, count, MARGIN * threshold, self.mesh)
        run = self.reconstruct(x, values, pattern)
        run.state["threshold"] = SMOOTHING * threshold + (1 - SMOOTHING) * smallest
        return run

    @abstractmethod
    def reconstruct(self, x, values, pattern) -> Forward:
        """Decode the selected latents and measure the error."""

    def revival(self, run, x, recon, dead):
        return revival_by_aux_k(self, x, recon, dead)

    @torch.no_grad()
    def settle(self):
        self.sae.threshold.copy_(self.state["threshold"].expand_as(self.sae.threshold))

    @torch.no_grad()
    def calibrate(self, held_out):
        sae, guess = self.sae, self.state["threshold"].item()
        floors = (0.7 * guess, 0.3 * guess, 0.0)
        level = level_on(lambda x: pre_activations(sae, x, sae.b_enc), held_out, self.spec.l0, floors, self.shards)
        self.state["threshold"] = torch.full_like(self.state["threshold"], level)
        self.settle()


class BatchTopK(BatchSelection):
    """The plain error of the whole reconstruction."""

    splits_width = True

    def reconstruct(self, x, values, pattern):
        recon, error = self.decode_error(values, pattern, x)
        return Forward(recon, values, pattern, error / len(x))
