"""Assets on disk: an entry is one safetensors file, named by what decides its content and by a hash of
that content and its model.

An entry gets its name when it is whole and is never changed after, so nobody waits for anybody: two writers of one
name write the same, and a reader keeps the file that it has opened even if it is removed meanwhile. What is truncated,
altered or another model's is passed over, so that it gets built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError, explaining, first_line
from sae_train.sae.tensor_files import write_tensors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.protocols import LanguageModel

NOWHERE = "none"
MOST_BYTES = 4 * 2**30  # of all entries in a folder; docs/absorption.md names it
FINGERPRINT, PLAIN = "fingerprint", "plain"
_PLAIN = ("words", "settings", "counts", "model_accuracy", "sampled_from", "notes", "seconds", "hash")
_ENTRY = re.compile(r"\.?[0-9a-f]{16}-[0-9a-f]{16}\.safetensors(?P<temporary>\..*\.tmp)?")
_A_DAY = 86_400  # seconds; a temporary file of that age has no writer any more


def cache_folder(asked: str | None = None) -> Path | None:
    """Where the eval's set-up is kept: in the folder that was asked for, by default $XDG_CACHE_HOME/sae-train (in
    ~/.cache where that is not set), or, with "none", nowhere."""
    if asked == NOWHERE:
        return None
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/sae-train"
    with explaining(lambda error: f"eval_cache: {first_line(error)} Name a folder, or none.", RuntimeError):
        folder = Path(asked or default).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"eval_cache {asked!r} is a file: name a folder, or none to keep nothing of the eval's set-up")
    return folder


def holds(folder: Path, key: dict[str, Any]) -> bool:
    """Whether there is an entry under a key, of whatever model."""
    return any(folder.glob(f"{_digest(key)}-*.safetensors"))


def read(folder: Path, key: dict[str, Any], is_of_the_model: Callable[[Tensor], bool]) -> Iterator[dict[str, Any]]:
    """Yield the fields of the assets under a key that can be read and whose fingerprint passes, and mark them used."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob(f"{_digest(key)}-*.safetensors")):
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError), safe_open(path, "pt") as file:
            if not is_of_the_model(file.get_tensor(FINGERPRINT)):
                continue
            plain = json.loads(file.metadata()[PLAIN])
            fields = {name: plain[name] for name in _PLAIN}
            fields |= {name: file.get_tensor(name) for name in file.keys() if name != FINGERPRINT}  # noqa: SIM118
            with suppress(OSError):  # of a folder that may only be read
                os.utime(path)
            yield fields


def write(folder: Path, key: dict[str, Any], fingerprint: Tensor, assets: Assets) -> None:
    """Add an entry, then remove those that were not used for longest until MOST_BYTES are left.

    UserError where it cannot be written.
    """
    from safetensors import SafetensorError

    tensors = {name: value for name, value in vars(assets).items() if isinstance(value, torch.Tensor)}
    plain = {name: getattr(assets, name) for name in _PLAIN}
    path = folder / f"{_digest(key)}-{_digest([assets.hash, fingerprint.tolist()])}.safetensors"
    sentence = "the eval's set-up could not be kept in {}: {}; --eval-cache names another folder, or none"
    with explaining(lambda error: sentence.format(folder, first_line(error)), OSError, SafetensorError):
        write_tensors({**tensors, FINGERPRINT: fingerprint}, path, {PLAIN: json.dumps(plain)})
        _prune(folder, path)


@torch.no_grad()
def fingerprint_of(lm: LanguageModel) -> Float[Tensor, "16 d"]:
    """Activations and some logits of 16 entries spread over the vocabulary: they tell when a model's weights changed
    under its name, before the hook or behind it."""
    ids = torch.arange(16) * len(lm.tokenizer) // 16
    tokens = ids[None].to(lm.device)
    return torch.cat([lm.activations(tokens)[0].float().cpu(), lm.logits(tokens)[0].float().cpu()[:, ids]], 1)


def is_same(dtype: torch.dtype, now: Tensor, then: Tensor) -> bool:
    """Tell whether two fingerprints, of activations and 16 logits a row, are of the same weights."""
    if now.shape != then.shape:
        return False
    # Thread counts change the last bits of an activation; other weights change far more.
    most = max(1e-3, torch.finfo(dtype).eps)
    parts = zip(now.tensor_split((-16,), 1), then.tensor_split((-16,), 1), strict=True)
    return all(float((a - b).norm()) <= most * float(a.norm()) for a, b in parts)


def _prune(folder: Path, new: Path) -> None:
    """What a writer that was killed left behind counts as an entry too."""
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process removes entries as well
            name, stat = _ENTRY.fullmatch(path.name), path.stat()
            if name and not (name["temporary"] and time.time() - stat.st_mtime < _A_DAY):
                entries.append((path == new, stat.st_mtime_ns, stat.st_size, path))
    left = MOST_BYTES
    for is_new, _, size, path in sorted(entries, reverse=True):
        left -= size
        if left < 0 and not is_new:
            with suppress(OSError):
                path.unlink()


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
