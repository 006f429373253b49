"""The folder of a run: its name, which a new run takes before it does anything long, and what it says from then on."""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sae_train.config import CONFIGS, PRESETS, Settings, flat, l0_label, read_yaml, resolve, width_label
from sae_train.errors import UserError, explaining
from sae_train.files import read_json, remove_temporaries, write_json

if TYPE_CHECKING:
    from sae_train.config import SAESpec
    from sae_train.data.given import Given

# What a run does that began before these settings were there: it kept outliers, and each word had its own context.
BEFORE_GIVEN = {"outlier_norm": "none"}
BEFORE = BEFORE_GIVEN | {"eval_contexts": "each"}
LONGEST_NAME = 120  # of a derived one; file systems take 255 bytes
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# Settings that may name something on this disk.
PATHS = ("model", "dataset", "hierarchy", "activation_cache", "eval_cache", "init_from")


def trusting(folder: Path, info: dict[str, Any], trust_remote_code: bool, command: str) -> dict[str, Any]:
    """Return run.json with the user's own word on code from the hub; UserError where the run ran some and it is no."""
    if info["settings"].get("trust_remote_code") and not trust_remote_code:
        raise UserError(
            f"the run {str(folder)!r} was begun with --trust-remote-code, which runs code from the hub: if you trust "
            f"it, say so again by {command} --trust-remote-code"
        )
    return info | {"settings": info["settings"] | {"trust_remote_code": trust_remote_code}}


def default_name(settings: Settings) -> str:
    """Name a run by model, hook where one was asked for, architectures, widths and targets."""
    sae, model = settings.sae, settings.lm.model
    preset = read_yaml(CONFIGS / f"{model}.yaml") if model in PRESETS else {}
    hook = f"-{settings.lm.hook}" if settings.lm.hook not in (None, preset.get("hook")) else ""
    hook = f"-{len(settings.lm.hooks)}_hooks" if settings.lm.hooks else hook
    stem = re.sub(r"[^\w.+-]+", "_", f"{Path(model).name}{hook}")
    widths = "+".join(width_label(width) for width in sae.width)
    targets = "+".join(map(l0_label, sae.l0))
    seeds = f"-seed_{'+'.join(map(str, sae.seed))}" if sae.seed != (0,) else ""
    name = f"{stem}-{'+'.join(sae.arch)}-{widths}-l0_{targets}{seeds}"
    return name if len(name.encode()) <= LONGEST_NAME else f"{stem[:60]}-{len(settings.specs)}_saes"


def check_free(settings: Settings) -> None:
    """UserError if the name that was asked for is taken."""
    folder = Path(settings.run.out, settings.run.name or "")
    if settings.run.name and folder.exists():
        raise UserError(
            f"the run folder {str(folder)!r} exists: choose another --name, or go on with it by "
            f"sae-train resume {folder}"
        )


def reserve(settings: Settings, about: dict[str, Any]) -> Path:
    """Make the folder of a new run with its first run.json: from then on it can be resumed.

    Of runs that begin together each gets a folder of its own: where a derived name is taken it gets a number.
    """
    out, name = Path(settings.run.out), settings.run.name or default_name(settings)
    names = [name] if settings.run.name else itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    first = {"status": "running", "settings": flat(settings), "dataset": settings.dataset, **about}
    first["saes"] = describe_saes(settings.specs)
    with explaining(lambda error: f"no run folder can be made in {str(out)!r}: {error.strerror}", OSError):
        out.mkdir(parents=True, exist_ok=True)
        for folder in (out / name for name in names):
            if _claim(folder, first):
                return folder
    check_free(settings)
    raise UserError(f"the run folder {str(folder)!r} was taken by another run just now: choose another --name")


def _claim(folder: Path, first: dict[str, Any]) -> bool:
    """Give a folder that holds run.json its name, unless something has it."""
    if folder.exists():
        return False
    temporary = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        write_json(temporary / "run.json", first)
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


@contextmanager
def removed_on_failure(folder: Path, was_there: bool) -> Iterator[None]:
    """Leave no folder behind where what happens inside fails, nor the one around it unless it `was_there`."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not was_there:
            with suppress(OSError):
                folder.parent.rmdir()
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other process of this machine work on a run meanwhile; UserError where one does.

    What a killed process had half written is removed. The lock is the system's, on the folder itself: it ends with the
    process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work on the run {str(folder)!r}: let it end first") from None
        except OSError:  # a file system without locks
            pass
        else:
            remove_temporaries(folder)
        yield
    finally:
        os.close(handle)


def describe_saes(
    specs: Sequence[SAESpec], failed: Mapping[str, str | None] = MappingProxyType({}),
    finals: Mapping[str, Any] = MappingProxyType({}), written: Mapping[str, Any] = MappingProxyType({}),
) -> list[dict[str, Any]]:  # fmt: skip
    """The SAEs' entries of run.json; `written` holds the baselines of those that are, by name."""
    return [
        {
            "name": spec.name,
            **spec.model_dump(exclude={"hook"}),
            **({"hook_name": spec.hook} if spec.hook else {}),
            "failed": failed.get(spec.name),
            "final": finals.get(spec.name, {}),
            "written": spec.name in written,
            "baseline": written.get(spec.name, {}),
        }
        for spec in specs
    ]


def _settings_from(info: dict[str, Any]) -> dict[str, Any]:
    """The settings of run.json; a relative path is looked up from where the run was begun."""
    settings, begun = dict(info["settings"]), Path(info.get("working_folder") or ".")
    if begun.absolute() != Path.cwd():
        there = {key: begun / str(settings[key]) for key in PATHS if settings.get(key)}
        settings |= {key: str(path) for key, path in there.items() if path.exists()}
    return settings


def is_finished(folder: Path, info: Mapping[str, Any]) -> bool:
    """Whether the run, whose run.json is `info`, has all that it leaves: the report is written last."""
    return info.get("status") == "finished" and (folder / "report.html").exists()


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that left an SAE, where the SAE still is in it."""
    run = checkpoint.absolute() / "../.."
    return run if (run / "run.json").is_file() else None


def find_model(name: str, checkpoint: Path) -> str:
    """The model that an SAE was trained on; a relative path is looked up from where the SAE's run was begun."""
    run = run_of(checkpoint)
    if not name or Path(name).exists() or run is None:
        return name
    there = Path(read_json(run / "run.json").get("working_folder") or ".", name)
    return str(there) if there.exists() else name


def restore_settings(folder: Path, info: dict[str, Any], activations: Any) -> tuple[Settings, Given | None]:
    """The settings of an interrupted run, and its activations where they are a user's own."""
    from sae_train.data.given import given_settings

    if not info.get("activations"):
        if activations is not None:
            raise UserError(f"the run {str(folder)!r} makes its activations itself: leave activations out")
        # What "auto" meant there counts here.
        dtype = {"dtype": info["dtype"]} if info.get("dtype") else {}
        return resolve(BEFORE | _settings_from(info) | dtype), None
    if activations is None:
        activations = info["activations"].get("file")
    if activations is None:
        raise UserError(
            f"the run {str(folder)!r} was trained on activations given in Python: go on with it there, by "
            f"sae_train.resume({str(folder)!r}, activations=…)"
        )
    settings, given = given_settings(activations, BEFORE_GIVEN | _settings_from(info))
    if {**given.record, "file": None} != {**info["activations"], "file": None}:
        raise UserError(f"the activations are not those that the run {str(folder)!r} began with: give the same ones")
    return settings, given
