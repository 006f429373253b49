"""Which path and which tile sizes a shape gets: the one place where such choices are made.

Chosen after trials on one H200 at d_in 768 and 2304 with d_sae 65,536; at other sizes they are estimates. All tiles
compile for sm_80 and sm_90 with few spills or none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

# Groups of the fused encoder are the columns of one tile; those of the slab path are free.
GROUP = {"fused": 128, "slab": 128}
# Rows expected to need repair, were the latents independent, by which R is chosen.
MAX_REPAIRED = 0.005
# Candidates of one row that one program holds in registers.
MAX_CANDIDATES = 32_768
# Candidates per group for entries above a floor: up to R / group of all latents before a row is redone.
R_ABOVE = 8


@dataclass(frozen=True)
class Plan:
    """How one encoder call runs: R candidates from each group of latents, and the GEMM's tile."""

    path: str
    group: int
    R: int
    block_m: int = 128
    block_k: int = 64
    warps: int = 8
    stages: int = 3

    def n_groups(self, d_sae: int) -> int:
        return -(-d_sae // self.group)

    def candidates(self, d_sae: int) -> int:
        return self.n_groups(d_sae) * self.R


def expected_repairs(n_groups: int, k: int, R: int) -> float:
    """Expected groups of one row with R or more of its top k, for latents that are independent: a Poisson tail."""
    mean = k / n_groups
    below = sum(math.exp(r * math.log(mean) - mean - math.lgamma(r + 1)) for r in range(R))
    return n_groups * max(0.0, 1.0 - below)


@cache
def plan(k: int | None, d_sae: int, itemsize: int, path: str = "fused", capability: int = 90) -> Plan:
    """Return how to find the k largest (k None: all above a floor) of d_sae pre-activations.

    path: "fused" (GEMM tile to candidates), "slab" (cuBLAS, then candidates) or "sort" (a stable sort in slabs), which
    comes instead where k is no small share of d_sae. capability: the GPU's, 90 for 9.0.
    """
    if path != "sort":
        for R in (R_ABOVE,) if k is None else (2, 4, 8, 16):
            how = Plan(path, GROUP[path], R, **(tile_for(itemsize, capability) if path == "fused" else {}))
            if fits(how, k, d_sae) and (k is None or expected_repairs(how.n_groups(d_sae), k, R) <= MAX_REPAIRED):
                return how
    return Plan("sort", 1, 1)


def fits(how: Plan, k: int | None, d_sae: int) -> bool:
    """Whether every group has R members, the candidates hold k entries, and a program holds the candidates."""
    n_groups, candidates = how.n_groups(d_sae), how.candidates(d_sae)
    return d_sae // n_groups >= how.R and (k or 0) <= candidates <= MAX_CANDIDATES


def tile_for(itemsize: int, capability: int) -> dict[str, int]:
    """Return the GEMM tile for elements of that many bytes.

    Of 2 bytes with 4 warps: two programs then fit on a multiprocessor, and one multiplies while the other selects (1.8
    ms in place of 3.4, though with a floor a few registers spill). GPUs before 9.0 would spill 4 KB a thread.
    """
    warps = 4 if itemsize == 2 and capability >= 90 else 8
    return {"block_m": 128, "block_k": 128 // itemsize, "warps": warps, "stages": 3}


def warps_for(block: int) -> int:
    """Return warps so that a thread holds about 16 of `block` elements."""
    return min(32, max(1, block // 512))
