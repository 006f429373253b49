"""Where a run keeps activations, how much room there is, and how fast what is written gets there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_train.config import Settings

TRIED = 2**25  # bytes that are written to tell a disk's rate


def disk_of(settings: Settings) -> tuple[Path, int]:
    """The folder that activations are kept under, and the bytes that are free there or theirs already."""
    folder, asked = _folder(settings), settings.data.activation_cache
    theirs = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if asked else 0
    return folder, shutil.disk_usage(_there(folder)).free + theirs


def write_seconds(settings: Settings, size: float) -> float | None:
    """Seconds until so many bytes are on the disk, at the rate of a small file just now; None where none can be."""
    block = os.urandom(TRIED)  # some disks compress
    try:
        with tempfile.TemporaryFile(dir=_there(_folder(settings))) as file:
            start = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return size / TRIED * (time.perf_counter() - start)
    except OSError:
        return None


def _folder(settings: Settings) -> Path:
    return Path(settings.data.activation_cache or settings.run.out).expanduser()


def _there(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
