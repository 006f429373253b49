"""Loss recovered: what the language model's cross-entropy keeps when an SAE's reconstruction takes the activation's
place.

Cross-entropy is over real next tokens: positions whose next token is special (BOS, padding, document ends) are left
out. The SAE, or zero, replaces the activation only where the token itself is neither special nor dropped: SAEs never
see those in training, so there the clean activation stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from sae_train.errors import UserError
from sae_train.evals.contexts import show_nothing
from sae_train.protocols import SparseSAE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.contexts import Progress
    from sae_train.protocols import SAE, LanguageModel

_CHUNK_ELEMENTS = 2**24  # of dense latents: 64 MB in float32
_LOGIT_ELEMENTS = 2**25  # of one (batch, position, vocabulary) block: 128 MB in float32
_CHECKED = 4  # sequences on which a pass that starts late is compared with a whole one
FIDELITY_TOKENS = 4096  # that a look in a run takes
_KEEP_ELEMENTS = 2**27  # clean log-probabilities are kept up to 512 MB, or else computed again at each look


@dataclass(frozen=True)
class FidelityData:
    """The passes that every SAE shares: tokens, and the cross-entropies without an SAE and with zeros in its place.

    `starts` is where the language model's passes begin, batch by batch: an SAE changes nothing before.
    """

    tokens: Int[Tensor, "batch position"]
    special_ids: tuple[int, ...]
    """never predicted"""
    kept_ids: tuple[int, ...]
    """special and dropped: their activations stay clean"""
    clean_loss: float
    ablated_loss: float
    clean_log_probs: list[Tensor] | None
    starts: list[Tensor | None]

    @classmethod
    @torch.no_grad()
    def build(
        cls, lm: LanguageModel, tokens: Int[Tensor, "batch position"], drop_ids: Collection[int] = ()
    ) -> FidelityData:
        special, kept = tuple(sorted(lm.special_ids)), tuple(sorted({*lm.special_ids, *drop_ids}))
        n_real = int(_is_scored(tokens, special).sum())
        if not n_real:
            raise UserError("loss recovered needs sequences with at least two tokens that are not special.")
        keep = n_real * len(lm.tokenizer) <= _KEEP_ELEMENTS
        starts = _starts(lm, tokens)
        clean = [_log_probs(lm, *part, special) for part in _parts(lm, tokens, starts)] if keep else None
        clean_loss = _mean_loss(lm, tokens, special, starts, clean)
        ablated_loss = _mean_loss(lm, tokens, special, starts, edit=_edit(kept, torch.zeros_like))
        return cls(tokens, special, kept, clean_loss, ablated_loss, clean, starts)


@torch.no_grad()
def loss_recovered(lm: LanguageModel, sae: SAE, tokens: Tensor | FidelityData) -> dict[str, float]:
    """Cross-entropy with the SAE's reconstruction in place, as a share of what zero-ablation loses.

    1 is as good as clean, 0 as bad as zeros; the KL divergence is from clean to spliced, in nats.
    """
    data = tokens if isinstance(tokens, FidelityData) else FidelityData.build(lm, tokens)
    return losses_recovered(lm, [lambda: sae], data)[0]


@torch.no_grad()
def losses_recovered(
    lm: LanguageModel, makers: Sequence[Callable[[], SAE]], data: FidelityData, progress: Progress = show_nothing
) -> list[dict[str, float]]:
    """loss_recovered of each SAE that a maker returns; a clean pass that was not kept is made once for all of them.

    A maker is called for every batch of tokens, so that no two SAEs are in memory at a time.
    `progress` hears how many passes are done.
    """
    special, n = data.special_ids, 0
    loss, divergence = [0.0] * len(makers), [0.0] * len(makers)
    for number, (part, start) in enumerate(_parts(lm, data.tokens, data.starts)):
        clean = data.clean_log_probs[number] if data.clean_log_probs else _log_probs(lm, part, start, special)
        targets, shares = _targets(part, special).to(clean.device), clean.exp()
        for i, make in enumerate(makers):
            progress("measuring loss recovered", number * len(makers) + i, len(data.starts) * len(makers))
            spliced = _log_probs(lm, part, start, special, _edit(data.kept_ids, partial(_reconstruct, make())))
            loss[i] += float(-spliced.gather(1, targets).double().sum())
            divergence[i] += float((clean - spliced).mul_(shares).sum(1).double().sum())
        n += len(clean)
    lost = data.ablated_loss - data.clean_loss
    return [
        {
            "metrics/ce_loss_score": (data.ablated_loss - total / n) / lost if lost else float("nan"),
            "metrics/ce_loss_with_sae": total / n,
            "metrics/ce_loss_without_sae": data.clean_loss,
            "metrics/ce_loss_with_ablation": data.ablated_loss,
            "metrics/kl_div_with_sae": apart / n,
        }
        for total, apart in zip(loss, divergence, strict=True)
    ]


def _batches(lm: LanguageModel, tokens: Tensor) -> Iterator[Tensor]:
    per_sequence = tokens.shape[1] * len(lm.tokenizer)
    yield from tokens.split(max(1, _LOGIT_ELEMENTS // per_sequence))


def _parts(lm: LanguageModel, tokens: Tensor, starts: list[Tensor | None]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of tokens, and where the language model's passes over them begin."""
    yield from zip(_batches(lm, tokens), starts, strict=True)


def _is_in(tokens: Tensor, ids: tuple[int, ...]) -> Bool[Tensor, "batch position"]:
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))


def _is_scored(tokens: Tensor, special: tuple[int, ...]) -> Bool[Tensor, "batch position-1"]:
    return ~_is_in(tokens[:, 1:], special)


def _targets(tokens: Tensor, special: tuple[int, ...]) -> Int[Tensor, "n 1"]:
    return tokens[:, 1:][_is_scored(tokens, special)][:, None]


_Edit = Callable[["Tensor"], Callable[["Tensor"], "Tensor"]]


def _edit(kept_ids: tuple[int, ...], replace: Callable[[Tensor], Tensor]) -> _Edit:
    """For given tokens, the edit that replaces activations except at kept ids."""

    def for_tokens(tokens: Tensor) -> Callable[[Tensor], Tensor]:
        keep = _is_in(tokens, kept_ids)[..., None]
        return lambda x: torch.where(keep, x, replace(x))

    return for_tokens


def _starts(lm: LanguageModel, tokens: Tensor) -> list[Tensor | None]:
    """What each pass can start from, if the logits from there have the bits of a whole pass."""
    parts = list(_batches(lm, tokens))
    few = parts[0][:_CHECKED]
    first = lm.start(few)
    if first is None or not torch.equal(lm.logits(few, start=first), lm.logits(few)):
        return [None] * len(parts)
    return list(map(lm.start, parts))


def _log_probs(
    lm: LanguageModel, tokens: Tensor, start: Tensor | None, special: tuple[int, ...], edit: _Edit | None = None
) -> Float[Tensor, "n vocab"]:
    tokens = tokens.to(lm.device)
    logits = lm.logits(tokens, edit and edit(tokens), start)
    return logits[:, :-1][_is_scored(tokens, special)].log_softmax(-1)


def _mean_loss(
    lm: LanguageModel, tokens: Tensor, special: tuple[int, ...], starts: list[Tensor | None],
    log_probs: list[Tensor] | None = None, edit: _Edit | None = None,
) -> float:  # fmt: skip
    total, n = 0.0, 0
    for number, (part, start) in enumerate(_parts(lm, tokens, starts)):
        own = log_probs[number] if log_probs else _log_probs(lm, part, start, special, edit)
        total += float(-own.gather(1, _targets(part, special).to(own.device)).double().sum())
        n += len(own)
    return total / n


def _reconstruct(sae: SAE, x: Float[Tensor, "batch position d_in"]) -> Float[Tensor, "batch position d_in"]:
    rows = x.flatten(0, 1).to(sae.W_dec.dtype)
    n_rows = max(1, _CHUNK_ELEMENTS // len(sae.W_dec))
    parts = [sae(part) if isinstance(sae, SparseSAE) else sae.decode(sae.encode(part)) for part in rows.split(n_rows)]
    return torch.cat(parts).to(x.dtype).view_as(x)
