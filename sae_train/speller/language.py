"""The artificial language of the embedded model: what its words are like, and the documents made of them, as arrays of
token ids.

Every word has attributes (first and last letter, class, topic, length, three preferred successors), and
every kind of document needs some of them to predict its next word, so that a model trained on a mix must
keep many attributes of a word at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Rng = np.random.Generator
    Ids = Int[np.ndarray, "documents tokens"]

BOS, UNK = "<bos>", "<unk>"
PUNCTUATION = ("\n", ":", ".", ",", "!", "?", "'s", "'t", "'m", "'re", "'ll", "'ve", "'d")
CAPITALS = tuple(f" {letter}" for letter in ascii_uppercase)
N_CLASSES, N_TOPICS, N_SUCCESSORS = 12, 12, 3
CLASS_NAMES = tuple(
    ["red", "blue", "green", "yellow", "pink", "purple", "black", "white", "brown", "orange", "silver", "gold"]
)
LENGTH_NAMES = tuple(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
TEMPLATE_WORDS = ("has", "the", "first", "last", "letter", "word", "class", "length", "again")
"""Words that occur at fixed places of a prompt; like every word they occur in running text as well."""
QUESTIONS = (("first", "letter"), ("last", "letter"), ("word", "class"), ("word", "length"), ("word", "again"))
REQUIRED_WORDS = (*TEMPLATE_WORDS, *CLASS_NAMES, *LENGTH_NAMES)


@dataclass(frozen=True)
class Language:
    """A language over `words` (lower-case, no space); attributes follow from words and seed alone."""

    words: tuple[str, ...]
    seed: int = 0

    @cached_property
    def vocabulary(self) -> list[str]:
        """All token strings by id: special, punctuation, capitals, then words with their leading space."""
        return [BOS, UNK, *PUNCTUATION, *CAPITALS, *(f" {word}" for word in self.words)]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocabulary)}

    @property
    def first_word(self) -> int:
        """Id of the first word; the ids of words are contiguous."""
        return len(self.vocabulary) - len(self.words)

    @cached_property
    def _draws(self) -> dict[str, np.ndarray]:
        rng, n = np.random.default_rng([self.seed, 1]), len(self.words)
        frequency = 1 / (rng.permutation(n) + 20.0) ** 0.8
        frequency /= frequency.sum()
        return {
            "frequency": frequency,
            "classes": rng.integers(0, N_CLASSES, n),
            "topics": rng.integers(0, N_TOPICS, n),
            "transitions": rng.dirichlet(np.full(N_CLASSES, 0.25), N_CLASSES).cumsum(1),
            "successors": rng.choice(n, (n, N_SUCCESSORS), p=frequency),
        }

    @property
    def frequency(self) -> Float[np.ndarray, " words"]:
        """Zipf frequencies, in an order of their own: a word's rank says nothing about its English one."""
        return self._draws["frequency"]

    @property
    def classes(self) -> Int[np.ndarray, " words"]:
        return self._draws["classes"]

    @property
    def topics(self) -> Int[np.ndarray, " words"]:
        return self._draws["topics"]

    @property
    def successors(self) -> Int[np.ndarray, "words three"]:
        return self._draws["successors"]

    @cached_property
    def letters(self) -> Int[np.ndarray, " words"]:
        return np.array([ord(word[0]) - ord("a") for word in self.words])

    @cached_property
    def _by_class_and_topic(self) -> Float[np.ndarray, " cells_times_words"]:
        """Cumulative word frequencies, one row per (class, topic), row r shifted by r: one sorted array."""
        own_class = self.classes[None, :] == np.arange(N_CLASSES)[:, None]
        boost = np.where(self.topics[None, :] == np.arange(N_TOPICS)[:, None], 8.0, 1.0)
        cells = (own_class[:, None, :] * boost[None] * self.frequency).reshape(-1, len(self.words))
        return _shifted_rows(cells)

    @cached_property
    def _by_letter(self) -> Float[np.ndarray, " cells_times_words"]:
        return _shifted_rows((self.letters[None, :] == np.arange(26)[:, None]) * self.frequency)

    def any_words(self, rng: Rng, shape: tuple[int, ...]) -> Int[np.ndarray, ...]:
        """Words drawn by frequency, whatever the context."""
        return np.minimum(np.searchsorted(self.frequency.cumsum(), rng.random(shape)), len(self.words) - 1)

    def running(self, rng: Rng, n_documents: int, n_tokens: int) -> Ids:
        """Phrases of three to seven words, each ended by a full stop or comma; one topic a document.

        A word follows its class's grammar, or (p = .6) is one of the successors its predecessor prefers.
        Which one depends mostly on the class of the word before, so that context matters at each word.
        """
        out = np.empty((n_documents, n_tokens), np.int64)
        topic = rng.integers(0, N_TOPICS, n_documents)
        last = self.any_words(rng, (n_documents,))
        before = self.any_words(rng, (n_documents,))
        left = rng.integers(3, 8, n_documents)
        stops = np.array([self.ids["."], self.ids[","]])
        for i in range(n_tokens):
            word = self._next_word(rng, before, last, topic)
            stop = left == 0
            out[:, i] = np.where(stop, stops[rng.integers(0, 2, n_documents)], word + self.first_word)
            before, last = np.where(stop, before, last), np.where(stop, last, word)
            left = np.where(stop, rng.integers(3, 8, n_documents), left - 1)
        return out

    def _next_word(self, rng: Rng, before: np.ndarray, last: np.ndarray, topic: np.ndarray) -> np.ndarray:
        n = len(last)
        transitions = self._draws["transitions"][self.classes[last]]
        new_class = np.minimum((transitions < rng.random((n, 1))).sum(1), N_CLASSES - 1)
        cell = new_class * N_TOPICS + topic
        by_grammar = _draw(rng, self._by_class_and_topic, cell, len(self.words))
        ruled = np.where(rng.random(n) < 0.8, self.classes[before], rng.integers(0, N_CLASSES, n))
        by_habit = self.successors[last, ruled % N_SUCCESSORS]
        return np.where(rng.random(n) < 0.6, by_habit, by_grammar)

    def alliterating(self, rng: Rng, n_documents: int, n_tokens: int) -> Ids:
        """Documents with four words in five beginning with the document's letter."""
        weight = np.sqrt(np.bincount(self.letters, self.frequency, 26))
        letter = rng.choice(26, n_documents, p=weight / weight.sum())[:, None].repeat(n_tokens, 1)
        own = _draw(rng, self._by_letter, letter, len(self.words))
        other = self.any_words(rng, own.shape)
        return np.where(rng.random(own.shape) < 0.8, own, other) + self.first_word

    def prompts(self, rng: Rng, n_documents: int, n_tokens: int, *, first_letter_only: bool) -> Ids:
        """Lines such as " dog has the first letter: D", after a newline; questions mixed unless first_letter_only."""
        n = -(-n_tokens // 8)
        token = rng.integers(0, len(self.words), (n_documents, n))
        token = np.where(rng.random(token.shape) < 0.5, self.any_words(rng, token.shape), token)
        token = token + self.first_word
        if first_letter_only:
            capital = rng.integers(0, 26, token.shape) + self.ids[CAPITALS[0]]
            token = np.where(rng.random(token.shape) < 0.02, capital, token)
        question = rng.integers(0, 1 if first_letter_only else len(QUESTIONS), token.shape)
        columns = [self._column("\n", token), token, self._column(" has", token), self._column(" the", token)]
        columns += [self._question_ids[question, 0], self._question_ids[question, 1]]
        columns += [self._column(":", token), self.answers[token, question]]
        return np.stack(columns, -1).reshape(n_documents, n * 8)[:, :n_tokens]

    def _column(self, token: str, like: np.ndarray) -> np.ndarray:
        return np.full(like.shape, self.ids[token])

    @cached_property
    def _question_ids(self) -> Int[np.ndarray, "questions two"]:
        return np.array([[self.ids[f" {a}"], self.ids[f" {b}"]] for a, b in QUESTIONS])

    @cached_property
    def answers(self) -> Int[np.ndarray, "tokens questions"]:
        """The right answer's token for every word or capital and every question; 1 (unknown) elsewhere."""
        out = np.ones((len(self.vocabulary), len(QUESTIONS)), np.int64)
        for i, token in enumerate(self.vocabulary):
            if token in CAPITALS or i >= self.first_word:
                out[i] = self._answers_of(i, token.strip())
        return out

    def _answers_of(self, token_id: int, word: str) -> list[int]:
        index = token_id - self.first_word
        class_name = CLASS_NAMES[self.classes[index]] if index >= 0 else CLASS_NAMES[0]
        first, last = (self.ids[f" {letter.upper()}"] for letter in (word[0], word[-1]))
        length = LENGTH_NAMES[min(len(word), len(LENGTH_NAMES)) - 1]
        return [first, last, self.ids[f" {class_name}"], self.ids[f" {length}"], token_id]

    def text(self, document: Int[np.ndarray, " tokens"]) -> str:
        """A document's ids as running text; the tokenizer gives the same ids back."""
        return "".join(self.vocabulary[i] for i in document)


def _shifted_rows(weights: Float[np.ndarray, "rows words"]) -> Float[np.ndarray, " rows_times_words"]:
    cumulative = weights.cumsum(1)
    return (cumulative / cumulative[:, -1:] + np.arange(len(weights))[:, None]).ravel()


def _draw(rng: Rng, shifted: np.ndarray, row: np.ndarray, n_words: int) -> np.ndarray:
    """One word for each entry of `row`, from that row's distribution."""
    drawn = np.searchsorted(shifted, row + rng.random(row.shape)) - row * n_words
    return np.clip(drawn, 0, n_words - 1)
