"""What stands before each word, and what the model makes of it.

A context is a set of in-context examples. Each word may have one of its own, as in SAEBench, or many words share one:
its tokens then go through the model once, and each of its words as a single token behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from sae_train.config import EACH
from sae_train.errors import UserError
from sae_train.evals import prompts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.prompts import PromptFormat
    from sae_train.evals.vocab import Vocabulary
    from sae_train.protocols import LanguageModel

Contexts = int | str
"""how many contexts the words of a split side share, or "each" for one a word"""

_BATCH_TOKENS = 8192
_N_ACCURACY = 256  # prompts for the model's own accuracy, a sanity figure that takes whole forward passes
_N_ASKED = 16  # of a shared context
_LOGIT_ELEMENTS = 2**26  # of one (batch, position, vocabulary) block: 256 MB in float32
_N_CHECKED = 4  # words read both ways before the short way is trusted
_SAME = {torch.float32: 1e-3}  # largest relative difference of the two ways; what goes wrong is far above
_SAME_IN_HALF = 0.05


class Progress(Protocol):
    """Hears what is being done, how much of it is done, and how much there is; 1 where nobody counts."""

    def __call__(self, doing: str, done: int = 0, of: int = 1) -> None:
        """Take it."""


def show_nothing(doing: str, done: int = 0, of: int = 1) -> None:
    """A Progress that shows nothing."""


def draw(
    own: Int[Tensor, " n"], pool: int, m: int, contexts: Contexts, g: torch.Generator
) -> Int[Tensor, "n m"]:  # fmt: skip
    """For each row m distinct numbers below pool, never the row's own one; fewer where the pool is small."""
    if contexts == EACH:
        return prompts.draw_examples(own, pool, m, g)
    m = max(0, min(m, pool - 1))
    sets = prompts.draw_examples(torch.full((contexts,), pool), pool + 1, m, g)
    place = torch.randperm(len(own), generator=g) % contexts
    for _ in range(contexts):
        holds = (sets[place] == own[:, None]).any(1)
        if not holds.any():
            break
        place = (place + holds.long()) % contexts
    drawn = sets[place]
    alone = (drawn == own[:, None]).any(1)  # words that every context holds
    drawn[alone] = prompts.draw_examples(own[alone], pool, m, g)
    return drawn


def own_split_prompts(
    lm: LanguageModel, fmt: PromptFormat, words: Vocabulary, is_test: Bool[Tensor, " n"], contexts: Contexts,
    g: torch.Generator,
) -> list[list[int]]:  # fmt: skip
    """A prompt per word, its examples drawn from the word's own side of the split."""
    examples: list[list[str]] = [[] for _ in words.words]
    for side in (~is_test, is_test):
        rows = side.nonzero().squeeze(1)
        drawn = rows[draw(torch.arange(len(rows)), len(rows), fmt.n_examples, contexts, g)]
        for row, others in zip(rows.tolist(), drawn.tolist(), strict=True):
            examples[row] = [words.words[o] for o in others]
    return _checked(lm, fmt, words, prompts.token_rows(lm, fmt, words.words, examples))


def fresh_prompts(
    lm: LanguageModel, fmt: PromptFormat, words: Vocabulary, tp_rows: Int[Tensor, " t"], contexts: Contexts,
    g: torch.Generator,
) -> list[list[int]]:  # fmt: skip
    """New prompts for the true positives, with examples from the whole vocabulary."""
    drawn = draw(tp_rows, len(words), fmt.n_examples, contexts, g)
    examples = [[words.words[o] for o in others] for others in drawn.tolist()]
    chosen = words.subset(tp_rows.tolist())
    return _checked(lm, fmt, chosen, prompts.token_rows(lm, fmt, chosen.words, examples))


def _checked(lm: LanguageModel, fmt: PromptFormat, words: Vocabulary, rows: list[list[int]]) -> list[list[int]]:
    for ids, token_id, word in zip(rows, words.token_ids, words.words, strict=True):
        if ids[fmt.word_position] != token_id:
            raise UserError(
                f"the tokenizer of {lm.name} does not keep {word!r} as one token at position {fmt.word_position} of "
                f"the template {fmt.hierarchy.template!r} once examples stand before it; give another template."
            )
        if len(ids) > lm.context:
            raise UserError(f"a prompt of {len(ids)} tokens does not fit the {lm.context} positions of {lm.name}.")
    return rows


def shared_prefixes(rows: list[list[int]], word_position: int) -> dict[tuple[int, ...], list[int]]:
    """The tokens before the word that several prompts have in common, with the numbers of those prompts.

    The prompts' own tokens decide, so a word that changes how its context is written counts as one without.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, ids in enumerate(rows):
        groups.setdefault(tuple(ids[:word_position]), []).append(number)
    return {prefix: numbers for prefix, numbers in groups.items() if prefix and len(numbers) > 1}


@torch.no_grad()
def read_words(
    lm: LanguageModel, word_position: int, rows: list[list[int]], shared: bool, tell: Callable[[int], None]
) -> Float[Tensor, "n d_in"]:
    """Activations at the words, prompt by prompt; `tell` hears how many are read.

    With `shared`, what prompts have in common before the word goes through the model once.
    """
    out, read = torch.zeros(len(rows), lm.d_in), torch.zeros(len(rows), dtype=torch.bool)

    def put(numbers: Tensor, x: Tensor) -> None:
        out[numbers], read[numbers] = x.float().cpu(), True
        tell(int(read.sum()))

    tell(0)
    for prefix, numbers in shared_prefixes(rows, word_position).items() if shared else ():
        words = torch.tensor([[rows[n][word_position]] for n in numbers], device=lm.device)
        put(torch.tensor(numbers), lm.activations_after(torch.tensor(prefix, device=lm.device), words)[:, -1])
    left = (~read).nonzero().squeeze(1)
    for numbers, tokens in prompts.batches([rows[n] for n in left.tolist()], _BATCH_TOKENS):
        put(left[numbers], lm.activations(tokens.to(lm.device))[:, word_position])
    return out


@torch.no_grad()
def can_share(lm: LanguageModel, word_position: int, rows: list[list[int]]) -> bool:
    """Whether a model gives behind a prefix it has read the activations that it gives in the whole prompt."""
    for prefix, numbers in shared_prefixes(rows, word_position).items():
        few = [rows[n] for n in numbers[:_N_CHECKED]]
        words = torch.tensor([[ids[word_position]] for ids in few], device=lm.device)
        behind = lm.activations_after(torch.tensor(prefix, device=lm.device), words)
        if behind is None:
            return False
        whole = torch.stack([lm.activations(torch.tensor([ids], device=lm.device))[0, word_position] for ids in few])
        apart = (behind[:, -1] - whole).norm(dim=1) / whole.norm(dim=1)
        return bool((apart <= _SAME.get(lm.dtype, _SAME_IN_HALF)).all())
    return True


@torch.no_grad()
def answer_accuracy(
    lm: LanguageModel, fmt: PromptFormat, rows: list[list[int]], labels: Int[Tensor, " n"], shared: bool,
    tell: Callable[[int, int], None],
) -> float | None:  # fmt: skip
    """How often the model itself gives the right answer to some of the prompts; None if they ask for none."""
    if fmt.answer_ids is None or not rows:
        return None
    answers = torch.tensor(fmt.answer_ids)[labels]
    of, given_answers = _some_answers(lm, fmt.word_position, rows, shared)
    right = done = 0
    tell(0, of)
    for numbers, given in given_answers:
        right += int((given.cpu() == answers[numbers]).sum())
        done += len(numbers)
        tell(done, of)
    return right / of


def _some_answers(
    lm: LanguageModel, word_position: int, rows: list[list[int]], shared: bool
) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """How many prompts are asked, and (numbers, tokens that the model goes on with) of them."""
    groups = {p: numbers[:_N_ASKED] for p, numbers in shared_prefixes(rows, word_position).items()} if shared else {}
    taken = dict(list(groups.items())[: max(1, _N_ACCURACY // max(map(len, groups.values()), default=1))])
    if taken:
        return sum(map(len, taken.values())), _answers_after(lm, word_position, rows, taken)
    every = max(1, len(rows) // _N_ACCURACY)
    return len(rows[::every]), _answers(lm, rows, every)


def _answers(lm: LanguageModel, rows: list[list[int]], every: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = min(_BATCH_TOKENS, _LOGIT_ELEMENTS // len(lm.tokenizer))
    for numbers, tokens in prompts.batches(rows[::every], size):
        yield numbers * every, lm.logits(tokens.to(lm.device))[:, -1].argmax(-1)


def _answers_after(
    lm: LanguageModel, word_position: int, rows: list[list[int]], groups: dict[tuple[int, ...], list[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for prefix, numbers in groups.items():
        tokens = torch.tensor([rows[n][word_position:] for n in numbers], device=lm.device)
        logits = lm.logits_after(torch.tensor(prefix, device=lm.device), tokens)
        yield torch.tensor(numbers), logits[:, -1].argmax(-1)
