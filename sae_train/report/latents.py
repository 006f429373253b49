"""Pages of single latents: records of SAEs come in, JSON for the page's script and an empty section go out.

The script shows one label at a time: its main latents, then those that took words over from them.
"""

from __future__ import annotations

import json
from typing import Any

from sae_train.report.data import TrainedSAE
from sae_train.report.shell import section
from sae_train.report.text import escape, nouns

EXAMPLES = 6_000  # contexts in one page, over all SAEs
LEAST = 1


def latent_lists(saes: list[TrainedSAE]) -> str:
    """All records as a JSON text safe inside <script>, one list an SAE; of many SAEs fewer contexts each."""
    n_latents = sum(len(sae.latents) for sae in saes)
    most = max(EXAMPLES // max(n_latents, 1), LEAST)
    lists = [[_compact(record, most) for record in sae.latents] for sae in saes]
    text = json.dumps(lists, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def latent_section(saes: list[TrainedSAE]) -> str:
    """The section that the script fills; empty without records."""
    if not any(sae.latents for sae in saes):
        return ""
    noun = escape(saes[0].noun)
    lead = (
        f"The main latents of a {noun}, and the latents that took words over from them. Each with the held-out "
        "contexts on which it fires most (then some nearer its everyday strength), shaded by its activation, and the "
        "next tokens that it favours and disfavours directly (decoder row, last norm, unembedding)."
    )
    controls = (
        f'<p class="controls needs-script"><label>{noun.capitalize()} <select id="latent-label"></select></label> '
        '<label>or a latent <input id="latent-number" type="search" inputmode="numeric" placeholder="number"></label> '
        '<span id="latent-note"></span></p><div id="cards"></div>'
    )
    body = controls + "<noscript><p>This section needs JavaScript.</p></noscript>"
    return section(f'Latents of the {escape(nouns(saes[0].noun))} <span id="latents-of"></span>', body, lead=lead)


def _compact(record: dict[str, Any], most: int) -> list[Any]:
    """Latent, labels it is a main latent of, words it took over, density, maximum, histogram, contexts (kind, tokens,
    activations), favoured and disfavoured tokens."""
    contexts = [[e["kind"], e["tokens"], e["acts"]] for e in record["examples"][:most]]
    numbers = [f"{record['density']:.4g}", record["max"], record["histogram"]]
    return [record["latent"], record["main_of"], record["absorbs"], *numbers, contexts,
            record.get("top", []), record.get("bottom", [])]  # fmt: skip
