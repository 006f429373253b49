"""A model's forward pass changed at one module, cut short, or continued behind tokens that it has read before."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

CACHE_ELEMENTS = 2**25  # of one block's keys and values for all rows of a batch: 128 MB in float32


class Passes:
    """Rows of tokens through a model: all at a time, and half as many from where the memory ran out on.

    Activations of fewer rows differ by rounding, since products of other shapes add in another order.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def __call__(self, pass_on: Callable[[Tensor], list[Tensor]], tokens: Tensor) -> list[Tensor]:
        """Return what `pass_on` returns for all rows of tokens, each tensor put together; one row is not halved."""
        while True:
            n = min(len(tokens), self._most or len(tokens))
            try:
                parts = [pass_on(part) for part in tokens.split(n)]
                return parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
            except torch.OutOfMemoryError:
                if n == 1:
                    raise
            self._most = n // 2  # outside of the except clause, which holds the tensors of the pass that failed
            torch.cuda.empty_cache()
            sentence = "the memory ran out in a pass of %d rows through the language model: %d at a time from here on"
            logging.getLogger(__name__).warning(sentence, n, self._most)


def read_prefix(model: nn.Module, prefix: Tensor, pass_through: Callable[[Cache], Any]) -> Cache | None:
    """The keys and values that a pass of a prefix leaves in its cache; None where a model leaves none there.

    That is so where nothing has looked back before the hook, with states that are no keys and values (linear attention,
    convolutions), and with a model's own code from the hub, which may know other caches.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own_code = not type(model).__module__.startswith("transformers.")
    if own_code or "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    cache = DynamicCache(config=model.config.get_text_config())
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    pass_through(cache)
    return cache if cache.get_seq_length() == len(prefix) else None


def count_rows(cache: Cache) -> int:
    """How many rows may stand behind a prefix at a time, so that keys and values for all of them stay within bounds."""
    sizes = [layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized]
    return max(1, CACHE_ELEMENTS // max(sizes, default=1))


def spread(cache: Cache, n: int) -> Cache:
    """The cache of a prefix for one pass of n rows behind it, which leaves the first as it is."""
    behind = copy.copy(cache)
    behind.layers = [_spread_layer(layer, n) if layer.is_initialized else copy.copy(layer) for layer in cache.layers]
    return behind


def _spread_layer(layer: DynamicLayer, n: int) -> DynamicLayer:
    """A block's keys and values seen by n rows: put together in its turn and not kept, where a cache of n rows would
    hold those of all blocks."""
    keys, values = (x.expand(n, -1, -1, -1) for x in (layer.keys, layer.values))

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([keys, new_keys], -2), torch.cat([values, new_values], -2)

    seen = copy.copy(layer)
    seen.keys, seen.values, seen.update = keys, values, update
    return seen


@contextmanager
def changed(module: nn.Module, side: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass what enters a module, or its output, through `change` while the context lasts."""

    def on_input(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def on_output(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, list):  # as in the first GPT
            return [change(output[0]), *output[1:]]
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if side == "in":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def passing_on(block: nn.Module, n_others: int | None) -> Iterator[None]:
    """Let a block return what enters it while the context lasts: alone, or the first of so many other values, None."""

    def forward(*args: Any, hidden_states: Tensor | None = None, **_: Any) -> Tensor | tuple[Tensor]:
        x = args[0] if args else hidden_states
        return x if n_others is None else (x, *[None] * n_others)

    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
