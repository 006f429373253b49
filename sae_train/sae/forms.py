"""What a finished SAE computes, by form: its latents, dense or as active entries, and their reconstruction.

A form also says which vectors the SAE has beside its matrices, and which of them a decoder row's norm goes into.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.kernels import ops

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import nn

    SAE = nn.Module  # a sae.model.SAE, which is made of a form


class Form(ABC):
    """How latents come from activations; `vectors` are parameters of shape (d_sae,).

    `scaled` are those of them that are in units of a latent; `sae_lens` is SAELens' name of the form.
    """

    vectors: tuple[str, ...]
    scaled: tuple[str, ...]
    sae_lens: str

    @abstractmethod
    def encode(self, sae: SAE, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Return dense latents."""

    @abstractmethod
    def entries(self, sae: SAE, x: Float[Tensor, "batch d_in"]) -> tuple[Tensor, Tensor, Int[Tensor, " batch"]]:
        """Return the active latents, row after row: (values, latents, how many of each row)."""

    @abstractmethod
    def reconstruct(self, sae: SAE, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return x̂."""

    def shift(self, sae: SAE, by: Float[Tensor, " d_sae"]) -> None:
        """Change the biases, in place, as if `by` had been added to x·W_enc."""
        sae.b_enc.add_(by)


class ReLU(Form):
    """relu(pre), pre = (x − b_dec)·W_enc + b_enc."""

    vectors = scaled = ("b_enc",)
    sae_lens = "standard"

    def encode(self, sae, x):
        return ops.encode_relu(x, sae.W_enc, sae.b_enc, sae.input_bias)

    def entries(self, sae, x):
        return _to_entries(ops.active_above(x, sae.W_enc, sae.b_enc, sae.input_bias, 0.0))

    def reconstruct(self, sae, x):
        return sae.decode(self.encode(sae, x))


class TopK(Form):
    """The k largest of relu(pre)."""

    vectors = scaled = ("b_enc",)
    sae_lens = "topk"

    def encode(self, sae, x):
        values, indices = sae.encode_sparse(x)
        return torch.zeros(len(x), sae.cfg.d_sae, dtype=x.dtype, device=x.device).scatter(1, indices, values)

    def entries(self, sae, x):
        values, latents = sae.encode_sparse(x)
        active = values != 0
        return values[active], latents[active], active.sum(1)

    def reconstruct(self, sae, x):
        return ops.decode(*sae.encode_sparse(x), sae.W_dec, sae.b_dec)


class JumpReLU(Form):
    """pre·1[pre > threshold]."""

    vectors = scaled = ("b_enc", "threshold")
    sae_lens = "jumprelu"

    def encode(self, sae, x):
        return ops.encode_jumprelu(x, sae.W_enc, sae.b_enc, sae.input_bias, sae.threshold, 1.0)

    def entries(self, sae, x):
        return _to_entries(ops.active_above(x, sae.W_enc, sae.b_enc, sae.input_bias, sae.threshold))

    def reconstruct(self, sae, x):
        return sae.decode(self.encode(sae, x))


class Gated(Form):
    """1[s + b_gate > 0]·relu(exp(r_mag)·s + b_mag), s = (x − b_dec)·W_enc (Rajamanoharan et al. 2024a, eqs. 3–5)."""

    vectors = ("b_gate", "b_mag", "r_mag")
    scaled = ("b_gate", "b_mag")
    sae_lens = "gated"

    def encode(self, sae, x):
        s = (x - sae.input_bias) @ sae.W_enc
        return (s + sae.b_gate > 0) * (sae.r_mag.exp() * s + sae.b_mag).relu()

    def entries(self, sae, x):
        open_, pattern = ops.active_above(x, sae.W_enc, torch.zeros_like(sae.b_gate), sae.input_bias, -sae.b_gate)
        values = (sae.r_mag.exp()[pattern.latents] * open_ + sae.b_mag[pattern.latents]).relu()
        active = values > 0
        counts = torch.bincount(pattern.tokens[active], minlength=len(x))
        return values[active], pattern.latents[active], counts

    def reconstruct(self, sae, x):
        return sae.decode(self.encode(sae, x))

    def shift(self, sae, by):
        sae.b_gate.add_(by)
        sae.b_mag.add_(sae.r_mag.exp() * by)


FORMS: dict[str, Form] = {"relu": ReLU(), "topk": TopK(), "jumprelu": JumpReLU(), "gated": Gated()}


def _to_entries(selected: tuple[Tensor, ops.Pattern]) -> tuple[Tensor, Tensor, Tensor]:
    values, pattern = selected
    return values, pattern.latents, pattern.offsets.diff()
