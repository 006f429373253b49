"""A run's curves as one picture: rows of metrics.jsonl come in, a PNG goes out, for model cards and W&B."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sae_train.files import whole

PANELS = (
    ("metrics/explained_variance", "explained variance, held out"),
    ("metrics/l0", "L0, held out"),
    ("metrics/ce_loss_score", "loss recovered"),
    ("sparsity/dead_fraction", "dead latents, share"),
    ("absorption/mean_fraction", "absorption, fraction (95 % interval)"),
    ("absorption/mean_full", "full absorption (95 % interval)"),
    ("toy/mcc", "MCC against the truth"),
    ("toy/absorption", "absorption against the truth"),
)
MOST_NAMED = 14  # more curves than that cannot be told apart by a legend
LOOK = "metrics/explained_variance"  # rows that have it were looked at on held-out text


def curves(rows: list[dict[str, Any]]) -> bytes:
    """Draw the figures that the rows have, a line per SAE over training tokens; return the PNG."""
    from matplotlib.figure import Figure

    looks = [row for row in rows if row.get(LOOK) is not None]
    shown = [(key, title) for key, title in PANELS if any(row.get(key) is not None for row in looks)]
    names = list(dict.fromkeys(row["sae"] for row in looks))
    n_rows = max(1, -(-len(shown) // 2))
    figure = Figure(figsize=(10, 2.7 * n_rows + 0.6), layout="constrained")
    for place, (key, title) in enumerate(shown):
        axes = figure.add_subplot(n_rows, 2, place + 1)
        _panel(axes, key, title, looks, names)
    if 1 <= len(names) <= MOST_NAMED:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def write_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the picture whole."""
    with whole(path) as temporary:
        temporary.write_bytes(curves(rows))


def _panel(axes: Any, key: str, title: str, looks: list[dict[str, Any]], names: list[str]) -> None:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(names) <= 10 else "viridis"]
    for i, name in enumerate(names):
        own = [row for row in looks if row["sae"] == name and row.get(key) is not None]
        colour = palette(i) if len(names) <= 10 else palette(i / (len(names) - 1))
        tokens = [row["tokens"] for row in own]
        axes.plot(tokens, [row[key] for row in own], color=colour, label=name, linewidth=1.4, marker=".", markersize=4)
        ends = [(row.get(f"{key}_low"), row.get(f"{key}_high")) for row in own]
        if own and all(low is not None and high is not None for low, high in ends):
            axes.fill_between(tokens, *zip(*ends, strict=True), color=colour, alpha=0.12, linewidth=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
