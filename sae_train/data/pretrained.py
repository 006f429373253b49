"""In: the name of a model (embedded, local folder, hub id) or dataset on the hub.
Out: where to load it from, its tokenizer, and one sentence for whatever goes wrong on the way."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sae_train.errors import UserError, explaining, first_line

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"


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
    """Find what to load: the embedded folder, a local folder, or a hub id."""
    folder = EMBEDDED if name == "speller" else Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"the folder {name} has no config.json: it is not a Hugging Face model folder.")
        return str(folder), {"local_files_only": True}
    if name == "speller" or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise UserError(f"there is no model folder {name!r}; give a Hugging Face folder, a hub id or speller.")
    return name, {"local_files_only": not hub_answers(name, "model")}


def load_errors(name: str) -> AbstractContextManager[None]:
    """Turn what transformers, safetensors or the hub's client raises for bad input into one sentence."""
    if Path(name).expanduser().is_dir() or name == "speller":
        return explaining(lambda error: f"cannot load the model in {name}: {first_line(error)}")
    return explaining(
        lambda _: (
            f"cannot load {name!r}: no folder of this name is here, and the hub does not give it (no "
            "network, not in the local cache, gated, or no such model); give a local model folder or speller."
        )
    )


def load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """Load the tokenizer, taking a tokenizer.json as it is where the folder declares no class of its own.

    AutoTokenizer would put the family's rules in its place for some model types (Qwen 2, Phi 3).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    declared = get_tokenizer_config(source, **options).get("tokenizer_class")
    plain = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(source, **options)


def quiet() -> None:
    """Silence progress bars and advice on stderr; errors still raise."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
