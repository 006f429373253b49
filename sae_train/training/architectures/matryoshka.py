"""matryoshka: batchtopk whose nested prefixes of latents must each reconstruct x (Bussmann et al. 2025).

Loss: the mean over prefixes of ⟨‖x − x̂_prefix‖²⟩, + α·AuxK on the whole.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from sae_train.kernels import ops
from sae_train.training import losses
from sae_train.training.architectures.base import Forward
from sae_train.training.architectures.batchtopk import BatchSelection

PREFIX_COPIES = 4  # what a step holds of a batch for each prefix: block, sum, error, gradient


class Matryoshka(BatchSelection):
    """Prefixes are the first shares of the latents that `matryoshka_prefixes` names."""

    splits_width = True

    @classmethod
    def problems(cls, settings):
        shares = settings.train.matryoshka_prefixes
        if list(shares) != sorted(shares) or shares[-1] != 1:
            shown = ", ".join(f"{share:g}" for share in shares)
            return [f"matryoshka_prefixes {shown}: give rising shares, the last of them 1"]
        lengths = {width: [0, *(round(share * width) for share in shares)] for width in settings.sae.width}
        return [
            f"matryoshka_prefixes: at width {width} a prefix adds no latent: leave out the narrowest or raise the width"
            for width, ends in lengths.items()
            if len(set(ends)) < len(ends)
        ]

    @classmethod
    def step_bytes(cls, settings, d_in):
        return 4.0 * PREFIX_COPIES * settings.batch_tokens * d_in * len(settings.matryoshka_prefixes)

    @cached_property
    def edges(self) -> Tensor:
        """Where blocks of latents begin and end: 0, then the prefixes' lengths; of this process's latents."""
        ends = [round(share * self.spec.width) for share in self.settings.matryoshka_prefixes]
        edges, n = torch.tensor([0, *ends], device=self.sae.W_dec.device), self.sae.cfg.d_sae
        return (edges - self.shards.rank * n).clamp(0, n)

    def reconstruct(self, x, values, pattern):
        blocks = ops.decode_blocks(values, pattern, self.edges, self.sae.W_dec)
        prefixes = self.shards.add_up(blocks.cumsum(1) + self.own_b_dec)
        return Forward(prefixes[:, -1], values, pattern, losses.nested_mse(x, prefixes))
