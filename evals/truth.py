"""Recovery and absorption of one SAE against a planted dictionary, the toy's.

The toy knows which features are active, so nothing is estimated here: no probe, no ranking, no prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_train.evals.latents import encode
from sae_train.evals.presets import Preset, get_preset
from sae_train.evals.scoring import score_projections, unit

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.data.toy import Sample, Toy
    from sae_train.protocols import SAE

RECOVERED = 0.9


@torch.no_grad()
def truth(sae: SAE, toy: Toy, sample: Sample, preset: str | Preset = "saebench") -> dict[str, float]:
    """Figures by name: recovery always, absorption where the toy has parents with children.

    mcc is the mean cosine of decoder rows and true directions over the pairs of the best one-to-one matching (as in
    SynthSAEBench, arXiv 2602.14687, but signed: latents have no negative values); recovered the share of features
    whose partner's cosine exceeds .9; f1 the mean over features of the partner's F1 as its detector on the sample.
    Features without a partner count 0 in the last two.
    """
    rows = unit(sae.W_dec.detach().float())
    cos = rows @ toy.directions.T
    feature, latent = match(cos)
    paired = cos[latent, feature]
    f1 = detector_f1(sae, sample, feature, latent, toy.n_features)
    figures = {
        "mcc": float(paired.mean()),
        "recovered": float((paired > RECOVERED).sum()) / toy.n_features,
        "f1": float(f1.sum()) / int(sample.features.unique().numel()),
    }
    return figures | (_hierarchy(sae, toy, cos, get_preset(preset)) if bool((toy.parents >= 0).any()) else {})


def match(cos: Float[Tensor, "d_sae n_features"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return features and latents of the one-to-one matching with the largest summed cosine (Hungarian algorithm)."""
    from scipy.optimize import linear_sum_assignment

    latent, feature = linear_sum_assignment(cos.cpu().numpy(), maximize=True)
    return torch.as_tensor(feature, device=cos.device), torch.as_tensor(latent, device=cos.device)


def detector_f1(
    sae: SAE, sample: Sample, feature: Int[Tensor, " pairs"], latent: Int[Tensor, " pairs"], n_features: int
) -> Float[Tensor, " pairs"]:
    """F1 = 2·TP / (2·TP + FP + FN) of 'the latent fires' for 'the feature is active'; 0 where neither ever happens."""
    latents = encode(sae, sample.x)
    partner = torch.full((latents.d_sae,), -1, device=feature.device)
    partner[latent] = feature
    seen = partner[latents.columns]
    hit = torch.isin(latents.row_of_entry * n_features + seen, sample.rows * n_features + sample.features) & (seen >= 0)
    both = seen[hit].bincount(minlength=n_features)[feature]
    fired = latents.columns.bincount(minlength=latents.d_sae)[latent]
    active = sample.features.bincount(minlength=n_features)[feature]
    return 2 * both / (fired + active).clamp(min=1)


def _hierarchy(sae: SAE, toy: Toy, cos: Float[Tensor, "d_sae n_features"], preset: Preset) -> dict[str, float]:
    """Absorption over words: the toy's events, each shown once without noise.

    A word asks about each parent in it that has a child in it. The parent's latent is the one whose decoder row is
    closest to it. absorption is the share of words on which that one is silent while another latent carries the parent
    by the preset's thresholds, the true direction in the probe's place: a mean over parents. absorption_weighted has
    the words weighted by their frequency. absorption_split takes the latents of `k_sparse_latents` for the parent's
    instead, as the first-letter eval does. parent_precision and parent_recall are those of the parent's own latent,
    over all words.
    """
    words = toy.words
    latents = sae.encode(words.to(sae.W_dec.dtype)).float()
    fires, norms = latents > 0, sae.W_dec.detach().float().norm(dim=1)
    table = []
    for parent in toy.parents[toy.parents >= 0].unique().tolist():
        there, asked = toy.words_of(parent)
        weight, a = toy.event_frequency[asked], words[asked] @ toy.directions[parent]
        own = int(cos[:, parent].argmax())
        mains = [own], k_sparse_latents(fires, there, preset)
        full, split = (score_projections(latents[asked], cos[:, parent], a, m, preset, norms)[1] for m in mains)
        both, fired = (fires[:, own] & there).sum(), fires[:, own].sum()
        rates = [full.double().mean(), (full * weight).sum() / weight.sum(), split.double().mean()]
        table.append(torch.stack([*rates, both / fired.clamp(min=1), both / there.sum()]))
    names = ("absorption", "absorption_weighted", "absorption_split", "parent_precision", "parent_recall")
    return dict(zip(names, torch.stack(table).mean(0).tolist(), strict=True)) | _components(sae, toy, cos)


def k_sparse_latents(
    fires: Bool[Tensor, "n_words d_sae"], there: Bool[Tensor, " n_words"], preset: Preset
) -> list[int]:
    """Return the latents that best tell, any of them firing, on which words a feature is.

    Greedy: the next one is added while it raises F1 by more than f1_jump, up to max_k, as feature splitting is judged.
    """
    chosen: list[int] = []
    covered, best = torch.zeros_like(there), 0.0
    while len(chosen) < preset.max_k:
        either = covered[:, None] | fires
        f1 = 2 * (either & there[:, None]).sum(0) / (either.sum(0) + there.sum())
        value, latent = f1.max(0)
        if chosen and float(value) - best <= preset.f1_jump:
            break
        chosen.append(int(latent))
        covered, best = covered | fires[:, latent], float(value)
    return chosen


def _components(sae: SAE, toy: Toy, cos: Float[Tensor, "d_sae n_features"]) -> dict[str, float]:
    """What a parent's encoder has of its child, and a child's decoder of its parent: means over parent–child edges.

    Both are cosines, after the latent's own feature is taken out of the other one's direction, so that both are 0 for
    the true dictionary. In the encoder, negative is absorption (the child silences the parent's latent) and positive
    hedging; in the decoder, positive is absorption and negative makes up for hedging (Chanin et al. 2024, 2025).
    """
    child = (toy.parents >= 0).nonzero().squeeze(1)
    parent, closest = toy.parents[child], cos.argmax(0)
    p, c = toy.directions[parent], toy.directions[child]
    overlap = (p * c).sum(1, keepdim=True)
    encoders, rows = (unit(w.detach().float()) for w in (sae.W_enc.T[closest[parent]], sae.W_dec[closest[child]]))
    return {
        "encoder_child": float((encoders * unit(c - overlap * p)).sum(1).mean()),
        "decoder_parent": float((rows * unit(p - overlap * c)).sum(1).mean()),
    }
