"""Files of tensors: safetensors in and out, each written under a temporary name and renamed when complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_train.errors import UserError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; UserError if it is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} does not exist: the checkpoint is incomplete; copy or save it again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): copy or save it again.") from None


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors and text metadata to a safetensors file, without a copy of it in memory."""
    from safetensors.torch import save_file

    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _write(path, lambda partial: save_file(data, partial, metadata))


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file that appears whole or not at all."""
    _write(path, lambda partial: partial.write_bytes(data))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
