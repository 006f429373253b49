"""Trains the embedded language model on its language and on English stories, and writes its folder."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from sae_train.files import write_json
from sae_train.speller import hierarchies, text
from sae_train.speller.corpus import SHARES, Corpus
from sae_train.speller.language import Language
from sae_train.speller.model import N_BEFORE, build_model, build_tokenizer
from sae_train.speller.words import choose_words, read_stories, story_ids

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import SmolLM3ForCausalLM


@dataclass(frozen=True)
class Settings:
    """What the training script can be told; the defaults made the shipped model."""

    n_steps: int = 1300
    n_rows: int = 32
    lr: float = 3e-3
    lr_blocks: float = 0.02
    weight_decay: float = 0.05
    seed: int = 0
    n_train_tokens: int = 2_400_000
    n_held_out_tokens: int = 160_000


def train(stories_folder: Path, word_lists: list[Path], out: Path, settings: Settings) -> None:
    """Train, sample and generate the text that ships, and write everything to `out`."""
    stories = read_stories(stories_folder)
    language = Language(choose_words(stories, word_lists), settings.seed)
    corpus = Corpus(language, story_ids(stories, language))
    torch.manual_seed(settings.seed)
    model = build_model(len(language.vocabulary))
    start = time.perf_counter()
    fit(model, corpus, settings)
    save(model, language, out, settings, time.perf_counter() - start)
    hierarchies.write(language, out)
    text.write(model, corpus, out / "text", settings.n_train_tokens, settings.n_held_out_tokens, settings.seed)


def fit(model: SmolLM3ForCausalLM, corpus: Corpus, settings: Settings) -> None:
    """AdamW with a short warm-up and a cosine, in bfloat16 where the matrices are."""
    rng = np.random.default_rng([settings.seed, 2])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimisers = build_optimisers(model, settings)
    schedules = [LambdaLR(each, lambda step: lr_factor(step, settings.n_steps)) for each in optimisers]
    for layer in model.model.layers[N_BEFORE:]:
        layer.mlp.forward = torch.zeros_like
    model.train()
    start = time.perf_counter()
    for step in range(settings.n_steps):
        rows = torch.from_numpy(corpus.batch(rng, settings.n_rows, step / settings.n_steps))
        loss = next_token_loss(model, rows, answer_weight(rows, corpus.language.ids[":"]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for each in (*optimisers, *schedules):
            each.step()
        model.zero_grad()
        if step % 100 == 0 or step == settings.n_steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    for layer in model.model.layers[N_BEFORE:]:
        del layer.mlp.forward
    model.eval()


def next_token_loss(model: SmolLM3ForCausalLM, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1].contiguous(), use_cache=False).logits.flatten(0, 1)
    loss = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / weight.sum()


def answer_weight(rows: torch.Tensor, colon: int) -> torch.Tensor:
    """Answers to questions count four times: they are few, and all that is asked about a word's attributes."""
    return 1 + 3 * (rows[:, :-1] == colon).float()


def build_optimisers(model: SmolLM3ForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and norms."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    blocks = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
    other = [weight for name, weight in named if weight.ndim == 1 or ".layers." not in name]
    adam = torch.optim.AdamW(other, lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    if not settings.lr_blocks:
        adam.add_param_group({"params": blocks, "weight_decay": settings.weight_decay})
        return [adam]
    return [adam, torch.optim.Muon(blocks, lr=settings.lr_blocks, weight_decay=settings.weight_decay)]


def lr_factor(step: int, n_steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def save(model: SmolLM3ForCausalLM, language: Language, out: Path, settings: Settings, seconds: float) -> None:
    """Write a Hugging Face folder (weights in float16) and the settings it came from."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(out)
    model.float()
    build_tokenizer(language.vocabulary).save_pretrained(out)
    provenance = {**asdict(settings), "shares": SHARES, "seconds": round(seconds), "torch": torch.__version__}
    write_json(out / "training.json", provenance)
