"""Readers of SAEs' folders, one a layout: each gives one of our SAEs for raw activations.

Layouts are SAELens' (ours), sparsify's, Gemma Scope's, Llama Scope's and, where the caller allows their pickles,
dictionary_learning's and Qwen-Scope's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError
from sae_train.sae.foreign_settings import (
    Buffer,
    DictionaryFile,
    SAELensFile,
    SparsifyFile,
    SparsifyRun,
    checked,
)
from sae_train.sae.forms import FORMS
from sae_train.sae.gemma_scope import read_gemma_scope
from sae_train.sae.llama_scope import SETTINGS, read_llama_scope
from sae_train.sae.model import SAE, SAEConfig, fold_decoder_norm
from sae_train.sae.parts import Parts, drop_ones, read_json, read_settings, rename
from sae_train.sae.qwen_scope import FILE as QWEN_FILE
from sae_train.sae.qwen_scope import read_qwen_scope
from sae_train.sae.tensor_files import read_pickled, read_tensors

FROM_SAE_LENS = {form.sae_lens: ours for ours, form in FORMS.items()}
SETTINGS_FILES = ("cfg.json", "config.json", SETTINGS)
PROVENANCE = ("model_name", "hook_name", "context_size", "prepend_bos", "dataset_path", "l0")
# TransformerLens' short names in SAELens' list of published SAEs: by how they begin, and the others.
OWNERS = {"pythia-": "EleutherAI", "gemma-": "google"}
SHORT_NAMES = {"gpt2-small": "gpt2", "mistral-7b": "mistralai/Mistral-7B-v0.1"} | {
    f"qwen3-{size}": f"Qwen/Qwen3-{size.upper()}" for size in ("0.6b", "1.7b", "4b", "8b", "14b")
}
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


def read_sae(folder: Path, device: str | torch.device, allow_pickle: bool = False) -> SAE:
    """Read the SAE in a folder; UserError says what is missing, damaged or of a kind that is not read."""
    path = find_weights(folder)
    if path is None:
        raise UserError(_say_what_is_missing(folder))
    if path.suffix == ".pt" and not allow_pickle:
        raise UserError(
            f"{path.parent} holds a pickled SAE ({path.name}), which is read only where that is allowed: "
            "load_sae(…, allow_pickle=True), or --allow-pickle; tensors alone are taken from it, no code."
        )
    if path == folder:
        folder, parts = path.parent, read_qwen_scope(path.parent, path.name)
    else:
        weights = path.relative_to(folder).as_posix()
        parts = LAYOUTS[weights](folder, weights)
    sae = _build(parts, folder, device)
    if "threshold" in sae.form.vectors:
        # There relu comes before the jump, so a negative threshold acts as 0.
        sae.threshold.data.clamp_(min=0)
    return fold_decoder_norm(sae) if parts.rescaled else sae


def find_weights(folder: Path) -> Path | None:
    """The file that holds an SAE's weights: one in its folder, or, of Qwen-Scope, what was named is the file itself."""
    if QWEN_FILE.fullmatch(folder.name) and folder.is_file():
        return folder
    return next((folder / name for name in LAYOUTS if (folder / name).is_file()), None)


def _say_what_is_missing(folder: Path) -> str:
    if (folder / "cfg.json").is_file():
        return f"{folder / WEIGHTS} does not exist: the checkpoint is incomplete; copy or save it again."
    if (folder / SETTINGS).is_file():
        return f"{folder / LLAMA_SCOPE} does not exist: the checkpoint is incomplete; copy it again."
    inside = sorted(str(p.parent) for p in folder.glob("saes/*/cfg.json"))
    inside += sorted(str(p) for p in folder.glob("*.sae.pt") if QWEN_FILE.fullmatch(p.name))
    hint = f"choose one of {', '.join(inside)}" if inside else "give a folder with cfg.json and its weights"
    return f"{folder} is no SAE checkpoint: {hint}."


def _sae_lens(folder: Path, weights: str) -> Parts:
    """SAELens; its configurations from before version 6 keep all at the top and name topk by the activation."""
    if (folder / "config.json").is_file() and "hook_point_in" in read_json(folder / "config.json"):
        raise UserError(
            f"{folder} is in the later layout of OpenMOSS (config.json with hook_point_in), which is not read: let "
            "SAELens load it and save it in its own."
        )
    cfg = read_settings(folder / "cfg.json", SAELensFile)
    activation = cfg.activation_fn_str or cfg.activation_fn or "relu"
    theirs = "topk" if activation == "topk" else cfg.architecture
    if theirs not in FROM_SAE_LENS:
        known = ", ".join(FROM_SAE_LENS)
        raise UserError(f"{folder}: architecture {theirs!r} is not read; readable are {known}.")
    if activation not in ("relu", "topk"):
        raise UserError(f"{folder}: activation {activation!r} is not read; readable are relu and topk.")
    origin = cfg.metadata or cfg
    known = {name: getattr(origin, name) for name in PROVENANCE}
    known = {name: getattr(cfg, name) if value is None else value for name, value in known.items()}
    known["model_name"] = hub_id(known["model_name"])
    known["metadata"] = cfg.metadata.model_dump(exclude=set(PROVENANCE), exclude_unset=True) if cfg.metadata else {}
    known["apply_b_dec_to_input"] = cfg.apply_b_dec_to_input
    if theirs == "topk":
        older = (cfg.activation_fn_kwargs or {}).get("k")
        known["k"] = cfg.k if cfg.k is not None else older
        if older not in (None, known["k"]):
            raise UserError(f"{folder}: its settings give k {cfg.k:g} and k {older!r}: one of them is wrong.")
    tensors = drop_ones(read_tensors(folder / weights))
    sizes = {"d_in": cfg.d_in, "d_sae": cfg.d_sae}
    return Parts(FROM_SAE_LENS[theirs], tensors, _given(known), cfg.rescale_acts_by_decoder_norm, sizes)


def _given(known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in known.items() if value is not None}


def _sparsify(folder: Path, weights: str) -> Parts:
    """sparsify: one folder a module, its run's config.json above them."""
    cfg = read_settings(folder / "cfg.json", SparsifyFile)
    above, run = folder.absolute().parent / "config.json", SparsifyRun()
    if above.is_file() and {"sae", "ctx_len"} & (content := read_json(above)).keys():  # else it is somebody else's
        run = checked(SparsifyRun, content, above)
        checked(SparsifyFile, run.sae.model_dump() | {"transcode": run.sae.transcode or run.transcode}, above)
    block = re.fullmatch(r"(?:layers|h)[._](\d+)", folder.absolute().name)
    hook = f"blocks.{block[1]}.hook_resid_post" if block else folder.absolute().name
    known = {"model_name": run.model, "dataset_path": run.dataset, "context_size": run.ctx_len, "hook_name": hook}
    sizes = {"d_in": cfg.d_in, "num_latents": cfg.num_latents or None}
    return Parts("topk", rename(read_tensors(folder / weights)), {**_given(known), "k": cfg.k}, sizes=sizes)


def _dictionary_learning(folder: Path, weights: str) -> Parts:
    """dictionary_learning: weights as a pickle of tensors, the class and its origin in config.json.

    BatchTopK's single threshold is written out, as it selects latents outside training.
    """
    config = read_settings(folder / "config.json", DictionaryFile)
    trainer, buffer = config.trainer, config.buffer or Buffer()
    if trainer.dict_class not in DICTIONARIES:
        known = ", ".join(DICTIONARIES)
        raise UserError(f"{folder}: class {trainer.dict_class!r} is not read; readable are {known}.")
    architecture, apply_b_dec = DICTIONARIES[trainer.dict_class]
    tensors = rename(read_pickled(folder / weights))
    if architecture == "jumprelu" and "threshold" in tensors and tensors["threshold"].numel() == 1:
        tensors["threshold"] = tensors["threshold"].expand(len(tensors.get("W_dec", ()))).contiguous()
    dropped = {"k", "group_sizes"} | ({"threshold"} if architecture == "topk" else set())
    known = {
        "k": trainer.k, "apply_b_dec_to_input": apply_b_dec, "model_name": trainer.lm_name or "",
        "context_size": buffer.ctx_len, "hook_name": trainer.submodule_name or "",
    }  # fmt: skip
    if "resid_post" in known["hook_name"] and isinstance(trainer.layer, int):
        known["hook_name"] = f"blocks.{trainer.layer}.hook_resid_post"
    if buffer.io == "in":  # what goes into a module has another hook
        known["hook_name"] = ""
    sizes = {"activation_dim": trainer.activation_dim, "dict_size": trainer.dict_size}
    return Parts(architecture, {name: t for name, t in tensors.items() if name not in dropped}, known, sizes=sizes)


def hub_id(name: str | None) -> str | None:
    """The hub's id of a model that SAELens calls by TransformerLens' old short names; any other name as it is."""
    owner = next((owner for start, owner in OWNERS.items() if (name or "").startswith(start)), None)
    return f"{owner}/{name}" if owner else SHORT_NAMES.get(name, name)


READ_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTS, PICKLED, LLAMA_SCOPE = "sae_weights.safetensors", "ae.pt", "checkpoints/final.safetensors"
LAYOUTS: dict[str, Callable[[Path, str], Parts]] = {
    WEIGHTS: _sae_lens,
    "sae.safetensors": _sparsify,
    "params.safetensors": read_gemma_scope,
    "params.npz": read_gemma_scope,
    LLAMA_SCOPE: read_llama_scope,
    PICKLED: _dictionary_learning,
}


def files_of_layouts(allow_pickle: bool) -> list[str]:
    """Names of all files that a reader may want of a folder."""
    return [*SETTINGS_FILES, *(name for name in LAYOUTS if allow_pickle or name != PICKLED)]


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
    for (name, said), found in zip(parts.sizes.items(), (d_in, d_sae), strict=False):
        if said not in (None, found):
            raise UserError(f"{folder}: its settings give {name} {said} and its weights have {found}: one is wrong.")
    k = known.pop("k", None)
    if architecture == "topk" and not (isinstance(k, int | float) and k == int(k) and 0 < k <= d_sae):
        raise UserError(f"{folder}: its settings give k {k!r}; a topk SAE needs a whole number of 1 to {d_sae}.")
    allowed = {field.name for field in fields(SAEConfig)}
    extras = {name: value for name, value in known.items() if name in allowed}
    k = int(k) if architecture == "topk" else None
    dtype = _widest(tensors, folder)
    sae = SAE(SAEConfig(architecture, d_in, d_sae, k=k, dtype=dtype, **extras), device=device)
    sae.load_state_dict(tensors)
    return sae


def _widest(tensors: dict[str, Tensor], folder: Path) -> str:
    """The precision in which nothing that a file holds is rounded: float32, or float64 where a tensor has that.

    16-bit files are exact in float32, in which everything is then computed.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in READ_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{folder}: {name} is of type {kind}; read are float16, bfloat16, float32 and float64.")
    return "float64" if any(t.dtype == torch.float64 for t in tensors.values()) else "float32"
