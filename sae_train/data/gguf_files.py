"""Language models in GGUF files: transformers reads them, weights are dequantised, and the tokenizer is the file's own.

What transformers would not do as the file says is put right or refused here: rotary scaling that it drops, numbers that
a tokenizer splits digit by digit, a token that it adds, a tokenizer.json beside the file that it would prefer.
"""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_train.errors import UserError, explaining, first_line

SUFFIX = ".gguf"
MAGIC = b"GGUF"
# Pre-tokenizers, by llama.cpp's names, that split off each digit and then split as GPT-2 does.
DIGIT_BY_DIGIT = ("smollm", "starcoder")
SCALING_READ = ("gpt-oss",)  # architectures whose rotary scaling transformers takes over


def check(path: Path) -> None:
    """Refuse a file that is not GGUF, or whose model would come out as another one."""
    with explaining(lambda error: f"cannot read {path}: {first_line(error)}", OSError), path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is not a GGUF file; give a Hugging Face folder, a GGUF file or a hub id.")
    if find_spec("gguf") is None:
        raise UserError(f"{path} is a GGUF file, which takes the package gguf to read: pip install gguf.")
    with explaining(lambda _: f"{path} is cut off or damaged: its GGUF header cannot be read."):
        metadata, tensors = _header(path)
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    scaled = scaling != "none" or any(name.startswith("rope_f") for name in tensors)
    if scaled and architecture not in SCALING_READ:
        raise UserError(
            f"{path} scales its rotary positions, which transformers does not take over from a GGUF file, so its "
            "activations would be others: give the model as a Hugging Face folder or hub id."
        )


def _header(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the metadata, in which arrays are counts, and the tensors' names."""
    from transformers.integrations.gguf import read_gguf_metadata

    return read_gguf_metadata(str(path))


def load_config(path: Path) -> Any:
    """Load the configuration, which takes seconds, once for the plan and the run."""
    return copy.deepcopy(_config(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _config(path: Path, _changed: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)


def load_tokenizer(path: Path) -> Any:
    """Load the file's tokenizer, from an empty folder: a tokenizer.json beside the file would take its place."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as empty:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            empty, gguf_file=str(path.absolute()), local_files_only=True
        )
    metadata, _ = _header(path)
    if len(tokenizer) > metadata["tokenizer.ggml.tokens"]:
        tokenizer = _without_made_up(tokenizer, metadata["tokenizer.ggml.tokens"])
    if metadata.get("tokenizer.ggml.pre") in DIGIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _without_made_up(tokenizer: Any, n_tokens: int) -> Any:
    """Leave out what transformers adds to a vocabulary that lacks GPT-2's <|endoftext|>: an id without a weight."""
    from tokenizers import Tokenizer

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < n_tokens]
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(core)), **tokenizer.special_tokens_map)


@contextmanager
def loading(options: dict[str, Any], config: Any) -> Iterator[dict[str, Any]]:
    """Give what from_pretrained needs beside `options` for a GGUF file, and keep its progress bar off the screen."""
    if "gguf_file" not in options:
        yield {}
        return
    from transformers import GgufConfig

    with redirect_stderr(io.StringIO()):
        yield {"config": config, "quantization_config": GgufConfig(dequantize=True)}
