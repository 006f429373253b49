"""Where a run keeps activations, how much room there is, and how fast what is written gets there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_train.data.activation_cache import find_kept
from sae_train.data.text_source import about_cache
from sae_train.errors import UserError

if TYPE_CHECKING:
    from sae_train.config import Settings
    from sae_train.data.sources import Facts

TRIED = 2**25  # bytes that are written to tell a disk's rate


@dataclass(frozen=True)
class Kept:
    """What there is already of the activations that a run keeps, as far as can be said without model and text."""

    tokens: int
    size: int

    @classmethod
    def find(cls, settings: Settings, facts: Facts) -> Kept:
        """Look below the folder that the settings name; nothing where they name none."""
        asked = settings.data.activation_cache
        if not asked or not facts.kept_bytes:
            return cls(0, 0)
        about = about_cache(settings, facts.hook_name, facts.dtype, settings.context(facts.context))
        return cls(*find_kept(Path(asked).expanduser(), about))


def disk_of(settings: Settings, cache: bool = True) -> tuple[Path, int]:
    """The folder that activations are kept under (without `cache` that of runs), and the bytes that are free there."""
    folder = _folder(settings) if cache else Path(settings.run.out).expanduser()
    return folder, shutil.disk_usage(_there(folder)).free


def is_one_disk(a: Path, b: Path) -> bool:
    return _there(a).stat().st_dev == _there(b).stat().st_dev


def check_folders(settings: Settings) -> None:
    """UserError where a folder that is to be written to is a file, lies in one, or is not this user's to write."""
    asked = {
        "no run folder can be made": settings.run.out,
        "no activations can be kept": settings.data.activation_cache,
    }
    for what, folder in asked.items():
        if folder:
            path = Path(folder).expanduser().absolute()
            there = next(each for each in (path, *path.parents) if each.exists())
            if not there.is_dir():
                raise UserError(f"{what} in {str(folder)!r}: {there} is a file: name a folder")
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"{what} in {str(folder)!r}: you may not write in {there}: name another folder")


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
