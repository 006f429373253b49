"""SAEs on the hub: fetches a folder of a repo to this disk. Whatever goes wrong becomes one sentence."""

from __future__ import annotations

import errno
import glob
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sae_train.errors import UserError, explaining

BY_STATUS = {
    401: "the hub does not accept the token: log in by `hf auth login` or set HF_TOKEN to one that may write",
    403: "the token has no right to do this: take one that may write to the repo",
    404: "there is no such repo, or the token may not see it",
    409: "the repo was changed meanwhile: run the same command again",
    412: "the repo was changed meanwhile: run the same command again",
    413: "the hub finds it too large",
    429: "the hub has had too many requests: wait some minutes and run the same command again",
}


def fetch(repo: str, folder: str | None, names: Sequence[str], revision: str | None = None) -> Path:
    """Bring those of the named files that a repo's folder (or the repo itself) has; return the local folder.

    What was fetched before serves without a network. UserError lists the repo's SAEs where the folder has none.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{folder.strip('/')}/" if folder else ""
    patterns = [glob.escape(prefix) + name for name in names] + ["config.json"]
    named = f"{repo}/{prefix}".removesuffix("/")
    with hub_errors(f"no SAE {named!r} is in a folder here, and it cannot be had from the hub"), quiet_client():
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
        fetched = [name for name in names if (root / prefix / name).is_file()]
        if not [name for name in fetched if not name.endswith(".json")]:
            raise UserError(_no_sae_there(repo, folder, names, revision))
    return root / prefix


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's advice and retries off stderr, and its bars where nobody watches; errors still raise."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, hidden = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not hidden:
            enable_progress_bars()


def hub_errors(what: str) -> AbstractContextManager[None]:
    """Turn what the hub's client, the network or the disk raises into one sentence that starts with `what`."""
    return explaining(lambda error: f"{what}: {_reason(error)}.")


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    failed = f"the connection failed or broke off ({words[:200].rstrip('.')}); run the same command again"
    return known_reason(error) or failed


def known_reason(error: Exception) -> str | None:
    """Why the hub or the disk refused, in words; None for what neither of them said."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return "HF_HUB_OFFLINE is set, which keeps everything off the network"
    if any(isinstance(e, LocalTokenNotFoundError) for e in chain):
        return BY_STATUS[401]
    for e in chain:
        if isinstance(e, HfHubHTTPError) and e.response is not None:
            status = e.response.status_code
            failed = "the hub has failed: run the same command again later" if status >= 500 else "the hub refused"
            return f"{BY_STATUS.get(status, failed)} (HTTP {status})"
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            return "the disk is full"
    return None


def _no_sae_there(repo: str, folder: str | None, names: Sequence[str], revision: str | None) -> str:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repo, revision=revision)
    weights = [f"/{name}" for name in names if not name.endswith(".json")]
    saes = sorted({file.removesuffix(name) for file in files for name in weights if file.endswith(name)})
    where = f"its folder {folder!r}" if folder else "its top folder"
    hint = f"name one of {some(saes)}" if saes else "nor has another of its folders"
    layers = [file for file in files if file.endswith(".sae.pt")]
    if layers:
        hint = f"name one of its files, such as {layers[0]}, with allow_pickle=True, or --allow-pickle"
    if any(Path(file).name == "ae.pt" for file in files) and "ae.pt" not in names:
        hint = "its SAEs are pickled (ae.pt), which are read only with allow_pickle=True, or --allow-pickle"
    return f"{repo} has no readable SAE in {where}: {hint}."


def some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
