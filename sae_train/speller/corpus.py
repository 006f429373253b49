"""What the language model is trained on: documents of the language and stories, packed into batches of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sae_train.speller.language import BOS, Language

if TYPE_CHECKING:
    from jaxtyping import Int

CONTEXT = 128
SHARES = {"running": 0.24, "alliterating": 0.22, "first_letter": 0.12, "questions": 0.12, "stories": 0.30}
"""Share of the rows of a batch that each kind of document gets."""


@dataclass(frozen=True)
class Corpus:
    """Endless training batches; half of the rows are cut and spliced, as packed text is."""

    language: Language
    stories: Int[np.ndarray, " tokens"]

    def documents(self, kind: str, rng: np.random.Generator, n: int) -> Int[np.ndarray, "n context"]:
        """`n` rows of one kind, each beginning with BOS."""
        if kind == "stories":
            start = rng.integers(0, len(self.stories) - CONTEXT, n)
            rows = self.stories[start[:, None] + np.arange(CONTEXT)]
        else:
            rows = np.pad(self._generate(kind, rng, n), ((0, 0), (1, 0)))
        rows[:, 0] = self.language.ids[BOS]
        return rows

    def _generate(self, kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
        if kind in ("first_letter", "questions"):
            return self.language.prompts(rng, n, CONTEXT - 1, first_letter_only=kind == "first_letter")
        return getattr(self.language, kind)(rng, n, CONTEXT - 1)

    def batch(self, rng: np.random.Generator, n_rows: int, progress: float) -> Int[np.ndarray, "rows context"]:
        """A mix by `SHARES`; in the first quarter of training half of it is first-letter prompts."""
        shares = np.array(list(SHARES.values()))
        if progress < 0.25:
            shares = 0.5 * shares + 0.5 * (np.array(list(SHARES)) == "first_letter")
        counts = rng.multinomial(n_rows, shares / shares.sum())
        rows = np.concatenate([self.documents(kind, rng, n) for kind, n in zip(SHARES, counts, strict=True)])
        return _splice(rows, rng)


def _splice(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put the tail of another row before half of the rows, and push their own end out."""
    out, partner = rows.copy(), rng.permutation(len(rows))
    for i in np.flatnonzero(rng.random(len(rows)) < 0.5):
        cut = rng.integers(8, rows.shape[1] // 2)
        out[i] = np.concatenate([rows[partner[i], -cut:], rows[i, :-cut]])
    return out
