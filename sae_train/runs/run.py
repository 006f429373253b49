"""The two things to do with runs: train one, go on with one.

A `Run` is what Python users hold of one: the folder with its metrics, absorption tables, SAEs and report.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sae_train.config import Settings, flat, resolve
from sae_train.config.record import ResumedRun, at_hook, read_run
from sae_train.errors import UserError, first_line
from sae_train.files import read_json, read_metrics
from sae_train.interrupts import interrupts_wait
from sae_train.publishing.reproduce import python_call
from sae_train.runs.extend import begun_at, extend
from sae_train.runs.folder import (
    alone_in,
    check_free,
    is_finished,
    removed_on_failure,
    reserve,
    restore_settings,
    trusting,
)
from sae_train.runs.initial import initial_of, with_initial

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from sae_train.data.given import Given
    from sae_train.evals.assets import Assets
    from sae_train.protocols import Callback
    from sae_train.runs.display import Display
    from sae_train.runs.session import Session
    from sae_train.sae.model import SAE


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run on disk."""

    path: Path

    @functools.cached_property
    def saes(self) -> dict[str, SAE]:
        """The run's SAEs by name, for raw activations."""
        from sae_train.sae.files import load_sae

        folders = sorted(file.parent for file in (self.path / "saes").glob("*/cfg.json"))
        return {folder.name: load_sae(folder) for folder in folders}

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
    def failed(self) -> dict[str, str]:
        """Why SAEs ended early, by name; those of a finished run that are not named here are finished."""
        return {sae["name"]: sae["failed"] for sae in self.info["saes"] if sae["failed"]}

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
    settings = with_initial(settings, config, of_text=activations is None)
    if activations is None:
        return start(resolve(settings, config), command=command, callbacks=callbacks)
    from sae_train.data.given import given_settings

    resolved, given = given_settings(activations, settings, config)
    return start(resolved, given, command, callbacks)


def start(
    settings: Settings, given: Given | None = None, command: str | None = None, callbacks: Sequence[Callback] = (),
    check: Callable[[dict[str, Any]], None] = lambda made_from: None,
) -> Run:  # fmt: skip
    """Check the plan, take the run's folder, open everything and train, on activations that were `given` or else made.

    `command` is how the run was asked for, as run.json keeps it; `check` is given what the activations are made from
    and may refuse it. Where nothing was trained yet, a failure leaves no folder behind.
    """
    from sae_train.runs.process import prepare_process, without_collection

    prepare_process()
    check_free(settings)
    with _display() as display:
        with without_collection():
            with interrupts_wait():
                from sae_train.runs import session
                from sae_train.runs.plan import make_plan
                from sae_train.runs.runner import Runner
                from sae_train.training.ranks import current

            plan, ranks = make_plan(settings, given), current()
            ranks.first(plan.check)
            settings = plan.settings
            about = {
                "notes": ([settings.run.note] if settings.run.note else []) + plan.notes,
                "command": command,
                "working_folder": str(Path.cwd()),
                "activations": given and given.record,
                "init_from": plan.initial and plan.initial.record,
                "passes": [[spec.name for spec in specs] for specs in plan.passes],
            }
            was_there = Path(settings.run.out).exists()
            folder = ranks.first(lambda: reserve(settings, about))
        with alone_in(folder) if ranks.is_first else nullcontext():
            with without_collection(), removed_on_failure(folder, was_there):
                display(f"loading {settings.lm.model} and its data")
                opened = session.open_session(settings, plan.passes, folder, given, plan.initial)
                check(_made_from(opened))
                built, notes = _assets(opened, display)
                display("looking at the first activations")
                session.begin(opened)
                about["notes"] += notes
                runner = Runner(opened, folder, built, about, display, callbacks)
            return _finished(runner.go())


def _made_from(opened: Session) -> dict[str, Any]:
    """What the activations are made from, as run.json keeps it; empty where that is not known."""
    return getattr(opened.first.source, "made_from", {})


def _finished(folder: Path) -> Run:
    """The run that ended; UserError if none of its SAEs was finished."""
    run = Run(folder)
    if run.info["status"] == "failed":
        reasons = {reason.split(": ", 1)[-1] for reason in run.failed.values()}
        raise UserError(
            f"no SAE of the run {str(folder)!r} was finished ({'; '.join(sorted(reasons))}): lower --lr, or look at "
            "what the SAEs are trained on"
        )
    return run


def _display() -> Display:
    """What a person sees; of several processes the first alone speaks."""
    from sae_train.runs.display import Display, is_first

    return Display(quiet=not is_first())


def _assets(opened: Session, display: Display) -> tuple[dict[str, Assets], list[str]]:
    """What the eval needs of the model at each hook where it can run, made by one process for all."""
    from sae_train.runs.callbacks import build_assets

    def build() -> tuple[dict[str, Assets], list[str]]:
        assets, said = {}, []
        for hook, stream in opened.streams.items():
            display("setting up the absorption eval" + (f" at {hook}" if hook else ""))
            built, notes = build_assets(stream.language and stream.language.lm, opened.settings.eval, display)
            assets |= {hook: built.to("cpu")} if built else {}
            said += [f"{hook}: {note}" if hook else note for note in notes]
        return assets, said

    return opened.ranks.first(build)


def resume(
    folder: str | Path, *, activations: Any = None, callbacks: Sequence[Callback] = (),
    trust_remote_code: bool = False, tokens: Any = None, where: Mapping[str, Any] = MappingProxyType({}),
) -> Run:  # fmt: skip
    """Go on with an interrupted run from its last saved state; UserError if there is nothing to go on with.

    With `tokens` a finished run is trained further, until it has had so many in all (`runs/extend.py`).
    A run on activations of your own needs them again, and one with callbacks of your own goes on without those that are
    not given again. Code of the hub's is run only where `trust_remote_code` says so here, whatever run.json says.
    `where` has settings of places and devices that take the place of the run's, such as {"device": "cuda:1"}.
    """
    from sae_train.runs.display import is_first

    folder = Path(folder)
    read_run(folder, ResumedRun)
    with alone_in(folder) if is_first() else nullcontext():  # the processes have not met yet
        return _go_on(folder, activations, callbacks, trust_remote_code, tokens, where)


def _go_on(
    folder: Path, activations: Any, callbacks: Sequence[Callback], trust_remote_code: bool, tokens: Any,
    where: Mapping[str, Any],
) -> Run:  # fmt: skip
    """What `resume` does, alone in the run's folder, so that no other process writes what is read here."""
    with interrupts_wait():
        from sae_train.data.origin import check_unchanged
        from sae_train.runs import session
        from sae_train.runs.plan import find_passes
        from sae_train.runs.process import prepare_process
        from sae_train.runs.runner import Runner

    prepare_process()
    info = read_run(folder, ResumedRun)
    if tokens is None and is_finished(folder, info):
        raise UserError(
            f"the run {str(folder)!r} is finished: sae-train report {folder} shows it, and sae-train resume {folder} "
            f"--tokens NUMBER trains it further, to more than its {info.get('tokens') or 0:,} tokens"
        )
    if info.get("passes") is None:
        raise UserError(f"the run {str(folder)!r} was begun by an earlier version of sae-train: start it again")
    info = trusting(folder, info, trust_remote_code, f"sae-train resume {folder}")
    if tokens is not None:
        info = extend(folder, info, tokens)
    settings, given = restore_settings(folder, info, activations)
    settings = resolve(flat(settings) | where) if where else settings
    kept = ("command", "working_folder", "activations", "saes", "init_from", "stages")
    about = {name: info.get(name) for name in kept}
    with _display() as display:
        display.interrupted = f"go on with: sae-train resume {folder}"
        display(f"loading {settings.lm.model} and its data")
        passes, initial = find_passes(settings.specs, info["passes"]), initial_of(settings, info.get("init_from"))
        opened = session.open_session(settings, passes, folder, given, initial, begun_at(info, settings))
        check_unchanged(info, _made_from(opened))
        saved = session.newest_state(folder)
        if saved:
            _load_state(opened, saved)
        else:  # it ended before its first state was saved
            session.begin(opened)
        built, notes = _assets(opened, display)
        notes += session.note_processes(opened, info.get("processes")) + _other_words(info, built)
        about["notes"] = [*info.get("notes", []), *(note for note in notes if note not in info.get("notes", []))]
        return _finished(Runner(opened, folder, built, about, display, callbacks).go())


def _other_words(info: dict[str, Any], built: dict[str, Assets]) -> list[str]:
    """A note if the eval reads other words or activations than it did before the run was interrupted."""
    before = {hook: (at_hook(info, hook).get("eval_assets") or {}).get("hash") for hook in built}
    if all(then in (None, built[hook].hash) for hook, then in before.items()):
        return []
    return [
        "the absorption eval reads other words or activations than before the interruption (another machine or number "
        "format, or changed lists of words): its looks before and after are not of one kind"
    ]


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
