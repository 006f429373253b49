"""Files of tensors: safetensors, written whole, and other libraries' pickles, of which tensors alone are read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from sae_train.errors import UserError, explaining
from sae_train.files import whole


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; UserError if it is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} does not exist: the checkpoint is incomplete; copy or save it again.")
    damaged = f"{path} is truncated or no safetensors file"
    with explaining(lambda error: f"{damaged} ({error}): copy or save it again.", SafetensorError, OSError, ValueError):
        return load_file(path)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict; torch's restricted reader runs none of the file's code and refuses anything else."""
    import pickle

    refused = f"{path} is damaged or holds something beside tensors: it is not read."
    bad = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError)
    with explaining(lambda _: refused, *bad):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(refused)
    return content


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors and text metadata to a safetensors file, without a copy of it in memory; OSError as of any file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with whole(path) as temporary:
        try:
            save_file(data, temporary, metadata)
        except SafetensorError as error:  # a full disk's too, with its number in the text
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
