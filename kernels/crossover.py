"""Sparse sums or dense products: the choice for the next step, by how many latents were active.

Both give the same gradients; the sparse ones cost by the entry, the dense ones by (batch, d_sae).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sae_train.kernels.patterns import Pattern

# Share of active latents at which both take as long. CPU: measured by benchmarks/kernels/bench_crossover.py.
# CUDA: an estimate.
SHARES = {"cpu": 0.05, "cuda": 0.005}
# Share from which groups of the fused encoder, of 128 latents, have too many entries too often: an estimate.
CROWDED_SHARE = 2 / 128
# How far the running mean must be past a share before the way is changed, as a factor.
MARGIN = 1.2
SMOOTHING = 0.9


@dataclass
class Crossover:
    """The way taken now, by a running mean of the share of active latents, with a margin against going to and fro.

    `crowded` says whether many groups of latents are expected to have too many entries for the fused encoder. `room`
    is how many entries a step may find that is not to wait for the device; None where it may wait. Such a step cannot
    know its share: `take_in` is then for whoever reads it later.
    """

    mean: float | None = None
    dense: bool = False
    crowded: bool = False
    room: int | None = None

    def choose(self, pattern: Pattern, late: bool = False) -> Pattern:
        """Take in a batch; return its pattern with the way that is to be taken.

        `late`: the way that earlier batches give, if there were any, and the batch is not taken in where it had to find
        room, since the host does not know its size then.
        """
        dense = self.dense if late and self.mean is not None else None
        if pattern.n_found is None:
            entries = (pattern.offsets.numel() - 1) * pattern.d_sae
            self.take_in(pattern.latents.numel(), entries, pattern.latents.device)
        return replace(pattern, dense=self.dense if dense is None else dense)

    def take_in(self, n: int, entries: int, device: torch.device) -> None:
        """Take in that n of a batch's entries (tokens × latents) were active."""
        share, crossing = n / max(1, entries), SHARES.get(device.type, SHARES["cuda"])
        if self.mean is None:
            self.mean, self.dense, self.crowded = share, share > crossing, share > CROWDED_SHARE
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * share
        self.dense = self._past(crossing, self.dense)
        self.crowded = self._past(CROWDED_SHARE, self.crowded)

    def _past(self, share: float, before: bool) -> bool:
        return self.mean > (share / MARGIN if before else share * MARGIN)

    def state_dict(self) -> dict[str, float | bool | None]:
        """Return what a resumed run needs."""
        return {"mean": self.mean, "dense": self.dense, "crowded": self.crowded}

    def load_state_dict(self, state: dict[str, float | bool | None]) -> None:
        """Restore what state_dict returned."""
        self.mean, self.dense, self.crowded = state["mean"], state["dense"], state.get("crowded", False)
