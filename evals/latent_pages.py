"""What single latents do: how often each fires, its strongest contexts in a text, and its direct effect on the language
model's next token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals.latents import encode

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.result import AbsorptionResult
    from sae_train.protocols import SAE, LanguageModel

MOST_LATENTS = 128
MAIN_PER_LABEL = 3
N_TOP, QUANTILES = 5, (0.75, 0.5, 0.25)
EVERYDAY = 20  # activations from which on quantiles say something
BEFORE, AFTER = 12, 5  # tokens shown around the one that fires
N_TOKENS = 8  # most and least favoured next tokens
N_BINS = 12


@dataclass(frozen=True)
class Sample:
    """Token rows with the activations x of the tokens that SAEs see; `seen` says where those stand."""

    tokens: Int[Tensor, "rows position"]
    seen: Bool[Tensor, "rows position"]
    x: Float[Tensor, "n d_in"]


@torch.no_grad()
def sample(
    lm: LanguageModel,
    tokens: Int[Tensor, "rows position"],
    is_seen: Callable[[Tensor, Tensor], Bool[Tensor, "rows position"]],
) -> Sample:
    """Run the model over the rows; tokens that `is_seen` (of tokens and activations) denies are shown, not encoded."""
    seen, x = [], []
    for part in tokens.split(64):
        part = part.to(lm.device)
        rows = lm.activations(part)
        seen.append(is_seen(part, rows))
        x.append(rows[seen[-1]])
    return Sample(tokens.cpu(), torch.cat(seen).cpu(), torch.cat(x))


def choose(result: AbsorptionResult | None) -> dict[int, dict[str, list[str]]]:
    """Latents worth a page, with the labels they are main latents of and the words they absorb, the busiest first.

    Those are at most MAIN_PER_LABEL main latents of each label that counts, and the first absorbers of fully absorbed
    words.
    """
    roles: dict[int, dict[str, list[str]]] = {}
    if result is None or not len(result.by_letter):
        return roles

    def role(latent: int) -> dict[str, list[str]]:
        return roles.setdefault(int(latent), {"main_of": [], "absorbs": []})

    for row in result.by_letter[result.by_letter["counts"]].to_dict("records"):
        for latent in row["main_latents"][:MAIN_PER_LABEL]:
            role(latent)["main_of"].append(row["letter"])
    taken = [row for row in result.words.to_dict("records") if row["outcome"] == "carried" and row["absorbers"]]
    busy = Counter(int(row["absorbers"][0]) for row in taken)
    room = {latent for latent, _ in busy.most_common(max(MOST_LATENTS - len(roles), 0))} | roles.keys()
    for row in taken:
        if int(row["absorbers"][0]) in room:
            role(row["absorbers"][0])["absorbs"].append(row["word"])
    return roles


@torch.no_grad()
def describe(sae: SAE, roles: dict[int, dict[str, list[str]]], text: Sample, lm: LanguageModel) -> list[dict[str, Any]]:
    """One record a latent: latent, main_of, absorbs, density (share of tokens), max, histogram (counts of N_BINS equal
    bins from 0 to max), examples, and top and bottom next tokens (none where the hook is not as wide as the model)."""
    latents = list(roles)
    if not latents:
        return []
    columns = torch.tensor(latents, device=sae.W_dec.device)
    acts = torch.zeros(*text.tokens.shape, len(latents))
    acts[text.seen] = encode(sae, text.x.to(sae.W_dec.dtype)).take(columns).cpu()
    effects = lm.read_out(sae.W_dec[columns])
    n_seen = int(text.seen.sum())
    records = []
    for i, latent in enumerate(latents):
        own = acts[..., i]
        fired = own[own > 0]
        most = float(fired.max()) if len(fired) else 0.0
        records.append({
            "latent": latent, **roles[latent], "density": len(fired) / max(n_seen, 1), "max": _short(most),
            "histogram": fired.histc(N_BINS, 0, most).int().tolist() if len(fired) else [],
            "examples": _examples(own, text.tokens, lm.tokenizer),
            **({} if effects is None else _rank_tokens(effects[i], lm.tokenizer)),
        })  # fmt: skip
    return records


def _examples(acts: Float[Tensor, "rows position"], tokens: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """The strongest activations, one a row of the text; of a latent that fires often also one near each quantile of its
    activations, in other rows."""
    strongest, place = acts.max(1)
    order = strongest.argsort(descending=True, stable=True)[:N_TOP]
    chosen = [("top", int(row), int(place[row])) for row in order if strongest[row] > 0]
    values, rest = acts[acts > 0], acts.clone()
    rest[[row for _, row, _ in chosen]] = 0
    for quantile in QUANTILES if len(values) >= EVERYDAY else ():
        rest[chosen[-1][1]] = 0
        distance = torch.where(rest > 0, (rest - values.quantile(quantile)).abs(), torch.inf)
        row, position = divmod(int(distance.argmin()), acts.shape[1])
        if rest[row, position] > 0:
            chosen.append((f"{quantile:g}", row, position))
    return [_example(kind, acts[row], tokens[row], position, tokenizer) for kind, row, position in chosen]


def _example(kind: str, acts: Tensor, tokens: Tensor, position: int, tokenizer: Any) -> dict[str, Any]:
    window = slice(max(position - BEFORE, 0), position + AFTER + 1)
    shown = [tokenizer.decode([token]) for token in tokens[window].tolist()]
    return {"kind": kind, "tokens": shown, "acts": [_short(value) for value in acts[window].tolist()]}


def _rank_tokens(effect: Float[Tensor, " vocab"], tokenizer: Any) -> dict[str, list[list[Any]]]:
    tokens = {}
    for name, largest in (("top", True), ("bottom", False)):
        values, ids = effect[: len(tokenizer)].topk(min(N_TOKENS, len(tokenizer)), largest=largest)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        tokens[name] = [[tokenizer.decode([token]), _short(value)] for token, value in pairs]
    return tokens


def _short(value: float) -> float:
    return float(f"{value:.3g}")
