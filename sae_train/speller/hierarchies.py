"""Hierarchies of the embedded language that its spelling does not show, written as JSON files for the eval."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sae_train.files import write_json
from sae_train.speller.language import CLASS_NAMES, PUNCTUATION, Language

if TYPE_CHECKING:
    from pathlib import Path


def write(language: Language, folder: Path) -> None:
    """Write word-class.json, {"word class": {class: [words]}}, to `folder`/hierarchies."""
    words: dict[str, list[str]] = {name: [] for name in CLASS_NAMES}
    for word, number in zip(language.words, language.classes.tolist(), strict=True):
        words[CLASS_NAMES[number]].append(word)
    write_json(folder / "hierarchies" / "word-class.json", {"word class": words})


def language_of(folder: Path) -> Language:
    """The language that a model's folder was trained on."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    n_other = 2 + len(PUNCTUATION) + 26
    words = sorted(vocabulary, key=vocabulary.__getitem__)[n_other:]
    settings = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return Language(tuple(word.removeprefix(" ") for word in words), settings["seed"])
