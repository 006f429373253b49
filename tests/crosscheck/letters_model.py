"""A small GPT-2 with the real GPT-2 tokenizer whose words show their first letter, made of the shared data, and three
SAEs trained on it.

A word's embedding is a direction of its letter, one of eight clusters of that letter, two of 256 general features and a
little noise; the transformer's own weights are small and random, so all of it is readable after the first block.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

D_MODEL, N_CLUSTERS, N_GENERAL, HOOK = 128, 8, 256, "blocks.0.hook_resid_post"


def make(folder: Path, shared_data: Path, seed: int = 0) -> tuple[str, list[str]]:
    """Make the model, train the SAEs; both are the same on every call with the same seed."""
    tokenizer = shared_data / "tokenizers" / "gpt2"
    if not tokenizer.is_dir():
        raise SystemExit(f"the letters model needs the GPT-2 tokenizer in {tokenizer}.")
    model = folder / "gpt2-letters"
    save_model(model, tokenizer, seed)
    train(model, shared_data / "text" / "novels_19c", folder)
    saes = sorted(str(path.parent) for path in (folder / "letters" / "saes").glob("*/cfg.json"))
    return str(model), saes


def save_model(folder: Path, tokenizer_folder: Path, seed: int) -> None:
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    n, last = len(tokenizer), len(tokenizer) - 1
    config = GPT2Config(
        vocab_size=n, n_embd=D_MODEL, n_layer=2, n_head=4, n_positions=128, bos_token_id=last, eos_token_id=last
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(embeddings(tokenizer, torch.Generator().manual_seed(seed)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def embeddings(tokenizer, g):
    """The token table; tokens that are no words have noise alone."""
    import torch

    def directions(n: int):
        rows = torch.randn(n, D_MODEL, generator=g)
        return rows / rows.norm(dim=1, keepdim=True)

    letters, clusters, general = directions(26), directions(26 * N_CLUSTERS), directions(N_GENERAL)
    table = 0.1 * directions(len(tokenizer))
    for token_id, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))])):
        core = text.removeprefix(" ")
        if not (core.isascii() and core.isalpha()):
            continue
        letter = ord(core[0].lower()) - ord("a")
        cluster = letter * N_CLUSTERS + int(torch.randint(N_CLUSTERS, (), generator=g))
        some = torch.randperm(N_GENERAL, generator=g)[:2]
        table[token_id] += 0.7 * letters[letter] + 0.9 * clusters[cluster] + 0.6 * general[some].sum(0)
    return table


def train(model: Path, text: Path, out: Path) -> None:
    """Three short SAEs, one per architecture."""
    command = [
        sys.executable, "-m", "sae_train", "--model", str(model), "--hook", HOOK, "--dataset", str(text), "--arch",
        "topk,jumprelu,relu", "--width", "1024", "--l0", "3", "--tokens", "300000", "--batch-tokens", "1024",
        "--no-absorption", "--device", "cpu", "--name", "letters", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"training the letters model's SAEs failed:\n{done.stderr[-3000:] or done.stdout[-3000:]}")
