"""What absorption does to the model: how its answer's margin on an absorbed word changes when the absorber is taken
out, or the silent parent is put in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_train.evals import causal
from sae_train.evals.causal_rate import prompts_of
from sae_train.evals.latents import encode
from sae_train.evals.scoring import unit

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.evals.result import AbsorptionResult
    from sae_train.protocols import SAE, LanguageModel

COLUMNS = ("letter", "word", "absorber", "clean", "absorber_change", "random_change", "parent_change", "swap_change")


@torch.no_grad()
def interventions(
    sae: SAE, lm: LanguageModel, assets: Assets, result: AbsorptionResult, most: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Intervene on at most `most` fully absorbed words, drawn at random; margins and changes are in logits.

    The absorber is the latent with the largest projection on the probe. random_change takes another firing latent's
    direction out, at the absorber's size (NaN for a word where none fires). parent_change puts the label's first main
    latent in, at its median activation where it fires (NaN where it never does); swap_change does both. The SAE's
    error stays as it is. Empty for a prompt that asks for no answer.
    """
    import pandas as pd

    assets = assets.to(sae.W_dec.device)
    rows = _absorbed_rows(assets, result, most, seed)
    if not len(rows) or not len(assets.answer_ids):
        return pd.DataFrame(columns=list(COLUMNS))
    W_dec, labels = sae.W_dec.detach().float(), assets.tp_labels[rows]
    acts, columns = encode(sae, assets.tp_x[rows].to(sae.W_dec.dtype)).padded()
    cos = (unit(W_dec)[columns] * unit(assets.probe_weight.T)[labels][:, None]).sum(-1)
    entry = (acts * cos * W_dec.norm(dim=1)[columns]).argmax(1, keepdim=True)
    absorber = columns.gather(1, entry)
    removed = acts.gather(1, entry) * W_dec[absorber.squeeze(1)]
    main = [torch.tensor(m, device=columns.device) for m in result.by_letter["main_latents"]]
    exclude = columns == absorber
    for row, label in enumerate(labels.tolist()):
        exclude[row] |= torch.isin(columns[row], main[label])
    control = causal.matched_controls(acts, columns, W_dec, exclude, removed, torch.Generator().manual_seed(seed))
    inserted = _parents(sae, assets, main)[labels]
    margins = causal.intervene(lm, prompts_of(assets).subset(rows), removed, control, inserted.nan_to_num())
    no_parent, no_control = inserted.isnan().any(1), control.norm(dim=1) == 0
    changes = (
        margins.clean, margins.absorber, margins.random.masked_fill(no_control, float("nan")),
        margins.parent.masked_fill(no_parent, float("nan")), margins.swap.masked_fill(no_parent, float("nan")),
    )  # fmt: skip
    names = [assets.label_names[c] for c in labels.tolist()]
    words = [assets.words[r] for r in assets.tp_rows[rows].tolist()]
    values = [names, words, absorber.squeeze(1).tolist(), *(c.tolist() for c in changes)]
    return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))


def _absorbed_rows(assets: Assets, result: AbsorptionResult, most: int, seed: int) -> Tensor:
    """Rows of the true positives that count as fully absorbed."""
    flags = torch.tensor(result.words["full"].to_numpy(dtype=float) > 0, device=assets.tp_rows.device)
    rows = flags.nonzero().squeeze(1)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most].sort().values
    return rows[drawn.to(rows.device)]


def _parents(sae: SAE, assets: Assets, main: list[Tensor]) -> Float[Tensor, "n_labels d_in"]:
    """Per label its first main latent's vector at the median of its activations on the label's true positives."""
    table = encode(sae, assets.tp_x.to(sae.W_dec.dtype))
    first = torch.stack([m[0] for m in main])
    acts = table.take(first)
    own = assets.tp_labels[:, None] == torch.arange(len(main), device=acts.device)
    typical = acts.masked_fill(~own | (acts <= 0), float("nan")).nanmedian(0).values
    return typical[:, None] * sae.W_dec.detach().float()[first]
