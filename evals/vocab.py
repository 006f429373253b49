"""The eval's words: which of a hierarchy's entries are one word of the tokenizer each (and why others are not), which
of them are sampled, and which are test words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_train.evals.hierarchy import Hierarchy


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


def split(vocabulary: Vocabulary, test_share: float, g: torch.Generator) -> torch.Tensor:
    """Mark test words: the same share of every label; a label with a single word trains."""
    is_test = torch.zeros(len(vocabulary), dtype=torch.bool)
    is_test[_draw_by_label(vocabulary.labels, lambda n: round(test_share * n) if n > 1 else 0, g)] = True
    return is_test


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
