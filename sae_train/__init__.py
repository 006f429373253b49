"""Train sparse autoencoders at a controlled width and L0, and watch first-letter absorption while they train."""

from __future__ import annotations

import os
from typing import Any

# Read by torch at its first large allocation on a CPU: huge pages for tensors. A training step took 12 % more time
# without, for page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["load_sae", "train"]


def __getattr__(name: str) -> Any:
    """Import the two public functions on first use, so that the command line answers at once."""
    if name == "train":
        from sae_train.runs.run import train

        return train
    if name == "load_sae":
        from sae_train.sae.files import load_sae

        return load_sae
    raise AttributeError(f"module 'sae_train' has no attribute {name!r}")
