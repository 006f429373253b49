"""Where in a language model the first letter can be read: a probe's F1 on held-out words after each block, as CSV.

    python benchmarks/probe_by_block.py --model smollm2 --out benchmarks/results/probe_by_block_smollm2.csv

Words stand in prompts as the eval's do, but share a few contexts: a context goes through the model once, and each word
follows it as one token. All blocks are read in one pass.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
from csv_rows import append, cpu

from sae_train.data.hooks import find_blocks
from sae_train.data.language_model import load_language_model
from sae_train.evals import prompts, vocab
from sae_train.evals.assets import ground_truth
from sae_train.evals.hierarchy import get_hierarchy
from sae_train.evals.presets import SAEBENCH

if TYPE_CHECKING:
    from torch import Tensor

WORDS_A_CONTEXT = 256
COLUMNS = ("model", "words", "seed", "block", "f1", "letters", "cpu")


class Stop(Exception):
    """Ends a pass of the model after the last block that is read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--words", type=int, help="a stratified sample; default: all")
    parser.add_argument("--blocks", help="such as 0,4,8; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lm = load_language_model(options.model)
    g = torch.Generator().manual_seed(options.seed)
    hierarchy = get_hierarchy()
    fmt, words = words_of(lm, hierarchy, options.words, g)
    is_test = vocab.split(words, SAEBENCH.test_share, g)
    labels = torch.tensor(words.labels)
    n_blocks = len(lm._model.get_submodule(find_blocks(lm._model)))
    at = [int(block) for block in options.blocks.split(",")] if options.blocks else list(range(n_blocks))
    for block, at_block in zip(at, by_block(lm, fmt, words, is_test, at, g), strict=True):
        _, figures = ground_truth(at_block, labels, is_test, len(hierarchy.labels), SAEBENCH, options.seed)
        f1 = figures[:, 0]
        row = {"model": options.model, "words": len(words), "seed": options.seed, "block": block, "cpu": cpu(),
               "f1": f"{float(f1.mean()):.4f}", "letters": int((f1 > SAEBENCH.min_probe_f1).sum())}  # fmt: skip
        append(options.out, COLUMNS, [row])
        print(f"blocks.{block}.hook_resid_post  F1 {row['f1']}  letters that count {row['letters']}", flush=True)


def words_of(lm: Any, hierarchy: Any, n_words: int | None, g: torch.Generator) -> tuple[Any, Any]:
    """The prompt's format and the words that are one token in it, or a stratified sample of them."""
    found, dropped = vocab.entries(lm.tokenizer, lm.special_ids, hierarchy)
    fmt = prompts.fit_format(lm, hierarchy, found, SAEBENCH)
    single = vocab.keep_single_tokens(found, dropped, lambda words: prompts.single_token_words(lm, fmt, words))
    return fmt, vocab.sample(single, n_words, g) if n_words else single


@torch.no_grad()
def by_block(lm: Any, fmt: Any, words: Any, is_test: Tensor, at: list[int], g: torch.Generator) -> list[Tensor]:
    """What leaves the blocks `at` at each word. Examples in a context are words of the same side of the split."""
    out = [torch.zeros(len(words), lm._model.config.hidden_size) for _ in at]
    for side in (is_test, ~is_test):
        rows = side.nonzero().flatten()
        for part in rows[torch.randperm(len(rows), generator=g)].split(WORDS_A_CONTEXT):
            others = rows[~torch.isin(rows, part)]
            chosen = others[torch.randperm(len(others), generator=g)[: fmt.n_examples]].tolist()
            tokens = prompts.token_rows(
                lm, fmt, [words.words[r] for r in part.tolist()], [[words.words[r] for r in chosen]] * len(part)
            )
            table = torch.tensor(tokens)[:, : len(tokens[0]) + fmt.word_position + 1]
            for x, seen in zip(out, last_token(lm._model, table, at), strict=True):
                x[part] = seen
    return out


def last_token(model: Any, table: Tensor, at: list[int]) -> list[Tensor]:
    """What leaves the blocks `at` at the last token of rows that are alike but for it."""
    assert (table[:, :-1] == table[0, :-1]).all()
    blocks = model.get_submodule(find_blocks(model))
    seen: dict[int, Tensor] = {}

    def catch(i: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[i] = (output[0] if isinstance(output, tuple) else output)[:, -1].float()
            if i == max(at):
                raise Stop

        return hook

    handles = [blocks[i].register_forward_hook(catch(i)) for i in at]
    past = DynamicCache()
    with suppress(Stop):
        model(input_ids=table[:1, :-1], past_key_values=past, use_cache=True)
    past.batch_repeat_interleave(len(table))
    with suppress(Stop):
        model(input_ids=table[:, -1:], past_key_values=past, use_cache=True)
    for handle in handles:
        handle.remove()
    return [seen[i] for i in at]


if __name__ == "__main__":
    main()
