"""How a run was asked for, and the command that makes it again from the settings that run.json keeps."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from os import PathLike
from typing import Any

from sae_train.config import LMSettings, flat, groups, leaves, resolve
from sae_train.config.units import plain, width_label

CACHES = ("activation_cache", "eval_cache")


def command(settings: dict[str, Any], stages: Sequence[int] = ()) -> str:
    """Name every setting that differs from the model's defaults; where things are kept and shown is left out.

    Where a finished run went on after `stages`, in tokens, each part has a line.
    """
    ends = [*stages, settings["tokens"]]
    settings = settings | {"tokens": ends[0]}
    usual = flat(resolve({"model": settings["model"]})) | {"model": LMSettings().model}
    group_of, models = leaves(), groups()
    words, before = ["sae-train"], ""
    for name, value in settings.items():
        if name not in usual or group_of[name] == "run" or name in CACHES:
            continue
        if value == usual[name] and name not in ("width", "l0"):
            continue
        flag = f"--{name.replace('_', '-')}"
        if models[group_of[name]].model_fields[name].annotation is bool:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "drop" and len(value) > 1:  # a token may hold a comma, so several come by a file alone
            before = f"printf '%s\\n' {shlex.quote(json.dumps({name: list(value)}))} > drop.yaml\n"
            words += ["--config", "drop.yaml"]
        elif value is not None:
            words += [flag, _write_flag_value(name, value)]
    return "\n".join([before + shlex.join(words), *(f"sae-train resume RUN --tokens {end}" for end in ends[1:])])


def _write_flag_value(name: str, value: Any) -> str:
    parts = value if isinstance(value, list | tuple) else [value]
    if name == "width":
        return ",".join(map(width_label, parts))
    return ",".join(
        f"{part:g}" if isinstance(part, float) and float(f"{part:g}") == part else str(part) for part in parts
    )


def shell_call(given: dict[str, Any], config: str | None) -> str:
    """Write the command line that gave these flags."""
    words = ["sae-train", *(["--config", config] if config else [])]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def python_call(settings: dict[str, Any], activations: Any = None, callbacks: Sequence[Any] = ()) -> str:
    """Write the call of `sae_train.train` that had these arguments."""
    words = [f"{name}={_write_value(value)}" for name, value in settings.items()]
    if activations is not None:
        words.append(f"activations={_write_activations(activations)}")
    if callbacks:
        words.append(f"callbacks=[{', '.join(getattr(each, '__name__', type(each).__name__) for each in callbacks)}]")
    return f"sae_train.train({', '.join(words)})"


def _write_value(value: Any) -> str:
    """A setting as it can be typed again; what no setting takes stays as it is, to be refused with the others."""
    try:
        return repr(plain(value))
    except ValueError:
        return repr(value)


def _write_activations(activations: Any) -> str:
    if isinstance(activations, str | PathLike):
        return repr(str(activations))
    shape = getattr(activations, "shape", None)
    return f"<{type(activations).__name__}{'' if shape is None else f' {tuple(shape)}'}>"
