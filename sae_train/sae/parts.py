"""What a reader of a layout makes of an SAE's folder, and what readers share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError, explaining
from sae_train.files import BAD_JSON
from sae_train.sae.foreign_settings import Checked, checked

OTHER_NAMES = {
    "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "encoder.bias": "b_enc", "gate_bias": "b_gate",
    "mag_bias": "b_mag", "w_enc": "W_enc", "w_dec": "W_dec",
}  # fmt: skip
TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}


@dataclass
class Parts:
    """What a folder says of its SAE: our form's name, tensors by our names, fields of SAEConfig."""

    architecture: str
    tensors: dict[str, Tensor]
    known: dict[str, Any] = field(default_factory=dict)
    rescaled: bool = False
    """whether latents are compared and returned in units of their decoder rows"""
    sizes: dict[str, int | None] = field(default_factory=dict)
    """the settings' names and values of d_in and d_sae, in this order"""


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the checkpoint is incomplete; copy it again.")
    damaged = f"{path} is not readable JSON: the checkpoint is damaged; copy it again."
    with explaining(lambda _: damaged, *BAD_JSON):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(damaged)
    return content


def read_settings(path: Path, model: type[Checked]) -> Checked:
    return checked(model, read_json(path), path)


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    turned = {TRANSPOSED[name]: t.t() for name, t in tensors.items() if name in TRANSPOSED and t.ndim == 2}
    return {OTHER_NAMES.get(name, name): t for name, t in tensors.items() if name not in TRANSPOSED} | turned


def drop_ones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a scaling factor that scales nothing."""
    factor = tensors.get("scaling_factor")
    if factor is None or not torch.equal(factor, torch.ones_like(factor)):
        return tensors
    return {name: t for name, t in tensors.items() if name != "scaling_factor"}


def repository_of(folder: Path) -> tuple[str, list[str]] | None:
    """The name of the repo that a folder of the hub's cache is of, and the folders from there down to it."""
    parts = folder.absolute().parts
    for at, name in enumerate(parts):
        if name == "snapshots" and parts[at - 1].startswith("models--"):
            return parts[at - 1].split("--")[-1], list(parts[at + 2 :])
    return None


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache is at."""
    parts = folder.absolute().parts
    at = parts.index("snapshots") if "snapshots" in parts else len(parts)
    return parts[at + 1] if repository_of(folder) and at + 1 < len(parts) else None
