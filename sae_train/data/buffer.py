"""In: a LanguageModel and a TokenStream, or a hook's reader of a Harvest.
Out: an endless iterator of shuffled activation batches that resumes bit-exactly; held-out activations.

The activations of the stream's kept tokens, in order, are cut into blocks of `buffer_tokens`; each block is
permuted by a generator of its own and handed out in batches. Nothing is lost between blocks, and the state
is a position: on resume the current block is computed again, or read where blocks are kept on disk. There a block takes
no memory but for the part that is handed out, and while it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config import LEAST_HELD_OUT
from sae_train.data.harvest import LM_BATCH_TOKENS, Harvest, Reader, dropped, kept_activations
from sae_train.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_train.data.activation_cache import ActivationCache, Draft, KeptBlock
    from sae_train.data.language_model import LanguageModel
    from sae_train.data.tokens import TokenStream
    from sae_train.protocols import Source

MAX_EMPTY_BATCHES = 100


class ActivationBuffer:
    """Endless iterator over (batch_tokens, d_in) float32 activations on the model's device."""

    def __init__(
        self,
        lm: LanguageModel,
        tokens: TokenStream,
        *,
        buffer_tokens: int,
        batch_tokens: int,
        drop_ids: Collection[int] = (),
        skip_first: bool = False,
        seed: int = 0,
        cache: ActivationCache | None = None,
        reader: Reader | None = None,
    ) -> None:
        """Special ids and `drop_ids` are left out, with `skip_first` the first position of each row as well;
        `buffer_tokens` is rounded up to whole batches.

        Blocks that `cache` has are read, and the others are written to it. `reader` is that of this hook where several
        share their passes.
        """
        self.lm = lm
        self.tokens = tokens
        self.reader = reader or Harvest([lm], tokens, drop_ids, skip_first).readers[0]
        self.batch_tokens = batch_tokens
        self.buffer_tokens = rounded_up(buffer_tokens, batch_tokens)
        self._seed, self._cache = seed, cache
        self.load_state_dict({"tokens": self.reader.state, "skip": 0, "block": 0, "offset": 0})

    def __iter__(self) -> ActivationBuffer:
        return self

    def __next__(self) -> Float[Tensor, "batch_tokens d_in"]:
        if self._block is None:
            self._fill()
        x = self._block.batch(self._offset, self._offset + self.batch_tokens)
        self._offset += self.batch_tokens
        if self._offset == self.buffer_tokens:
            self._start = {"tokens": self._end["tokens"], "skip": self._end["skip"], "block": self._start["block"] + 1}
            self._offset = 0
            self._block = None
        return x

    @property
    def epoch(self) -> int:
        """How often the data began anew, up to the end of the current block."""
        return self._end["epoch"] if self._end else self.reader.epoch

    def peek(self, n: int) -> Float[Tensor, "n d_in"]:
        """Return activations of the next n tokens of the text, in order, and stay where it is.

        They are kept for the block that comes next.
        """
        x = torch.cat(self.reader.peek(-(-n // LM_BATCH_TOKENS)))[:n]
        if not len(x):
            raise UserError(self._nothing())
        return x

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON values: where the block starts, how much of it is handed out."""
        return {**self._start, "offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; the next batches are bit-equal to those that followed it."""
        self._start = {name: state[name] for name in ("tokens", "skip", "block")}
        self._offset = state["offset"]
        self._block: Block | KeptBlock | None = None
        self._end: dict[str, Any] = {}
        self._go_to(self._start)

    def _go_to(self, start: dict[str, Any]) -> None:
        """Bring the reader to where a block starts."""
        self.reader.load_state_dict(start["tokens"])
        self._rest: Tensor | None = None
        self._used = start["skip"]

    def _fill(self) -> None:
        """Read or compute the block at the position."""
        number, device = self._start["block"], self.lm.device
        kept = self._cache.read(number, device) if self._cache else None
        if kept is not None:
            self._block, self._end = kept, kept.end
            self._go_to(self._end)
            return
        order = torch.randperm(self.buffer_tokens, generator=torch.Generator().manual_seed(_mix(self._seed, number)))
        block = (self._cache.draft if self._cache else partial(Block, device=device))(order, self.lm.d_in)
        self._compute(block)
        self._end = {"tokens": self._batch_start, "skip": self._used, "epoch": self.reader.epoch}
        if len(block.rows) > 1:  # of many processes some write none
            check_activations(block.rows, self.lm)
        self._block = self._cache.write(number, block, self._end, device) if self._cache else block

    def _compute(self, block: Block | Draft) -> None:
        """Compute the block at the position."""
        filled = 0
        while filled < self.buffer_tokens:
            if self._rest is None or len(self._rest) == 0:
                self._forward()
            piece = self._rest[: self.buffer_tokens - filled]
            block.put(filled, piece)
            filled += len(piece)
            self._used += len(piece)
            self._rest = self._rest[len(piece) :]

    def _forward(self) -> None:
        """Compute the next tokens' kept activations; after a resume some of them are used up."""
        skip = self._used if self._rest is None else 0
        for _ in range(MAX_EMPTY_BATCHES):
            self._batch_start = self.reader.state
            kept = next(self.reader)
            self._used = min(skip, len(kept))
            self._rest = kept[self._used :]
            if len(self._rest):
                return
            skip = 0
        raise UserError(self._nothing())

    def _nothing(self) -> str:
        return f"all tokens of {self.tokens.name} are special or dropped: there is nothing to train on."


class Block:
    """A block in memory: `rows` as the text has them, handed out in their `order`."""

    def __init__(self, order: Int[Tensor, " n"], d_in: int, device: torch.device | str) -> None:
        self.rows, self._order = torch.zeros(len(order), d_in, device=device), order.to(device)

    def put(self, at: int, x: Float[Tensor, "m d_in"]) -> None:
        """Take the rows that stand at `at` and behind it in the text."""
        self.rows[at : at + len(x)] = x

    def batch(self, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """Return the rows that are handed out in these places."""
        return self.rows[self._order[start:stop]]


def held_out_activations(
    lm: LanguageModel,
    rows: Int[Tensor, "rows context"],
    drop_ids: Collection[int] = (),
    n_tokens: int | None = None,
    sequences: int = 32,
    at_least: int = 1,
    skip_first: bool = False,
) -> Float[Tensor, "tokens d_in"]:
    """Return the activations of the kept tokens of held-out rows in order, at most `n_tokens` of them.

    Fewer than `at_least` of them is a UserError.
    """
    drop = dropped(lm, drop_ids)
    kept = []
    n_kept = 0
    for part in rows.split(sequences):
        kept.append(kept_activations(lm, part, drop, skip_first))
        n_kept += len(kept[-1])
        if n_tokens is not None and n_kept >= n_tokens:
            break
    if n_kept < max(1, at_least):
        raise UserError(
            f"{n_kept} of {rows.numel()} tokens are left once special and dropped ones are taken out, but "
            f"{max(1, at_least)} are needed: hold out more, drop fewer tokens or take other text."
        )
    x = torch.cat(kept)[:n_tokens]
    check_activations(x, lm)
    return x


def rounded_up(buffer_tokens: int, batch_tokens: int) -> int:
    """Return how many activations a buffer holds: whole batches."""
    return max(1, -(-buffer_tokens // batch_tokens)) * batch_tokens


def estimate_scale(x: Float[Tensor, "tokens d_in"]) -> float:
    """Return the factor that brings the mean squared norm of `x` to d_in."""
    return math.sqrt(x.shape[-1] / x.double().square().sum(-1).mean().item())


def check_held_out(n: int, name: str) -> None:
    """Refuse fewer held-out activations than figures can be measured on."""
    if n < LEAST_HELD_OUT:
        raise UserError(
            f"{n} activations of {name} are held out, but figures need at least {LEAST_HELD_OUT}: give more data, or "
            "raise held_out_tokens."
        )


def check_activations(x: Float[Tensor, "tokens d_in"], source: LanguageModel | Source) -> None:
    """Refuse activations from which nothing can be learned."""
    where = f"{source.name} at {source.hook_name}" if source.hook_name else source.name
    if not torch.isfinite(x).all():
        raise UserError(f"the activations of {where} are not finite; try float32, or another hook.")
    if bool((x == x[0]).all()):
        raise UserError(
            f"the activations of {where} are the same vector for every token: "
            "there is nothing to learn; choose another hook."
        )


def _mix(seed: int, block: int) -> int:
    """Give every (seed, block) a seed of its own (SplitMix64's odd constants, 63 bits)."""
    return (seed * 0x9E3779B97F4A7C15 + block * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
