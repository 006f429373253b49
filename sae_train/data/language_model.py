"""In: a language model (named, local Hugging Face folder, GGUF file or hub id) and a TransformerLens hook name.
Out: a LanguageModel (see hooked_model), or, from the configuration alone, the facts that a plan needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data import gguf_files
from sae_train.data.dtypes import DTYPES, choose_dtype
from sae_train.data.hooked_model import LanguageModel
from sae_train.data.hooks import HookPoint, match_hooks, resolve_hook, width_at
from sae_train.data.pretrained import describe_weights, load_config, load_errors, load_tokenizer, locate, quiet
from sae_train.errors import UserError, explaining, first_line
from sae_train.interrupts import interrupts_wait

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a language model before its weights are loaded."""

    architecture: str
    n_layers: int
    d_model: int
    d_in: int
    context: int
    hook_name: str
    n_parameters: int
    n_parameters_to_hook: int
    is_quantised: bool
    """in a GGUF file, so that the weights are made whole again while it is loaded"""


def load_language_model(
    model: str | Path,
    hook: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model; `model` is a name of `NAMED`, a local folder, a GGUF file or a hub id.

    Without `hook` the model's own choice is taken (`sae_hook` in its config.json), else the residual stream
    after its middle block; `dtype` may be "auto" (see dtypes). An unknown model or hook, or a hub id without network,
    is a UserError.
    """
    return load_at_hooks(model, (hook,), device, dtype, trust_remote_code)[0]


def load_at_hooks(
    model: str | Path,
    hooks: Sequence[str | None],
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> list[LanguageModel]:
    """Load a language model once and return it as seen from each hook; as `load_language_model` otherwise."""
    dtype = DTYPES[choose_dtype(dtype, torch.device(device))]
    quiet()
    source, options = locate(str(model))
    options["trust_remote_code"] = trust_remote_code
    from transformers import AutoModelForCausalLM

    empty = _without_weights(str(model), source, options)
    config, points = empty.config, [resolve_hook(empty, hook, str(model)) for hook in hooks]
    with load_errors(str(model)):
        tokenizer = load_tokenizer(source, options)
        # The default attention is sdpa wherever the architecture supports it; sdpa has no soft cap (Gemma 2).
        eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        with gguf_files.loading(options, config) as further:
            lm, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **eager, **options, **further
            )
    if found["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"the weights of {model} lack {min(found['missing_keys'])}: the files are incomplete.")
    with explaining(lambda error: f"{model} cannot run: {first_line(error)}"):
        lm = lm.to(device)
        loaded = [LanguageModel(str(model), lm, tokenizer, point, _context(config)) for point in points]
        for each, point in zip(loaded, points, strict=True):
            _check_passes(each, width_at(empty, point))
    weights = describe_weights(str(model), source, options)
    for each in loaded:
        each.weights = weights
    return loaded


def describe_language_model(model: str, hook: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """Return size and hook of a model from its configuration alone; an unknown model or hook is a UserError."""
    return describe_at_hooks(model, (hook,), trust_remote_code)[0]


def describe_at_hooks(model: str, hooks: Sequence[str | None], trust_remote_code: bool = False) -> list[ModelFacts]:
    """Return size and hook of a model for each hook that names and patterns ask for; as `describe_language_model`."""
    quiet()
    source, options = locate(model)
    options["trust_remote_code"] = trust_remote_code
    empty = _without_weights(model, source, options)
    points = match_hooks(empty, hooks, model)
    return [_describe(empty, point, "gguf_file" in options) for point in points]


def _describe(empty: nn.Module, point: HookPoint, is_quantised: bool) -> ModelFacts:
    """Counted to the hook: the blocks up to the hooked one, whose share of a forward pass harvesting pays for."""
    text = empty.config.get_text_config()
    n_layers = text.num_hidden_layers
    blocks = empty.get_submodule(re.sub(r"\.\d+(\..*)?$", "", point.module))
    per_block = sum(p.numel() for p in blocks.parameters()) // n_layers
    return ModelFacts(
        architecture=type(empty).__name__,
        n_layers=n_layers,
        d_model=text.hidden_size,
        d_in=width_at(empty, point),
        context=_context(empty.config),
        hook_name=point.name,
        n_parameters=sum(p.numel() for p in empty.parameters()),
        n_parameters_to_hook=per_block * (1 + int(point.name.split(".")[1])),
        is_quantised=is_quantised,
    )


def _without_weights(name: str, source: str, options: dict[str, Any]) -> nn.Module:
    """Build the model on "meta", from its configuration alone."""
    from transformers import AutoModelForCausalLM

    with load_errors(name):
        config = load_config(source, options)
        config.get_text_config()  # fails where there is more than one
    try:
        with interrupts_wait(), load_errors(name), torch.device("meta"):  # imports the model's class
            return AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"])
    except UserError as error:
        if "Unrecognized configuration class" not in str(error.__cause__):
            raise
        raise UserError(
            f"{name} is no causal language model that transformers knows: its configuration is "
            f"{type(config).__name__}; choose one that gives logits of the next token."
        ) from error


def _context(config: Any) -> int:
    """How many positions a model has; some say none, or -1, for no limit."""
    said = getattr(config.get_text_config(), "max_position_embeddings", None)
    return said if said and said > 0 else DEFAULT_CONTEXT


def _check_passes(lm: LanguageModel, width: int) -> None:
    """Refuse what a configuration hides: a residual stream of several vectors, and a model that is not causal.

    In BERT, which transformers loads as a causal one too, a token sees those after it. Rounding may differ where a
    mixture of experts groups its tokens in another way.
    """
    if lm.d_in != width:
        raise UserError(
            f"{lm.hook_name} of {lm.name} has {lm.d_in} values a token, not {width}: its residual stream is more than "
            "one vector a token, which cannot be read here; choose another hook or model."
        )
    one, other = (lm.activations(torch.tensor([[0, 1, 2, last]]))[0, :-1] for last in (1, 2))
    if float((one - other).norm()) > (1e-4 if lm.dtype == torch.float32 else 0.05) * float(one.norm()):
        raise UserError(
            f"{lm.name} is no causal language model: its activations at a token change with the tokens after it. (One "
            "of BERT's kind is causal only where its config.json says is_decoder: true.)"
        )
