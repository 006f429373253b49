"""SAEs and training states on disk: SAELens' layout is written, every known layout is read, states are safetensors."""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError, explaining, first_line
from sae_train.files import write_json
from sae_train.sae.fetch import fetch
from sae_train.sae.forms import FORMS
from sae_train.sae.layouts import PROVENANCE, WEIGHTS, files_of_layouts, read_sae
from sae_train.sae.model import SAE, SAEConfig
from sae_train.sae.qwen_scope import FILE as QWEN_FILE
from sae_train.sae.tensor_files import read_tensors, write_tensors

SAE_LENS_VERSION = "6.54.12"
REPO_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
STATE, STATE_VALUES = "state.safetensors", "values"


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Write cfg.json and sae_weights.safetensors as SAELens reads them; other files of the folder stay."""
    folder = Path(folder)
    write_tensors(dict(sae.state_dict()), folder / WEIGHTS)
    write_json(folder / "cfg.json", _sae_lens_cfg(sae.cfg))


def load_sae(
    path: str | Path,
    folder: str | None = None,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> SAE:
    """Read an SAE from a local folder or from a repo on the hub ("you/name") and a folder in it.

    Layouts: ours, SAELens', sparsify's, Gemma Scope's, Llama Scope's; with allow_pickle dictionary_learning's and
    Qwen-Scope's (whose `folder` is a file, layer20.sae.pt), from whose pickles tensors alone are taken. Of a repo only
    the SAE's own files are fetched, at `revision` (a branch, tag or commit).
    UserError says in one sentence what is missing, damaged or not read.
    """
    with explaining(
        lambda error: f"device {device!r} cannot be used: {first_line(error)}", RuntimeError, AssertionError
    ):
        torch.empty(0, device=device)
    return read_sae(find_sae(path, folder, revision, allow_pickle), device, allow_pickle)


def find_sae(
    path: str | Path, folder: str | None = None, revision: str | None = None, allow_pickle: bool = False
) -> Path:
    """Return where an SAE is on this disk, fetched from the hub where it was not here."""
    if not isinstance(path, str | PathLike):
        raise UserError(f"an SAE is named by a folder or a repo on the hub, not by a {type(path).__name__}.")
    here = Path(path).expanduser()
    if here.exists() or not re.fullmatch(REPO_ID, str(path)):
        return here / folder if folder else here
    if folder and QWEN_FILE.fullmatch(folder) and allow_pickle:
        return fetch(str(path), None, [folder], revision) / folder
    return fetch(str(path), folder, files_of_layouts(allow_pickle), revision)


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries of tensors and JSON values to folder/state.safetensors."""
    tensors, values = {}, {}
    for name, value in _flatten(state):
        (tensors if isinstance(value, Tensor) else values)[name] = value
    write_tensors(tensors, Path(folder) / STATE, {STATE_VALUES: json.dumps(values)})


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read what save_state wrote, bit for bit, on the CPU."""
    from safetensors import safe_open

    path = Path(folder) / STATE
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if STATE_VALUES not in metadata:
        raise UserError(f"{path} is no training state of sae-train: give the folder of a run that it started.")
    state: dict[str, Any] = {}
    for name, value in (*tensors.items(), *json.loads(metadata[STATE_VALUES]).items()):
        *parents, last = name.split("/")
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return state


def _flatten(state: dict[str, Any], prefix: str = ""):
    for key, value in state.items():
        assert "/" not in key, f"a state key must not contain '/': {key}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _sae_lens_cfg(cfg: SAEConfig) -> dict[str, Any]:
    metadata = cfg.metadata | {name: getattr(cfg, name) for name in PROVENANCE}
    return {
        "architecture": FORMS[cfg.architecture].sae_lens,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        **({"k": cfg.k, "rescale_acts_by_decoder_norm": False} if cfg.architecture == "topk" else {}),
        "dtype": cfg.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata | {"sae_lens_version": SAE_LENS_VERSION},
    }
