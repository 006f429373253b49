"""Steering of L0 for relu, jumprelu and gated: the controller of levels and price, and the levels that give an L0.

Everything lives in device tensors, so that an update costs no wait; `state_dict` is all a resumed run needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


# Rows whose dense margins are held at a time while a level is looked for.
CHUNK_ROWS = 1024


class L0Controller:
    """Holds L0 at its target from two sides, with e = log(L0 / L0*) of each batch.

    Fast: all levels that latents must exceed move so that log L0 falls by LEVEL_GAIN·e. Above a level pre-activations
    thin out about exponentially, so that a move by δ·(mean excess) lowers log L0 by δ; the architecture moves them.
    Slow: log λ ← log λ + PRICE_GAIN·clip(e, ±1). What e is left then is what the levels must be moved against the
    loss's own pull, so that λ comes to where there is none.

    λ stays within a factor MAX_FACTOR of where it began, so that it cannot wind up while it has no grip on L0.
    """

    LEVEL_GAIN = 0.4
    PRICE_GAIN = 0.02
    MAX_FACTOR = 1e4
    MOST = 2.0  # of e that levels answer to in one step

    def __init__(self, target: float, start: float, first_step: int, device: torch.device | str = "cpu"):
        """λ begins to move at `first_step`, the levels at once."""
        self.target, self.start, self.first_step = target, math.log(start), first_step
        self.log_price = torch.tensor(self.start, device=device)

    @property
    def coefficient(self) -> Tensor:
        """λ now."""
        return self.log_price.exp()

    @torch.no_grad()
    def update(self, l0: Tensor, step: int, keep: Tensor | bool = True) -> Tensor:
        """Take in the L0 of one batch; return by how many mean excesses the levels are to rise.

        `keep` false leaves everything as it was, and returns 0.
        """
        error, keep = (l0.clamp_min(1e-3) / self.target).log(), torch.as_tensor(keep)
        if step >= self.first_step:
            limit = math.log(self.MAX_FACTOR)
            moved = self.log_price + self.PRICE_GAIN * error.clamp(-1, 1)
            self.log_price = torch.where(keep, moved.clamp(self.start - limit, self.start + limit), self.log_price)
        return torch.where(keep, self.LEVEL_GAIN * error.clamp(-self.MOST, self.MOST), 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the controller's memory."""
        return {"log_price": self.log_price}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what state_dict returned."""
        self.log_price = state["log_price"].to(self.log_price.device).clone()


def level_for(pre: Float[Tensor, "n d_sae"], l0: float) -> Float[Tensor, ""]:
    """Return the level that on average l0 pre-activations of a token exceed."""
    count = min(max(1, round(l0 * pre.shape[0])), pre.numel())
    return pre.flatten().kthvalue(pre.numel() - count + 1).values


def level_on(
    margin: Callable[[Tensor], Tensor], x: Float[Tensor, "n d_in"], l0: float, floors: tuple[float, ...]
) -> float:
    """Return the level that exactly n·l0 of the margins (rows, d_sae) of x's rows exceed.

    Only margins above a floor are kept in memory: the first floor that leaves enough of them, else the last.
    """
    count = round(l0 * len(x))
    for floor in floors:
        kept = torch.cat([m[m > floor] for m in map(margin, x.split(CHUNK_ROWS))])
        if kept.numel() > count:
            lowest = kept.numel() - count
            return (kept.kthvalue(lowest).values + kept.kthvalue(lowest + 1).values).item() / 2
    return floors[-1]
