"""Assets on disk: a folder per content key holds assets.safetensors, words.parquet and assets.json; what is stale,
truncated or not ours is ignored, so that it gets rebuilt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.files import whole_folder

if TYPE_CHECKING:
    from torch import Tensor

    from sae_train.evals.assets import Assets

_PLAIN = ("settings", "counts", "model_accuracy", "sampled_from", "notes", "seconds", "hash")
_FILES = ("assets.safetensors", "words.parquet")


def folder_of(cache_dir: Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / digest


def read(cache_dir: Path, key: dict[str, Any], fingerprint: Tensor) -> dict[str, Any] | None:
    """Return the fields of the cached assets, or None if there are none that are whole and of this very model."""
    from pandas import read_parquet
    from safetensors.torch import load_file

    folder = folder_of(cache_dir, key)
    try:
        plain = json.loads((folder / "assets.json").read_text())
        if any(_digest(folder / name) != plain["digests"][name] for name in _FILES):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    tensors = load_file(folder / "assets.safetensors")
    seen = tensors.pop("fingerprint")
    # Thread counts change the last bits of an activation; other weights change far more.
    if seen.shape != fingerprint.shape or not torch.allclose(seen, fingerprint, rtol=1e-3, atol=1e-4):
        return None
    words = read_parquet(folder / "words.parquet")["word"].tolist()
    return {"words": words, **tensors, **{name: plain[name] for name in _PLAIN}}


def write(cache_dir: Path, key: dict[str, Any], fingerprint: Tensor, assets: Assets) -> None:
    """Write them into the folder of their key: readers see all or nothing."""
    import pandas as pd
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in vars(assets).items() if isinstance(value, torch.Tensor)}
    columns = {name: getattr(assets, name).numpy() for name in ("token_ids", "labels", "is_test")}
    plain = {name: getattr(assets, name) for name in _PLAIN}
    with whole_folder(folder_of(cache_dir, key)) as folder:
        save_file({**tensors, "fingerprint": fingerprint.contiguous()}, folder / "assets.safetensors")
        pd.DataFrame({"word": assets.words, **columns}).to_parquet(folder / "words.parquet", index=False)
        plain["digests"] = {name: _digest(folder / name) for name in _FILES}
        (folder / "assets.json").write_text(json.dumps(plain, indent=2))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
