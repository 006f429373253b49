"""The eval's words: which of a hierarchy's entries are one word of the tokenizer each (and why others are not), which
of them are sampled, and which are test words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError
from sae_train.evals import prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_train.evals.hierarchy import Hierarchy
    from sae_train.evals.presets import Preset
    from sae_train.evals.prompts import PromptFormat
    from sae_train.protocols import LanguageModel

LEAST_WORDS = 20  # of a listed label: four of them are test words


@dataclass(frozen=True)
class Vocabulary:
    """Words in the order of their token ids, with their labels; counts tells what became of every tokenizer entry."""

    words: list[str]
    token_ids: list[int]
    labels: list[int]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.words)

    def subset(self, rows: list[int]) -> Vocabulary:
        words, ids, labels = ([column[r] for r in rows] for column in (self.words, self.token_ids, self.labels))
        return Vocabulary(words, ids, labels, self.counts)


def entries(tokenizer: Any, special_ids: set[int], hierarchy: Hierarchy) -> tuple[Vocabulary, Counter]:
    """Tokenizer entries that spell a word of the hierarchy, and counts of the others by reason."""
    dropped: Counter = Counter()
    words = Vocabulary([], [], [])
    for token_id, text in enumerate(_strings(tokenizer)):
        if token_id in special_ids:
            dropped["dropped: special token"] += 1
        elif (label := hierarchy.label(text)) is None:
            dropped[f"dropped: {hierarchy.belonging}"] += 1
        else:
            words.words.append(text)
            words.token_ids.append(token_id)
            words.labels.append(label)
    return words, dropped


def choose(lm: LanguageModel, hierarchy: Hierarchy, preset: Preset) -> tuple[PromptFormat, Vocabulary, dict[str, int]]:
    """The prompts' format, the words that are one token in it, and what listed labels are left out, with their words.

    A listed label needs LEAST_WORDS. A rule's labels stay however few their words are, as in SAEBench.
    """
    found, dropped = entries(lm.tokenizer, lm.special_ids, hierarchy)
    if few := count_few(found, hierarchy):  # before their names have to fit the prompt
        return _choose_without(few, lm, hierarchy, preset)
    fmt = prompts.fit_format(lm, hierarchy, found, preset)
    words = keep_single_tokens(found, dropped, lambda v: prompts.single_token_words(lm, fmt, v))
    if few := count_few(words, hierarchy):
        return _choose_without(few, lm, hierarchy, preset)
    if len(words) < len(hierarchy.labels):
        raise UserError(
            f"only {len(words)} words are one token of {lm.name} in the template {hierarchy.template!r}; the eval "
            f"needs at least {len(hierarchy.labels)}."
        )
    return fmt, words, {}


def count_few(words: Vocabulary, hierarchy: Hierarchy) -> dict[str, int]:
    """The listed labels that have fewer than LEAST_WORDS of the words, with how many they have."""
    n_words = Counter(words.labels)
    counts = {name: n_words[number] for number, name in enumerate(hierarchy.labels)}
    return {name: n for name, n in counts.items() if n < LEAST_WORDS} if hierarchy.is_listed else {}


def _choose_without(few: dict[str, int], lm: LanguageModel, hierarchy: Hierarchy, preset: Preset) -> tuple:
    kept = [number for number, name in enumerate(hierarchy.labels) if name not in few]
    if len(kept) < 2:
        raise UserError(
            f"a hierarchy needs two labels with at least {LEAST_WORDS} words that are one token of {lm.name}; of "
            f"{hierarchy.name!r} there are {_counted(few)}."
        )
    fmt, words, more = choose(lm, hierarchy.keep(kept), preset)
    return fmt, words, few | more


def left_out_note(model: str, few: dict[str, int]) -> str:
    return f"labels with fewer than {LEAST_WORDS} words that are one token of {model} are left out: {_counted(few)}"


def keep_single_tokens(
    words: Vocabulary, dropped: Counter, is_single: Callable[[Vocabulary], list[bool]]
) -> Vocabulary:
    """Drop words that the prompt's tokens do not show as their own one token, then repeated strings."""
    single = words.subset([r for r, ok in enumerate(is_single(words)) if ok])
    first = {word: row for row, word in reversed(list(enumerate(single.words)))}
    rows = sorted(first.values())
    dropped["dropped: not one token in the prompt"] = len(words) - len(single)
    dropped["dropped: duplicate"] = len(single) - len(rows)
    kept = single.subset(rows)
    return Vocabulary(kept.words, kept.token_ids, kept.labels, {"kept": len(kept), **dropped})


def sample(vocabulary: Vocabulary, n_words: int, g: torch.Generator) -> Vocabulary:
    """About n_words of the words, the same share of every label (at least one each), in order."""
    share = min(1.0, n_words / max(len(vocabulary), 1))
    return vocabulary.subset(_draw_by_label(vocabulary.labels, lambda n: max(1, round(share * n)), g))


def split(vocabulary: Vocabulary, test_share: float, g: torch.Generator, together: bool = False) -> torch.Tensor:
    """Mark test words: the same share of every label; a label with a single word trains.

    With `together` all forms of a word ("dog", " dog", " Dog") stand on one side.
    """
    words = [word.strip().lower() for word in vocabulary.words] if together else range(len(vocabulary))
    keys = list(zip(vocabulary.labels, words, strict=True))
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = sorted(first.values())
    drawn = _draw_by_label([keys[row][0] for row in rows], lambda n: round(test_share * n) if n > 1 else 0, g)
    test_keys = {keys[rows[i]] for i in drawn}
    return torch.tensor([key in test_keys for key in keys], dtype=torch.bool)


def _counted(labels: dict[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in labels.items())


def _draw_by_label(labels: list[int], how_many: Callable[[int], int], g: torch.Generator) -> list[int]:
    chosen: list[int] = []
    all_labels = torch.tensor(labels)
    for label in range(max(labels, default=-1) + 1):
        rows = (all_labels == label).nonzero().squeeze(1)
        chosen += rows[torch.randperm(len(rows), generator=g)[: how_many(len(rows))]].tolist()
    return sorted(chosen)


def _strings(tokenizer: Any) -> list[str]:
    n = len(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in range(n)], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    # SentencePiece-style decoders strip the space that opens a text: the piece still shows it.
    return [
        " " + text if piece and piece.startswith("▁") and not text.startswith(" ") else text
        for piece, text in zip(pieces, texts, strict=True)
    ]
