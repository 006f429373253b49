"""A language model's passes over a text, for one hook or several: what is computed for one is computed for all.

The readers of the hooks go through the text each at its own pace, since outliers are left out hook by hook. What a
reader has not come to waits for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.data.language_model import LanguageModel
    from sae_train.data.tokens import TokenStream

LM_BATCH_TOKENS = 4096  # that go through the language model at a time
Place = tuple[int, int, int]


class Harvest:
    """The kept activations of a text's batches at each hook of `lms`, one model, with a reader for each hook.

    Special ids and `drop_ids` are left out, with `skip_first` the first position of each row as well. No more than
    `most_waiting` activations wait for a reader: one that is further behind has its own passes.
    """

    def __init__(
        self, lms: Sequence[LanguageModel], tokens: TokenStream, drop_ids: Collection[int] = (),
        skip_first: bool = False, most_waiting: int = 0,
    ) -> None:  # fmt: skip
        self.lms, self.tokens, self.most_waiting = lms, tokens, most_waiting
        self._drop, self._skip_first = dropped(lms[0], drop_ids), skip_first
        self.readers = [Reader(self, lm) for lm in lms]

    def compute(self, asking: Reader) -> None:
        """Compute the batch at a reader's position, for it and for those that have not gone past it."""
        self.go_to(asking.state)
        place = place_of(asking.state)
        takers = [reader for reader in self.readers if reader is asking or reader.takes(place, self.most_waiting)]
        tokens = next(self.tokens)
        end = self.tokens.state_dict()
        lms = [reader.lm for reader in takers]
        parts = kept_at_hooks(lms, tokens, self._drop, self._skip_first)
        for reader, part in zip(takers, parts, strict=True):
            reader.waiting[place] = part, end

    def go_to(self, state: dict[str, Any]) -> None:
        """Bring the text to a position where it is not there."""
        if self.tokens.state_dict() != state:
            self.tokens.load_state_dict(state)


def waiting_room(buffer_tokens: int) -> int:
    """How many activations may wait for a reader beside a buffer: two blocks of it, and what a run looks at first."""
    return max(2 * buffer_tokens, 8 * LM_BATCH_TOKENS)


class Reader:
    """An endless iterator over the kept activations of a text's batches at one hook, in a position of its own."""

    def __init__(self, harvest: Harvest, lm: LanguageModel) -> None:
        self.harvest, self.lm = harvest, lm
        self.waiting: dict[Place, tuple[Tensor, dict[str, Any]]] = {}
        """by position: what was computed ahead, and where the text goes on after it"""
        self.state: dict[str, Any] = harvest.tokens.state_dict()

    def __next__(self) -> Float[Tensor, "tokens d_in"]:
        place = place_of(self.state)
        if place not in self.waiting:
            self.harvest.compute(self)
        kept, self.state = self.waiting.pop(place)
        return kept

    @property
    def epoch(self) -> int:
        """How often the data began anew."""
        return self.state["epoch"]

    def peek(self, n_batches: int) -> list[Float[Tensor, "tokens d_in"]]:
        """Return the next batches and stay where it is; they wait until they come up."""
        start, seen = self.state, []
        for _ in range(n_batches):
            place = place_of(self.state)
            if place not in self.waiting:
                self.harvest.compute(self)
            kept, self.state = self.waiting[place]
            seen.append(kept)
        self.state = start
        return seen

    def takes(self, place: Place, most_waiting: int) -> bool:
        """Say whether a batch is to wait: one that is still to come, where there is room."""
        is_ahead = place not in self.waiting and place >= place_of(self.state)
        return is_ahead and sum(len(kept) for kept, _ in self.waiting.values()) < most_waiting

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position, from which the batches follow again bit for bit; what waits from before it is let go."""
        self.state, here = state, place_of(state)
        self.waiting = {place: kept for place, kept in self.waiting.items() if place >= here}


def place_of(state: dict[str, Any]) -> Place:
    """Order the positions of a text."""
    return state["epoch"], state["document"], state["used"]


def kept_at_hooks(
    lms: Sequence[LanguageModel], tokens: Int[Tensor, "batch position"], drop: Int[Tensor, " ids"], skip_first: bool
) -> list[Float[Tensor, "tokens d_in"]]:
    """Return `kept_activations` of one model at each of its hooks, in one pass."""
    if len(lms) == 1:
        return [kept_activations(lms[0], tokens, drop, skip_first)]
    tokens = tokens.to(lms[0].device)
    seen = is_seen(tokens, drop, skip_first)
    return [x[seen] for x in lms[0].activations_at(lms, tokens)]


def kept_activations(
    lm: LanguageModel, tokens: Int[Tensor, "batch position"], drop: Int[Tensor, " ids"], skip_first: bool = False
) -> Float[Tensor, "tokens d_in"]:
    """Return the activations of the tokens that `is_seen` tells, in reading order."""
    tokens = tokens.to(lm.device)
    return lm.activations(tokens)[is_seen(tokens, drop, skip_first)]


def is_seen(
    tokens: Int[Tensor, "batch position"], drop: Int[Tensor, " ids"], skip_first: bool
) -> Bool[Tensor, "batch position"]:
    """Say which tokens SAEs are trained on: those not in `drop`, with `skip_first` but for the first of each row."""
    seen = ~torch.isin(tokens, drop)
    if skip_first:
        seen[:, 0] = False
    return seen


def dropped(lm: LanguageModel, drop_ids: Collection[int] = ()) -> Int[Tensor, " ids"]:
    """Return the ids that SAEs never see: the tokenizer's special ones and `drop_ids`."""
    return torch.tensor(sorted({*lm.special_ids, *drop_ids}), dtype=torch.long, device=lm.device)
