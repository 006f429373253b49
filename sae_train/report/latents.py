"""Records of single latents as the page's script takes them."""

from __future__ import annotations

from typing import Any

from sae_train.report.data import TrainedSAE

EXAMPLES = 6_000  # contexts in one page, over all SAEs
LEAST = 1


def latent_lists(saes: list[TrainedSAE]) -> list[list[list[Any]]]:
    """All records, one list an SAE; of many SAEs fewer contexts each."""
    n_latents = sum(len(sae.latents) for sae in saes)
    most = max(EXAMPLES // max(n_latents, 1), LEAST)
    return [[_compact(record, most) for record in sae.latents] for sae in saes]


def _compact(record: dict[str, Any], most: int) -> list[Any]:
    """Latent, labels it is a main latent of, words it took over, density, maximum, histogram, contexts (kind, tokens,
    activations), favoured and disfavoured tokens."""
    contexts = [[e["kind"], e["tokens"], e["acts"]] for e in record["examples"][:most]]
    numbers = [f"{record['density']:.4g}", record["max"], record["histogram"]]
    return [record["latent"], record["main_of"], record["absorbs"], *numbers, contexts,
            record.get("top", []), record.get("bottom", [])]  # fmt: skip
