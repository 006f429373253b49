"""Tables of an evaluation: one row per word (a true positive) and one row per label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals.figures import auroc, f1_precision_recall
from sae_train.evals.intervals import bootstrap
from sae_train.evals.outcomes import OUTCOMES

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sae_train.evals.absorption import Scored
    from sae_train.evals.assets import Assets
    from sae_train.evals.k_sparse import KSparse
    from sae_train.evals.latents import Latents
    from sae_train.evals.presets import Preset
    from sae_train.protocols import SAE

WORD_COLUMNS = (
    "letter", "word", "token_id", "fraction", "full", "fraction_family", "full_family", "outcome", "main_act", "a",
    "main_latents", "absorbers", "absorber_cos", "absorber_proj",
)  # fmt: skip
CAUSAL_COLUMNS = ("candidate", "effect_latent", "effect", "second_effect", "effect_cos")
TOP = ("top_latent", "top_f1", "top_precision", "top_recall", "top_auroc")
INTERVALS = ("fraction", "full")


def outcomes(scored: Scored, preset: Preset) -> Tensor:
    """Number of each true positive's outcome."""
    s = scored.scores
    silent = (torch.where(scored.is_main, scored.acts, 0) < preset.silent_below).all(1)
    lost = torch.where(s.full, 1, torch.where(s.absorber_proj[:, 0] > 0, 2, 3))
    return torch.where(silent, lost, 0)


def word_table(assets: Assets, scored: Scored, chosen: KSparse, preset: Preset) -> pd.DataFrame:
    """One row per true positive; absorbers by falling projection."""
    import pandas as pd

    s, entry = scored.scores, scored.scores.absorber_entry
    n_real = (s.absorber_proj > 0).sum(1).tolist()
    parts = (scored.columns.gather(1, entry), scored.cos.gather(1, entry), s.absorber_proj)
    absorbers = [[row[:n] for row, n in zip(part.tolist(), n_real, strict=True)] for part in parts]
    labels, rows = assets.tp_labels.tolist(), assets.tp_rows.tolist()
    main = [chosen.main_latents(c) for c in range(len(assets.label_names))]
    columns = [
        [assets.label_names[c] for c in labels], [assets.words[r] for r in rows],
        assets.token_ids[assets.tp_rows].tolist(), s.fraction.tolist(), s.full.tolist(),
        scored.family.fraction.tolist(), scored.family.full.tolist(),
        [OUTCOMES[o] for o in outcomes(scored, preset).tolist()], s.main_act.tolist(), scored.a.tolist(),
        [main[c] for c in labels], *absorbers,
    ]  # fmt: skip
    table = pd.DataFrame(dict(zip(WORD_COLUMNS, columns, strict=True)))
    if scored.causal is None:
        return table
    rate = scored.causal
    causal = (rate.candidate, rate.latent, rate.effect, rate.second, rate.cos)
    table["full"] = rate.weight.tolist()
    return table.assign(**{name: c.tolist() for name, c in zip(CAUSAL_COLUMNS, causal, strict=True)})


def letter_table(assets: Assets, scored: Scored, chosen: KSparse, preset: Preset) -> pd.DataFrame:
    """One row per label, with 95 % bootstrap intervals over its words."""
    import pandas as pd

    s, labels, names = scored.scores, assets.tp_labels, assets.label_names
    n_labels = len(names)
    full = s.full.double() if scored.causal is None else scored.causal.weight.double()
    values = {"fraction": s.fraction, "full": full, "fraction_family": scored.family.fraction,
              "full_family": scored.family.full, "recall_main": s.main_act > 0}  # fmt: skip
    outcome = outcomes(scored, preset)
    values |= {f"lost_{name}": outcome == i for i, name in enumerate(OUTCOMES) if i}
    stacked = torch.stack([v.double() for v in values.values()], 1)
    n_tp = labels.bincount(minlength=n_labels)
    means = torch.zeros(n_labels, len(values), dtype=torch.float64, device=stacked.device)
    means = means.index_add_(0, labels, stacked) / n_tp[:, None]  # 0/0 = NaN where there is no true positive
    n_main = chosen.n_main
    columns: dict[str, Any] = {
        "letter": names, "counts": (assets.letters_that_count & (n_tp > 0)).tolist(), "n_tp": n_tp.tolist(),
        **dict(zip(values, means.T.tolist(), strict=True)),
        "n_full": (means[:, 1] * n_tp).nan_to_num().round().long().tolist(), "n_split": n_main.tolist(),
        "main_latents": [chosen.main_latents(c) for c in range(n_labels)],
    }  # fmt: skip
    draws = bootstrap(stacked[:, : len(INTERVALS)].cpu(), labels.cpu(), n_labels, preset.n_bootstrap, seed=0)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)
    for i, name in enumerate(INTERVALS):
        columns |= {f"{name}_low": low[:, i].tolist(), f"{name}_high": high[:, i].tolist()}
    figures = assets.probe_figures.T.tolist()
    columns |= dict(zip(("probe_f1", "probe_precision", "probe_recall", "probe_auroc"), figures, strict=True))
    columns |= {"f1_k1": chosen.f1[:, 0].tolist()}
    columns |= {"f1_split": chosen.f1.gather(1, (n_main - 1).clamp(min=0)[:, None]).squeeze(1).tolist()}
    table = pd.DataFrame(columns)
    if scored.causal is not None and preset.letters_without_candidates == "drop":
        table["counts"] &= scored.causal.n_candidates.cpu().numpy() > 0
    return table


def top_latents(sae: SAE, assets: Assets, test: Latents, directions: Tensor) -> dict[str, Any]:
    """Per label the latent whose encoder column points most along the probe, as a classifier of test words."""
    # In one product: normalising the columns first would copy the whole encoder.
    W_enc = sae.W_enc.detach().float()
    cos = (directions @ W_enc) / W_enc.norm(dim=0)
    top = cos.nan_to_num(-1).argmax(1)
    truth = assets.labels[assets.is_test][:, None] == torch.arange(len(top), device=top.device)
    acts = test.take(top)
    figures = [*f1_precision_recall(acts > 0, truth), auroc(acts, truth)]
    return dict(zip(TOP, [top.tolist(), *(f.tolist() for f in figures)], strict=True))


def main_precision(assets: Assets, test: Latents, chosen: KSparse) -> list[float]:
    """Per label, the share with the label of the test words on which a main latent fires; NaN without such words."""
    main = [chosen.main_latents(c) for c in range(len(chosen.ranking))]
    columns = torch.tensor([latent for latents in main for latent in latents], device=test.columns.device).long()
    fired = [part.any(1) for part in (test.take(columns) > 0).split([len(latents) for latents in main], dim=1)]
    labels = assets.labels[assets.is_test]
    return [float((labels[fires] == c).double().mean()) for c, fires in enumerate(fired)]
