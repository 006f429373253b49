"""What a language model's answer owes to single latents at the word: prompts and SAE directions come in, integrated
gradients and exact changes of the answer's margin go out, with the SAE's error term kept.

With x = f·W_dec + b_dec + err at the word, everything here edits x alone: removing a latent is x − f_i·W_dec,i, and
scaling latents and error by 1 − α is b_dec + (1 − α)(x − b_dec), so neither encoding again nor the error is needed.
W_dec and b_dec are those of raw activations: an SAE that rescales its input has to have its scale folded into them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals.scoring import unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.protocols import LanguageModel

_CPU_TOKENS = 1024  # in one forward pass on a CPU: more of them leave its caches
_BATCH_TOKENS = 8192
_LOGIT_ELEMENTS = 2**26  # of one (batch, position, vocabulary) block: 256 MB in float32
_BLOCK_ELEMENTS = 2**24  # of one block of directions or gradients: 64 MB in float32


@dataclass(frozen=True)
class Prompts:
    """Prompts whose word stands at one place counted from the end, and the token that answers each label.

    tokens are right-aligned; shorter prompts are filled up with −1 on the left. right_ids, where given, take the
    answers' place as the right ones, not as the others.
    """

    tokens: Int[Tensor, "n position"]
    word_position: int
    answer_ids: Int[Tensor, " n_labels"]
    labels: Int[Tensor, " n"]
    right_ids: Int[Tensor, " n_labels"] | None = None
    shared: bool = False
    """read what stands before the word once for all prompts (and changes) that have it in common"""

    def __post_init__(self) -> None:
        assert self.word_position < 0, "the word's position is counted from the end"
        assert bool((self.tokens[:, self.word_position :] >= 0).all()), "a prompt ends before its word"

    def __len__(self) -> int:
        return len(self.tokens)

    def subset(self, rows: Tensor) -> Prompts:
        return replace(self, tokens=self.tokens[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Prompts:
        names = ("tokens", "answer_ids", "labels", *(["right_ids"] if self.right_ids is not None else []))
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class Interventions:
    """The clean margin of n words and its change under each intervention on the word's activation."""

    clean: Float[Tensor, " n"]
    absorber: Float[Tensor, " n"]
    random: Float[Tensor, " n"]
    parent: Float[Tensor, " n"]
    swap: Float[Tensor, " n"]


def answer_margin(
    logits: Float[Tensor, "n vocab"], labels: Int[Tensor, " n"], answer_ids: Int[Tensor, " n_labels"],
    right_ids: Int[Tensor, " n_labels"] | None = None,
) -> Float[Tensor, " n"]:  # fmt: skip
    """Logit of the right answer's token minus the mean of the other answers'."""
    answers = logits[:, answer_ids]
    right_ids = answer_ids if right_ids is None else right_ids
    right = logits.gather(1, right_ids[labels][:, None]).squeeze(1)
    others = answers.scatter(1, labels[:, None], 0.0)
    return right - others.sum(1) / (len(answer_ids) - 1)


@torch.no_grad()
def margins(
    lm: LanguageModel, prompts: Prompts, rows: Int[Tensor, " m"], deltas: Float[Tensor, "m d_in"] | None
) -> Float[Tensor, " m"]:
    """Margins of prompts[rows[i]] once deltas[i] is added to the word's activation; clean ones without deltas."""
    prompts, rows = prompts.to(lm.device), rows.to(lm.device)
    if prompts.shared and len(rows):
        return _margins_behind(lm, prompts, rows, deltas)
    parts = []
    for numbers, tokens in _batches(lm, prompts, rows):
        change = None if deltas is None else _adder(deltas[numbers.to(deltas.device)])
        parts.append((numbers, _margin(lm, prompts, rows[numbers], tokens, change)))
    return _assemble(parts, (len(rows),), lm.device)


def mean_gradients(
    lm: LanguageModel, prompts: Prompts, bias: Float[Tensor, " d_in"], steps: int = 6
) -> Float[Tensor, "n d_in"]:
    """Gradient of the margin in the word's activation, averaged over bias + (1 − α)(x − bias), α = 0, 1/steps, ….

    The path of the released code of arXiv 2409.14507: α stops one step short of 1, and other positions stay clean.
    """
    prompts, bias = prompts.to(lm.device), bias.detach().to(lm.device)
    parts = []
    for rows in torch.arange(len(prompts), device=lm.device).split(max(1, _BLOCK_ELEMENTS // (steps * len(bias)))):
        along = _gradients(lm, prompts, rows.repeat_interleave(steps), bias, steps)
        parts.append(along.reshape(len(rows), steps, len(bias)).mean(1))
    return torch.cat(parts)


@torch.no_grad()
def attributions(
    gradients: Float[Tensor, "n d_in"], acts: Float[Tensor, "n m"], columns: Int[Tensor, "n m"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "n m"]:  # fmt: skip
    """Integrated-gradients effect of removing each latent: (gradient · W_dec,i)(0 − f_i)."""
    out = torch.zeros(acts.shape, dtype=gradients.dtype, device=gradients.device)
    for row, entry in _entry_blocks(acts != 0, W_dec.shape[1]):
        slope = (gradients[row] * W_dec[columns[row, entry]].to(gradients.dtype)).sum(1)
        out[row, entry] = slope * -acts[row, entry].to(gradients.dtype)
    return out


@torch.no_grad()
def exact_attributions(
    lm: LanguageModel, prompts: Prompts, acts: Float[Tensor, "n m"], columns: Int[Tensor, "n m"],
    W_dec: Float[Tensor, "d_sae d_in"], keep: int,
) -> Float[Tensor, "n m"]:  # fmt: skip
    """Change of the margin when one latent alone is removed, for the `keep` latents of largest |f_i|·‖W_dec,i‖.

    The exact counterpart of `attributions`; entries beyond `keep`, and latents that add nothing to x, read 0.
    """
    acts, columns, W_dec = acts.to(lm.device), columns.to(lm.device), W_dec.to(lm.device)
    clean = margins(lm, prompts, torch.arange(len(prompts)), None)
    out = torch.zeros(acts.shape, dtype=clean.dtype, device=lm.device)
    size = acts.abs() * W_dec.norm(dim=1)[columns]
    largest = size.topk(min(keep, size.shape[1]), dim=1).indices
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter(1, largest, True) & (size != 0)
    for row, entry in _entry_blocks(chosen, W_dec.shape[1]):
        removed = acts[row, entry, None] * W_dec[columns[row, entry]]
        out[row, entry] = margins(lm, prompts, row, -removed) - clean[row]
    return out


def absorbed(
    attribution: Float[Tensor, "n m"], cos: Float[Tensor, "n m"], min_margin: float = 1.0, min_cos: float = 0.025
) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Decide absorption as arXiv 2409.14507 does, apart from the silence of the main latents.

    Returns (flag, entry of the latent of largest |attribution|, its attribution s1, the second's s2, 0 if none).
    cos holds the cosine of each entry's decoder row to the probe. A NaN attribution is never absorption.
    """
    _, ranked = attribution.abs().topk(min(2, attribution.shape[1]), dim=1)
    top = attribution.gather(1, ranked)
    first, s1 = ranked[:, 0], top[:, 0]
    s2 = top[:, 1] if top.shape[1] > 1 else torch.zeros_like(s1)
    along = cos.gather(1, first[:, None]).squeeze(1) >= min_cos
    return (s1 <= 0) & (s1.abs() - s2.abs() >= min_margin) & along, first, s1, s2


@torch.no_grad()
def intervene(
    lm: LanguageModel, prompts: Prompts, removed: Float[Tensor, "n d_in"], control: Float[Tensor, "n d_in"],
    inserted: Float[Tensor, "n d_in"],
) -> Interventions:  # fmt: skip
    """Take the absorber's vector out, or a control's in its place; put the silent parent's in; do both at once."""
    rows = torch.arange(len(prompts))
    clean = margins(lm, prompts, rows, None)

    def change(delta: Tensor) -> Tensor:
        return margins(lm, prompts, rows, delta) - clean

    return Interventions(clean, change(-removed), change(-control), change(inserted), change(inserted - removed))


@torch.no_grad()
def matched_controls(
    acts: Float[Tensor, "n m"], columns: Int[Tensor, "n m"], W_dec: Float[Tensor, "d_sae d_in"],
    exclude: Bool[Tensor, "n m"], removed: Float[Tensor, "n d_in"], generator: torch.Generator,
) -> Float[Tensor, "n d_in"]:  # fmt: skip
    """Vector of a random latent that fires on the same word, at the norm of `removed`.

    Main latents and the absorber are to be excluded. A word without another firing latent gets the zero vector.
    """
    free = (acts != 0) & ~exclude & (W_dec.norm(dim=1)[columns] > 0)
    draw = torch.rand(acts.shape, generator=generator, device=generator.device).to(acts.device)
    pick = torch.where(free, draw, -1.0).argmax(1, keepdim=True)
    direction = unit(W_dec[columns.gather(1, pick).squeeze(1)].to(removed.dtype)) * acts.gather(1, pick).sign()
    return torch.where(free.any(1, keepdim=True), direction * removed.norm(dim=1, keepdim=True), 0.0)


def _margins_behind(lm: LanguageModel, prompts: Prompts, rows: Tensor, deltas: Tensor | None) -> Float[Tensor, " m"]:
    """Margins as the words and what follows them give behind prefixes that are read once."""
    place, parts = prompts.word_position, []
    _, group = prompts.tokens[rows, :place].unique(dim=0, return_inverse=True)
    most = max(1, _LOGIT_ELEMENTS // (len(lm.tokenizer) * -place))
    for number in range(int(group.max()) + 1):
        for numbers in (group == number).nonzero().squeeze(1).split(most):
            before = prompts.tokens[rows[numbers[0]], :place]
            tail = prompts.tokens[rows[numbers], place:]
            added = None
            if deltas is not None:
                added = deltas.new_zeros(*tail.shape, deltas.shape[1])
                added[:, 0] = deltas[numbers.to(deltas.device)]
            logits = lm.logits_after(before[before >= 0], tail, added)[:, -1]
            margin = answer_margin(logits, prompts.labels[rows[numbers]], prompts.answer_ids, prompts.right_ids)
            parts.append((numbers, margin))
    return _assemble(parts, (len(rows),), lm.device)


def _batches(lm: LanguageModel, prompts: Prompts, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(places in rows, tokens) rectangles of equal-length prompts: no padding, so no mask to get wrong."""
    lengths = (prompts.tokens >= 0).sum(1)[rows]
    for length in lengths.unique().tolist():
        for numbers in (lengths == length).nonzero().squeeze(1).split(_batch_rows(lm, length)):
            yield numbers, prompts.tokens[rows[numbers], -length:]


def _batch_rows(lm: LanguageModel, length: int) -> int:
    budget = _CPU_TOKENS if torch.device(lm.device).type == "cpu" else _BATCH_TOKENS
    return max(1, min(budget, _LOGIT_ELEMENTS // len(lm.tokenizer)) // length)


def _entry_blocks(chosen: Tensor, d_in: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(row, entry) of the chosen ones, so many at a time that their directions stay within one block."""
    size = max(1, _BLOCK_ELEMENTS // d_in)
    rows, entries = chosen.nonzero(as_tuple=True)
    if len(rows):
        yield from zip(rows.split(size), entries.split(size), strict=True)


def _adder(delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x + delta.to(x)


def _margin(
    lm: LanguageModel, prompts: Prompts, rows: Tensor, tokens: Tensor, change: Callable[[Tensor], Tensor] | None
) -> Float[Tensor, " batch"]:
    """Margins of one rectangle of prompts, the word's activation passed through `change`."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, prompts.word_position] = change(x[:, prompts.word_position])
        return x

    logits = lm.logits(tokens, None if change is None else edit)[:, -1]
    return answer_margin(logits, prompts.labels[rows], prompts.answer_ids, prompts.right_ids)


def _gradients(lm: LanguageModel, prompts: Prompts, rows: Tensor, bias: Tensor, steps: int) -> Float[Tensor, "m d_in"]:
    """Gradient of each row's margin at the word's activation drawn towards bias, step after step in turn."""
    parts = [
        (numbers, _gradient(lm, prompts, rows[numbers], tokens, bias, (numbers % steps, steps)))
        for numbers, tokens in _batches(lm, prompts, rows)
    ]
    return _assemble(parts, (len(rows), len(bias)), lm.device)


@torch.enable_grad()
def _gradient(
    lm: LanguageModel, prompts: Prompts, rows: Tensor, tokens: Tensor, bias: Tensor, alpha: tuple[Tensor, int]
) -> Float[Tensor, "batch d_in"]:
    """Gradient of the margin at bias + (1 − α)(x − bias), α a fraction (numerators, denominator)."""
    moved: list[Tensor] = []

    def draw_in(x: Tensor) -> Tensor:
        # Detached here, so that the graph begins at the hook: the blocks before it cost no memory and no time.
        kept = 1 - alpha[0].to(x)[:, None] / alpha[1]
        moved.append((bias.to(x) + kept * (x - bias.to(x))).detach().requires_grad_())
        return moved[0]

    margin = _margin(lm, prompts, rows, tokens, draw_in)
    return torch.autograd.grad(margin.sum(), moved[0])[0]


def _assemble(parts: list[tuple[Tensor, Tensor]], shape: tuple[int, ...], device: Any) -> Tensor:
    """Put the batches' results back in the order of the rows."""
    out = torch.zeros(shape, dtype=parts[0][1].dtype if parts else None, device=device)
    for numbers, part in parts:
        out[numbers] = part
    return out
