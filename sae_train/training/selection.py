"""The largest pre-activations where a batch's tokens, or an SAE's latents, are split over processes.

What is selected is, ties of a token aside, what one process with all tokens and latents selects: each finds its own
candidates, and all agree from which value on they are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from sae_train.kernels import ops

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae_train.sae.model import SAE
    from sae_train.training.ranks import Mesh, Ranks


def token_topk(x: Float[Tensor, "batch d_in"], sae: SAE, k: int, shards: Ranks) -> tuple[Tensor, ops.Pattern]:
    """Return which of this process's latents are among the k largest of a token, as `ops.active_topk` does."""
    weights = sae.W_enc, sae.b_enc, sae.b_dec
    if shards.size == 1:
        return ops.active_topk(x, *weights, k)
    with torch.no_grad():
        n = min(k, sae.cfg.d_sae)
        pre, found = ops.active_topk(x, *weights, n)
        keep = among_largest(pre.view(-1, n), k, shards).reshape(-1)
        pattern = ops.select_entries(found, keep)
    return ops.active_at(x, *weights, pre[keep], pattern), pattern


def among_largest(own: Float[Tensor, "batch n"], k: int, shards: Ranks) -> Bool[Tensor, "batch n"]:
    """Return which of each token's own candidates are among the k largest of everybody's; NaN is.

    Of equal ones for the last place those of the first process are taken.
    """
    every = candidates_of_all(own, shards)
    last = ops.kth_largest(every, k)[:, None]
    above, equal = ~(every <= last), every == last
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return keep.view(len(own), shards.size, -1)[:, shards.rank]


def kth_largest(own: Float[Tensor, "batch n"], k: int, shards: Ranks) -> Float[Tensor, " batch"]:
    """Return the k-th largest of everybody's values of each token, of which none is below 0."""
    if shards.size == 1:
        return ops.kth_largest(own, k)
    n = min(k, own.shape[1])
    largest = nnf.pad(own.topk(n, dim=1, sorted=False).values, (0, k - n))
    return ops.kth_largest(candidates_of_all(largest, shards), k)


def candidates_of_all(own: Float[Tensor, "batch n"], shards: Ranks) -> Float[Tensor, "batch all"]:
    """Return everybody's candidates of each token side by side."""
    return shards.stack(own).transpose(0, 1).reshape(len(own), -1)


def batch_topk(
    x: Float[Tensor, "batch d_in"], sae: SAE, count: int, floor: Float[Tensor, ""], mesh: Mesh
) -> tuple[Tensor, ops.Pattern, Tensor]:
    """Return what of this process is among the `count` largest of the whole batch, as `ops.active_batch_topk` does."""
    weights = sae.W_enc, sae.b_enc, sae.b_dec
    if mesh.size == 1:
        return ops.active_batch_topk(x, *weights, count, floor)
    own, found = ops.batch_candidates(x, *weights, count, floor)
    every = mesh.collect(own)
    if len(every) < count and floor > 0:
        own, found = ops.batch_candidates(x, *weights, count, torch.zeros_like(floor))
        every = mesh.collect(own)
    keep, smallest = _keep_largest(own, every, count, lambda: _places(found, mesh), mesh)
    pattern = ops.select_entries(found, keep)
    return ops.active_at(x, *weights, own[keep], pattern), pattern, smallest


def _keep_largest(own, every, count: int, places, mesh: Mesh) -> tuple[Bool[Tensor, " n"], Tensor]:
    """Return which of its own values this process keeps, and the smallest that anybody does.

    Of equal ones for the last places those are kept that come first in the whole batch (`places`).
    """
    n = len(every)
    if n <= count:
        return torch.ones_like(own, dtype=torch.bool), every.amin() if n else every.new_zeros(())
    smallest = every.kthvalue(n - count + 1).values
    above, equal = own > smallest, own == smallest
    left = count - int((every > smallest).sum())
    if int((every == smallest).sum()) > left:
        at = places()
        equal &= at <= mesh.collect(at[equal]).sort().values[left - 1]
    return above | equal, smallest


def _places(found: ops.Pattern, mesh: Mesh) -> Int[Tensor, " n"]:
    """Where entries lie in the dense latents of the whole batch: token·width + latent."""
    first_token = mesh.data.rank * (found.offsets.numel() - 1)
    first_latent, width = mesh.width.rank * found.d_sae, mesh.width.size * found.d_sae
    return (found.tokens + first_token) * width + found.latents + first_latent
