"""Outliers: activations of many times the usual norm, such as those of attention sinks, kept away from SAEs.

In a squared error one of them weighs as much as thousands of others: it takes latents, and its share of the explained
variance hides how well the others are reconstructed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from sae_train.protocols import Batches

LOOK_AHEAD = 4  # batches that are looked through together on a GPU, since every look waits for it
MOST_EMPTY = 100  # looks in a row that find nothing but outliers


def norm_limit(x: Float[Tensor, "n d_in"], factor: float) -> float:
    """Return `factor` times the median norm; no limit where half of the norms are 0."""
    return factor * x.norm(dim=1).median().item() or math.inf


def is_kept(x: Float[Tensor, "*n d_in"], limit: float) -> Bool[Tensor, "*n"]:
    """Say whose norm is at most the limit. What is not finite is a fault for others to see, and no outlier."""
    norms = x.norm(dim=-1)
    return (norms <= limit) | ~norms.isfinite()


class WithoutOutliers:
    """Batches without the rows whose norm is above `limit`, which is set later; the rows behind them move up.

    Where nothing is above it, the batches are those that come in, bit for bit. `left_out` counts the others, up to the
    last batch that was looked through; a position keeps that count, and looks through that batch again.
    """

    def __init__(self, batches: Batches, batch_tokens: int) -> None:
        self.limit = math.inf
        self._batches, self._batch_tokens = batches, batch_tokens
        self.load_state_dict({"batches": batches.state_dict(), "used": 0, "left_out": 0})

    @property
    def epoch(self) -> int:
        """How often the data began anew, up to the last batch that was looked through."""
        return max(self._epoch, self._batches.epoch)

    def __iter__(self) -> WithoutOutliers:
        return self

    def __next__(self) -> Float[Tensor, "batch_tokens d_in"]:
        parts, missing = [], self._batch_tokens
        while missing:
            if self._rows is None or self._used == len(self._rows):
                self._look()
            parts.append(self._rows[self._used : self._used + missing])
            self._used += len(parts[-1])
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def peek(self, n: int) -> Float[Tensor, "n d_in"]:
        """Return about the next n activations that are kept, and stay where it is."""
        if self._rows is None and self._used:
            self._look()
        ahead = [] if self._rows is None else [self._rows[self._used :]]
        x = self._batches.peek(n)
        return torch.cat([*ahead, x[is_kept(x, self.limit)]])[:n]

    def state_dict(self) -> dict[str, Any]:
        """Return the position: that of the batches whose rows are handed out, and how many of the rows are."""
        seen = {"left_out": self.left_out, "epoch": self.epoch}
        if self._rows is not None and self._used == len(self._rows):
            return {"batches": self._batches.state_dict(), "used": 0, "left_out_before": self.left_out} | seen
        return {"batches": self._start, "used": self._used, "left_out_before": self._left_out_before} | seen

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; with the same limit the batches that followed it follow again, bit for bit."""
        self._start, self._used = state["batches"], state["used"]
        self.left_out, self._epoch = state["left_out"], state.get("epoch", 0)
        self._left_out_before = state.get("left_out_before", self.left_out)  # states of before have no other count
        self._rows: Tensor | None = None
        self._batches.load_state_dict(self._start)

    def _look(self) -> None:
        """Take in the next batches that have rows to keep; after a resume some of the rows are used up."""
        used = self._used if self._rows is None else 0
        if self._rows is None:
            self.left_out = self._left_out_before
        for _ in range(MOST_EMPTY):
            self._start, self._left_out_before = self._batches.state_dict(), self.left_out
            x = next(self._batches)
            if more := _n_together(x) - 1:
                x = torch.cat([x, *(next(self._batches) for _ in range(more))])
            kept = is_kept(x, self.limit)
            self._rows = x if bool(kept.all()) else x[kept]
            self.left_out += len(x) - len(self._rows)
            self._used = min(used, len(self._rows))
            used -= self._used
            if self._used < len(self._rows):
                return
        raise UserError(
            f"no activation of {MOST_EMPTY} batches has a norm of at most {self.limit:.4g}, which the first ones had: "
            "shuffle them, or keep outliers by --outlier-norm none"
        )


def _n_together(x: Tensor) -> int:
    """How many batches like x are looked through together."""
    return LOOK_AHEAD if x.is_cuda else 1
