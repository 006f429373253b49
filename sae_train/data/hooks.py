"""TransformerLens hook names: a Hugging Face configuration comes in, the modules that its hooks belong to go out.

TransformerLens is the authority on hook names and on which module each one belongs to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from sae_train.errors import UserError

KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class HookPoint:
    """Where a hook name lives in the Hugging Face model: a module's path, and its input or output.

    `norm` is the path of the model's norm before the unembedding, if it has one.
    """

    name: str
    module: str
    side: str  # "in" or "out"
    norm: str | None = None


def hook_points(config: Any, name: str) -> dict[str, HookPoint]:
    """Map every supported hook name of a Hugging Face config to its module, as TransformerLens defines it."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = (getattr(config, "architectures", None) or ["unnamed"])[0]
    try:
        bridge_config = build_bridge_config_from_hf(config, architecture, name, torch.float32)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
        block = adapter.component_mapping["blocks"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"TransformerLens has no decoder blocks for {name} (architecture {architecture}); "
            "choose a causal language model that it supports."
        ) from error
    norm = getattr(adapter.component_mapping.get("ln_final"), "name", None)
    places = {kind: _place(block, block.hook_aliases.get(kind)) for kind in KINDS}
    points = {}
    for layer in range(bridge_config.n_layers):
        for kind, place in places.items():
            if place is not None:
                hook = f"blocks.{layer}.{kind}"
                points[hook] = HookPoint(hook, f"{block.name}.{layer}{place[0]}", place[1], norm)
    return points


def _place(block: Any, alias: str | None) -> tuple[str, str] | None:
    """Turn an alias such as "mlp.hook_out" into (".<module in the block>", "out"); None if there is none."""
    match = re.fullmatch(r"(?:(\w+)\.)?hook_(in|out)", alias or "")
    if match is None:
        return None
    part, side = match.groups()
    if part is None:
        return "", side
    component = block.submodules.get(part)
    # Only components whose hook is the plain input or output of one module qualify.
    return (f".{component.name}", side) if component is not None and component.name else None


def default_hook(config: Any, points: dict[str, HookPoint]) -> str:
    """The model's own choice (`sae_hook` in its configuration), else the residual stream after the middle block."""
    layers = 1 + max(int(name.split(".")[1]) for name in points)
    return getattr(config, "sae_hook", None) or f"blocks.{(layers - 1) // 2}.hook_resid_post"


def choose_hook(points: dict[str, HookPoint], hook: str, name: str) -> HookPoint:
    """The hook point of that name; UserError with near ones if there is none."""
    if hook not in points:
        near = get_close_matches(hook, points, n=3, cutoff=0.5) or list(points)[:3]
        last = 1 + max(int(known.split(".")[1]) for known in points)
        raise UserError(
            f"{name} has no hook {hook!r} that can be used here; near ones are {', '.join(near)} "
            f"({last} blocks, counted from 0)."
        )
    return points[hook]
