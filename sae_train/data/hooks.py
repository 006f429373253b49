"""TransformerLens' hook names, and the modules of a Hugging Face model that they belong to.

TransformerLens is the authority. It is imported for all names but those of the residual stream before and after a
block: where a model has one list of equal blocks, these are what enters a block and what leaves it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sae_train.errors import UserError

KINDS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "attn.hook_z", "mlp.hook_pre", "mlp.hook_post",
)  # fmt: skip
RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass(frozen=True)
class HookPoint:
    """Where a hook name lives in the Hugging Face model: a module's path, and its input or output.

    `norm` is the path of the model's norm before the unembedding, if it has one.
    """

    name: str
    module: str
    side: str  # "in" or "out"
    norm: str | None = None


def resolve_hook(model: nn.Module, hook: str | None, name: str) -> HookPoint:
    """Return the hook point of that name; the weights may be on "meta". UserError with near names if there is none.

    By default the model's own choice (`sae_hook` in its configuration), else what leaves the middle block.
    """
    hook = hook or getattr(model.config, "sae_hook", None)
    blocks = find_blocks(model)
    points = None if blocks else hook_points(model, name)
    if hook is None:
        n_layers = len(model.get_submodule(blocks)) if blocks else _n_blocks(points)
        hook = f"blocks.{(n_layers - 1) // 2}.hook_resid_post"
    point = residual_point(model, blocks, hook) if blocks else None
    return point or choose_hook(hook_points(model, name) if points is None else points, hook, name)


def match_hooks(model: nn.Module, asked: Sequence[str | None], name: str) -> list[HookPoint]:
    """Return the points that names and patterns (blocks.*.hook_resid_post) ask for, in their order, each once.

    None is the default hook; the weights may be on "meta". UserError for a name that the model has not, and for a
    pattern that none of its hooks fits.
    """
    found: dict[str, HookPoint] = {}
    for pattern in asked:
        names = [pattern]
        if pattern is not None and "*" in pattern:
            names = [hook for hook in _all_hooks(model, pattern, name) if fnmatchcase(hook, pattern)]
        if not names:
            raise UserError(
                f"no hook of {name} fits the pattern {pattern!r}: take one such as blocks.*.hook_resid_post, with one "
                f"of {', '.join(KINDS)}"
            )
        found |= {point.name: point for point in (resolve_hook(model, hook, name) for hook in names)}
    return list(found.values())


def _all_hooks(model: nn.Module, pattern: str, name: str) -> list[str]:
    """Return the names in a model; those of the residual stream alone where the pattern asks for no others."""
    blocks = find_blocks(model)
    n_blocks = len(model.get_submodule(blocks)) if blocks else 0
    residual = [f"blocks.{i}.hook_resid_{side}" for i in range(n_blocks) for side in ("pre", "post")]
    if blocks and re.search(r"\.hook_resid_(pre|post)$", pattern):
        return residual
    return list(hook_points(model, name))


def find_blocks(model: nn.Module) -> str | None:
    """Return the path of the decoder's blocks, or None where the model's structure does not tell them plainly.

    They are the one list of as many modules as there are layers, all of one class. An encoder beside the decoder, a
    second such list (a vision tower) or a residual stream of several (AltUp) is left to TransformerLens.
    """
    text = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False) or getattr(text, "altup_num_inputs", None):
        return None
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    fitting = [path for path in outer if len(lists[path]) == getattr(text, "num_hidden_layers", None)]
    alike = [path for path in fitting if len({type(block) for block in lists[path]}) == 1]
    return alike[0] if len(alike) == len(fitting) == 1 else None


def residual_point(model: nn.Module, blocks: str, hook: str) -> HookPoint | None:
    """Return the point of the residual stream before or after one of these blocks; None for any other name."""
    match = RESIDUAL.fullmatch(hook)
    if match is None or int(match[1]) >= len(model.get_submodule(blocks)):
        return None
    parent = blocks.rpartition(".")[0]
    siblings = model.get_submodule(parent).named_children()
    norms = [child for child, module in siblings if "Norm" in type(module).__name__]
    norm = ".".join(filter(None, (parent, norms[-1]))) if norms else None
    return HookPoint(hook, f"{blocks}.{match[1]}", "in" if match[2] == "pre" else "out", norm)


def width_at(model: nn.Module, point: HookPoint) -> int:
    """Number of values a token has at a hook: that of the linear map hooked there, else the residual stream's."""
    module = model.get_submodule(point.module)
    names = ("in_features", "nx") if point.side == "in" else ("out_features", "nf")  # of a Linear, of GPT-2's Conv1D
    own = (getattr(module, name) for name in names if hasattr(module, name))
    return next(own, model.config.get_text_config().hidden_size)


def hook_points(model: nn.Module, name: str) -> dict[str, HookPoint]:
    """Map every hook name of `KINDS` to its module, as TransformerLens does, where the model has that module."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    try:
        bridge_config = build_bridge_config_from_hf(model.config, architecture, name, torch.float32)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
        block = adapter.component_mapping["blocks"]
    except Exception as error:  # what it raises for a configuration that it does not know shares no base
        raise UserError(_no_blocks(name, architecture)) from error
    # Its map is that of a family; a model may lack some of the modules (OPT's last norm, for one).
    modules = {path for path, _ in model.named_modules()}
    norm = getattr(adapter.component_mapping.get("ln_final"), "name", None)
    norm = norm if norm in modules else None
    places = {kind: place for kind in KINDS if (place := _place(block, kind))}
    points = [
        HookPoint(f"blocks.{layer}.{kind}", f"{block.name}.{layer}{path}", side, norm)
        for layer in range(bridge_config.n_layers)
        for kind, (path, side) in places.items()
    ]
    found = {point.name: point for point in points if point.module in modules}
    if not found:
        raise UserError(_no_blocks(name, architecture))
    return found


def _no_blocks(name: str, architecture: str) -> str:
    return (
        f"TransformerLens has no decoder blocks for {name} (architecture {architecture}); "
        "choose a causal language model that it supports."
    )


def _place(block: Any, kind: str) -> tuple[str, str] | None:
    """Where a block has a kind of hook: (".<module in the block>", "in" or "out"); None if it is no module's own."""
    part, _, hook = kind.rpartition(".")
    component = block.submodules.get(part) if part else block
    alias = component and component.hook_aliases.get(hook)
    match = re.fullmatch(r"((?:\w+\.)*)hook_(in|out)", alias) if isinstance(alias, str) else None
    if match is None:
        return None
    inner, side = match[1].split(".")[:-1], match[2]
    if part and not inner:
        return None  # a mixture of experts: its hook_pre and hook_post are the whole MLP's input and output
    path = [component.name] if part and component.name else []
    for step in inner:
        component = component.submodules.get(step)
        if component is None:
            return None
        path += [component.name] if component.name else []
    if inner and not component.name:
        return None  # a part that TransformerLens made up, such as OPT's MLP
    return "".join(f".{step}" for step in path), side


def _n_blocks(points: dict[str, HookPoint]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in points), default=0)


def choose_hook(points: dict[str, HookPoint], hook: str, name: str) -> HookPoint:
    """The hook point of that name; UserError with near ones if there is none."""
    if hook not in points:
        near = get_close_matches(hook, points, n=3, cutoff=0.5) or list(points)[:3]
        raise UserError(
            f"{name} has no hook {hook!r} that can be used here; near ones are {', '.join(near)} "
            f"({_n_blocks(points)} blocks, counted from 0)."
        )
    return points[hook]
