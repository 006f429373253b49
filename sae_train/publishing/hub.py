"""What the hub's client does for publishing: a folder's upload in one commit, and the metadata of its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.errors import UserError
from sae_train.report.text import number
from sae_train.sae.fetch import hub_errors, quiet_client, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TAGS = ["saelens", "sparse-autoencoder", "sae", "mechanistic-interpretability", "interpretability"]
FIGURES = (
    ("metrics/l0", "l0", "L0, mean active latents a token"),
    ("metrics/explained_variance", "explained_variance", "explained variance"),
    ("metrics/ce_loss_score", "ce_loss_score", "loss recovered"),
    ("sparsity/dead_fraction", "dead_fraction", "share of dead latents"),
    ("absorption/mean_fraction", "absorption_fraction", "absorption, mean fraction"),
    ("absorption/mean_full", "full_absorption", "full absorption, mean rate"),
)
NOT_COUNTED = {".gitattributes"}  # what a new repo holds


@dataclass(frozen=True)
class Origin:
    """Names as they are published; `info` is run.json's content, `on_hub` the dataset's hub id if it has one."""

    repo: str
    license: str
    model: str
    dataset: str
    info: dict[str, Any]
    base_model: str | None
    on_hub: str | None
    command: str | None


def upload(staged: Path, repo: str, private: bool, replace: bool) -> str:
    """Make the repo if it is not there and commit all staged files at once; return the repo's address.

    A repo that holds files already is refused unless `replace`: files of the same names are then overwritten.
    `upload_folder` would not do: since huggingface_hub 2 it may make several commits, and break off between them.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with hub_errors(f"nothing was published to {repo}"), quiet_client():
        url = api.create_repo(repo, private=private, exist_ok=True)
        info = api.repo_info(repo)
        if private and not info.private:
            raise UserError(f"{repo} is there already and public: nothing was published; make it private first.")
        held = sorted({file.rfilename for file in info.siblings or []} - NOT_COUNTED)
        if held and not replace:
            raise UserError(f"{repo} holds files already ({some(held)}): choose another name, or --force.")
        files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        adds = [CommitOperationAdd(name, path) for name, path in files.items()]
        try:
            api.create_commit(repo, adds, commit_message="Publish SAEs with sae-train", parent_commit=info.sha)
        except Exception:
            if not _arrived(api, repo, info.sha, set(files)):
                raise
    return str(url)


def _arrived(api: HfApi, repo: str, before: str, names: set[str]) -> bool:
    """Whether the commit was made although its answer was lost."""
    try:
        info = api.repo_info(repo)
    except Exception:  # no answer to this either: nothing is known
        return False
    return info.sha != before and names <= {file.rfilename for file in info.siblings or []}


def check_repo_id(repo: str) -> None:
    """UserError unless a repo's name is one that the hub takes, with its owner."""
    if not is_hub_id(repo) or repo.count("/") != 1:
        raise UserError("--repo takes an owner and a name of letters, digits, '-', '_' and '.', such as you/name.")


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repo's on the hub, with its owner or, as gpt2, without."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii()


def front_matter(origin: Origin, saes: list[dict[str, Any]]) -> str:
    """What the hub reads of a published repo: a block of YAML with the SAEs' figures as its model index."""
    from huggingface_hub import ModelCardData

    name = origin.repo.split("/")[-1]
    data = ModelCardData(
        library_name="saelens",
        license=origin.license,
        base_model=origin.base_model,
        datasets=[origin.on_hub] if origin.on_hub else None,
        tags=TAGS,
    )
    # The client would merge all results on one dataset into one, so the SAEs go through it one by one.
    results = [result for sae in saes for result in _results(name, origin, sae)]
    if results:
        data["model-index"] = [{"name": name, "results": results}]
    return data.to_yaml()


def _results(name: str, origin: Origin, sae: dict[str, Any]) -> list[dict[str, Any]]:
    """One SAE's figures; the ends of an interval go with the metric."""
    from huggingface_hub import EvalResult, ModelCardData

    final = sae["final"]
    figures = [
        EvalResult(
            task_type="feature-extraction",
            task_name=f"sparse autoencoder {sae['name']}",
            dataset_type=origin.on_hub or "text",
            dataset_name=f"{origin.dataset}, held out",
            metric_type=kind,
            metric_name=title,
            metric_value=_short(final[key]),
            metric_args=_interval(final, key),
        )
        for key, kind, title in FIGURES
        if number(final.get(key)) is not None
    ]
    return (
        ModelCardData(model_name=name, eval_results=figures).to_dict()["model-index"][0]["results"] if figures else []
    )


def _interval(final: dict[str, Any], key: str) -> dict[str, float] | None:
    ends = {f"ci95_{end}": number(final.get(f"{key}_{end}")) for end in ("low", "high")}
    return None if None in ends.values() else {name: _short(value) for name, value in ends.items()}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
