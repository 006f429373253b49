"""Quality of an SAE on held-out activations in the SAE's own scale: L0, EV, error and density."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_train.sae.model import SAE

# A chunk of dense latents takes 64 MB in float32.
CHUNK_ELEMENTS = 2**24


def totals(x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
    """Return Σ‖x − x̄‖² and Σ‖x‖², which are the same for every SAE."""
    return (x - x.mean(0)).square().sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)


@torch.no_grad()
def held_out_metrics(
    sae: SAE, x: Float[Tensor, "n d_in"], known: tuple[Tensor, Tensor] | None = None
) -> dict[str, float | Tensor]:
    """Return metrics/l0, metrics/explained_variance, metrics/mse and density, the share of tokens per latent (d_sae).

    EV = 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²; mse = Σ‖x − x̂‖² / Σ‖x‖² (1 for a reconstruction of 0). `known`: what `totals`
    returned for x.
    """
    error = torch.zeros((), dtype=torch.float64, device=x.device)
    counts = torch.zeros(sae.cfg.d_sae, device=x.device)
    for chunk in x.split(max(1, CHUNK_ELEMENTS // sae.cfg.d_sae)):
        values, latents, n_active = sae.encode_entries(chunk)
        error += (chunk - sae.decode_entries(values, latents, n_active)).square().sum(dtype=torch.float64)
        counts += torch.bincount(latents, minlength=sae.cfg.d_sae)
    spread, energy = known or totals(x)
    return {
        "metrics/l0": (counts.sum(dtype=torch.float64) / len(x)).item(),
        "metrics/explained_variance": (1 - error / spread).item(),
        "metrics/mse": (error / energy).item(),
        "density": counts / len(x),
    }
