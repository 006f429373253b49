"""The reader of Llama Scope's SAEs: hyperparams.json, and the weights in checkpoints/final.safetensors.

In the authors' code (OpenMOSS/Language-Model-SAEs, sae.py) an SAE for raw activations has the encoder's bias b_E/s and
the decoder's b_D/s, with s = √d / the mean norm of activations: pre = x·W_E + b_E/s, latents = pre·1[pre·‖W_D,i‖ > θ],
x̂ = latents·W_D + b_D/s. The threshold θ is in units of raw activations, as SAELens' reader has it, too.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sae_train.errors import UserError
from sae_train.sae.foreign_settings import LlamaScopeFile
from sae_train.sae.parts import Parts, read_settings, rename
from sae_train.sae.tensor_files import read_tensors

SETTINGS = "hyperparams.json"
MODELS = {"Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B"}  # by how the name of an SAE's folder begins


def read_llama_scope(folder: Path, weights: str) -> Parts:
    """Make its function one of raw activations; its folder's name, as Llama3_1-8B-Base-L19R-8x, tells the model."""
    cfg = read_settings(folder / SETTINGS, LlamaScopeFile)
    tensors = {name: t.float() for name, t in rename(read_tensors(folder / weights)).items()}
    if not cfg.use_decoder_bias:
        tensors.setdefault("b_dec", torch.zeros(cfg.d_model))
    missing = {"W_enc", "W_dec", "b_enc", "b_dec"} - tensors.keys()
    if missing:
        raise UserError(f"{folder}: the weights lack {', '.join(sorted(missing))}: copy the checkpoint again.")
    for name in ("b_enc", "b_dec"):
        tensors[name] = tensors[name] / cfg.scale
    threshold = torch.full(tensors["W_dec"].shape[:1], cfg.jump_relu_threshold)
    if cfg.sparsity_include_decoder_norm:
        threshold = threshold / tensors["W_dec"].norm(dim=1)
    known = {
        "apply_b_dec_to_input": cfg.apply_decoder_bias_to_pre_encoder and cfg.use_decoder_bias,
        "hook_name": cfg.hook_point_in, "context_size": 1024, "dataset_path": "cerebras/SlimPajama-627B",
        "model_name": next((hub for name, hub in MODELS.items() if folder.absolute().name.startswith(name)), ""),
    }  # fmt: skip
    sizes = {"d_model": cfg.d_model, "d_sae": cfg.d_sae}
    return Parts("jumprelu", tensors | {"threshold": threshold}, known, sizes=sizes)
