"""In: a language model (named, local Hugging Face folder, GGUF file or hub id) and a TransformerLens hook name.
Out: a LanguageModel that gives the activations at that hook, and logits with the activations edited there.

The forward pass is the plain Hugging Face model's, stopped right after the hooked module, because TransformerLens'
bridge computes attention eagerly (three times slower and four times the memory at context 1024).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data import gguf_files
from sae_train.data.dtypes import DTYPES, choose_dtype
from sae_train.data.forward import changed, count_rows, passing_on, read_prefix, spread
from sae_train.data.hooks import HookPoint, resolve_hook, width_at
from sae_train.data.pretrained import (
    describe_weights,
    load_config,
    load_errors,
    load_tokenizer,
    locate,
    quiet,
    special_ids,
)
from sae_train.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from transformers import Cache

    from sae_train.training.ranks import Ranks

DEFAULT_CONTEXT = 2048
# Tokens in one forward pass on a CPU: more of them leave its caches (37k tokens/s at 1,024; 24k at 4,096).
CPU_TOKENS = 1024


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


class _Stop(Exception):
    """Ends a forward pass once the hooked module has run."""


class LanguageModel:
    """A frozen causal language model seen from one hook."""

    weights: dict[str, Any] | None = None
    """which weights these are, for the record of a run"""
    _ranks: Ranks | None = None

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, point: HookPoint, context: int) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.hook_name = point.name
        self.context = context
        self.bos_id: int | None = tokenizer.bos_token_id
        self.special_ids = special_ids(tokenizer)
        self._model = model.eval().requires_grad_(False)
        self._module = model.get_submodule(point.module)
        self._side = point.side
        blocks, layer = re.match(r"(.+?)\.(\d+)(?:\.|$)", point.module).groups()
        *self._before, self._block = list(model.get_submodule(blocks))[: int(layer) + 1]
        # Where logits can start: from what enters the hooked block, or, where that is hooked at its end, leaves it.
        self._resumes = "out" if self._side == "out" and self._module is self._block else "in"
        self._norm = model.get_submodule(point.norm) if point.norm else None
        self.device = next(model.parameters()).device
        form = self._block.register_forward_hook(self._note_form)
        seen = self._activations(torch.zeros(1, 1, dtype=torch.long))
        form.remove()
        self.d_in, self.dtype = seen.shape[-1], seen.dtype

    def _note_form(self, _block: nn.Module, _given: Any, returned: Any) -> None:
        self._returns_tuple = isinstance(returned, tuple)

    def activations(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_in"]:
        """Return the activations at the hook in float32, computing nothing beyond the hooked module."""
        ranks = self._ranks
        n = (
            max(1, CPU_TOKENS // tokens.shape[1])
            if self.device.type == "cpu"
            else -(-len(tokens) // (ranks.size if ranks else 1))
        )
        parts = tokens.split(n)
        if ranks is None or ranks.size == 1:
            return torch.cat([self._activations(part) for part in parts]).float()
        x = torch.empty(*tokens.shape, self.d_in, device=self.device)
        ranks.fill(x.split(n), lambda i: self._activations(parts[i]))
        return x

    @torch.no_grad()
    def activations_after(
        self, prefix: Int[Tensor, " before"], tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position d_in"] | None:
        """Return the activations in float32 of rows of tokens that all stand behind one prefix.

        The prefix goes through the model once, and its keys and values are kept. None where this model keeps none.
        """
        cache = read_prefix(self._model, prefix, lambda cache: self._activations(prefix[None], cache))
        if cache is None:
            return None
        parts = tokens.split(count_rows(cache))
        return torch.cat([self._activations(part, spread(cache, len(part))) for part in parts]).float()

    @torch.no_grad()
    def logits_after(
        self, prefix: Int[Tensor, " before"], tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocab"] | None:
        """Return next-token logits in float32 of rows of tokens that all stand behind one prefix.

        The prefix goes through the blocks once, and its keys and values are kept. None where this model keeps none.
        """
        # The blocks alone, without the unembedding: nobody asks for the prefix's own logits.
        blocks = partial(self._model.base_model, prefix[None].to(self.device), use_cache=True)
        cache = read_prefix(self._model, prefix, lambda cache: blocks(past_key_values=cache))
        if cache is None:
            return None
        parts = tokens.split(count_rows(cache))
        return torch.cat([self._forward(part, spread(cache, len(part))).logits for part in parts]).float()

    def shared_by(self, ranks: Ranks) -> LanguageModel:
        """Return this model with activations that all processes compute together, each its share of the rows.

        All of them then get all activations, on a CPU the same bits as one process: the parts of a batch that go
        through the model at a time stay the same.
        """
        shared = copy.copy(self)
        shared._ranks = ranks
        return shared

    def _activations(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        caught: list[Tensor] = []

        def catch(x: Tensor) -> Tensor:
            caught.append(x.reshape(*tokens.shape, -1))  # OPT flattens (batch, position) inside its blocks
            raise _Stop

        with torch.no_grad(), changed(self._module, self._side, catch), suppress(_Stop):
            self._forward(tokens, cache)
        return caught[0]

    def start(self, tokens: Int[Tensor, "batch position"]) -> Tensor | None:
        """Return the hidden states that `logits` can start from: no edit changes them, and what comes before them need
        not be computed again. None where nothing comes before.
        """
        if not self._before and self._resumes == "in":
            return None
        caught: list[Tensor] = []

        def catch(x: Tensor) -> Tensor:
            caught.append(x)
            raise _Stop

        with torch.no_grad(), changed(self._block, self._resumes, catch), suppress(_Stop):
            self._forward(tokens)
        return caught[0]

    def logits(
        self,
        tokens: Int[Tensor, "batch position"],
        edit: Callable[[Tensor], Tensor] | None = None,
        start: Tensor | None = None,
    ) -> Float[Tensor, "batch position vocab"]:
        """Return next-token logits in float32.

        `edit` maps the float32 activations at the hook to what replaces them; gradients flow through it. With `start`,
        what the method of that name returned for these tokens, the blocks before it are not computed again.
        """

        def replace(x: Tensor) -> Tensor:
            edited = edit(x.reshape(*tokens.shape, -1).float())
            return edited.to(x.dtype).reshape(x.shape)

        with ExitStack() as changes:
            if start is not None:
                for block in self._before:
                    changes.enter_context(passing_on(block))
                if self._resumes == "out":
                    changes.enter_context(passing_on(self._block, self._returns_tuple))
                changes.enter_context(changed(self._block, "in", lambda _: start))
            if edit is not None:
                changes.enter_context(changed(self._module, self._side, replace))
            return self._forward(tokens).logits.float()

    @torch.no_grad()
    def read_out(self, directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n vocab"] | None:
        """Return what directions of the residual stream say of the next token, past all later blocks.

        The logits of the last norm and the unembedding on each direction alone, without their bias and their mean; None
        where the hook's values are not added to the residual stream, or are not as wide.
        """
        head = self._model.get_output_embeddings()
        if head is None or head.weight.shape[1] != self.d_in or re.search(r"\.(attn|mlp)\.", self.hook_name):
            return None
        rows = torch.cat([directions, torch.zeros_like(directions[:1])]).to(self.device, head.weight.dtype)
        logits = head(self._norm(rows) if self._norm is not None else rows).float()
        logits = logits[:-1] - logits[-1]
        return (logits - logits.mean(1, keepdim=True)).cpu()

    def _forward(self, tokens: Tensor, cache: Cache | None = None) -> Any:
        n = tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if n > self.context:
            raise UserError(f"{n} tokens do not fit the {self.context} positions of {self.name}.")
        kept = {} if cache is None else {"past_key_values": cache}
        return self._model(input_ids=tokens.to(self.device), use_cache=cache is not None, **kept)


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
    dtype = DTYPES[choose_dtype(dtype, torch.device(device))]
    quiet()
    source, options = locate(str(model))
    options["trust_remote_code"] = trust_remote_code
    from transformers import AutoModelForCausalLM

    empty = _without_weights(str(model), source, options)
    config, point = empty.config, resolve_hook(empty, hook, str(model))
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
    _check_tokenizer(lm, tokenizer, str(model))
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT
    loaded = LanguageModel(str(model), lm.to(device), tokenizer, point, context)
    loaded.weights = describe_weights(str(model), source, options)
    return loaded


def describe_language_model(model: str, hook: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """Return size and hook of a model from its configuration alone; an unknown model or hook is a UserError.

    Counted to the hook: the blocks up to the hooked one, whose share of a forward pass harvesting pays for.
    """
    quiet()
    source, options = locate(model)
    options["trust_remote_code"] = trust_remote_code
    empty = _without_weights(model, source, options)
    point = resolve_hook(empty, hook, model)
    text = empty.config.get_text_config()
    n_layers = text.num_hidden_layers
    blocks = empty.get_submodule(re.sub(r"\.\d+(\..*)?$", "", point.module))
    per_block = sum(p.numel() for p in blocks.parameters()) // n_layers
    return ModelFacts(
        architecture=type(empty).__name__,
        n_layers=n_layers,
        d_model=text.hidden_size,
        d_in=width_at(empty, point),
        context=getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT,
        hook_name=point.name,
        n_parameters=sum(p.numel() for p in empty.parameters()),
        n_parameters_to_hook=per_block * (1 + int(point.name.split(".")[1])),
        is_quantised="gguf_file" in options,
    )


def _without_weights(name: str, source: str, options: dict[str, Any]) -> nn.Module:
    """Build the model on "meta", from its configuration alone."""
    from transformers import AutoModelForCausalLM

    with load_errors(name):
        config = load_config(source, options)
    try:
        with load_errors(name), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"])
    except UserError as error:
        if "Unrecognized configuration class" not in str(error.__cause__):
            raise
        raise UserError(
            f"{name} is no causal language model that transformers knows: its configuration is "
            f"{type(config).__name__}; choose one that gives logits of the next token."
        ) from error


def _check_tokenizer(lm: nn.Module, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer with ids that the model cannot embed."""
    n_embedded = lm.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= n_embedded:
        raise UserError(
            f"the tokenizer of {name} has id {largest}, but the model embeds only {n_embedded} ids: "
            "they do not belong together."
        )
