"""Train sparse autoencoders at a controlled width and L0, and watch first-letter absorption while they train."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PUBLIC = {
    "train": "sae_train.runs.run",
    "resume": "sae_train.runs.run",
    "Run": "sae_train.runs.run",
    "load_sae": "sae_train.sae.files",
    "NumberedBatches": "sae_train.data.given",
    "register_architecture": "sae_train.training.architectures",
}

__all__ = ["NumberedBatches", "Run", "load_sae", "register_architecture", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the command line answers at once."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'sae_train' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
