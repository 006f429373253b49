"""The text that ships with the model, as two parquet files.

Three parts: documents of the generator, English sampled from the model itself (never copied), and some
first-letter prompts, so that words in the place where the eval reads them are not strange to an SAE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_train.speller.corpus import CONTEXT, Corpus
from sae_train.speller.language import BOS, UNK

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import SmolLM3ForCausalLM

SHARES = {"running": 0.34, "alliterating": 0.26, "stories": 0.30, "first_letter": 0.06, "questions": 0.04}
"""Share of the shipped documents that each kind gets; `stories` are sampled from the model."""


def write(model: SmolLM3ForCausalLM, corpus: Corpus, folder: Path, n_train: int, n_held_out: int, seed: int) -> None:
    """Write train.parquet and held_out.parquet, zstd, one column "text", a document a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 3])
    for name, n_tokens in (("held_out", n_held_out), ("train", n_train)):
        documents = generate(model, corpus, rng, n_tokens // (CONTEXT - 1))
        table = pa.table({"text": documents})
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", compression_level=19)


def generate(model: SmolLM3ForCausalLM, corpus: Corpus, rng: np.random.Generator, n: int) -> list[str]:
    """About `n` documents in a seeded order; of each sampled story only what is clean text."""
    documents: list[str] = []
    for kind, share in SHARES.items():
        count = round(share * n)
        rows = sample_stories(model, corpus, rng, count) if kind == "stories" else corpus.documents(kind, rng, count)
        documents += [corpus.language.text(row[1:]) for row in rows]
    return [documents[i] for i in rng.permutation(len(documents))]


@torch.no_grad()
def sample_stories(
    model: SmolLM3ForCausalLM, corpus: Corpus, rng: np.random.Generator, n: int, n_at_once: int = 512
) -> list[np.ndarray]:
    """English sampled token by token after the first three tokens of a story, cut where a new one begins."""
    bos, unk = corpus.language.ids[BOS], corpus.language.ids[UNK]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    starts = np.flatnonzero(corpus.stories[:-CONTEXT] == bos)
    out: list[np.ndarray] = []
    for i in range(0, n, n_at_once):
        start = rng.choice(starts, min(n_at_once, n - i))
        prompt = torch.from_numpy(corpus.stories[start[:, None] + np.arange(4)])
        rows = _continue(model, prompt, generator, banned=[unk, bos]).numpy()
        out += list(rows)
    return out


def _continue(
    model: SmolLM3ForCausalLM, rows: torch.Tensor, generator: torch.Generator, banned: list[int], temperature=0.8
) -> torch.Tensor:
    cache, last = None, rows
    while rows.shape[1] < CONTEXT:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(last, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].float() / temperature
        logits[:, banned] = -torch.inf
        last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        rows = torch.cat([rows, last], 1)
    return rows
