"""An SAE whose latents are split over processes: what of it is whole, and how it is put together.

Each process holds an SAE of its own latents, with the vectors of these; b_dec alone is whole on all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.sae.model import SAE

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_train.training.ranks import Ranks

WHOLE = "b_dec"
BLOCK = 16  # numbers that torch.randn draws at a time: draws of multiples of it follow one another as in one draw


@torch.no_grad()
def gather(sae: SAE, shards: Ranks) -> SAE | None:
    """Return, on the first process alone, the SAE with the latents of all."""
    if shards.size == 1:
        return sae
    whole = None
    if shards.is_first:
        whole = SAE(replace(sae.cfg, d_sae=shards.size * sae.cfg.d_sae), device=sae.W_dec.device)
        whole.b_dec.copy_(sae.b_dec)
    for name, part in sae.named_parameters():
        if name != WHOLE:
            into = None if whole is None else _latent_major(name, getattr(whole, name)).chunk(shards.size)
            shards.bring(_latent_major(name, part), into)
    return whole


def take(name: str, value: Tensor, shards: Ranks) -> Tensor:
    """Return what of an SAE's parameter belongs to this process."""
    if name == WHOLE or shards.size == 1:
        return value
    own = _latent_major(name, value).chunk(shards.size)[shards.rank]
    return own.t() if name == "W_enc" else own


def _latent_major(name: str, parameter: Tensor) -> Tensor:
    return parameter.detach().t() if name == "W_enc" else parameter.detach()


def draw_rows(n: int, d_in: int, generator: torch.Generator, shards: Ranks) -> Float[Tensor, "n d_in"]:
    """Return this process's n rows of the normal numbers that a process with all rows draws."""
    if n * d_in % BLOCK:
        return torch.randn(n * shards.size, d_in, generator=generator)[n * shards.rank : n * (shards.rank + 1)]
    for rank in range(shards.size):
        rows = torch.randn(n, d_in, generator=generator)
        if rank == shards.rank:
            own = rows
    return own


def norms(gradients: dict[str, Tensor], shards: Ranks) -> Tensor:
    """Return the norms of these tensors with the latents of all."""
    own = torch.stack([tensor.norm() for tensor in gradients.values()])
    if shards.size == 1:
        return own
    squares = own.square()
    if WHOLE in gradients and not shards.is_first:  # which counts once
        squares[list(gradients).index(WHOLE)] = 0.0
    return shards.sum(squares).sqrt()
