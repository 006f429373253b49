"""The folder of a study: which of its parts are there and with which settings, and which runs lie beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import flat, leaves
from sae_train.config.record import ResumedRun, read_run
from sae_train.errors import UserError
from sae_train.runs.folder import PATHS, is_finished

if TYPE_CHECKING:
    from sae_train.config import Settings

PLACES = ("device", "activation_cache", "eval_cache")
FREE = (*PLACES, "trust_remote_code")  # where and how, not what


def folder_of(part: Settings) -> Path:
    return Path(part.run.out, part.run.name or "")


def status_of(part: Settings) -> str | None:
    """Finished, failed or begun; None where nothing of the part is there."""
    folder = folder_of(part)
    if not folder.exists():
        return None
    info = read_run(folder, ResumedRun)
    return info["status"] if info.get("status") == "failed" or is_finished(folder, info) else "begun"


def has_ended(part: Settings) -> bool:
    return status_of(part) in ("finished", "failed")


def check_same(part: Settings) -> None:
    """UserError where a part's folder holds a run with other settings."""
    folder = folder_of(part)
    if folder.exists() and (other := _differing(part, read_run(folder, ResumedRun))):
        raise UserError(
            f"{str(folder)!r} was made with other settings ({', '.join(other)}): give the study another --out, or "
            "remove that folder"
        )


def _differing(part: Settings, begun: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """The settings of a part that a run was not made with, beside those that are free and those of groups in `but`."""
    group_of, base = leaves(), Path(begun.get("working_folder") or ".")
    free = {*FREE, *(name for name in group_of if group_of[name] in ("run", *but))}
    if part.lm.dtype == "auto":
        free.add("dtype")

    def is_same(name: str, value: Any) -> bool:
        then = begun["settings"].get(name)
        paths = name in PATHS and isinstance(then, str) and isinstance(value, str)
        return then == value or (paths and Path(base, then).resolve() == Path(value).resolve())

    return [name for name, value in flat(part).items() if name not in free and not is_same(name, value)]


def beside(parts: Sequence[Settings], but_begun: bool = True) -> list[Path]:
    """Runs in the study's folder that are no part of the design, as another design of it left them.

    They have the settings that all parts share. With `but_begun` the finished ones alone.
    """
    names, found = {part.run.name for part in parts}, []
    for record in sorted(Path(parts[0].run.out).glob("*/run.json")):
        folder = record.parent
        with suppress(UserError):
            info = read_run(folder, ResumedRun)
            is_asked = is_finished(folder, info) or not but_begun
            if is_asked and folder.name not in names and not _differing(parts[0], info, but=("sae",)):
                found.append(folder)
    return found


def check_nothing_again(parts: Sequence[Settings]) -> None:
    """UserError where a part would train SAEs that a run beside it has, finished or begun."""
    there = {
        tuple(sae.get(name) for name in ("arch", "width", "l0", "seed")): folder.name
        for folder in beside(parts, but_begun=False)
        for sae in read_run(folder, ResumedRun).get("saes") or []
        if not sae.get("failed")
    }
    for part in parts:
        again = [(spec.name, there.get((spec.arch, spec.width, spec.l0, spec.seed))) for spec in part.specs]
        again = [(name, folder) for name, folder in again if folder]
        if again and not folder_of(part).exists():
            saes, folders = (", ".join(dict.fromkeys(names)) for names in zip(*again, strict=True))
            raise UserError(
                f"the part {part.run.name} would train again {saes}, which {part.run.out!r} has ({folders}): leave the "
                "grid of what is there as it was, and give what is new one of its own; or give the study another --out"
            )
