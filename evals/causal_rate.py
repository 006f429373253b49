"""The causal absorption rate of arXiv 2409.14507: an SAE, the language model and the words whose main latents are
silent come in; the latent that the model's answer owes most to, and whether it absorbs the word, go out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sae_train.config import EACH
from sae_train.evals import causal
from sae_train.evals.contexts import can_share

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.absorption import Scored
    from sae_train.evals.assets import Assets
    from sae_train.evals.presets import Preset
    from sae_train.protocols import SAE, LanguageModel


@dataclass(frozen=True)
class CausalRate:
    """Per true positive: candidate (it was looked at), weight (1/share of its label's candidates looked at if absorbed,
    else 0), and the latent of the largest effect with its effect, the second's, and its cosine to the probe (NaN and −1
    where the word was not looked at)."""

    candidate: Bool[Tensor, " t"]
    weight: Float[Tensor, " t"]
    latent: Int[Tensor, " t"]
    effect: Float[Tensor, " t"]
    second: Float[Tensor, " t"]
    cos: Float[Tensor, " t"]
    n_candidates: Int[Tensor, " n_labels"]


def causal_rate(
    sae: SAE,
    lm: LanguageModel,
    assets: Assets,
    scored: Scored,
    candidates: Bool[Tensor, " t"],
    preset: Preset,
    seed: int,
) -> CausalRate:
    """Attribute the answer's margin to the latents of at most max_candidates words a label."""
    labels, n_labels = assets.tp_labels, len(assets.label_names)
    n_candidates = labels[candidates].bincount(minlength=n_labels)
    taken = _sample(labels, candidates, n_labels, preset.max_candidates, seed)
    rows = taken.nonzero().squeeze(1)
    n = len(labels)
    nan = torch.full((n,), float("nan"), device=labels.device)
    out = CausalRate(
        taken, torch.zeros_like(nan), torch.full_like(labels, -1), nan, nan.clone(), nan.clone(), n_candidates
    )
    if not len(rows):
        return out
    acts, columns, cos = scored.acts[rows], scored.columns[rows], scored.cos[rows]
    effects = _effects(sae, lm, _prompts(assets, lm, preset).subset(rows), acts, columns, preset).to(cos)
    flag, entry, first, second = causal.absorbed(effects, cos, preset.min_margin, preset.full_cos)
    share = labels[taken].bincount(minlength=n_labels) / n_candidates
    out.weight[rows] = torch.where(flag, 1 / share[labels[rows]], 0.0)
    out.latent[rows] = columns.gather(1, entry[:, None]).squeeze(1)
    out.cos[rows] = cos.gather(1, entry[:, None]).squeeze(1)
    out.effect[rows], out.second[rows] = first, second
    return out


def _prompts(assets: Assets, lm: LanguageModel, preset: Preset) -> causal.Prompts:
    made = replace(prompts_of(assets), shared=_can_share(lm, assets))
    if not preset.lower_case_answer:
        return made
    encoded = lm.tokenizer([name.lower() for name in assets.label_names], add_special_tokens=False)["input_ids"]
    return replace(made, right_ids=torch.tensor([ids[-1] for ids in encoded], device=made.answer_ids.device))


def _can_share(lm: LanguageModel, assets: Assets) -> bool:
    """Whether the prompts have contexts in common, and the model answers the same behind one that it has read."""
    if assets.settings.get("contexts", EACH) == EACH or not len(assets.tp_tokens):
        return False
    row, place = [token for token in assets.tp_tokens[0].tolist() if token >= 0], assets.settings["word_position"]
    prefix, tail = (torch.tensor(part, device=lm.device) for part in (row[:place], [row[place:]]))
    return len(prefix) > 0 and can_share(lm, place, [row, row]) and lm.logits_after(prefix, tail) is not None


def prompts_of(assets: Assets) -> causal.Prompts:
    """The true positives' prompts."""
    return causal.Prompts(assets.tp_tokens, assets.settings["word_position"], assets.answer_ids, assets.tp_labels)


def _effects(
    sae: SAE, lm: LanguageModel, prompts: causal.Prompts, acts: Tensor, columns: Tensor, preset: Preset
) -> Tensor:
    W_dec = sae.W_dec.detach().float()
    if preset.attribution == "ablation":
        return causal.exact_attributions(lm, prompts, acts, columns, W_dec, preset.n_ablated)
    gradients = causal.mean_gradients(lm, prompts, bias_of(sae), preset.gradient_steps)
    return causal.attributions(gradients.to(W_dec), acts, columns, W_dec)


def bias_of(sae: SAE) -> Float[Tensor, " d_in"]:
    """What an SAE decodes from silence."""
    return sae.b_dec.detach()


def _sample(labels: Tensor, candidates: Tensor, n_labels: int, most: int, seed: int) -> Bool[Tensor, " t"]:
    g = torch.Generator().manual_seed(seed)
    taken = torch.zeros_like(candidates)
    for label in range(n_labels):
        rows = (candidates & (labels == label)).nonzero().squeeze(1)
        taken[rows[torch.randperm(len(rows), generator=g)[:most].to(rows.device)]] = True
    return taken
