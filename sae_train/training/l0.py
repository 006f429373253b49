"""Steering of L0 for relu, jumprelu and gated: controllers of the price of a latent and of levels, and the levels that
give an L0.

Everything lives in device tensors, so that an update costs no wait; `state_dict` is all a resumed run needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.training.ranks import Ranks

if TYPE_CHECKING:
    from jaxtyping import Float


# Rows whose dense margins are held at a time while a level is looked for.
CHUNK_ROWS = 1024


class L0Controller:
    """A PI controller of the price λ in log space: log λ = I + K_p·e, I ← I + K_i·e, e = clip(log(L0_ema / L0*), ±1).

    I stays within a factor MAX_FACTOR of where it began, so that it cannot wind up while λ has no grip on L0.
    """

    PROPORTIONAL = 1.0
    INTEGRAL = 0.02
    SMOOTHING = 0.8
    MAX_FACTOR = 1e4

    def __init__(self, target: float, start: float, first_step: int, device: torch.device | str = "cpu"):
        self.target, self.start, self.first_step = target, math.log(start), first_step
        self.integral = torch.tensor(self.start, device=device)
        self.ema = torch.tensor(float("nan"), device=device)

    @property
    def coefficient(self) -> Tensor:
        """λ now."""
        return (self.integral + self.PROPORTIONAL * self._error()).exp()

    @torch.no_grad()
    def update(self, l0: Tensor, step: Tensor | int, keep: Tensor | bool = True) -> None:
        """Take in the L0 of one batch; λ moves from `first_step` on. `keep` false leaves everything as it was.

        All in place, and the step may be a tensor: so that updates can be recorded on a GPU.
        """
        ema = torch.where(self.ema.isnan(), l0, self.SMOOTHING * self.ema + (1 - self.SMOOTHING) * l0)
        self.ema.copy_(torch.where(torch.as_tensor(keep), ema, self.ema))
        limit = math.log(self.MAX_FACTOR)
        moved = self.integral + self.INTEGRAL * self._error()
        moved = moved.clamp(self.start - limit, self.start + limit)
        moves = torch.as_tensor(step >= self.first_step) & torch.as_tensor(keep)
        self.integral.copy_(torch.where(moves, moved, self.integral))

    def _error(self) -> Tensor:
        return (self.ema.clamp_min(1e-3) / self.target).log().nan_to_num(0.0).clamp(-1, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the controller's memory."""
        return {"integral": self.integral.clone(), "ema": self.ema.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what state_dict returned."""
        self.integral = state["integral"].to(self.integral.device).clone()
        self.ema = state["ema"].to(self.ema.device).clone()


class LevelController(L0Controller):
    """Holds L0 from two sides where the levels that latents must exceed can be moved; e = log(L0 / L0*) of a batch.

    Fast: the levels move so that log L0 falls by LEVEL_GAIN·e. Above a level pre-activations thin out about
    exponentially, so that a rise by δ mean excesses lowers log L0 by δ. Slow: I takes e in as above, without K_p. What
    e is left is what the levels must be moved against the loss's own pull, so that λ comes to where there is none.
    """

    PROPORTIONAL, SMOOTHING = 0.0, 0.0
    LEVEL_GAIN = 0.4
    MOST = 2.0  # of e that levels answer to in one step
    MOST_MOVED = 1.0  # by levels in one step: where hardly a pre-activation is near them, a mean excess is no measure

    def rise(self, l0: Tensor, mean_excess: Tensor) -> Tensor:
        """Return by how much the levels are to rise after a batch with this L0."""
        error = (l0.clamp_min(1e-3) / self.target).log()
        move = self.LEVEL_GAIN * error.clamp(-self.MOST, self.MOST) * mean_excess
        return move.clamp(-self.MOST_MOVED, self.MOST_MOVED)


def level_for(pre: Float[Tensor, "n d_sae"], l0: float, shards: Ranks | None = None) -> Float[Tensor, ""]:
    """Return the level that on average l0 pre-activations of a token exceed; `shards` hold other latents of them."""
    shards = shards or Ranks()
    count = min(max(1, round(l0 * pre.shape[0])), shards.size * pre.numel())
    pre = pre.flatten()
    if shards.size > 1:
        pre = shards.collect(pre.topk(min(count, pre.numel()), sorted=False).values)
    return pre.kthvalue(pre.numel() - count + 1).values


def level_on(
    margin: Callable[[Tensor], Tensor], x: Float[Tensor, "n d_in"], l0: float, floors: tuple[float, ...],
    shards: Ranks | None = None,
) -> float:  # fmt: skip
    """Return the level that exactly n·l0 of the margins (rows, d_sae) of x's rows exceed; `shards` hold others of them.

    Only margins above a floor are kept in memory: the first floor that leaves enough of them, else the last.
    """
    count = round(l0 * len(x))
    for floor in floors:
        kept = (shards or Ranks()).collect(torch.cat([m[m > floor] for m in map(margin, x.split(CHUNK_ROWS))]))
        if kept.numel() > count:
            lowest = kept.numel() - count
            return (kept.kthvalue(lowest).values + kept.kthvalue(lowest + 1).values).item() / 2
    return floors[-1]
