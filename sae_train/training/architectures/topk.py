"""topk: the k largest of relu(pre) of each token, loss ⟨‖e‖²⟩ + α·AuxK (Gao et al. 2024)."""

from __future__ import annotations

from sae_train.training.architectures.base import Architecture, Forward, revival_by_aux_k
from sae_train.training.selection import token_topk


class TopK(Architecture):
    """L0 is exact by selection: nothing steers it, starts it or calibrates it. lr: Gao et al. 2024."""

    form, base_lr = "topk", 2e-4
    lr_factors, first_coefficient = {}, None
    splits_width = takes_bfloat16 = waits_for_nothing = True

    @classmethod
    def problems(cls, settings):
        fractional = [str(l0) for l0 in settings.sae.l0 if l0 != int(l0)]
        what = "topk keeps a whole number of latents per token"
        return [f"l0 {', '.join(fractional)} is not whole: {what}"] if fractional else []

    def make_leaves(self):
        return {"b_enc": self.sae.b_enc, "b_dec": self.sae.b_dec}

    def start(self, sample):
        """No level to set."""

    def forward(self, x):
        pre, pattern = token_topk(x, self.sae, self.sae.cfg.k, self.shards)
        values = pre.relu()
        recon, error = self.decode_error(values, pattern, x)
        return Forward(recon, values, pattern, error / len(x))

    def revival(self, run, x, recon, dead):
        return revival_by_aux_k(self, x, recon, dead)

    def settle(self):
        """The SAE is what is trained: nothing to bring in line."""

    def calibrate(self, held_out):
        """k is the L0."""
