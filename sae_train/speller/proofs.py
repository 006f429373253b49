"""What the embedded model must show before any SAE is trained on it: each proof is measured and printed in a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from sae_train.errors import UserError
from sae_train.speller.language import BOS
from sae_train.speller.model import N_BEFORE

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

TAIL = " has the first letter:"
WORD_POSITION = -6
BATCH = 128


@dataclass(frozen=True)
class Proof:
    """One measured number with the bound it has to keep."""

    name: str
    value: float
    low: float = -np.inf
    high: float = np.inf

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high


def prove(folder: Path, n_words: int | None = None, seed: int = 0) -> list[Proof]:
    """Every proof; accuracy and ablations on at most `n_words` words that the probe never saw."""
    speller = Speller(folder)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(speller.words))
    train, test = np.split(order, [int(0.8 * len(order))])
    x = speller.word_activations(rng)
    probe = fit_probe(x[train], speller.labels[train], seed)
    f1 = probe_f1(probe(x[test]), speller.labels[test])
    prompts, labels = speller.prompts(test[:n_words], test, rng)
    rows, random = probe.weight.detach(), torch.randn(26, x.shape[1], generator=torch.Generator().manual_seed(seed))
    partner = torch.from_numpy(rng.permutation(len(prompts)))
    accuracy = {
        "clean": speller.accuracy(prompts, labels),
        "probe": speller.accuracy(prompts, labels, eraser(rows, x[train])),
        "random": speller.accuracy(prompts, labels, eraser(random, x[train])),
        "swapped": speller.accuracy(prompts, labels[partner], lambda word: word[partner]),
    }
    return [
        Proof("first-letter accuracy, held-out prompts", accuracy["clean"], low=0.99),
        Proof("probe F1 on held-out words, mean of letters", float(f1.mean()), low=0.9),
        Proof("letters whose probe F1 exceeds .6", int((f1 > 0.6).sum()), low=24),
        Proof("accuracy, the probe's readings erased at the word", accuracy["probe"], high=0.25),
        Proof("accuracy, 26 random readings erased at the word", accuracy["random"], low=0.9),
        Proof("letter follows a word's state swapped in", accuracy["swapped"], low=0.95),
        Proof("MFLOP a token, forward to the hook", speller.mflop_to_hook(), high=4.0),
        Proof("MB in all", sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, high=20.0),
    ]


class Speller:
    """The shipped model with what the proofs need of it."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(f"No model in {folder}: train one with `python -m sae_train.speller train`.")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        vocabulary = self.tokenizer.get_vocab()
        lower = [token for token in vocabulary if token.strip().isalpha() and token.strip().islower()]
        self.words = sorted(lower, key=vocabulary.__getitem__)
        self.labels = torch.tensor([ord(word.strip()[0]) - ord("a") for word in self.words])

    def encode(self, texts: list[str]) -> Int[Tensor, "prompts tokens"]:
        return self.tokenizer([BOS + text for text in texts], return_tensors="pt").input_ids

    @torch.no_grad()
    def word_activations(self, rng: np.random.Generator) -> Float[Tensor, "words d_in"]:
        """The state of every word in a prompt of one example; the window hides all that stands before."""
        examples = rng.permutation(len(self.words))
        texts = [f"{self._line(i)}\n{word}" for i, word in zip(examples, self.words, strict=True)]
        out: list[Tensor] = []
        handle = self._hook(lambda x: out.append(x[:, -1].clone()))
        for tokens in self.encode(texts).split(BATCH):
            self.model.model(tokens)
        handle.remove()
        return torch.cat(out)

    def prompts(
        self, asked: Int[np.ndarray, " n"], pool: Int[np.ndarray, " m"], rng: np.random.Generator, n_examples: int = 10
    ) -> tuple[Int[Tensor, "n tokens"], Int[Tensor, " n"]]:
        """Prompts of ten examples from `pool` and an unanswered line for each word of `asked`."""
        texts = []
        for i in asked:
            examples = rng.choice(pool[pool != i], n_examples, replace=False)
            texts.append("".join(self._line(j) for j in examples) + "\n" + self.words[i] + TAIL)
        return self.encode(texts), self.labels[asked]

    def _line(self, i: int) -> str:
        return f"\n{self.words[i]}{TAIL} {self.words[i].strip()[0].upper()}"

    @torch.no_grad()
    def accuracy(self, prompts: Tensor, labels: Tensor, edit: Callable[[Tensor], Tensor] | None = None) -> float:
        """Share of prompts answered with the right capital letter, the word's state edited on the way."""
        answers = self.tokenizer.convert_tokens_to_ids([f" {chr(65 + int(label))}" for label in labels])
        handle = self._hook(lambda x: _at_word(x, edit)) if edit else None
        logits = self.model(prompts, logits_to_keep=1).logits[:, -1]
        if handle:
            handle.remove()
        return (logits.argmax(-1) == torch.tensor(answers)).float().mean().item()

    def _hook(self, change: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
        def hook(_module, _inputs, output):
            change(output[0] if isinstance(output, tuple) else output)

        return self.model.model.layers[N_BEFORE - 1].register_forward_hook(hook)

    def mflop_to_hook(self) -> float:
        """Two for each weight of the blocks before the hook, and attention inside the window."""
        config, blocks = self.model.config, self.model.model.layers[:N_BEFORE]
        weights = sum(weight.numel() for block in blocks for weight in block.parameters())
        attention = 2 * config.sliding_window * config.hidden_size * N_BEFORE
        return 2 * (weights + attention) / 1e6


def _at_word(x: Tensor, edit: Callable[[Tensor], Tensor]) -> None:
    x[:, WORD_POSITION] = edit(x[:, WORD_POSITION])


def fit_probe(x: Float[Tensor, "words d_in"], labels: Int[Tensor, " words"], seed: int) -> torch.nn.Linear:
    """26 sigmoids trained jointly, positives weighted up, learning rate from 1e-2 down to 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    targets = F.one_hot(labels, 26).float()
    positive = targets.sum(0).clamp(min=1)
    probe = torch.nn.Linear(x.shape[1], 26)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimiser = torch.optim.Adam(probe.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, (1e-5 / 1e-2) ** (1 / 50))
    for _ in range(50):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            loss = F.binary_cross_entropy_with_logits(
                probe(x[rows]), targets[rows], pos_weight=(len(x) - positive) / positive
            )
            optimiser.zero_grad()
            (26 * loss).backward()
            optimiser.step()
        schedule.step()
    return probe


def probe_f1(logits: Float[Tensor, "words 26"], labels: Int[Tensor, " words"]) -> Float[Tensor, " letters"]:
    """F1 of each letter that occurs."""
    predicted: Bool[Tensor, "words 26"] = logits > 0
    true = F.one_hot(labels, 26).bool()
    hits = (predicted & true).sum(0)
    return (2 * hits / (predicted.sum(0) + true.sum(0)).clamp(min=1))[true.any(0)]


def eraser(rows: Float[Tensor, "k d_in"], x: Float[Tensor, "n d_in"]) -> Callable[[Tensor], Tensor]:
    """An edit after which `rows` read the same on every word, and so does all that varies with their readings.

    The least change that does it removes the readings along the data's own directions (LEACE, arXiv 2306.03819,
    with the readings in the place of labels); an orthogonal projection would leave what correlates with them.
    """
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    along = covariance @ rows.T
    oblique = along @ torch.linalg.solve(rows @ along, rows)
    return lambda word: word - (word - mean) @ oblique.T


def table(proofs: list[Proof]) -> str:
    """One line a proof: name, value, bound, verdict."""
    lines = []
    for proof in proofs:
        bound = f">= {proof.low:g}" if proof.low > -np.inf else f"<= {proof.high:g}"
        verdict = "holds" if proof.holds else "FAILS"
        lines.append(f"{proof.name:<52} {proof.value:>8.3f}  {bound:<8} {verdict}")
    return "\n".join(lines)
