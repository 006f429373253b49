"""A language model seen from one hook: the activations there, and logits with the activations edited.

The forward pass is the plain Hugging Face model's, stopped right after the hooked module, because TransformerLens'
bridge computes attention eagerly (three times slower and four times the memory at context 1024).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data.forward import Passes, changed, count_rows, passing_on, read_prefix, spread
from sae_train.data.hooks import HookPoint
from sae_train.data.pretrained import special_ids
from sae_train.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from transformers import Cache

    from sae_train.training.ranks import Ranks

# Tokens in one forward pass on a CPU: more of them leave its caches (37k tokens/s at 1,024; 24k at 4,096).
CPU_TOKENS = 1024


class _Stop(Exception):
    """Ends a forward pass once the hooked module has run."""


class LanguageModel:
    """A frozen causal language model seen from one hook."""

    weights: dict[str, Any] | None = None
    """which weights these are, for the record of a run"""
    _ranks: Ranks | None = None

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, point: HookPoint, context: int) -> None:
        self.name = name
        self.passes = Passes()
        self.tokenizer = tokenizer
        self.hook_name = point.name
        self.context = context
        self.bos_id: int | None = tokenizer.bos_token_id
        # Ids that the tokenizer has and the model does not embed; some models come with one that no text has.
        self._beyond = range(
            model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0) + 1
        )
        self.special_ids = {*special_ids(tokenizer), *self._beyond}
        self._model = model.eval().requires_grad_(False)
        self._module = model.get_submodule(point.module)
        self._side = point.side
        blocks, layer = re.match(r"(.+?)\.(\d+)(?:\.|$)", point.module).groups()
        *self._before, self._block = list(model.get_submodule(blocks))[: int(layer) + 1]
        # Where logits can start: from what enters the hooked block, or, where that is hooked at its end, leaves it.
        self._resumes = "out" if self._side == "out" and self._module is self._block else "in"
        self._norm = model.get_submodule(point.norm) if point.norm else None
        self.device = next(model.parameters()).device
        self._n_others: int | None = None
        self._carries = False
        form = [*self._before, self._block][0].register_forward_hook(self._note_form)
        try:
            seen = self._activations(torch.zeros(1, 1, dtype=torch.long))
        finally:
            form.remove()
        self.d_in, self.dtype = seen.shape[-1], seen.dtype

    def _note_form(self, _block: nn.Module, _given: Any, returned: Any) -> None:
        """See what a block returns: the residual stream alone or the first of several values."""
        if hasattr(returned, "_fields"):
            raise UserError(f"the blocks of {self.name} pass on several streams, which cannot be read here.")
        others = returned[1:] if isinstance(returned, tuple | list) else None
        self._n_others = None if others is None else len(others)
        # Some hand on what the next ones need (router states, chosen positions), so that none can be started at;
        # attention's weights, (1, heads, 1, 1) for the one token that is passed here, are not that.
        self._carries = any(other is not None and getattr(other, "shape", ())[2:] != (1, 1) for other in others or ())

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

    def activations_at(
        self, hooked: Sequence[LanguageModel], tokens: Int[Tensor, "batch position"]
    ) -> list[Float[Tensor, "batch position d_in"]]:
        """Return what `activations` of each of `hooked`, this model seen from other hooks, returns: in one pass."""
        n = max(1, CPU_TOKENS // tokens.shape[1]) if self.device.type == "cpu" else len(tokens)
        parts = [self._catch(hooked, part) for part in tokens.split(n)]
        return [torch.cat(of_hook).float() for of_hook in zip(*parts, strict=True)]

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
        self, prefix: Int[Tensor, " before"], tokens: Int[Tensor, "batch position"],
        added: Float[Tensor, "batch position d_in"] | None = None,
    ) -> Float[Tensor, "batch position vocab"] | None:  # fmt: skip
        """Return next-token logits in float32 of rows of tokens that all stand behind one prefix.

        The prefix goes through the blocks once, and its keys and values are kept. None where this model keeps none.
        `added` is added to the tokens' activations at the hook.
        """
        # The blocks alone, without the unembedding: nobody asks for the prefix's own logits.
        self._check_ids(prefix)
        blocks = partial(self._model.base_model, prefix[None].to(self.device), use_cache=True)
        cache = read_prefix(self._model, prefix, lambda cache: blocks(past_key_values=cache))
        if cache is None:
            return None

        def pass_on(rows: slice) -> Tensor:
            part = tokens[rows]
            with ExitStack() as changes:
                if added is not None:
                    changes.enter_context(changed(self._module, self._side, lambda x: add(x, added[rows])))
                return self._forward(part, spread(cache, len(part))).logits

        def add(x: Tensor, more: Tensor) -> Tensor:
            return (x.float() + more.to(x.device).reshape(x.shape)).to(x.dtype)

        n = count_rows(cache)
        return torch.cat([pass_on(slice(start, start + n)) for start in range(0, len(tokens), n)]).float()

    def shared_by(self, ranks: Ranks) -> LanguageModel:
        """Return this model with activations that all processes compute together, each its share of the rows.

        All of them then get all activations, on a CPU the same bits as one process: the parts of a batch that go
        through the model at a time stay the same.
        """
        shared = copy.copy(self)
        shared._ranks = ranks
        return shared

    def _activations(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self._catch([self], tokens, cache)[0]

    def _catch(self, hooked: Sequence[LanguageModel], tokens: Tensor, cache: Cache | None = None) -> list[Tensor]:
        """The activations at the hooks of `hooked`, all this model, in passes of as many rows as fit."""
        if cache is not None:  # which is of so many rows
            return self._pass(hooked, tokens, cache)
        return self.passes(partial(self._pass, hooked), tokens)

    def _pass(self, hooked: Sequence[LanguageModel], tokens: Tensor, cache: Cache | None = None) -> list[Tensor]:
        """The same in one pass, which ends at the last of the hooks."""
        caught: dict[int, Tensor] = {}

        def catch(i: int, x: Tensor) -> Tensor:
            caught[i] = x.reshape(*tokens.shape, -1)  # OPT flattens (batch, position) inside its blocks
            if len(caught) == len(hooked):
                raise _Stop
            caught[i] = caught[i].clone()  # what comes behind may write into it
            return x

        with torch.no_grad(), ExitStack() as changes:
            for i, lm in enumerate(hooked):
                changes.enter_context(changed(lm._module, lm._side, partial(catch, i)))
            with suppress(_Stop):
                self._forward(tokens, cache)
        return [caught[i] for i in range(len(hooked))]

    def start(self, tokens: Int[Tensor, "batch position"]) -> Tensor | None:
        """Return the hidden states that `logits` can start from: no edit changes them, and what comes before them need
        not be computed again. None where nothing comes before, or blocks hand on more than these states.
        """
        if self._carries or (not self._before and self._resumes == "in"):
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
                    changes.enter_context(passing_on(block, self._n_others))
                if self._resumes == "out":
                    changes.enter_context(passing_on(self._block, self._n_others))
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

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face folder; weights of a GGUF file are written whole."""
        if hasattr(self._model.config, "quantization_config"):
            del self._model.config.quantization_config
        self._model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _forward(self, tokens: Tensor, cache: Cache | None = None) -> Any:
        n = tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if n > self.context:
            raise UserError(f"{n} tokens do not fit the {self.context} positions of {self.name}.")
        self._check_ids(tokens)
        kept = {} if cache is None else {"past_key_values": cache}
        return self._model(input_ids=tokens.to(self.device), use_cache=cache is not None, **kept)

    def _check_ids(self, tokens: Tensor) -> None:
        """Refuse ids that only the tokenizer knows; where it knows none of them, nothing is looked at."""
        if self._beyond and int(tokens.max()) >= self._beyond.start:
            unknown = int(tokens.max())
            raise UserError(
                f"the text has the token {self.tokenizer.convert_ids_to_tokens(unknown)!r}, id {unknown} of the "
                f"tokenizer of {self.name}, but the model embeds only {self._beyond.start} ids: take the tokenizer "
                "that belongs to it, or text without that token."
            )
