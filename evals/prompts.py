"""In-context prompts: words, a hierarchy and a tokenizer come in; token rows and the word's computed position go out.

A prompt is a newline, some lines like "dog has the first letter: D", and a last line that stops before the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from sae_train.evals.hierarchy import Hierarchy
    from sae_train.evals.presets import Preset
    from sae_train.evals.vocab import Vocabulary
    from sae_train.protocols import LanguageModel


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are written for one tokenizer; word_position counts from the end (−1 is the last token).

    answer_ids holds, per label, the token that begins the right answer; None if the template asks for none.
    """

    hierarchy: Hierarchy
    prefix: str
    separator: str
    n_examples: int
    word_position: int
    word_tail: tuple[int, ...]
    answer_ids: tuple[int, ...] | None
    bos_id: int | None

    def text(self, word: str, examples: list[str]) -> str:
        lines = [_line(self.hierarchy, e) for e in examples] + [_query(self.hierarchy.template, word)]
        return self.prefix + self.separator.join(lines)


def with_template(hierarchy: Hierarchy, template: str | None) -> Hierarchy:
    """The hierarchy with another prompt line; {letter} is another word for {label}."""
    template = (template or hierarchy.template).replace("{letter}", "{label}")
    label_first = "{label}" in template and template.index("{label}") < template.find("{word}")
    if template.count("{word}") != 1 or template.count("{label}") > 1 or label_first:
        raise UserError(
            f"the template {template!r} must contain {{word}} once and may contain {{label}} once after it, "
            f"as in {hierarchy.template!r} or 'the word is {{word}}'."
        )
    return replace(hierarchy, template=template)


def fit_format(lm: LanguageModel, hierarchy: Hierarchy, found: Vocabulary, preset: Preset) -> PromptFormat:
    """Find out how a model's tokenizer writes the hierarchy's template; UserError says what does not fit."""
    if not len(found):
        raise UserError(f"every entry in the tokenizer of {lm.name} is {hierarchy.belonging}.")
    template, example = hierarchy.template, found.words[len(found) // 2]
    newline = _has_newline(lm.tokenizer, example)
    if "{label}" in template:
        _check_answerable(lm, hierarchy, example, newline)
    separator = "\n" if newline else " "
    prefix = "\n" if newline and preset.leading_newline else ""
    before = _line(hierarchy, example) + separator
    position, tail = _locate(lm, template, before, found)
    n_examples = _n_examples(lm, hierarchy, prefix, separator, found, preset.n_examples)
    answers = _answers(lm, hierarchy, before, example) if "{label}" in template else None
    return PromptFormat(hierarchy, prefix, separator, n_examples, position, tail, answers, lm.bos_id)


def single_token_words(lm: LanguageModel, fmt: PromptFormat, found: Vocabulary) -> list[bool]:
    """Which words stand in the prompt as exactly their own token, followed by the usual tail."""
    before = _line(fmt.hierarchy, found.words[len(found) // 2]) + fmt.separator
    rows = _encode(lm.tokenizer, [before + _query(fmt.hierarchy.template, w) for w in found.words])
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


def token_rows(lm: LanguageModel, fmt: PromptFormat, words: list[str], examples: list[list[str]]) -> list[list[int]]:
    """Token ids of every prompt, BOS first."""
    texts = [fmt.text(w, e) for w, e in zip(words, examples, strict=True)]
    bos = [] if fmt.bos_id is None else [fmt.bos_id]
    return [bos + ids for ids in _encode(lm.tokenizer, texts)]


def right_aligned(rows: list[list[int]]) -> Int[Tensor, "n position"]:
    """Prompts as one table; shorter ones begin with −1."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), -1)
    for number, ids in enumerate(rows):
        out[number, out.shape[1] - len(ids) :] = torch.tensor(ids)
    return out


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


def _line(hierarchy: Hierarchy, word: str) -> str:
    return _put(hierarchy.template, word).replace("{label}", hierarchy.labels[hierarchy.label(word)])


def _query(template: str, word: str) -> str:
    return _put(query_of(template), word)


def query_of(template: str) -> str:
    """The part of a line that stands before the answer."""
    return template.split("{label}")[0].rstrip(" ")


def _put(template: str, word: str) -> str:
    """A word that brings its own space takes the place of the template's."""
    return template.replace(" {word}" if word.startswith(" ") else "{word}", word).replace("{word}", word)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _has_newline(tokenizer: Any, word: str) -> bool:
    line, space = _encode(tokenizer, [f"{word}\n{word}", f"{word} {word}"])
    return line != space and tokenizer.unk_token_id not in line


def _check_answerable(lm: LanguageModel, hierarchy: Hierarchy, example: str, newline: bool) -> None:
    template = hierarchy.template
    texts = [f"{_line(hierarchy, example)} {_query(template, example)} {label}" for label in hierarchy.labels]
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


def _answers(lm: LanguageModel, hierarchy: Hierarchy, before: str, example: str) -> tuple[int, ...]:
    query = before + _query(hierarchy.template, example)
    stem, *full = _encode(lm.tokenizer, [query, *(f"{query} {label}" for label in hierarchy.labels)])
    answers = tuple(ids[len(stem)] if len(ids) > len(stem) else -1 for ids in full)
    if len(set(answers)) < len(hierarchy.labels) or any(ids[: len(stem)] != stem for ids in full):
        raise UserError(
            f"the tokenizer of {lm.name} does not begin each of the answers {' '.join(hierarchy.labels)} with a token "
            f"of its own after {query_of(hierarchy.template)!r}; give a template without {{label}}, such as "
            "'the word is {word}'."
        )
    return answers


def _locate(lm: LanguageModel, template: str, before: str, found: Vocabulary) -> tuple[int, tuple[int, ...]]:
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


def _n_examples(
    lm: LanguageModel, hierarchy: Hierarchy, prefix: str, separator: str, found: Vocabulary, wanted: int
) -> int:
    """As many examples as wanted, or as fit the context with the longest line that single-token words make."""
    template, word = hierarchy.template, found.words[len(found) // 2]
    query = _query(template, word)
    lines = [_put(template, word).replace("{label}", label) for label in hierarchy.labels]
    texts = [prefix + query, *(prefix + line + separator + query for line in lines)]
    one, *two = (len(ids) for ids in _encode(lm.tokenizer, texts))
    room = lm.context - (lm.bos_id is not None) - one
    if room < 0:
        raise UserError(f"the template {template!r} does not fit the {lm.context} tokens of {lm.name}'s context.")
    return min(wanted, room // (max(two) - one))
