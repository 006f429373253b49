"""In-context prompts: words and a tokenizer come in, token rows and the word's computed position go out.

A prompt is a newline, some lines like "dog has the first letter: D", and a last line that stops before the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError
from sae_train.evals.vocab import LETTERS, Vocabulary, label_of

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from sae_train.evals.presets import Preset

DEFAULT_TEMPLATE = "{word} has the first letter: {letter}"


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are written for one tokenizer; word_position counts from the end (−1 is the last token)."""

    template: str
    prefix: str
    separator: str
    n_examples: int
    word_position: int
    word_tail: tuple[int, ...]
    answer_ids: tuple[int, ...] | None
    bos_id: int | None

    def text(self, word: str, examples: list[str]) -> str:
        lines = [_line(self.template, e) for e in examples] + [_query(self.template, word)]
        return self.prefix + self.separator.join(lines)


def fit_format(lm: Any, template: str, found: Vocabulary, preset: Preset) -> PromptFormat:
    """Find out how a model's tokenizer writes the template; UserError says what does not fit."""
    _check_template(template)
    if not len(found):
        raise UserError(f"the tokenizer of {lm.name} has no entry that is a word of the letters A-Z.")
    example = found.words[len(found) // 2]
    newline = _has_newline(lm.tokenizer, example)
    if "{letter}" in template:
        _check_answerable(lm, template, example, newline)
    separator = "\n" if newline else " "
    prefix = "\n" if newline and preset.leading_newline else ""
    before = _line(template, example) + separator
    position, tail = _locate(lm, template, before, found)
    n_examples = _n_examples(lm, template, prefix, separator, found, preset.n_examples)
    answers = _answers(lm, template, before, example) if "{letter}" in template else None
    return PromptFormat(template, prefix, separator, n_examples, position, tail, answers, lm.bos_id)


def single_token_words(lm: Any, fmt: PromptFormat, found: Vocabulary) -> list[bool]:
    """Which words stand in the prompt as exactly their own token, followed by the usual tail."""
    before = _line(fmt.template, found.words[len(found) // 2]) + fmt.separator
    rows = _encode(lm.tokenizer, [before + _query(fmt.template, w) for w in found.words])
    n_before = Counter(len(ids) for ids in rows).most_common(1)[0][0]
    return [
        len(ids) == n_before
        and ids[fmt.word_position] == token_id
        and tuple(ids[len(ids) + fmt.word_position + 1 :]) == fmt.word_tail
        for ids, token_id in zip(rows, found.token_ids, strict=True)
    ]


def draw_examples(own: Int[Tensor, " n"], pool: int, m: int, g: torch.Generator) -> Int[Tensor, "n m"]:
    """For each row m distinct numbers below pool, never the row's own one; fewer where the pool is small."""
    m = max(0, min(m, pool - 1))
    taken = own[:, None]
    for _ in range(m):
        left = pool - taken.shape[1]
        drawn = torch.randint(0, left, (len(own),), generator=g)
        # The drawn number counts the values still free: step over each taken one, in rising order.
        for value in taken.sort(1).values.T:
            drawn += (drawn >= value).long()
        taken = torch.cat([taken, drawn[:, None]], 1)
    return taken[:, 1:]


def token_rows(lm: Any, fmt: PromptFormat, words: list[str], examples: list[list[str]]) -> list[list[int]]:
    """Token ids of every prompt, BOS first."""
    texts = [fmt.text(w, e) for w, e in zip(words, examples, strict=True)]
    bos = [] if fmt.bos_id is None else [fmt.bos_id]
    return [bos + ids for ids in _encode(lm.tokenizer, texts)]


def batches(rows: list[list[int]], max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(row numbers, tokens) rectangles of equal-length prompts: no padding, so no mask to get wrong."""
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(rows):
        by_length.setdefault(len(ids), []).append(number)
    for length, numbers in sorted(by_length.items()):
        step = max(1, max_tokens // length)
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            yield torch.tensor(part), torch.tensor([rows[n] for n in part])


def _line(template: str, word: str) -> str:
    return _put(template, word).replace("{letter}", LETTERS[label_of(word)])


def _query(template: str, word: str) -> str:
    return _put(template.split("{letter}")[0].rstrip(" "), word)


def _put(template: str, word: str) -> str:
    """A word that brings its own space takes the place of the template's."""
    return template.replace(" {word}" if word.startswith(" ") else "{word}", word).replace("{word}", word)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _check_template(template: str) -> None:
    letter_first = "{letter}" in template and template.index("{letter}") < template.find("{word}")
    if template.count("{word}") != 1 or template.count("{letter}") > 1 or letter_first:
        raise UserError(
            f"the template {template!r} must contain {{word}} once and may contain {{letter}} once after it, "
            f"as in {DEFAULT_TEMPLATE!r} or 'the word is {{word}}'."
        )


def _has_newline(tokenizer: Any, word: str) -> bool:
    line, space = _encode(tokenizer, [f"{word}\n{word}", f"{word} {word}"])
    return line != space and tokenizer.unk_token_id not in line


def _check_answerable(lm: Any, template: str, example: str, newline: bool) -> None:
    texts = [f"{_line(template, example)} {_query(template, example)} {letter}" for letter in LETTERS]
    missing = dict.fromkeys(piece for text in texts for piece in _unwritten(lm.tokenizer, text))
    missing.pop(example.strip(), None)
    missing = ["newline"] * (not newline) + [repr(piece) for piece in missing]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"the tokenizer of {lm.name} has no token for {shown}, which the template {template!r} needs; "
            "give a template that it can write, such as 'the word is {word}'."
        )


def _unwritten(tokenizer: Any, text: str) -> list[str]:
    """Pieces of a text that become the unknown token or no token at all."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    lost = set(range(len(text)))
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token_id != tokenizer.unk_token_id:
            lost -= set(range(start, end))
    return "".join(c if i in lost else " " for i, c in enumerate(text)).split()


def _answers(lm: Any, template: str, before: str, example: str) -> tuple[int, ...]:
    query = before + _query(template, example)
    stem, *full = _encode(lm.tokenizer, [query, *(f"{query} {letter}" for letter in LETTERS)])
    answers = tuple(ids[-1] for ids in full)
    if len(set(answers)) < len(LETTERS) or any(ids[:-1] != stem for ids in full):
        raise UserError(
            f"the tokenizer of {lm.name} does not write a space and a capital letter as one token of its own after "
            f"{_query(template, '{word}')!r}; give a template without {{letter}}, such as 'the word is {{word}}'."
        )
    return answers


def _locate(lm: Any, template: str, before: str, found: Vocabulary) -> tuple[int, tuple[int, ...]]:
    """Where the word's token stands, from the end, and the tokens after it: what most words agree on."""
    rows = _encode(lm.tokenizer, [before + _query(template, w) for w in found.words])
    seen: Counter = Counter()
    for ids, token_id in zip(rows, found.token_ids, strict=True):
        if token_id in ids:
            place = len(ids) - 1 - ids[::-1].index(token_id)
            seen[(place - len(ids), tuple(ids[place + 1 :]))] += 1
    if not seen:
        raise UserError(f"no word is one token of {lm.name} in the template {template!r}.")
    return seen.most_common(1)[0][0]


def _n_examples(lm: Any, template: str, prefix: str, separator: str, found: Vocabulary, wanted: int) -> int:
    """As many examples as wanted, or as fit the context with the longest line that single-token words make."""
    word = found.words[len(found) // 2]
    line, query = _line(template, word), _query(template, word)
    one, two = (len(ids) for ids in _encode(lm.tokenizer, [prefix + query, prefix + line + separator + query]))
    room = lm.context - (lm.bos_id is not None) - one
    if room < 0:
        raise UserError(f"the template {template!r} does not fit the {lm.context} tokens of {lm.name}'s context.")
    return min(wanted, room // (two - one))
