"""The reader of Gemma Scope's SAEs, whose repository and folders name the model and the hook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError, explaining
from sae_train.sae.foreign_settings import GemmaScopeFile
from sae_train.sae.parts import Parts, drop_ones, read_settings, rename, repository_of
from sae_train.sae.tensor_files import read_tensors

GEMMA_HOOKS = {
    "res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z",
    "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z",
}  # fmt: skip
# Hugging Face's names of these places, as config.json has them.
GEMMA_PLACES = {"output": "res", "post_feedforward_layernorm.output": "mlp", "self_attn.o_proj.input": "att"}
NO_SAE = re.compile(r"transcoder|crosscoder|(?:^|[-_])clt(?:$|[-_])")


def read_gemma_scope(folder: Path, weights: str) -> Parts:
    """Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors): JumpReLU, nothing taken from the input.

    The model and the hook are read off the repository's name, the folders in it and, of Gemma Scope 2, config.json.
    """
    repository, inside = _place_in_repository(folder)
    if "embedding" in inside:
        raise UserError(f"{folder}: Gemma Scope's SAEs of the embedding are not read (they need another scale).")
    published = re.fullmatch(r"gemma-scope-(2-)?(\d+m|\d+b)-(pt|it)(?:-(.+))?", repository)
    kind = (published[4] if published and published[4] else inside[0] if inside else "").removesuffix("_all")
    others = [name for name in (repository, *inside) if NO_SAE.search(name)]
    if others or (published and kind not in GEMMA_HOOKS):
        what = (others or [kind])[0]
        raise UserError(f"{folder}: {what!r} is not read; of Gemma Scope SAEs of {', '.join(GEMMA_HOOKS)} are.")
    cfg = GemmaScopeFile()
    if (folder / "config.json").is_file():
        cfg = read_settings(folder / "config.json", GemmaScopeFile)
    path = folder / weights
    tensors = drop_ones(rename(_read_npz(path) if weights.endswith(".npz") else read_tensors(path)))
    known: dict[str, Any] = {"apply_b_dec_to_input": False, "dataset_path": "monology/pile-uncopyrighted"}
    layer = re.match(r"layer_(\d+)(?:_width_.*)?$", inside[-1] if len(inside) == 2 else inside[0] if inside else "")
    if published:
        known["model_name"] = _gemma(*published.groups()[:3])
    if layer and kind in GEMMA_HOOKS:
        known["hook_name"] = f"blocks.{layer[1]}.{GEMMA_HOOKS[kind]}"
    if cfg.model_name:
        known["model_name"] = cfg.model_name
    place = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", cfg.hf_hook_point_in or "")
    if place and place[2] in GEMMA_PLACES:
        known["hook_name"] = f"blocks.{place[1]}.{GEMMA_HOOKS[GEMMA_PLACES[place[2]]]}"
    return Parts("jumprelu", tensors, known)


def _place_in_repository(folder: Path) -> tuple[str, list[str]]:
    """The name of Gemma Scope's repository that a folder is in, and the folders from there down to it.

    In the hub's cache, or as deep as the folder's own name says; folders above are the user's own.
    """
    if cached := repository_of(folder):
        return cached
    parts = folder.absolute().parts
    below = {"layer_": 2, "width_": 2, "average_l0_": 3, "canonical": 3}
    depth = next((depth for start, depth in below.items() if parts[-1].startswith(start)), 0)
    if not depth or len(parts) <= depth:
        return "", []
    return parts[-depth - 1].split("--")[-1], list(parts[-depth:])


def _gemma(second: str | None, size: str, tuned: str) -> str:
    """The language model's hub id; of Gemma 2 and of Gemma 3 270m the base model has no suffix."""
    suffix = "" if tuned == "pt" and (not second or size == "270m") else f"-{tuned}"
    return f"google/gemma-{3 if second else 2}-{size}{suffix}"


def _read_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    import numpy as np

    bad = (OSError, ValueError, TypeError, zipfile.BadZipFile)
    explained = explaining(lambda error: f"{path} is truncated or no archive of arrays ({error}): copy it again.", *bad)
    with explained, np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}
