"""Readers of SAEs' folders, one a layout: each gives one of our SAEs for raw activations.

Layouts are SAELens' (ours), sparsify's, Gemma Scope's and, where the caller allows its pickle, dictionary_learning's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError, explaining
from sae_train.sae.forms import FORMS
from sae_train.sae.model import SAE, SAEConfig, fold_decoder_norm
from sae_train.sae.tensor_files import read_tensors

FROM_SAE_LENS = {form.sae_lens: ours for ours, form in FORMS.items()}
PROVENANCE = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path", "l0")
# dictionary_learning's classes: our form, and whether b_dec is taken from the input.
DICTIONARIES = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "GatedAutoEncoder": ("gated", True),
}
OTHER_NAMES = {
    "bias": "b_dec", "decoder_bias": "b_dec", "decoder.bias": "b_dec", "encoder.bias": "b_enc", "gate_bias": "b_gate",
    "mag_bias": "b_mag", "w_enc": "W_enc", "w_dec": "W_dec",
}  # fmt: skip
TRANSPOSED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}


@dataclass
class Parts:
    """What a folder says of its SAE: our form's name, tensors by our names, fields of SAEConfig."""

    architecture: str
    tensors: dict[str, Tensor]
    known: dict[str, Any] = field(default_factory=dict)
    rescaled: bool = False
    """whether latents are compared and returned in units of their decoder rows"""


def read_sae(folder: Path, device: str | torch.device, allow_pickle: bool = False) -> SAE:
    """Read the SAE in a folder; UserError says what is missing, damaged or of a kind that is not read."""
    weights = next((name for name in LAYOUTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(_say_what_is_missing(folder))
    if weights == PICKLED and not allow_pickle:
        raise UserError(
            f"{folder} holds a pickled SAE ({PICKLED}), which is read only where that is allowed: "
            "load_sae(…, allow_pickle=True), or --allow-pickle; tensors alone are taken from it, no code."
        )
    parts = LAYOUTS[weights](folder, weights)
    sae = _build(parts, folder, device)
    if "threshold" in sae.form.vectors:
        # There relu comes before the jump, so a negative threshold acts as 0.
        sae.threshold.data.clamp_(min=0)
    return fold_decoder_norm(sae) if parts.rescaled else sae


def _say_what_is_missing(folder: Path) -> str:
    if (folder / "cfg.json").is_file():
        return f"{folder / WEIGHTS} does not exist: the checkpoint is incomplete; copy or save it again."
    inside = sorted(str(p.parent) for p in folder.glob("saes/*/cfg.json"))
    hint = f"choose one of {', '.join(inside)}" if inside else "give a folder with cfg.json and its weights"
    return f"{folder} is no SAE checkpoint: {hint}."


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the checkpoint is incomplete; copy it again.")
    damaged = f"{path} is not readable JSON: the checkpoint is damaged; copy it again."
    with explaining(lambda _: damaged, OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(damaged)
    return content


def _sae_lens(folder: Path, weights: str) -> Parts:
    """SAELens; its configurations from before version 6 keep all at the top and name topk by the activation."""
    cfg = _read_json(folder / "cfg.json")
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    theirs = "topk" if activation == "topk" else cfg.get("architecture", "standard")
    if theirs not in FROM_SAE_LENS:
        known = ", ".join(FROM_SAE_LENS)
        raise UserError(f"{folder}: architecture {theirs!r} is not read; readable are {known}.")
    if activation not in ("relu", "topk"):
        raise UserError(f"{folder}: activation {activation!r} is not read; readable are relu and topk.")
    for key in ("normalize_activations", "reshape_activations", "finetuning_scaling_factor"):
        if cfg.get(key, "none") not in ("none", None, False):
            raise UserError(f"{folder}: {key} {cfg[key]!r} is not supported; fold it into the weights first ('none').")
    metadata = {name: cfg.get(name) for name in PROVENANCE} | dict(cfg.get("metadata") or {})
    known = {name: metadata.pop(name) for name in PROVENANCE}
    known = {name: value for name, value in known.items() if value is not None}
    known["metadata"], known["apply_b_dec_to_input"] = metadata, bool(cfg.get("apply_b_dec_to_input", True))
    if theirs == "topk":
        known["k"] = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    tensors = _drop_ones(read_tensors(folder / weights))
    return Parts(FROM_SAE_LENS[theirs], tensors, known, bool(cfg.get("rescale_acts_by_decoder_norm")))


def _sparsify(folder: Path, weights: str) -> Parts:
    """sparsify: one folder a module, its run's config.json above them."""
    cfg, tensors = _read_json(folder / "cfg.json"), read_tensors(folder / weights)
    if cfg.get("activation", "topk") != "topk" or cfg.get("signed") or cfg.get("transcode") or "W_skip" in tensors:
        raise UserError(f"{folder}: of sparsify's models only topk autoencoders are read, no groupmax, no transcoders.")
    run = _read_json(folder.parent / "config.json") if (folder.parent / "config.json").is_file() else {}
    block = re.fullmatch(r"(?:layers|h)[._](\d+)", folder.name)
    known = {"model_name": run.get("model"), "dataset_path": run.get("dataset"), "context_size": run.get("ctx_len")}
    known = {name: value for name, value in known.items() if value is not None}
    hook = f"blocks.{block[1]}.hook_resid_post" if block else folder.name
    return Parts("topk", _rename(tensors), {**known, "k": cfg.get("k"), "hook_name": hook})


def _dictionary_learning(folder: Path, weights: str) -> Parts:
    """dictionary_learning: weights as a pickle of tensors, the class and its origin in config.json.

    BatchTopK's single threshold is written out, as it selects latents outside training.
    """
    config = _read_json(folder / "config.json")
    trainer = config.get("trainer") or {}
    if trainer.get("dict_class") not in DICTIONARIES:
        known = ", ".join(DICTIONARIES)
        raise UserError(f"{folder}: class {trainer.get('dict_class')!r} is not read; readable are {known}.")
    architecture, apply_b_dec = DICTIONARIES[trainer["dict_class"]]
    tensors = _rename(_unpickle(folder / weights))
    if architecture == "jumprelu" and "threshold" in tensors and "W_dec" in tensors:
        tensors["threshold"] = tensors["threshold"].to(tensors["W_dec"]).expand(len(tensors["W_dec"])).contiguous()
    dropped = {"k", "group_sizes"} | ({"threshold"} if architecture == "topk" else set())
    known = {
        "k": trainer.get("k"), "apply_b_dec_to_input": apply_b_dec, "model_name": trainer.get("lm_name") or "",
        "context_size": (config.get("buffer") or {}).get("ctx_len"), "hook_name": trainer.get("submodule_name") or "",
    }  # fmt: skip
    if "resid_post" in known["hook_name"] and isinstance(trainer.get("layer"), int):
        known["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    return Parts(architecture, {name: t for name, t in tensors.items() if name not in dropped}, known)


def _gemma_scope(folder: Path, weights: str) -> Parts:
    """Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors): JumpReLU, nothing taken from the input.

    The model and the hook are read off the folder's own path, as nothing else names them.
    """
    if "embedding" in folder.parts[-3:]:
        raise UserError(f"{folder}: Gemma Scope's SAEs of the embedding are not read (they need another scale).")
    path = folder / weights
    tensors = _drop_ones(_rename(_read_npz(path) if weights.endswith(".npz") else read_tensors(path)))
    place = re.search(r"gemma-scope-(2-)?(\d+m|\d+b)-(pt|it)(?:-(res|mlp|att))?", str(folder))
    layer = re.search(r"layer_(\d+)", str(folder))
    known: dict[str, Any] = {"apply_b_dec_to_input": False, "dataset_path": "monology/pile-uncopyrighted"}
    if place:
        known["model_name"] = _gemma(*place.groups()[:3])
    kinds = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
    kind = (
        place[4] if place and place[4] else next((k for k in ("resid_post", "mlp_out", "attn") if k in str(folder)), "")
    )
    if layer and kind[:3] in kinds:
        known["hook_name"] = f"blocks.{layer[1]}.{kinds[kind[:3]]}"
    return Parts("jumprelu", tensors, known)


def _gemma(second: str | None, size: str, tuned: str) -> str:
    """The language model's hub id; of Gemma 2 and of Gemma 3 270m the base model has no suffix."""
    suffix = "" if tuned == "pt" and (not second or size == "270m") else f"-{tuned}"
    return f"google/gemma-{3 if second else 2}-{size}{suffix}"


WEIGHTS, PICKLED = "sae_weights.safetensors", "ae.pt"
LAYOUTS: dict[str, Callable[[Path, str], Parts]] = {
    WEIGHTS: _sae_lens,
    "sae.safetensors": _sparsify,
    "params.safetensors": _gemma_scope,
    "params.npz": _gemma_scope,
    PICKLED: _dictionary_learning,
}


def files_of_layouts(allow_pickle: bool) -> list[str]:
    """Names of all files that a reader may want of a folder."""
    return ["cfg.json", "config.json", *(name for name in LAYOUTS if allow_pickle or name != PICKLED)]


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    turned = {TRANSPOSED[name]: t.t() for name, t in tensors.items() if name in TRANSPOSED and t.ndim == 2}
    return {OTHER_NAMES.get(name, name): t for name, t in tensors.items() if name not in TRANSPOSED} | turned


def _drop_ones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a scaling factor that scales nothing."""
    factor = tensors.get("scaling_factor")
    if factor is None or not torch.equal(factor, torch.ones_like(factor)):
        return tensors
    return {name: t for name, t in tensors.items() if name != "scaling_factor"}


def _read_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    import numpy as np

    bad = (OSError, ValueError, TypeError, zipfile.BadZipFile)
    explained = explaining(lambda error: f"{path} is truncated or no archive of arrays ({error}): copy it again.", *bad)
    with explained, np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict; torch's restricted reader runs none of the file's code and refuses anything else."""
    import pickle

    refused = f"{path} is damaged or holds something beside tensors: it is not read."
    bad = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError)
    with explaining(lambda _: refused, *bad):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(refused)
    return content


def _build(parts: Parts, folder: Path, device: str | torch.device) -> SAE:
    """Make an SAE of these tensors, or say which of them do not fit."""
    architecture, tensors, known = parts.architecture, parts.tensors, parts.known
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(shapes.get("W_dec", ())) != 2:
        raise UserError(f"{folder}: the weights hold no matrix W_dec; found {', '.join(shapes) or 'nothing'}.")
    d_sae, d_in = shapes["W_dec"]
    want = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    want |= dict.fromkeys(FORMS[architecture].vectors, (d_sae,))
    if shapes != want:
        wrong = sorted(name for name in want.keys() | shapes.keys() if want.get(name) != shapes.get(name))
        raise UserError(f"{folder}: tensors {', '.join(wrong)} are missing, extra or of another shape than {want}.")
    k = known.pop("k", None)
    if architecture == "topk" and not (isinstance(k, int) and 0 < k <= d_sae):
        raise UserError(f"{folder}: its settings give k {k!r}; a topk SAE needs a whole number of 1 to {d_sae}.")
    dtype = str(tensors["W_dec"].dtype).removeprefix("torch.")
    allowed = {field.name for field in fields(SAEConfig)}
    extras = {name: value for name, value in known.items() if name in allowed}
    k = k if architecture == "topk" else None
    sae = SAE(SAEConfig(architecture, d_in, d_sae, k=k, dtype=dtype, **extras), device=device)
    sae.load_state_dict(tensors)
    return sae
