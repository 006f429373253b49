"""The eval's words: a tokenizer comes in, its entries that are one word each go out, with what was dropped and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Vocabulary:
    """Words in the order of their token ids, labelled 0–25; counts tells what became of every tokenizer entry."""

    words: list[str]
    token_ids: list[int]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def labels(self) -> list[int]:
        return [label_of(w) for w in self.words]

    def __len__(self) -> int:
        return len(self.words)

    def subset(self, rows: list[int]) -> Vocabulary:
        return Vocabulary([self.words[r] for r in rows], [self.token_ids[r] for r in rows], self.counts)


def label_of(word: str) -> int:
    """Number of the first letter, whatever its case and with or without a leading space."""
    return ord(word.lstrip(" ")[0].upper()) - ord("A")


def entries(tokenizer: Any, special_ids: set[int]) -> tuple[Vocabulary, Counter]:
    """Tokenizer entries that spell a word, and counts of the others by reason."""
    dropped: Counter = Counter()
    words, ids = [], []
    for token_id, text in enumerate(_strings(tokenizer)):
        if token_id in special_ids:
            dropped["dropped: special token"] += 1
        elif not _is_word(text):
            dropped["dropped: not a word of A-Z letters"] += 1
        else:
            words.append(text)
            ids.append(token_id)
    return Vocabulary(words, ids), dropped


def keep_single_tokens(
    found: Vocabulary, dropped: Counter, is_single: Callable[[Vocabulary], list[bool]]
) -> Vocabulary:
    """Drop words that the prompt's tokens do not show as their own one token, then repeated strings."""
    single = found.subset([r for r, ok in enumerate(is_single(found)) if ok])
    first = {word: row for row, word in reversed(list(enumerate(single.words)))}
    rows = sorted(first.values())
    dropped["dropped: not one token in the prompt"] = len(found) - len(single)
    dropped["dropped: duplicate"] = len(single) - len(rows)
    kept = single.subset(rows)
    return Vocabulary(kept.words, kept.token_ids, {"kept": len(kept), **dropped})


def sample(vocabulary: Vocabulary, n_words: int, g: torch.Generator) -> Vocabulary:
    """About n_words of the words, the same share of every letter (at least one each), in order."""
    share = min(1.0, n_words / max(len(vocabulary), 1))
    return vocabulary.subset(_stratified(vocabulary.labels, lambda n: max(1, round(share * n)), g))


def split(vocabulary: Vocabulary, test_share: float, g: torch.Generator) -> torch.Tensor:
    """Mark test words: the same share of every letter; a letter with a single word trains."""
    is_test = torch.zeros(len(vocabulary), dtype=torch.bool)
    is_test[_stratified(vocabulary.labels, lambda n: round(test_share * n) if n > 1 else 0, g)] = True
    return is_test


def _stratified(labels: list[int], how_many: Callable[[int], int], g: torch.Generator) -> list[int]:
    chosen: list[int] = []
    all_labels = torch.tensor(labels)
    for letter in range(len(LETTERS)):
        rows = (all_labels == letter).nonzero().squeeze(1)
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


def _is_word(text: str) -> bool:
    core = text.removeprefix(" ")
    return core.isascii() and core.isalpha()
