"""SAEs and training states on disk: SAELens' layout for SAEs (read and written), safetensors alone for states.

Every file appears under a temporary name and is renamed when complete, so that a killed run leaves no half file.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError
from sae_train.forms import FORMS
from sae_train.sae import SAE, SAEConfig, fold_decoder_norm

SAE_LENS_VERSION = "6.54.12"
FROM_SAE_LENS = {form.sae_lens: ours for ours, form in FORMS.items()}
WEIGHTS, SPARSIFY_WEIGHTS = "sae_weights.safetensors", "sae.safetensors"
PROVENANCE = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path", "l0")
STATE, STATE_VALUES = "state.safetensors", "values"


def save_sae(sae: SAE, folder: str | Path) -> None:
    """Write cfg.json and sae_weights.safetensors as SAELens reads them; other files of the folder stay."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(dict(sae.state_dict()), folder / WEIGHTS)
    _write_bytes(json.dumps(_sae_lens_cfg(sae.cfg), indent=2).encode(), folder / "cfg.json")


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE from a folder: ours, SAELens' (standard, topk, jumprelu, gated) or sparsify's (topk)."""
    folder = Path(path)
    cfg = _read_cfg(folder)
    if (folder / SPARSIFY_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file():
        return _from_sparsify(cfg, _read_tensors(folder / SPARSIFY_WEIGHTS), folder, device)
    return _from_sae_lens(cfg, _read_tensors(folder / WEIGHTS), folder, device)


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries of tensors and JSON values to folder/state.safetensors."""
    tensors, values = {}, {}
    for name, value in _flatten(state):
        (tensors if isinstance(value, Tensor) else values)[name] = value
    _write_tensors(tensors, Path(folder) / STATE, {STATE_VALUES: json.dumps(values)})


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read what save_state wrote, bit for bit, on the CPU."""
    from safetensors import safe_open

    path = Path(folder) / STATE
    tensors = _read_tensors(path)
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


def _read_cfg(folder: Path) -> dict[str, Any]:
    if (folder / "ae.pt").is_file():
        raise UserError(f"{folder} holds a pickled SAE (ae.pt), which is not read: convert it to SAELens' layout.")
    if not (folder / "cfg.json").is_file():
        inside = sorted(str(p.parent) for p in folder.glob("saes/*/cfg.json"))
        hint = f"choose one of {', '.join(inside)}" if inside else "give a folder with cfg.json and its weights"
        raise UserError(f"{folder} is no SAE checkpoint: {hint}.")
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cfg = None
    if not isinstance(cfg, dict):
        raise UserError(f"{folder / 'cfg.json'} is not readable JSON: the checkpoint is damaged; copy it again.")
    return cfg


def _from_sae_lens(cfg: dict, tensors: dict[str, Tensor], folder: Path, device: str | torch.device) -> SAE:
    architecture = FROM_SAE_LENS.get(cfg.get("architecture"))
    if architecture is None:
        known = ", ".join(FROM_SAE_LENS)
        raise UserError(f"{folder}: architecture {cfg.get('architecture')!r} is not read; readable are {known}.")
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") not in ("none", None):
            raise UserError(f"{folder}: {key} {cfg[key]!r} is not supported; fold it into the weights first ('none').")
    metadata = dict(cfg.get("metadata") or {})
    known = {name: metadata.pop(name) for name in PROVENANCE if metadata.get(name) is not None}
    k = cfg.get("k") if architecture == "topk" else None
    apply_b_dec = bool(cfg.get("apply_b_dec_to_input", True))
    sae = _build(
        architecture, tensors, folder, device, k=k, metadata=metadata, apply_b_dec_to_input=apply_b_dec, **known
    )
    if "threshold" in sae.form.vectors:
        # There relu comes before the jump, so a negative threshold acts as 0.
        sae.threshold.data.clamp_(min=0)
    return fold_decoder_norm(sae) if cfg.get("rescale_acts_by_decoder_norm") else sae


def _from_sparsify(cfg: dict, tensors: dict[str, Tensor], folder: Path, device: str | torch.device) -> SAE:
    if cfg.get("activation", "topk") != "topk" or cfg.get("transcode") or "W_skip" in tensors:
        raise UserError(f"{folder}: of sparsify's models only topk autoencoders are read, no groupmax, no transcoders.")
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    tensors = {renamed.get(name, name): t for name, t in tensors.items()}
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].t()
    return _build("topk", tensors, folder, device, k=cfg.get("k"), hook_name=folder.name)


def _build(
    architecture: str, tensors: dict[str, Tensor], folder: Path, device: str | torch.device, **known: Any
) -> SAE:
    """Make an SAE of these tensors, or say which of them do not fit."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(shapes.get("W_dec", ())) != 2:
        raise UserError(f"{folder}: the weights hold no matrix W_dec; found {', '.join(shapes) or 'nothing'}.")
    d_sae, d_in = shapes["W_dec"]
    want = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    want |= dict.fromkeys(FORMS[architecture].vectors, (d_sae,))
    if shapes != want:
        wrong = sorted(name for name in want.keys() | shapes.keys() if want.get(name) != shapes.get(name))
        raise UserError(f"{folder}: tensors {', '.join(wrong)} are missing, extra or of another shape than {want}.")
    if architecture == "topk" and not (isinstance(known["k"], int) and 0 < known["k"] <= d_sae):
        raise UserError(f"{folder}: cfg.json gives k {known['k']!r}; a topk SAE needs a whole number of 1 to {d_sae}.")
    dtype = str(tensors["W_dec"].dtype).removeprefix("torch.")
    allowed = {field.name for field in fields(SAEConfig)}
    extras = {name: value for name, value in known.items() if name in allowed}
    sae = SAE(SAEConfig(architecture, d_in, d_sae, dtype=dtype, **extras), device=device)
    sae.load_state_dict(tensors)
    return sae


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} does not exist: the checkpoint is incomplete; copy or save it again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): copy or save it again.") from None


def _write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save

    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _write_bytes(save(data, metadata), path)


def _write_bytes(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
