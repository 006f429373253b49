"""The README.md beside a saved SAE: its entry of run.json in, a short model card out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_train.summary import measured_line

CARD = """---
library_name: saelens
tags: [saelens, sparse-autoencoder, mechanistic-interpretability]
---
# {name}

A {arch} sparse autoencoder with {width:,} latents for `{hook_name}` of `{model}`, trained by sae-train on
{tokens:,} tokens of `{dataset}`.

| | |
|---|---|
| L0 on held-out text (asked) | {l0_reached} ({l0:g}) |
| explained variance, held out | {ev} |
| loss recovered | {recovered} |
| dead latents | {dead} |

{absorption}

```python
from sae_train import load_sae

sae = load_sae("path/to/{name}")
latents = sae.encode(x)  # x: activations (n, {d_in}) of {hook_name}, raw
```

SAELens loads the same folder: `SAE.load_from_disk("path/to/{name}")`.
"""


def write_card(folder: Path, sae: dict[str, Any], info: dict[str, Any]) -> None:
    """Write README.md into an SAE's folder (under a temporary name, then renamed)."""
    final = sae["final"]

    def shown(name: str, form: str) -> str:
        return "not measured" if final.get(name) is None else format(final[name], form)

    text = CARD.format(
        name=sae["name"],
        arch=sae["arch"],
        width=sae["width"],
        l0=sae["l0"],
        l0_reached=shown("metrics/l0", ".2f"),
        ev=shown("metrics/explained_variance", ".4f"),
        recovered=shown("metrics/ce_loss_score", ".4f"),
        dead=shown("sparsity/dead_fraction", ".1%"),
        absorption=measured_line(final, sae["baseline"].get("random")),
        model=info["model"],
        hook_name=info["hook_name"],
        tokens=info["tokens"],
        dataset=info["dataset"],
        d_in=info["d_in"],
    )
    temporary = folder / "README.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "README.md")
