"""The command line: words in, one call out. Mistakes become a sentence on stderr and exit code 2.

Flags and their help are made from the settings tree; nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Group, Parameter

from sae_train.config import groups, resolve
from sae_train.errors import UserError

OTHERS_WAIT = 10.0  # seconds that other processes leave the first one to say what is wrong
EPILOGUE = """Examples:

- `sae-train --width 16k --l0 50`
- `sae-train --arch relu,topk,jumprelu --width 1k,4k --l0 8,32`
- `sae-train --model gpt2 --hook blocks.8.hook_resid_post --width 16k --l0 50`
- `sae-train --config configs/gemma-2-2b.yaml --dry-run`
"""

app = App(
    name="sae-train",
    help="Train sparse autoencoders at a controlled width and L0, and watch first-letter absorption meanwhile.",
    help_format="markdown",
    help_epilogue=EPILOGUE,
    version_flags=["--version"],
    version=lambda: __import__("importlib.metadata").metadata.version("sae-train"),
    default_parameter=Parameter(negative=(), show_default=False),
)


def _flag_type(annotation: Any) -> type:
    """Booleans are switches; everything else arrives as text and is read by the settings tree."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return bool if bool in kinds else str


def _flags() -> list[inspect.Parameter]:
    """One keyword parameter for every leaf of the settings tree, in help groups by branch."""
    made = []
    for order, (name, model) in enumerate(groups().items()):
        group = Group((model.__doc__ or name).strip(), sort_key=order)
        for leaf, field in model.model_fields.items():
            kind = _flag_type(field.annotation)
            negative = f"--no-{leaf.replace('_', '-')}" if kind is bool and field.default else ()
            text = field.description + _default_text(field.default)
            parameter = Parameter(name=f"--{leaf.replace('_', '-')}", group=group, help=text, negative=negative)
            annotation = Annotated[kind | None, parameter]
            made.append(inspect.Parameter(leaf, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return made


def _default_text(default: Any) -> str:
    if default in (None, (), False):
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else "on" if default is True else default
    return f" [default: {shown}]"


def _train(*, config: str | None = None, dry_run: bool = False, **given: Any) -> None:
    """Train the SAEs of the grid on one stream of activations.

    The embedded model (the default) brings its own preset, configs/speller.yaml.
    """
    settings = resolve(given, config)
    if dry_run:
        from sae_train.runs.plan import make_plan

        plan = make_plan(settings)
        if _rank() == 0:
            print(plan.text())
        return
    from sae_train.publishing.reproduce import shell_call
    from sae_train.runs.run import start

    start(settings, command=shell_call(given, config))


def _with_flags(function: Any) -> Any:
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kinds = {"config": str | None, "dry_run": bool}
    helps = {
        "config": "YAML file with settings; flags win over it",
        "dry_run": "print the resolved plan (derived values, memory, time) and stop",
    }
    session = Group("Session", sort_key=-1)
    own = [p.replace(annotation=Annotated[kinds[p.name], Parameter(group=session, help=helps[p.name])]) for p in own]
    function.__signature__ = inspect.Signature(own + _flags())
    function.__annotations__ = {p.name: p.annotation for p in function.__signature__.parameters.values()}
    return function


app.default(_with_flags(_train))


@app.command
def resume(run: Path) -> None:
    """Go on with an interrupted run from its last saved state.

    Parameters
    ----------
    run:
        The run's folder, such as checkpoints/NAME.
    """
    from sae_train.runs.run import resume as resume_run

    resume_run(run)


@app.command(name="eval")
def evaluate(
    checkpoint: Path,
    *,
    model: str | None = None,
    hook: str | None = None,
    hierarchy: str | None = None,
    template: str | None = None,
    preset: str | None = None,
    eval_words: str | None = None,
    eval_seed: str | None = None,
    device: str | None = None,
    out: Path | None = None,
    folder: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Run the absorption eval on a finished SAE (ours, SAELens', sparsify's, Gemma Scope's, dictionary_learning's).

    Writes absorption.json (SAEBench's layout), absorption.parquet, interventions.parquet and the page absorption.html.

    Parameters
    ----------
    checkpoint:
        Folder with cfg.json and the weights, or a repo on the hub, such as you/name.
    model:
        Language model; default: the one named in the checkpoint.
    hook:
        Hook name; default: the one named in the checkpoint.
    hierarchy:
        What is asked of each word: first-letter, last-letter, first-vowel, word-length, word-class (of the embedded
        model) or a JSON file {parent: {label: [words]}}; default: first-letter.
    template:
        Prompt line of the eval; default: the hierarchy's own.
    preset:
        Definition of the scores: saebench (default), saebench-adam, saebench-0.3, paper, paper-exact, paper-released.
    eval_words:
        Words in the eval, a stratified sample; default: all.
    eval_seed:
        Seed of the split, prompts and probes.
    device:
        cpu, cuda, …; default: a GPU if there is one.
    out:
        Folder for what is written; default: the checkpoint's folder.
    folder:
        The SAE's folder in a repo that holds several.
    allow_pickle:
        Read dictionary_learning's pickled weights (tensors alone are taken from them).
    """
    from sae_train.runs.run import evaluate_checkpoint

    given = {
        "model": model,
        "hook": hook,
        "hierarchy": hierarchy,
        "template": template,
        "preset": preset,
        "eval_words": eval_words,
        "eval_seed": eval_seed,
        "device": device,
    }
    evaluate_checkpoint(checkpoint, given, out, folder, allow_pickle)


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


def _rank() -> int:
    """This process's number among those that a launcher such as torchrun started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def _complain(text: str) -> None:
    """Print a mistake, each line as a sentence of sae-train's.

    Of several processes the first speaks: the launcher then ends the others. If it does not, the mistake was not the
    first one's too, and is said here.
    """
    if _rank() > 0:
        time.sleep(OTHERS_WAIT)
    for line in text.strip().splitlines():
        print(f"sae-train: {line}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 2 a mistake of the caller, 130 interrupted)."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.UnusedCliTokensError as error:
        words = " ".join(error.unused_tokens)
        _complain(f"{words!r} is no command (eval, publish, report, resume, watch) and no option")
        return 2
    except (UserError, cyclopts.CycloptsError) as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
