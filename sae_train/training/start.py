"""What a learner starts from: its SAE, its centre, its optimiser, and its learning rate with the schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.sae.model import SAE, SAEConfig, copy_of, fold_decoder_norm, fold_scale
from sae_train.training.architectures import TRAINED

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_train.config import SAESpec, TrainSettings

# An SAE that is trained on at the full rate of a short run unlearns at first. On the toy (width 256, from L0 8, 150
# steps), EV at L0 8 and 4: topk .957 and .893 at the full rate, .963 and .896 at a third, .963 and .889 at an eighth.
FROM_AN_SAE = 1 / 3


def new_sae(spec: SAESpec, d_in: int, device: str | torch.device, n_shards: int = 1) -> SAE:
    """The SAE that will be finished: of its architecture's form, whose name is kept where the form has another.

    Where its latents are split over several processes, one with the share of each.
    """
    form = TRAINED[spec.arch].form
    metadata = {} if form == spec.arch else {"trained_as": spec.arch}
    k = round(spec.l0) if form == "topk" else None
    return SAE(SAEConfig(form, d_in, spec.width // n_shards, k=k, metadata=metadata), device=device)


@torch.no_grad()
def as_trained(
    source: SAE, scale: float, mean: Float[Tensor, " d_in"] | None, generator: torch.Generator
) -> SAE:  # fmt: skip
    """Return a finished SAE for raw activations as one for scale · (raw − mean), in the form that learners train.

    There b_dec is taken from the input and decoder rows have norm 1; a row of zeros, which is no direction, becomes a
    random one whose latent stays at 0. Computed in float64.
    """
    sae = copy_of(source, dtype="float64")
    sae = fold_scale(sae, 1 / scale, None if mean is None else -scale * mean.to(sae.W_dec))
    if not sae.cfg.apply_b_dec_to_input:
        sae.form.shift(sae, sae.b_dec @ sae.W_enc)
        sae = copy_of(sae, apply_b_dec_to_input=True)
    sae = fold_decoder_norm(sae)
    empty = sae.W_dec.norm(dim=1) < 0.5
    rows = torch.randn(int(empty.sum()), sae.cfg.d_in, generator=generator).to(sae.W_dec)
    sae.W_dec[empty] = rows / rows.norm(dim=1, keepdim=True)
    return sae


def geometric_median(x: Float[Tensor, "n d_in"], n_steps: int = 30) -> Float[Tensor, " d_in"]:
    """Return the point with the least summed distance to the rows of x (Weiszfeld's iteration)."""
    mean = x.mean(0)
    x = x - mean  # so that distances come out of products, which take no memory, without loss
    squares, median = x.square().sum(1), torch.zeros_like(mean)
    for _ in range(n_steps):
        distances = (squares - 2 * (x @ median) + median.square().sum()).clamp_min(1e-16).sqrt()
        weights = 1 / distances
        median = weights @ x / weights.sum()
    return mean + median


def default_lr(spec: SAESpec, n_steps: int) -> float:
    """base·√(2^14/width)·min(8, max(1, √(30,000/n_steps))), base by architecture.

    The last factor is for short runs and measured at 500 steps, where it is 7.7.
    """
    short = min(8.0, max(1.0, math.sqrt(30_000 / n_steps)))
    return TRAINED[spec.arch].base_lr * math.sqrt(2**14 / spec.width) * short


def lr_of(spec: SAESpec, settings: TrainSettings, n_steps: int) -> float:
    """The rate that was asked for, else the default; of that FROM_AN_SAE where training starts from an SAE."""
    return settings.lr or default_lr(spec, n_steps) * (FROM_AN_SAE if settings.init_from else 1.0)


def lr_factor(step: int, n_steps: int, warm_up: float, decay: float) -> float:
    """Rise linearly over the first share of the steps, stay at 1, fall linearly to 0 over the last share."""
    rise = (step + 1) / max(1.0, warm_up * n_steps)
    fall = (n_steps - step) / max(1.0, decay * n_steps)
    return min(1.0, rise, fall)


def new_adam(trained: dict[str, Tensor], factors: dict[str, float], lr: float) -> torch.optim.Adam:
    """Return the optimiser of all that is trained; `factors` multiply the learning rate of some."""
    by_factor: dict[float, list[Tensor]] = {}
    for name, p in trained.items():
        by_factor.setdefault(factors.get(name, 1.0), []).append(p)
    device = trained["W_dec"].device
    on_gpu = device.type == "cuda"  # there rates are tensors, for recorded steps to read
    groups = [{"params": params, "factor": factor} for factor, params in by_factor.items()]
    for group in groups if on_gpu else ():
        group["lr"] = torch.full((), lr, device=device)
    return torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True, capturable=on_gpu)
