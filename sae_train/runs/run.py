"""The two things to do with runs: train one, go on with one.

A `Run` is what Python users hold of one: the folder with its metrics, absorption tables, SAEs and report.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import Settings, resolve, width_label
from sae_train.config.record import ResumedRun, read_run
from sae_train.errors import UserError, first_line
from sae_train.files import read_json, read_metrics
from sae_train.publishing.reproduce import python_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from sae_train.data.given import Given
    from sae_train.evals.assets import Assets
    from sae_train.protocols import Callback
    from sae_train.runs.display import Display
    from sae_train.runs.session import Session
    from sae_train.sae.model import SAE


# What a run does that began before these settings were there: it kept outliers, and each word had its own context.
BEFORE_GIVEN = {"outlier_norm": "none"}
BEFORE = BEFORE_GIVEN | {"eval_contexts": "each"}


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run on disk."""

    path: Path

    @functools.cached_property
    def saes(self) -> dict[str, SAE]:
        """The run's SAEs by name, for raw activations."""
        from sae_train.sae.files import load_sae

        return {folder.name: load_sae(folder) for folder in sorted((self.path / "saes").glob("*"))}

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl as a table: one row per SAE and logged step."""
        import pandas as pd

        return pd.DataFrame(read_metrics(self.path))

    def events(self) -> pd.DataFrame:
        """The event log: one row per SAE and absorbed word, with the steps at which its letter latents fell silent and
        the other latent took over (`evals/events.py`); UserError for a run without it."""
        import pandas as pd

        from sae_train.evals.events import event_log

        path = self.path / "trajectory.parquet"
        if not path.is_file():
            raise UserError(
                f"the run {str(self.path)!r} holds no trajectory.parquet: its absorption eval left no words"
            )
        return event_log(pd.read_parquet(path))

    @property
    def info(self) -> dict[str, Any]:
        """run.json: settings, versions, hardware, final figures."""
        return read_json(self.path / "run.json")


def train(
    config: str | Path | None = None, *, activations: Any = None, callbacks: Sequence[Callback] = (), **settings: Any
) -> Run:
    """Train SAEs with settings named as the flags are: `train(width="16k", l0=50)`.

    `activations` takes the place of a language model: a tensor or an array (rows, d_in), a .npy or .safetensors file,
    or an object with the few methods of `protocols.Source`; `model` and `hook` then only say where they come from.
    `callbacks` are evals of your own, called at every look with (SAE for raw activations, step); the (name, value)
    pairs that they yield are logged, drawn and reported. Raises UserError.
    """
    command = python_call(settings | ({"config": str(config)} if config else {}), activations, callbacks)
    if activations is None:
        return start(resolve(settings, config), command=command, callbacks=callbacks)
    from sae_train.data.given import given_settings

    resolved, given = given_settings(activations, settings, config)
    return start(resolved, given, command, callbacks)


def start(
    settings: Settings, given: Given | None = None, command: str | None = None, callbacks: Sequence[Callback] = ()
) -> Run:
    """Check the plan, open everything, make the run's folder and train, on activations that were `given` or else made.

    `command` is how the run was asked for, as run.json keeps it.
    """
    from sae_train.runs.process import prepare_process, without_collection

    prepare_process()
    folder = free_folder(settings)
    with _display() as display:
        with without_collection():
            from sae_train.runs import session
            from sae_train.runs.plan import make_plan
            from sae_train.runs.runner import Runner
            from sae_train.training.ranks import current

            plan = make_plan(settings, given)
            current().first(plan.check)
            display(f"loading {settings.lm.model} and its data")
            opened = session.open_session(settings, plan.passes, folder, given)
            built, notes = _assets(opened, display)
            display("looking at the first activations")
            session.begin(opened)
        opened.ranks.first(lambda: folder.mkdir(parents=True))
        own_note = [settings.run.note] if settings.run.note else []
        about = {"notes": own_note + plan.notes + notes, "command": command, "activations": given and given.record}
        return Run(Runner(opened, folder, built, about, display, callbacks).go())


def _display() -> Display:
    """What a person sees; of several processes the first alone speaks."""
    from sae_train.runs.display import Display

    return Display(quiet=int(os.environ.get("RANK", "0")) > 0)


def _assets(opened: Session, display: Display) -> tuple[Assets | None, list[str]]:
    """What the eval needs of the model, made by one process for all."""
    from sae_train.runs.callbacks import build_assets

    def build() -> tuple[Assets | None, list[str]]:
        display("setting up the absorption eval")
        built, notes = build_assets(opened.language and opened.language.lm, opened.settings.eval, display)
        return built.to("cpu") if built else None, notes

    return opened.ranks.first(build)


def resume(
    folder: str | Path, *, activations: Any = None, callbacks: Sequence[Callback] = (), trust_remote_code: bool = False
) -> Run:
    """Go on with an interrupted run from its last saved state; UserError if there is nothing to go on with.

    A run on activations of your own needs them again, and one with callbacks of your own goes on without those that are
    not given again. Code of the hub's is run only where `trust_remote_code` says so here, whatever run.json says.
    """
    from sae_train.runs import session
    from sae_train.runs.plan import find_passes
    from sae_train.runs.process import prepare_process
    from sae_train.runs.runner import Runner

    prepare_process()
    folder = Path(folder)
    info = read_run(folder, ResumedRun)
    if info.get("status") == "finished":
        raise UserError(f"the run {str(folder)!r} is finished: sae-train report {folder} shows it")
    saved = session.newest_state(folder)
    if saved is None:
        raise UserError(f"the run {str(folder)!r} has no saved state yet: delete the folder and start it again")
    if info.get("passes") is None:
        raise UserError(f"the run {str(folder)!r} was begun by an earlier version of sae-train: start it again")
    if info["settings"].get("trust_remote_code") and not trust_remote_code:
        raise UserError(
            f"the run {str(folder)!r} was begun with --trust-remote-code, which runs code from the hub: if you trust "
            f"it, say so again by sae-train resume {folder} --trust-remote-code"
        )
    info["settings"]["trust_remote_code"] = trust_remote_code
    settings, given = _restore_settings(folder, info, activations)
    about = {name: info.get(name) for name in ("command", "activations", "saes")} | {"notes": info.get("notes", [])}
    with _display() as display:
        display.interrupted = f"go on with: sae-train resume {folder}"
        display(f"loading {settings.lm.model} and its data")
        opened = session.open_session(settings, find_passes(settings.specs, info["passes"]), folder, given)
        _load_state(opened, saved)
        built, _ = _assets(opened, display)
        return Run(Runner(opened, folder, built, about, display, callbacks).go())


def _load_state(opened: Session, saved: Path) -> None:
    """Go back to the saved moment; UserError where it is none of this run."""
    import torch

    from sae_train.runs import session

    try:
        session.load(opened, saved)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the saved state {str(saved)!r} is damaged or of other settings than run.json's ({first_line(error)}): "
            "go on from a copy whose files belong together, or start the run again"
        ) from error


def _restore_settings(folder: Path, info: dict[str, Any], activations: Any) -> tuple[Settings, Given | None]:
    """The settings of an interrupted run, and its activations where they are a user's own."""
    from sae_train.data.given import given_settings

    if not info.get("activations"):
        if activations is not None:
            raise UserError(f"the run {str(folder)!r} makes its activations itself: leave activations out")
        # What "auto" meant there counts here.
        dtype = {"dtype": info["dtype"]} if info.get("dtype") else {}
        return resolve(BEFORE | info["settings"] | dtype), None
    if activations is None:
        activations = info["activations"].get("file")
    if activations is None:
        raise UserError(
            f"the run {str(folder)!r} was trained on activations given in Python: go on with it there, by "
            f"sae_train.resume({str(folder)!r}, activations=…)"
        )
    settings, given = given_settings(activations, BEFORE_GIVEN | info["settings"])
    if {**given.record, "file": None} != {**info["activations"], "file": None}:
        raise UserError(f"the activations are not those that the run {str(folder)!r} began with: give the same ones")
    return settings, given


def default_name(settings: Settings) -> str:
    """Name a run by model, architectures, widths and targets."""
    sae = settings.sae
    widths = "+".join(width_label(width) for width in sae.width)
    targets = "+".join(f"{l0:g}" for l0 in sae.l0)
    seeds = f"-seed_{'+'.join(map(str, sae.seed))}" if sae.seed != (0,) else ""
    model = re.sub(r"[^\w.+-]+", "_", Path(settings.lm.model).name)
    return f"{model}-{'+'.join(sae.arch)}-{widths}-l0_{targets}{seeds}"


def free_folder(settings: Settings) -> Path:
    """The folder of a new run: an asked name must be free, a derived one gets a number when taken."""
    out = Path(settings.run.out)
    if settings.run.name:
        folder = out / settings.run.name
        if folder.exists():
            raise UserError(
                f"the run folder {str(folder)!r} exists: choose another --name, or go on with it by "
                f"sae-train resume {folder}"
            )
        return folder
    name = default_name(settings)
    taken = {path.name for path in out.glob(f"{name}*")} if out.is_dir() else set()
    numbered = (f"{name}-{i}" for i in range(2, len(taken) + 3))
    return out / next(free for free in (name, *numbered) if free not in taken)
