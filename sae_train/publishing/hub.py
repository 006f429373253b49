"""Uploads to the hub: a local folder comes in and goes out as one commit. Whatever goes wrong becomes one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_train.errors import UserError
from sae_train.sae.fetch import hub_errors, quiet_client, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOT_COUNTED = {".gitattributes"}  # what a new repo holds


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
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise UserError("--repo takes an owner and a name of letters, digits, '-', '_' and '.', such as you/name.")


def check_card(text: str) -> None:
    """Assert that the hub's own reader takes a model card's front matter, results included."""
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.to_dict().get("library_name"), "the model card's front matter is not read"
