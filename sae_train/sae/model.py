"""The sparse autoencoder itself, with weights in SAELens' orientation, and how scales and norms are folded into them.

W_enc is stored latent-major (its transpose is contiguous), which the sparse kernels and the optimiser want; its public
shape stays (d_in, d_sae).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from sae_train.errors import UserError
from sae_train.kernels import ops
from sae_train.sae.forms import FORMS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ARCHITECTURES = tuple(FORMS)


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

    act is relu, the k largest of relu (topk), or pre·1[pre > threshold] (jumprelu); gated has b_gate, b_mag and r_mag
    in place of b_enc (see forms).

    Activations may have any leading dimensions and any float dtype: all is computed and returned in the SAE's own.
    Whatever else is given is a UserError.
    """

    def __init__(self, cfg: SAEConfig, device: str | torch.device = "cpu"):
        super().__init__()
        if cfg.architecture not in FORMS:
            raise UserError(f"architecture {cfg.architecture!r} is unknown; allowed: {', '.join(FORMS)}.")
        self.cfg, self.form = cfg, FORMS[cfg.architecture]
        new = {"dtype": getattr(torch, cfg.dtype), "device": device}
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **new).t())
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **new))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **new))
        for name in self.form.vectors:
            self.register_parameter(name, nn.Parameter(torch.zeros(cfg.d_sae, **new)))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return dense latents."""
        return _spread(self.form.encode(self, self._rows(x, "activations")), x)

    def encode_sparse(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """Return values and indices of the k active latents of each token (topk only)."""
        if self.cfg.architecture != "topk":
            raise UserError(f"encode_sparse needs a topk SAE; this one is {self.cfg.architecture}: use encode.")
        rows = self._rows(x, "activations")
        values, indices = ops.encode_topk(rows, self.W_enc, self.b_enc, self.input_bias, self.cfg.k)
        return _spread(values, x), _spread(indices, x)

    @torch.no_grad()
    def encode_entries(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor, Int[Tensor, " rows"]]:
        """Return the active latents of all rows, row after row: (values, latents, how many of each row).

        The dense block is never kept whole; nothing is differentiable.
        """
        return self.form.entries(self, self._rows(x, "activations"))

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction of dense latents."""
        return _spread(torch.addmm(self.b_dec, self._rows(latents, "latents"), self.W_dec), latents)

    def decode_entries(
        self, values: Tensor, latents: Tensor, counts: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch d_in"]:
        """Return the reconstruction of active latents as encode_entries gives them."""
        pattern = ops.Pattern(latents, nnf.pad(counts.cumsum(0), (1, 0)), self.cfg.d_sae)
        return ops.decode_active(values, pattern, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction of x."""
        return _spread(self.form.reconstruct(self, self._rows(x, "activations")), x)

    def _rows(self, given: Tensor, what: str) -> Tensor:
        """What was given as rows in the SAE's dtype; UserError if it has none."""
        width = self.cfg.d_in if what == "activations" else self.cfg.d_sae
        if not isinstance(given, Tensor) or not given.is_floating_point():
            kind = getattr(given, "dtype", type(given).__name__)
            raise UserError(f"{what} are taken as a torch tensor of floats, not of type {kind}.")
        if given.ndim == 0 or given.shape[-1] != width:
            raise UserError(
                f"{what} of shape {tuple(given.shape)} do not fit this SAE: their last dimension is {width}."
            )
        if given.device != self.W_dec.device:
            raise UserError(f"{what} are on {given.device} and the SAE is on {self.W_dec.device}: move one of them.")
        return given.reshape(-1, width).to(self.W_dec.dtype)

    @property
    def input_bias(self) -> Tensor:
        """What is taken from x before encoding: b_dec, or 0 in checkpoints that say so."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else torch.zeros_like(self.b_dec)


def _spread(rows: Tensor, like: Tensor) -> Tensor:
    """Rows with the leading dimensions of what was given."""
    return rows.reshape(*like.shape[:-1], rows.shape[-1])


@torch.no_grad()
def fold_scale(sae: SAE, scale: float, mean: Float[Tensor, " d_in"] | None = None) -> SAE:
    """Return the SAE for raw activations of one that was trained on scale · (x − mean); latents keep their meaning.

    With x̃ = s·(x − m) and b = b_dec/s + m: pre = (x − b)·(s·W_enc) + b_enc gives the same latents f, and
    x̂ = f·(W_dec/s) + b. Where the encoder does not take b_dec from x, its own biases take in m. The decoder's 1/s is
    then moved into the latents for topk (and for any row of norm ≠ 1) by fold_decoder_norm.
    """
    out = copy_of(sae)
    out.W_enc.mul_(scale)
    out.W_dec.div_(scale)
    out.b_dec.div_(scale)
    if mean is not None:
        out.b_dec.add_(mean)
        if not sae.cfg.apply_b_dec_to_input:
            out.form.shift(out, -mean @ out.W_enc)
    return out


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> SAE:
    """Return the same function with unit decoder rows: W_enc and the form's scaled vectors take over the norms.

    Exact, but for topk only where all rows have the same norm, as after training: its selection compares latents.
    """
    out = copy_of(sae)
    norm = out.W_dec.to(torch.promote_types(out.W_dec.dtype, torch.float32)).norm(dim=1).clamp_min(1e-12)
    out.W_dec.copy_(out.W_dec / norm[:, None])
    out.W_enc.mul_(norm)
    for name in out.form.scaled:
        getattr(out, name).mul_(norm)
    return out


def copy_of(sae: SAE, **changes) -> SAE:
    """Return a detached copy, with fields of its configuration changed."""
    out = SAE(replace(sae.cfg, **changes), device=sae.W_dec.device)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            getattr(out, name).copy_(value)
    return out
