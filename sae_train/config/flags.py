"""The flags of the command line with their help, made from the settings tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sae_train.config.merge import groups, leaves

BRANCHES = {
    name: Group((model.__doc__ or name).strip(), sort_key=order) for order, (name, model) in enumerate(groups().items())
}
OF_AN_EVAL = (
    "model", "hook", "device", "dtype", "trust_remote_code", "dataset", "text_column", "preset", "hierarchy",
    "template", "eval_words", "eval_contexts", "eval_seed", "eval_cache",
)  # fmt: skip


def _flags(names: Iterable[str], titled: bool = False, **texts: str) -> type:
    """A dataclass of settings as flags, where None is not given; `texts` replace help that means training alone."""
    made = [(name, _flag(name, titled, texts.get(name)), None) for name in names]
    return make_dataclass("Flags", made, frozen=True)


def _flag(name: str, titled: bool, text: str | None) -> Any:
    """A setting's flag: booleans are switches; everything else arrives as text and is read by the settings tree."""
    branch = leaves()[name]
    field, dashed = groups()[branch].model_fields[name], name.replace("_", "-")
    kind = bool if field.annotation is bool else str
    negative = f"--no-{dashed}" if kind is bool and field.default else ()
    text = text or f"{field.description}{_default_text(field.default)}"
    group = BRANCHES[branch] if titled else "Parameters"
    return Annotated[kind | None, Parameter(name=f"--{dashed}", group=group, help=text, negative=negative)]


def _default_text(default: Any) -> str:
    if default in (None, (), False):
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else "on" if default is True else default
    return f" [default: {shown}]"


class TrainFlags(_flags(leaves(), titled=True)):
    """Every setting."""


class EvalFlags(
    _flags(
        OF_AN_EVAL,
        model="hub id, local Hugging Face folder, GGUF file, speller (embedded) or smollm2; default: the one named in "
        "the checkpoint",
        hook="TransformerLens hook name; default: the one named in the checkpoint",
        dataset="text that the random SAEs beside it are fitted on: hub id, local file or folder, generated or "
        "installed-docs; default: what the SAE's run held out, else the words of the eval",
    )
):
    """The settings that an evaluation of a finished SAE uses."""


def _asked(text: str) -> Parameter:
    return Parameter(help=text, group="Parameters")


@dataclass(frozen=True)
class ExportFlags:
    """How much text an export to Neuronpedia reads, and the names under which the SAEs are shown there."""

    tokens: Annotated[str, _asked("how much of the text to read; it is read once at most [default: 1m]")] = "1m"
    repo: Annotated[
        str | None, _asked("the SAEs' repo on the hub, such as you/name; release and creator are named by it")
    ] = None
    creator: Annotated[str | None, _asked("whose SAEs these are; default: the repo's owner")] = None
    creator_id: Annotated[
        str | None, _asked("account in Neuronpedia's database that is to own them; default: every database's own")
    ] = None
    model_id: Annotated[
        str | None, _asked("Neuronpedia's name of the model, such as gpt2-small; default: made from the run's")
    ] = None


@dataclass(frozen=True)
class SuiteFlags:
    """Which evals of sae-bench are run beside our own, where, and with what settings of theirs."""

    suite: Annotated[
        str | None,
        _asked(
            "evals of sae-bench to run as well, a comma list of core, sparse-probing, scr, tpp; their results stand "
            "in eval_results and on the page"
        ),
    ] = None
    suite_python: Annotated[
        Path | None,
        Parameter(
            help="python of an environment with sae-bench; default: this one, where it has sae-bench",
            group="Parameters",
            env_var="SAE_BENCH_PYTHON",
        ),
    ] = None
    suite_config: Annotated[
        Path | None,
        _asked("YAML file with sae-bench's own settings by eval, such as {core: {n_eval_reconstruction_batches: 4}}"),
    ] = None
