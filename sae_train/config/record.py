"""What the JSON files of a run's folder may hold, by types: run.json, records of latents, an evaluation's result.

A folder may come from somebody else, so its files are checked where they are read; names that become paths are names of
files, never paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sae_train.errors import UserError
from sae_train.files import OUR_FIGURES, check_types, read_json

WORDS = (
    "sae",
    "hook_name",
    "reason",
    "valid",
    "fitted_on",
)  # figures that are no numbers, by the last part of their names


def check_name(name: str) -> str:
    """Return a name that may become a folder's; ValueError for one that leads elsewhere."""
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name or not name.isprintable() or len(name) > 200:
        raise ValueError("this is no name of a folder: it must have no slash, and not be empty or too long")
    return name


def check_number(value: Any) -> Any:
    """Return what is neither text nor a truth value, which would pass for numbers; ValueError for these."""
    if isinstance(value, bool | str):
        raise ValueError("a number is needed")
    return value


def _check_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Let through numbers under our names, and whatever a user's own callback yields under theirs."""
    for name, value in figures.items():
        ours, last = name.split("/")[0] in OUR_FIGURES or "/" not in name, name.split("/")[-1]
        parts = value if isinstance(value, list) and last.endswith("histogram") else [value]
        kinds = (str, bool, type(None)) if last in WORDS else (int, float, type(None))
        if ours and not all(isinstance(part, kinds) for part in parts):
            raise ValueError(f"{name} is {str(value)[:60]!r}, which is no figure")
    return figures


Name = Annotated[str, AfterValidator(check_name)]
Number = Annotated[float, BeforeValidator(check_number)]
Whole = Annotated[int, BeforeValidator(check_number), Field(ge=0)]
Figures = Annotated[dict[str, Any], AfterValidator(_check_figures)]


class Record(BaseModel):
    """Keeps what it has no type for."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class SAERecord(Record):
    """One SAE of a run."""

    name: Name
    arch: str | None = None
    width: Annotated[Whole, Field(gt=0)] | None = None
    l0: Annotated[Number, Field(gt=0)] | None = None
    seed: Whole | None = None
    hook_name: Name | None = None
    failed: str | None = None
    written: bool | None = None
    final: Figures | None = None
    baseline: dict[str, Figures] | None = None


class WeightsFile(Record):
    """One file of a language model's weights."""

    name: str
    bytes: Whole
    sha256: str | None


class Weights(Record):
    """Which weights the language model had."""

    hub: str | None = None
    revision: str | None = None
    package: str | None = None
    files: list[WeightsFile] = []
    beside: list[WeightsFile] = []


class Hardware(Record):
    """The machine of a run."""

    cores: Whole | None = None
    gpus: list[str] | None = None


class Outliers(Record):
    """What a run left out as outliers."""

    median_norm: Number | None
    trained: Whole
    held_out: Whole
    first_position: bool


class GivenRecord(Record):
    """What a run knows of activations that were given to it."""

    file: str | None = None


class TextRecord(Record):
    """Which text a run read."""

    held_out_tokens: str
    files: dict[str, list[Any]] = {}


class MadeFrom(Record):
    """What a run's activations are made from."""

    weights: Weights | None = None
    packages: dict[str, str] | None = None
    text: TextRecord | None = None


class HookRecord(Record):
    """What a run of several hooks says of each."""

    hook_name: str
    d_in: Whole
    outliers: Outliers | None = None
    eval_assets: dict[str, Any] | None = None


class InitialRecord(Record):
    """Which SAE a run started from."""

    name: str
    path: str | None = None
    revision: str | None = None
    sha256: str | None = None
    arch: str | None = None
    l0: Number | None = None


class RunRecord(Record):
    """run.json, as a report reads it: what is only shown may be anything."""

    settings: dict[str, Any] | None = None
    saes: list[SAERecord] | None = None
    status: str | None = None
    command: str | None = None
    model: str | None = None
    hook_name: str | None = None
    dataset: str | None = None
    d_in: Whole | None = None
    tokens: Whole | None = None
    seconds: Number | None = None
    outliers: Outliers | None = None
    passes: list[list[str]] | None = None
    activations: GivenRecord | None = None
    made_from: MadeFrom | None = None
    working_folder: str | None = None
    eval_assets: dict[str, Any] | None = None
    hooks: dict[str, HookRecord] | None = None
    init_from: InitialRecord | None = None
    stages: list[Whole] | None = None


class PublishedRun(RunRecord):
    """run.json with what a card is made of."""

    saes: list[SAERecord]
    model: str
    dataset: str
    d_in: Whole
    versions: dict[str, str | None]
    weights: Weights | None = None
    hardware: Hardware | None = None
    git_commit: str | None = None


class ResumedRun(RunRecord):
    """run.json with what an interrupted run goes on from."""

    settings: dict[str, Any]
    saes: list[SAERecord] | None = None
    notes: list[str] = []


class MetricsRow(Record):
    """A line of metrics.jsonl."""

    sae: Name
    step: Whole | None = None
    tokens: Number | None = None

    _figures = model_validator(mode="before")(_check_figures)


class Example(Record):
    """A context of a latent."""

    kind: str
    tokens: list[str]
    acts: list[Number]


class LatentRecord(Record):
    """A line of latents/<sae>.jsonl."""

    latent: Whole
    main_of: list[str]
    absorbs: list[str]
    density: Number
    max: Number
    histogram: list[Whole]
    examples: list[Example]
    top: list[Any] = []
    bottom: list[Any] = []


class EvalDetails(Record):
    """What SAEBench's layout has no place for."""

    valid: bool
    reason: str | None
    mean_f1: Number | None
    intervals: dict[str, tuple[Number | None, Number | None]]
    baselines: dict[str, Figures]


class EvalMeans(Record):
    """The scores of an evaluation."""

    mean: Figures


class EvalFile(Record):
    """absorption.json of the first-letter eval."""

    eval_result_metrics: EvalMeans
    eval_result_details: list[Any]
    eval_result_unstructured: EvalDetails


class SuiteEntry(Record):
    """What is known of one eval of sae-bench beside its own file of results."""

    file: Name
    sae: str
    key: str
    text: str | None
    ours: Figures
    versions: dict[str, str]


class SuiteRecord(Record):
    """eval_results/suite.json."""

    evals: dict[str, SuiteEntry]


class SuiteResult(Record):
    """One of sae-bench's files of results, as far as the page shows it."""

    eval_result_metrics: dict[str, dict[str, Number | None]]


def read_run(folder: Path, model: type[RunRecord] = RunRecord) -> dict[str, Any]:
    """Read a run's run.json, whose values then have their types; UserError if they have not."""
    path = folder / "run.json"
    content = read_json(path)
    if not isinstance(content, dict) or not ({"settings", "saes"} & content.keys()):
        raise UserError(f"{str(path)!r} was not written by sae-train: it has no settings and no saes")
    return check_types(model, content, path).model_dump(exclude_unset=True)


def at_hook(info: dict[str, Any], hook_name: str | None) -> dict[str, Any]:
    """Return what run.json says where its run has one hook, or of one hook of several."""
    own = (info.get("hooks") or {}).get(hook_name)
    return info | own | {"hooks": None} if own else info


def fits(model: type[BaseModel], content: Any) -> bool:
    """Whether a record has the types of a model."""
    try:
        model.model_validate(content)
    except ValidationError:
        return False
    return True
