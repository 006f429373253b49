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


class Matryoshka(BatchSelection):
    """Prefixes are the first shares of the latents that `matryoshka_prefixes` names."""

    @cached_property
    def edges(self) -> Tensor:
        """Where blocks of latents begin and end: 0, then the prefixes' lengths."""
        ends = [round(share * self.spec.width) for share in self.settings.matryoshka_prefixes]
        return torch.tensor([0, *ends], device=self.sae.W_dec.device)

    def reconstruct(self, x, values, pattern):
        blocks = ops.decode_blocks(values, pattern, self.edges, self.sae.W_dec)
        prefixes = blocks.cumsum(1) + self.sae.b_dec
        return Forward(prefixes[:, -1], values, pattern, losses.nested_mse(x, prefixes))
