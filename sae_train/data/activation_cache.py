"""Activations on disk: blocks of a buffer go in, and come out bit for bit as long as nothing that made them changed.

A block is one safetensors file in the dtype that the language model computes in, so nothing is lost; it appears under
a temporary name and is renamed when complete. A block that is truncated, altered or of something else counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data.text_files import data_files
from sae_train.errors import UserError
from sae_train.sae.files import load_state, save_state

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class ActivationCache:
    """Blocks (n, d_in) by number, with where the text goes on after each; `key` says what they are made from.

    `n_read`, `n_written` and `n_replaced` (blocks found but not usable) count since this process started.
    """

    def __init__(self, folder: Path, key: str, dtype: torch.dtype) -> None:
        self.folder, self.key, self.dtype = folder, key, dtype
        self.n_read = self.n_written = self.n_replaced = 0

    def read(self, number: int, device: torch.device | str) -> tuple[Float[Tensor, "n d_in"], dict[str, Any]] | None:
        """Return a block in float32 and where the text goes on, or None if there is none that can be trusted."""
        folder = self._folder(number)
        if not folder.exists():
            return None
        try:
            saved = load_state(folder)
        except UserError:
            saved = {}
        if saved.get("key") != self.key or saved.get("checksum") != _checksum(saved["x"]):
            self.n_replaced += 1
            return None
        self.n_read += 1
        return saved["x"].to(device).float(), saved["end"]

    def write(self, number: int, block: Float[Tensor, "n d_in"], end: dict[str, Any]) -> None:
        """Keep a block and where the text goes on after it."""
        x = block.to(self.dtype).cpu()
        save_state(self._folder(number), {"x": x, "end": end, "key": self.key, "checksum": _checksum(x)})
        self.n_written += 1

    def said(self) -> str:
        """The counts for a person."""
        spoilt = f" ({self.n_replaced} of them truncated, altered or made from something else)"
        return f"{self.n_written} blocks written{spoilt if self.n_replaced else ''}, {self.n_read} read"

    def _folder(self, number: int) -> Path:
        return self.folder / self.key / f"block-{number:06d}"


def key_of(settings: dict[str, Any], *content: Tensor) -> str:
    """Return a short name for JSON values and the bits of tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for x in content:
        digest.update(_bytes(x))
    return digest.hexdigest()[:16]


def files_of(path: str | Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of a file, or of a folder's texts; nothing where there is no path."""
    path = Path(path).expanduser()
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in data_files(path)]


def _checksum(x: Tensor) -> int:
    return zlib.crc32(_bytes(x))


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B")
