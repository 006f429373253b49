"""The command line: which commands there are, and the call that each makes.

Mistakes become a sentence on stderr and exit code 2. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import App, Group, Parameter

from sae_train.config import Settings, resolve
from sae_train.config.flags import EvalFlags, ExportFlags, SuiteFlags, TrainFlags
from sae_train.errors import UserError, first_line
from sae_train.interrupts import interrupts_wait

if TYPE_CHECKING:
    from sae_train.runs.run import Run

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
PATH_TROUBLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
LOST = ("DistBackendError", "DistNetworkError", "DistStoreError")  # what torch raises where another process is gone
SOME_FAILED = 3  # exit code of a grid of which some SAEs are finished and others failed
OTHERS_WAIT = 10.0  # seconds that other processes leave the first one to say what is wrong
EPILOGUE = """Examples:

- `sae-train --width 16k --l0 50`
- `sae-train --arch relu,topk,jumprelu --width 1k,4k --l0 8,32`
- `sae-train --model gpt2 --hook blocks.8.hook_resid_post --width 16k --l0 50`
- `sae-train --config configs/gemma-2-2b.yaml --dry-run`
"""

SESSION = Group("Session", sort_key=-1)
FLAT = Parameter(name="*")  # a dataclass whose fields are flags of the command's own

app = App(
    name="sae-train",
    help="Train sparse autoencoders at a controlled width and L0, and watch first-letter absorption meanwhile.",
    help_format="markdown",
    help_epilogue=EPILOGUE,
    version_flags=["--version"],
    version=lambda: __import__("importlib.metadata").metadata.version("sae-train"),
    default_parameter=Parameter(negative=(), show_default=False),
)


@app.default
def train(
    *,
    config: Annotated[str | None, Parameter(group=SESSION, help="YAML file with settings; flags win over it")] = None,
    dry_run: Annotated[
        bool,
        Parameter(
            group=SESSION,
            help="print the resolved plan (derived values, memory, time), refuse what the run would, and stop",
        ),
    ] = False,
    flags: Annotated[TrainFlags | None, FLAT] = None,
) -> int:
    """Train the SAEs of the grid on one stream of activations.

    The embedded model (the default) brings its own preset, configs/speller.yaml. The exit code is 3 where some SAEs
    of a grid failed and the others are finished.
    """
    from sae_train.runs.initial import with_initial

    given = vars(flags or TrainFlags())
    settings = resolve(with_initial(given, config), config)
    if dry_run:
        _show_plan(settings)
        return 0
    from sae_train.publishing.reproduce import shell_call
    from sae_train.runs.run import start

    return _name_failed(start(settings, command=shell_call(given, config)))


def _name_failed(run: Run) -> int:
    """Say which SAEs of a run failed beside others that are finished; return the exit code."""
    failed, n = run.failed, len(run.info["saes"])
    if failed and _rank() == 0:
        which = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        _complain(f"{len(failed)} of {n} SAEs failed: {which}. The others are finished: {run.path}")
    return SOME_FAILED if failed else 0


def _show_plan(settings: Settings) -> None:
    """Print what a run would take, then refuse what cannot work.

    What is looked up meanwhile is shown on stderr, so that the plan can be piped.
    """
    from sae_train.runs.display import aside
    from sae_train.runs.folder import check_free

    check_free(settings)
    with aside() as display:
        display("looking at the model and its text")
        with interrupts_wait():
            from sae_train.runs.plan import make_plan

        plan = make_plan(settings)
        display("timing matrix products and counting words")
        text = plan.text()
    if _rank() == 0:
        print(text)
    plan.check()


@app.command
def resume(run: Path, *, tokens: str | None = None, trust_remote_code: bool = False) -> int:
    """Go on with an interrupted run from its last saved state, or train a finished one further.

    Parameters
    ----------
    run:
        The run's folder, such as checkpoints/NAME.
    tokens:
        Train a finished run further, until its SAEs have had so many tokens in all, such as 4M. The learning rate,
        which has fallen to 0, rises once more to its full value and falls again at the new end.
    trust_remote_code:
        Run the model's code from the hub, as the run was begun with it.
    """
    from sae_train.runs.run import resume as resume_run

    return _name_failed(resume_run(run, tokens=tokens, trust_remote_code=trust_remote_code))


@app.command(name="eval")
def evaluate(
    checkpoint: Path,
    *,
    flags: Annotated[EvalFlags | None, FLAT] = None,
    suite: Annotated[SuiteFlags | None, FLAT] = None,
    out: Path | None = None,
    folder: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Run the absorption eval on a finished SAE (ours, or another library's: docs/loading.md names the layouts).

    Writes absorption.json (SAEBench's layout), absorption.parquet, interventions.parquet and the page absorption.html.
    With --suite, sae-bench's own evals follow (docs/sae_bench.md).

    Parameters
    ----------
    checkpoint:
        folder with cfg.json and the weights, or a repo on the hub, such as you/name
    out:
        folder for what is written; default: the checkpoint's folder
    folder:
        the SAE's folder in a repo that holds several
    allow_pickle:
        read pickled weights, dictionary_learning's and Qwen-Scope's (tensors alone are taken from them)
    """
    from sae_train.runs.evaluation import evaluate_checkpoint
    from sae_train.runs.suite import find_suite

    given = vars(flags or EvalFlags())
    found = find_suite(suite or SuiteFlags(), bool(given["trust_remote_code"]))
    evaluate_checkpoint(checkpoint, given, out, folder, allow_pickle, found)


@app.command
def report(*runs: Path, out: Path | None = None, export: Path | None = None) -> None:
    """Write the HTML report of a run, or one page that compares several.

    Parameters
    ----------
    runs:
        Folders of runs.
    out:
        The page to write; default: report.html in the run's folder (comparison.html for several).
    export:
        Folder for the figures as PNG, SVG and CSV and the tables as CSV, beside the page.
    """
    from sae_train.report import export_report, write_report

    if not runs:
        raise UserError("no run was named: give at least one run folder, such as checkpoints/NAME")
    print(write_report(list(runs) if len(runs) > 1 else runs[0], out))
    if export:
        print(f"{len(export_report(runs, export))} files in {export}")


@app.command
def study(*, config: Path | None = None, quick: bool = False, out: Path | None = None, dry_run: bool = False) -> int:
    """Train a whole design of SAEs in parts, and answer on one page what width, L0 and architecture do to absorption.

    Parts are ordinary runs: those that are finished are skipped, so that the same command goes on after Ctrl-C.

    Parameters
    ----------
    config:
        YAML file of the design: shared settings, and grids of arch, width, l0 and seed; default: configs/study.yaml.
    quick:
        The design of configs/study_quick.yaml, on the embedded model.
    out:
        Folder of the study; default: checkpoints/NAME, by the design's file.
    dry_run:
        Print the parts and the time of those that are left, refuse what cannot work, and stop.
    """
    from sae_train.config.study import FULL, QUICK

    if quick and config:
        raise UserError(f"--quick is a design of its own, and --config {config} names another: give one of them")
    file = QUICK if quick else config or FULL
    folder = out or Path("checkpoints", file.stem)
    from sae_train.runs.display import aside
    from sae_train.runs.study import plan_study, run_study

    if dry_run:
        with aside() as display:
            display("looking at the model and its text, timing matrix products and counting words")
            text = plan_study(file, folder)
        print(text)
        return 0
    page, claims, failed = run_study(file, folder)
    print("\n".join(claims))
    print(f"study: {page}")
    if failed:
        _complain(f"{len(failed)} SAEs failed: {'; '.join(failed)}. The others are compared")
    return SOME_FAILED if failed else 0


@app.command
def watch(run: Path, *, port: int = 8642) -> None:
    """Show a run's report in the browser while it goes on: a page of this machine alone, until Ctrl-C.

    Parameters
    ----------
    run:
        The run's folder, such as checkpoints/NAME.
    port:
        Where the page is: http://127.0.0.1:PORT.
    """
    from sae_train.report.watch import serve

    with serve(run, port) as server:
        print(f"http://127.0.0.1:{server.server_port} shows {run}; Ctrl-C ends it", flush=True)
        server.serve_forever()


@app.command
def publish(
    checkpoint: Path,
    *,
    repo: str,
    private: bool = False,
    dry_run: bool = False,
    force: bool = False,
    license: str = "mit",
    base_model: str | None = None,
) -> None:
    """Publish a run's SAEs, or one of them, as one repo on the hub that SAELens and load_sae read.

    Refused are SAEs whose L0 is more than 2 % off, that were not evaluated or not finished, and repos that hold files.

    Parameters
    ----------
    checkpoint:
        A run's folder, or one SAE's in it.
    repo:
        Name on the hub, such as you/name; it is made if it is not there.
    private:
        Make it private.
    dry_run:
        Stage everything, check and list it, upload nothing.
    force:
        Publish what would be refused, but for SAEs that are not finished.
    license:
        Licence of the weights, by the hub's names; default: mit.
    base_model:
        The language model's hub id, where the run names a local folder.
    """
    from sae_train.publishing.publish import publish as publish_checkpoint

    publish_checkpoint(
        checkpoint, repo, private=private, dry_run=dry_run, force=force, license=license, base_model=base_model
    )


@app.command(name="export-neuronpedia")
def export_neuronpedia(
    checkpoint: Path,
    *,
    flags: Annotated[ExportFlags | None, FLAT] = None,
    out: Path | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write what a run's SAEs do on its own text in the format that Neuronpedia imports.

    Says first how many tokens that is, and how long it takes. Interrupted, the same command goes on with the SAEs that
    are not written yet.

    Parameters
    ----------
    checkpoint:
        A run's folder, or one SAE's in it.
    out:
        Folder to write to; default: neuronpedia in the run's folder.
    dry_run:
        Say how much and how long, and stop.
    trust_remote_code:
        Run the model's code from the hub, as the run was made with it.
    """
    with interrupts_wait():
        from sae_train.runs.neuronpedia_export import export_neuronpedia as export_run

    export_run(checkpoint, flags or ExportFlags(), out, dry_run, trust_remote_code)


def _rank() -> int:
    """This process's number among those that a launcher such as torchrun started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def _processes() -> int:
    """How many processes a launcher such as torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _explain_machine(error: Exception) -> str | None:
    """The sentence for memory that ran out and for other processes that are gone; None for any other error."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return (
            f"the memory ran out ({first_line(error)}): make room, or go on with more processes, each of which takes a "
            "share of every batch (torchrun --nproc-per-node N -m sae_train resume RUN); a lower --batch-tokens, "
            "--buffer-tokens or --width takes a new run"
        )
    if _processes() > 1 and (kind in LOST or "gloo" in text or "Connection closed by peer" in text):
        return (
            f"another process of the run is gone ({first_line(error)}): sae-train resume RUN, with as many processes, "
            "goes on from the last state saved"
        )
    return None


def _complain(text: str, waits: bool = True) -> None:
    """Print a mistake, each line as a sentence of sae-train's.

    Of several processes the first speaks: the launcher then ends the others. If it does not, the mistake was not the
    first one's too, and is said here. What all but one know may be said by the first two at once (not `waits`).
    """
    if _rank() > (0 if waits else 1):
        time.sleep(OTHERS_WAIT)
    for line in text.strip().splitlines():
        print(f"sae-train: {line}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 2 a mistake of the caller, 3 some SAEs of a grid failed, 130
    interrupted."""
    try:
        return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except cyclopts.UnusedCliTokensError as error:
        words = " ".join(error.unused_tokens)
        _complain(
            f"{words!r} is no command (eval, export-neuronpedia, publish, report, resume, study, watch) and no option"
        )
        return 2
    except (UserError, cyclopts.CycloptsError) as error:
        _complain(str(error))
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in DISK_TROUBLE:
            _complain(f"the disk does not take what is to be written{where}: {error.strerror}")
        elif error.errno in PATH_TROUBLE and error.filename:
            _complain(f"a file or folder cannot be used{where}: {error.strerror}")
        else:
            raise
        return 2
    except (MemoryError, RuntimeError) as error:
        sentence = _explain_machine(error)
        if sentence is None:
            raise
        _complain(sentence, waits=sentence.startswith("the memory"))
        return 2
    except KeyboardInterrupt:
        return 130
