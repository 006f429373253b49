"""What a run's activations are made from, as run.json keeps it: a resumed run sees where it changed under its name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import LOCAL_NAMES
from sae_train.data.text_files import data_files
from sae_train.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.data.tokens import TokenStream

MOST_HASHED = 4 * 2**30  # bytes of text in all; of larger data the ends of each file are hashed
END_BYTES = 2**20
CLOSE = 0.05  # relative difference that other hardware, thread counts and kernels may make


def describe_text(dataset: str, stream: TokenStream) -> dict[str, Any]:
    """Name the held-out tokens, which are the first of a text, and the files of a local one, by their hashes."""
    held_out = hashlib.sha256(stream.held_out.numpy().tobytes()).hexdigest()
    return {"dataset": dataset, "held_out_tokens": held_out, "files": _describe_files(dataset)}


def _describe_files(dataset: str) -> dict[str, list[Any]]:
    """Size and hash of each file of a local data set, by its path in it."""
    path = Path(dataset).expanduser()
    if dataset in LOCAL_NAMES or not path.exists():
        return {}
    files = data_files(path)
    whole = sum(file.stat().st_size for file in files) <= MOST_HASHED
    root = path.parent if path.is_file() else path
    return {file.relative_to(root).as_posix(): [file.stat().st_size, _hash(file, whole)] for file in files}


def _hash(file: Path, whole: bool) -> str:
    with file.open("rb") as stream:
        if whole:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        start = stream.read(END_BYTES)
        stream.seek(max(0, file.stat().st_size - END_BYTES))
        return hashlib.sha256(start + stream.read()).hexdigest()


def check_unchanged(
    info: dict[str, Any], now: dict[str, Any], since: str = "the run began", instead: str = "start a new run"
) -> None:
    """UserError if the model or the text is not the one that run.json says the run began with.

    What is not known of either is not compared.
    """
    then, problems = info.get("made_from") or {}, []
    model, text = f"the model {info['settings'].get('model')}", f"the text {info.get('dataset')}"
    if then.get("weights") and now.get("weights"):
        problems += _changed_weights(model, then["weights"], now["weights"])
    before, after = then.get("text") or {}, now.get("text") or {}
    files = before.get("files", {}).keys() | after.get("files", {}).keys() if before else ()
    changed = sorted(name for name in files if before["files"].get(name) != after.get("files", {}).get(name))
    if changed:
        problems.append(f"{text} ({_some(changed)})")
    elif before and before["held_out_tokens"] != after.get("held_out_tokens"):
        problems.append(f"{text}, or the tokenizer of {model},")
    if then.get("packages") and then["packages"] != now.get("packages"):
        problems.append(f"{text} (other versions of packages)")
    if problems:
        raise UserError(f"{' and '.join(problems)} changed since {since}: put back what it was, or {instead}")


def _changed_weights(model: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    then, now = before.get("revision"), after.get("revision")
    if then and now:
        return [f"{model} (revision {now} instead of {then})"] if now != then else []
    kinds = [kind for kind in ("files", "beside") if kind in before and kind in after]  # earlier versions kept one
    one, two = ({file["name"]: (file["bytes"], file["sha256"]) for kind in kinds for file in each[kind]}
                for each in (before, after))  # fmt: skip
    changed = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return [f"{model} ({_some(changed)})"] if changed else []


def check_same_activations(before: Float[Tensor, "n d_in"], now: Float[Tensor, "n d_in"], name: str) -> None:
    """UserError if held-out activations are not, up to rounding, those of when the run began."""
    if before.shape == now.shape and float((before - now).norm()) <= CLOSE * float(before.norm()):
        return
    raise UserError(
        f"the activations of {name} are not those that the run began with: what makes them changed; put back what it "
        "was, or start a new run"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
