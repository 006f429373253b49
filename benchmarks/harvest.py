"""How near reading a text is to the bare forward pass: text → shuffled activations beside the language model alone.

    python benchmarks/harvest.py --model speller
    python benchmarks/harvest.py --model smollm2 --hook blocks.8.hook_resid_post --dtype bfloat16 --dataset TEXT

A round fills one buffer from the text (read, tokenise, forward, shuffle, hand out) and sends as many tokens through the
model alone, in turns, so that what else the machine does meets both. Printed are medians over rounds, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sae_train.config import resolve
from sae_train.data.buffer import ActivationBuffer
from sae_train.data.harvest import LM_BATCH_TOKENS
from sae_train.data.language_model import LanguageModel
from sae_train.data.sources import kind_of
from sae_train.data.tokens import open_tokens
from sae_train.training.ranks import choose_device


def main() -> None:
    """Measure one model on one text."""
    options = read_options()
    given = {name: getattr(options, name) for name in ("model", "hook", "dtype", "dataset", "device")}
    settings = resolve(given)
    device = choose_device(settings.lm.device)
    lm = kind_of(settings).language_model(settings, device)
    rows = torch.randint(0, len(lm.tokenizer), (max(1, LM_BATCH_TOKENS // options.context), options.context))
    buffer = open_buffer(lm, settings.dataset, options)
    n_read = count_tokens(lm)
    speeds: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        before = n_read()
        seconds = timed(lambda: [next(buffer) for _ in range(options.tokens // options.batch_tokens)], device)
        harvested = n_read() - before
        n_batches = round(harvested / rows.numel())
        alone = timed(lambda n=n_batches: [lm.activations(rows) for _ in range(n)], device)
        speeds.append((harvested / seconds, n_batches * rows.numel() / alone))
    show(lm, speeds)


def read_options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="speller")
    parser.add_argument("--hook")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dataset")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192, help="activations in a buffer, and a round")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def open_buffer(lm: LanguageModel, dataset: str, options: argparse.Namespace) -> ActivationBuffer:
    """Open the text as a run does, and leave its first buffer, with what is done once, behind."""
    sequences = max(1, LM_BATCH_TOKENS // options.context)
    stream = open_tokens(dataset, lm.tokenizer, context=options.context, sequences=sequences, bos_id=lm.bos_id)
    buffer = ActivationBuffer(lm, stream, buffer_tokens=options.tokens, batch_tokens=options.batch_tokens)
    for _ in range(options.tokens // options.batch_tokens):
        next(buffer)
    return buffer


def count_tokens(lm: LanguageModel) -> Callable[[], int]:
    """Count what goes through the model; return how to ask for it."""
    activations, seen = lm.activations, [0]

    def counting(tokens: torch.Tensor) -> torch.Tensor:
        seen[0] += tokens.numel()
        return activations(tokens)

    lm.activations = counting
    return lambda: seen[0]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that the work takes, on a GPU until it is done there."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def show(lm: LanguageModel, speeds: list[tuple[float, float]]) -> None:
    """Print a Markdown row: medians, and the spread of the rounds' own ratios."""
    harvest, alone = (statistics.median(column) for column in zip(*speeds, strict=True))
    low, middle, high = statistics.quantiles([h / a for h, a in speeds], n=4)
    print("| model | hook | dtype | text → activations, tokens/s | forward pass alone, tokens/s | ratio (quartiles) |")
    print("|---|---|---|---|---|---|")
    dtype = str(lm.dtype).removeprefix("torch.")
    ratio = f"{middle:.3f} ({low:.3f}, {high:.3f})"
    print(f"| {lm.name} | {lm.hook_name} | {dtype} | {harvest:,.0f} | {alone:,.0f} | {ratio} |")


if __name__ == "__main__":
    main()
