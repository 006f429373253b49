"""English for the embedded model: the choice of its vocabulary, and stories read from a folder of text as ids."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from sae_train.errors import UserError
from sae_train.speller.language import BOS, REQUIRED_WORDS, Language

if TYPE_CHECKING:
    from pathlib import Path

N_STORY_WORDS, MIN_PER_LETTER = 4000, 64
TOKEN = re.compile(r" ?[A-Za-z]+|'[a-z]+|\n|[^A-Za-z\s]")
"""Splits text into the tokens of the vocabulary; the tokenizer uses the same pattern."""


def read_stories(folder: Path) -> list[str]:
    """Lower-cased stories from the `.txt` files of a folder, without quotation marks, each given once."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"No .txt files with English stories in {folder}; give a folder with --stories.")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files).lower()
    text = text.replace("<|endoftext|>", "\n").replace('"', "")
    return list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))


def choose_words(stories: list[str], word_lists: list[Path]) -> tuple[str, ...]:
    """The most frequent words of the stories, then words from the lists until no letter is rare."""
    counts = Counter(token.strip() for story in stories for token in TOKEN.findall(story))
    plain = [word for word, _ in counts.most_common() if re.fullmatch("[a-z]+", word)]
    chosen = dict.fromkeys([*REQUIRED_WORDS, *plain[:N_STORY_WORDS]])
    spare = [word for word in _read_word_lists(word_lists) if word not in chosen]
    for letter in "abcdefghijklmnopqrstuvwxyz":
        missing = MIN_PER_LETTER - sum(word[0] == letter for word in chosen)
        chosen.update(dict.fromkeys([word for word in spare if word[0] == letter][: max(missing, 0)]))
    return tuple(sorted(chosen))


def _read_word_lists(word_lists: list[Path]) -> list[str]:
    """Words of three to nine letters: those in every list first, in the first list's order."""
    lists = [[line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
             for file in word_lists]  # fmt: skip
    everywhere = set.intersection(*map(set, lists)) if lists else set()
    ordered = [word for word in lists[0] if word in everywhere] if lists else []
    ordered += sorted((word for words in lists[1:] for word in words), key=lambda word: (len(word), word))
    return [word for word in dict.fromkeys(ordered) if re.fullmatch("[a-z]{3,9}", word)]


def story_ids(stories: list[str], language: Language) -> np.ndarray:
    """All stories as one array of ids, a BOS before each; sentences with a foreign word are left out."""
    out: list[int] = []
    for story in stories:
        kept: list[int] = []
        for sentence in re.findall(r"[^.!?]+[.!?]*", story):
            tokens = [language.ids.get(token) for token in TOKEN.findall(" " + sentence.strip())]
            if None not in tokens:
                kept += tokens
        if len(kept) > 15:
            out += [language.ids[BOS], *kept]
    return np.array(out)
