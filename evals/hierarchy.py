"""What is asked of every word: its first letter, or another hierarchy known by name or read from a JSON file.

A hierarchy is a parent concept (the first letter) with labels (A to Z), each of which has children (words). A file
{parent: {label: [words]}} makes one, with its prompt line under "template" if the usual one, "{word} has the <parent>:
{label}", will not do. Files that ship are known by their names: hierarchies of meaning in hierarchies/ beside this
module, and the embedded language's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from sae_train.errors import UserError

# In a wheel as in a checkout: of any model's words, and of the embedded model's.
_SHIPPED = (Path(__file__).parent / "hierarchies", Path(__file__).parents[1] / "embedded" / "hierarchies")
VOWELS = "AEIOU"
LENGTHS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Hierarchy:
    """Labels by number; label_of takes a word without its leading space and gives None for one that does not belong."""

    name: str
    labels: tuple[str, ...]
    template: str
    label_of: Callable[[str], int | None]
    belonging: str
    """which words belong, for the count of those that do not"""
    digest: str = ""
    """of the words, where a file lists them"""

    @property
    def is_listed(self) -> bool:
        """Whether a file lists the words, instead of a rule that labels all."""
        return bool(self.digest)

    def label(self, text: str) -> int | None:
        """Number of a word's label, with or without its leading space."""
        return self.label_of(text.removeprefix(" "))

    def keep(self, numbers: list[int]) -> Hierarchy:
        """The hierarchy of these labels alone; words of the others do not belong."""
        new = {old: number for number, old in enumerate(numbers)}
        labels = tuple(self.labels[old] for old in numbers)
        return replace(self, labels=labels, label_of=lambda word: new.get(self.label_of(word)))


def get_hierarchy(name: str | Path | Hierarchy = "first-letter") -> Hierarchy:
    """Look a hierarchy up by name, or read a JSON file; UserError says what is wrong with either."""
    if isinstance(name, Hierarchy):
        return name
    if str(name) in RULES:
        return RULES[str(name)]
    shipped = {path.stem: path for folder in _SHIPPED for path in sorted(folder.glob("*.json"))}
    path = shipped.get(str(name), Path(name))
    if path.suffix != ".json":
        known = [*RULES, *shipped]
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(
            f"unknown hierarchy '{name}'{hint}; there are {', '.join(known)}, or give a .json file of "
            "{parent: {label: [words]}}"
        )
    return read_hierarchy(path)


def read_hierarchy(path: Path) -> Hierarchy:
    """Read {parent: {label: [words]}}, with an optional "template" beside the parent."""
    table = _read_json(path)
    template = table.pop("template", None)
    if len(table) != 1 or not isinstance(table[parent := next(iter(table))], dict):
        raise UserError(f"{path} must hold one parent, as {{parent: {{label: [words]}}}}; it holds {_names(table)}.")
    children = table[parent]
    if len(children) < 2 or not all(isinstance(words, list) and words for words in children.values()):
        raise UserError(f"the parent {parent!r} in {path} needs at least two labels, each with a list of words.")
    numbers = _numbers(children, path)
    digest = hashlib.sha256(json.dumps(children, sort_keys=True).encode()).hexdigest()[:16]
    template = template or f"{{word}} has the {parent}: {{label}}"
    return Hierarchy(parent, tuple(children), template, numbers.get, f"not a word of {parent!r}", digest)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no hierarchy file {str(path)!r}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the hierarchy file {str(path)!r} is not readable JSON: {error}.") from error
    if not isinstance(table, dict) or not isinstance(table.get("template", ""), str):
        raise UserError(f"{path} must be a JSON object {{parent: {{label: [words]}}}}, its template a string.")
    return table


def _numbers(children: dict[str, list], path: Path) -> dict[str, int]:
    numbers: dict[str, int] = {}
    labels = list(children)
    for number, (label, words) in enumerate(children.items()):
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{path} lists {word!r} under {label!r}: words are strings.")
            if (other := numbers.setdefault(word.strip(), number)) != number:
                raise UserError(f"{path} lists {word!r} under {labels[other]!r} and {label!r}: a word has one label.")
    return numbers


def _names(table: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in table) or "none"


def _is_word(core: str) -> bool:
    return core.isascii() and core.isalpha()


def _first_vowel(word: str) -> int | None:
    """Number of the vowel that comes first; None in a word without one."""
    return next((VOWELS.index(letter) for letter in word.upper() if letter in VOWELS), None)


def _rule(name: str, labels: tuple[str, ...], template: str, label_of: Callable[[str], int | None]) -> Hierarchy:
    belonging = "not a word of A-Z letters"
    return Hierarchy(name, labels, template, lambda core: label_of(core) if _is_word(core) else None, belonging)


PLAIN_TEMPLATE = "the word is {word}"
FIRST_LETTER = _rule(
    "first-letter", tuple(ascii_uppercase), "{word} has the first letter: {label}", lambda w: ord(w[0].upper()) - 65
)
RULES = {
    h.name: h
    for h in (
        FIRST_LETTER,
        _rule(
            "last-letter", tuple(ascii_uppercase), "{word} has the last letter: {label}",
            lambda w: ord(w[-1].upper()) - 65,
        ),
        _rule(
            "word-length", LENGTHS, "{word} has the word length: {label}", lambda w: min(len(w), len(LENGTHS)) - 1
        ),
        _rule("first-vowel", tuple(VOWELS), "{word} has the first vowel: {label}", _first_vowel),
        # A parent above the letters: that it splits into them is no absorption, which the family correction tells.
        _rule("letter-class", ("vowel", "consonant"), PLAIN_TEMPLATE, lambda w: int(w[0].upper() not in VOWELS)),
    )
}  # fmt: skip
