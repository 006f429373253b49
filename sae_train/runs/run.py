"""The three things to do with runs: train one, go on with one, evaluate a finished SAE.

A `Run` is what Python users hold of one: the folder with its metrics, absorption tables, SAEs and report.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import Settings, resolve, width_label
from sae_train.errors import UserError
from sae_train.files import read_json, read_metrics, write_json, write_parquet
from sae_train.publishing.reproduce import python_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from sae_train.data.given import Given
    from sae_train.data.language_model import LanguageModel
    from sae_train.evals.absorption import AbsorptionResult
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


def resume(folder: str | Path, *, activations: Any = None, callbacks: Sequence[Callback] = ()) -> Run:
    """Go on with an interrupted run from its last saved state; UserError if there is nothing to go on with.

    A run on activations of your own needs them again, and one with callbacks of your own goes on without those that are
    not given again.
    """
    from sae_train.runs import session
    from sae_train.runs.plan import find_passes
    from sae_train.runs.process import prepare_process
    from sae_train.runs.runner import Runner

    prepare_process()
    folder = Path(folder)
    info = read_json(folder / "run.json")
    if info.get("status") == "finished":
        raise UserError(f"the run {str(folder)!r} is finished: sae-train report {folder} shows it")
    saved = session.newest_state(folder)
    if saved is None:
        raise UserError(f"the run {str(folder)!r} has no saved state yet: delete the folder and start it again")
    if "passes" not in info:
        raise UserError(f"the run {str(folder)!r} was begun by an earlier version of sae-train: start it again")
    settings, given = _restore_settings(folder, info, activations)
    about = {name: info.get(name) for name in ("command", "activations", "saes")} | {"notes": info.get("notes", [])}
    with _display() as display:
        display.interrupted = f"go on with: sae-train resume {folder}"
        display(f"loading {settings.lm.model} and its data")
        opened = session.open_session(settings, find_passes(settings.specs, info["passes"]), folder, given)
        session.load(opened, saved)
        built, _ = _assets(opened, display)
        return Run(Runner(opened, folder, built, about, display, callbacks).go())


def _restore_settings(folder: Path, info: dict[str, Any], activations: Any) -> tuple[Settings, Given | None]:
    """The settings of an interrupted run, and its activations where they are a user's own."""
    from sae_train.data.given import given_settings

    if not info.get("activations"):
        if activations is not None:
            raise UserError(f"the run {str(folder)!r} makes its activations itself: leave activations out")
        # A run that names no contexts began when each word had its own. What "auto" meant there counts here.
        dtype = {"dtype": info["dtype"]} if info.get("dtype") else {}
        return resolve({"eval_contexts": "each"} | info["settings"] | dtype), None
    if activations is None:
        activations = info["activations"].get("file")
    if activations is None:
        raise UserError(
            f"the run {str(folder)!r} was trained on activations given in Python: go on with it there, by "
            f"sae_train.resume({str(folder)!r}, activations=…)"
        )
    settings, given = given_settings(activations, info["settings"])
    if {**given.record, "file": None} != {**info["activations"], "file": None}:
        raise UserError(f"the activations are not those that the run {str(folder)!r} began with: give the same ones")
    return settings, given


def evaluate_checkpoint(
    checkpoint: Path, given: dict[str, Any], out: Path | None = None, folder: str | None = None,
    allow_pickle: bool = False,
) -> AbsorptionResult:  # fmt: skip
    """Run the absorption eval on a saved SAE with its baselines and interventions; print and write what it says.

    The SAE is a local folder's or, with a repo's name and a `folder` in it, the hub's, which needs `out`.
    `given` holds settings by flag name; the model and the hook default to what the checkpoint says. Written are
    absorption.json (SAEBench's layout), absorption.parquet, interventions.parquet and absorption.html.
    """
    from sae_train.runs.process import prepare_process
    from sae_train.sae.files import load_sae
    from sae_train.training.ranks import current

    prepare_process()
    sae = load_sae(checkpoint, folder, allow_pickle=allow_pickle)
    checkpoint = Path(checkpoint, folder or "")
    if out is None and not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is on the hub: name by --out a folder for what is written")
    settings = resolve(_add_origin(given, sae, checkpoint))
    if current().size > 1:
        raise UserError("sae-train eval is the work of one process: start it without torchrun")
    with _display() as display:
        return _evaluate(sae, checkpoint, settings, Path(out or checkpoint), display)


def _evaluate(sae: SAE, checkpoint: Path, settings: Settings, out: Path, display: Display) -> AbsorptionResult:
    from sae_train.data.sources import kind_of
    from sae_train.evals import absorption, baselines
    from sae_train.evals.interventions import interventions
    from sae_train.runs.callbacks import build_assets
    from sae_train.runs.summary import absorption_line
    from sae_train.training.ranks import choose_device

    display(f"loading {settings.lm.model}")
    lm = kind_of(settings).language_model(settings, choose_device(settings.lm.device))
    own_notes = _fit_model(lm, sae, checkpoint)
    built, notes = build_assets(lm, settings.eval, display)
    if built is None:
        raise UserError(" ".join(notes))
    sae, built = sae.to(lm.device), built.to(lm.device)
    how = settings.eval
    result = absorption.evaluate(sae, built, preset=how.preset, seed=how.eval_seed, lm=lm, progress=display)
    write = functools.partial(_write_evaluation, result, sae, built, lm, checkpoint, out)
    written, beside = write({}, None), {}  # before what may fail yet
    if result.valid:
        beside = baselines.all_scores(sae, built.x, built, result, lm, display)
    for line in [*own_notes, *notes, absorption_line(result.metrics(), beside.get("random"))]:
        display.say(line)
    if result.valid:
        display("trying interventions")
        written = write(beside, interventions(sae, lm, built, result, seed=result.seed))
    display.say(f"written: {', '.join(map(str, written))}")
    return result


def _fit_model(lm: LanguageModel, sae: SAE, checkpoint: Path) -> list[str]:
    """Let the model begin its prompts as the SAE's texts began; UserError if the two are of different widths."""
    if lm.d_in != sae.cfg.d_in:
        raise UserError(
            f"the SAE in {str(checkpoint)!r} takes {sae.cfg.d_in} values a token and {lm.hook_name} of {lm.name} "
            f"has {lm.d_in}: name the --model and --hook that it was trained on"
        )
    if sae.cfg.prepend_bos or lm.bos_id is None:
        return []
    lm.bos_id = None
    return ["the eval's prompts have no BOS token, as the texts that the SAE was trained on had none"]


def _write_evaluation(
    result: AbsorptionResult, sae: SAE, built: Assets, lm: LanguageModel, checkpoint: Path, out: Path,
    beside: dict[str, dict], changes: pd.DataFrame | None,
) -> list[Path]:  # fmt: skip
    from sae_train.report import write_eval_page

    out.mkdir(parents=True, exist_ok=True)
    about = {
        "SAE": str(checkpoint), "model": lm.name, "hook": lm.hook_name, "preset": result.preset,
        "hierarchy": built.settings["hierarchy"], "seed": str(result.seed), "assets": result.asset_hash,
    }  # fmt: skip
    paths = [out / name for name in ("absorption.json", "absorption.parquet", "interventions.parquet")]
    write_json(paths[0], result.to_saebench_json(beside, sae_cfg_dict=asdict(sae.cfg)))
    write_parquet(paths[1], result.table(checkpoint.name, step=-1, with_words=True))
    if changes is not None and len(changes):
        write_parquet(paths[2], changes)
    else:
        paths[2].unlink(missing_ok=True)
    paths.append(write_eval_page(result, beside, changes, about, out / "absorption.html"))
    return [path for path in paths if path.exists()]


def _add_origin(given: dict[str, Any], sae: SAE, checkpoint: Path) -> dict[str, Any]:
    """Fill in model and hook from the checkpoint; UserError if neither it nor the caller names them."""
    known = {"model": sae.cfg.model_name or None, "hook": sae.cfg.hook_name or None}
    merged = known | {key: value for key, value in given.items() if value is not None}
    missing = [f"--{key}" for key in known if not merged[key]]
    if missing:
        raise UserError(
            f"the checkpoint {str(checkpoint)!r} does not say what it was trained on: give {', '.join(missing)}"
        )
    return merged


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
