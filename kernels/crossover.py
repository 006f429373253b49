"""Sparse sums or dense products: the choice for the next step, by how many latents were active.

Both give the same gradients; the sparse ones cost by the entry, the dense ones by (batch, d_sae).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sae_train.kernels.patterns import Pattern

# Share of active latents at which both take as long. CPU: measured by benchmarks/kernels/bench_crossover.py.
# CUDA: an estimate.
SHARES = {"cpu": 0.05, "cuda": 0.005}
# How far the running mean must be past the share before the way is changed, as a factor.
MARGIN = 1.2
SMOOTHING = 0.9


@dataclass
class Crossover:
    """The way taken now, by a running mean of the share of active latents, with a margin against going to and fro."""

    mean: float | None = None
    dense: bool = False

    def choose(self, pattern: Pattern) -> Pattern:
        """Take in a batch; return its pattern with the way that is to be taken. The host knows the size: no wait."""
        entries = (pattern.offsets.numel() - 1) * pattern.d_sae
        share = pattern.latents.numel() / max(1, entries)
        crossing = SHARES.get(pattern.latents.device.type, SHARES["cuda"])
        if self.mean is None:
            self.mean, self.dense = share, share > crossing
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * share
        self.dense = self.mean > (crossing / MARGIN if self.dense else crossing * MARGIN)
        return replace(pattern, dense=self.dense)

    def state_dict(self) -> dict[str, float | bool | None]:
        """Return what a resumed run needs."""
        return {"mean": self.mean, "dense": self.dense}

    def load_state_dict(self, state: dict[str, float | bool | None]) -> None:
        """Restore what state_dict returned."""
        self.mean, self.dense = state["mean"], state["dense"]
