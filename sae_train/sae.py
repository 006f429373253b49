"""The sparse autoencoder itself: activations in, latents and reconstructions out, with weights in SAELens' orientation.

W_enc is stored latent-major (its transpose is contiguous), which the sparse kernels and the optimiser want; its public
shape stays (d_in, d_sae).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sae_train.errors import UserError
from sae_train.kernels import ops

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ARCHITECTURES = ("relu", "topk", "jumprelu")


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is and where it came from; everything but the first four fields is bookkeeping."""

    architecture: str
    d_in: int
    d_sae: int
    k: int | None = None
    dtype: str = "float32"
    hook_name: str = ""
    model_name: str = ""
    context_size: int | None = None
    prepend_bos: bool = True
    dataset_path: str = ""
    l0: float | None = None
    apply_b_dec_to_input: bool = True
    metadata: dict = field(default_factory=dict)


class SAE(nn.Module):
    """latents = act((x − b_dec)·W_enc + b_enc), recon = latents·W_dec + b_dec.

    act is relu, the k largest of relu (topk), or pre·1[pre > threshold] (jumprelu).
    """

    def __init__(self, cfg: SAEConfig, device: str | torch.device = "cpu"):
        super().__init__()
        if cfg.architecture not in ARCHITECTURES:
            raise UserError(f"architecture {cfg.architecture!r} is unknown; allowed: {', '.join(ARCHITECTURES)}.")
        self.cfg = cfg
        new = {"dtype": getattr(torch, cfg.dtype), "device": device}
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **new).t())
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **new))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **new))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **new))
        if cfg.architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(cfg.d_sae, **new))

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Return dense latents."""
        if self.cfg.architecture == "topk":
            values, indices = self.encode_sparse(x)
            return torch.zeros(len(x), self.cfg.d_sae, dtype=x.dtype, device=x.device).scatter(1, indices, values)
        weights = self.W_enc, self.b_enc, self._input_bias()
        if self.cfg.architecture == "relu":
            return ops.encode_relu(x, *weights)
        return ops.encode_jumprelu(x, *weights, self.threshold, 1.0)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Return values and indices of the k active latents of each token (topk only)."""
        if self.cfg.architecture != "topk":
            raise UserError(f"encode_sparse needs a topk SAE; this one is {self.cfg.architecture}: use encode.")
        return ops.encode_topk(x, self.W_enc, self.b_enc, self._input_bias(), self.cfg.k)

    @torch.no_grad()
    def encode_entries(self, x: Float[Tensor, "batch d_in"]) -> tuple[Tensor, Tensor, Int[Tensor, " batch"]]:
        """Return the active latents of all rows, row after row: (values, latents, how many of each row).

        The dense block is never kept whole; nothing is differentiable.
        """
        if self.cfg.architecture == "topk":
            values, latents = self.encode_sparse(x)
            active = values != 0
            return values[active], latents[active], active.sum(1)
        floor = self.threshold if self.cfg.architecture == "jumprelu" else 0.0
        values, pattern = ops.active_above(x, self.W_enc, self.b_enc, self._input_bias(), floor)
        return values, pattern.latents, pattern.offsets.diff()

    def decode(self, latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """Return the reconstruction of dense latents."""
        return torch.addmm(self.b_dec, latents, self.W_dec)

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return the reconstruction of x."""
        if self.cfg.architecture == "topk":
            return ops.decode(*self.encode_sparse(x), self.W_dec, self.b_dec)
        return self.decode(self.encode(x))

    def _input_bias(self) -> Tensor:
        return self.b_dec if self.cfg.apply_b_dec_to_input else torch.zeros_like(self.b_dec)


@torch.no_grad()
def fold_scale(sae: SAE, scale: float) -> SAE:
    """Return the SAE for raw activations of one that was trained on scale · x; latents keep their meaning.

    With x̃ = s·x: pre = (x − b_dec/s)·(s·W_enc) + b_enc gives the same latents f, and x̂ = f·(W_dec/s) + b_dec/s. The
    decoder's 1/s is then moved into the latents for topk (and for any row of norm ≠ 1) by fold_decoder_norm.
    """
    out = copy_of(sae)
    out.W_enc.mul_(scale)
    out.W_dec.div_(scale)
    out.b_dec.div_(scale)
    return out


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> SAE:
    """Return the same function with unit decoder rows: W_enc, b_enc and threshold take over the norms.

    Exact for relu and jumprelu. For topk the selection compares latents, so it is exact only where all rows have the
    same norm, as after training.
    """
    out = copy_of(sae)
    norm = out.W_dec.norm(dim=1).clamp_min(1e-12)
    out.W_dec.div_(norm[:, None])
    out.W_enc.mul_(norm)
    out.b_enc.mul_(norm)
    if out.cfg.architecture == "jumprelu":
        out.threshold.mul_(norm)
    return out


def copy_of(sae: SAE, **changes) -> SAE:
    """Return a detached copy, with fields of its configuration changed."""
    out = SAE(replace(sae.cfg, **changes), device=sae.W_dec.device)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            getattr(out, name).copy_(value)
    return out
