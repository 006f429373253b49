"""sae-bench's side of `sae-train eval --suite`: its evals on one SAE, by its own code and with its own settings.

    PYTHON suite_bridge.py JOB.json

PYTHON is of an environment with sae-bench; nothing of sae-train is imported. Each eval that is done is told by a line
"@suite done NAME FILE", what goes wrong by the job's answer file. Three things of sae-bench are put aside. It asks
TransformerLens for a model by name; one that has no name there (a folder, most ids of the hub) is read by
TransformerLens' bridge to transformers. Data sets may run code of their own; here, where the user says so. And what is
not at hand it asks for again and again, for minutes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

SEED = 42  # of sae-bench's own runs
LLM_BATCH = 32  # for models that its table of batch sizes does not have
# What run_all_evals_custom_saes.py gives to the core eval.
CORE = {"n_eval_reconstruction_batches": 200, "n_eval_sparsity_variance_batches": 2000, "batch_size_prompts": 16,
        "compute_featurewise_density_statistics": True, "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": True}  # fmt: skip
CORE_NAMES = {"batch_size_prompts": "eval_batch_size_prompts", "llm_dtype": "dtype"}  # of settings as it takes them
UNREACHABLE = ("ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "OfflineModeIsEnabled",
               "LocalEntryNotFoundError", "HfHubHTTPError", "MaxRetryError")  # fmt: skip


class Refused(Exception):
    """What a user can mend, in a sentence."""


def main(job_file: Path) -> int:
    """Run the job's evals in turn; 1 where one fails, with the reason in the answer file."""
    job = json.loads(job_file.read_text())
    name = "set-up"
    try:
        with _asked_code(job), _own_model(job):
            for name in job["evals"]:
                print(f"\n@suite begin {name}", flush=True)
                file = EVALS[name](job, _load_sae(job), dict(job["settings"].get(name) or {}))
                print(f"\n@suite done {name} {file}", flush=True)
    except Exception as error:
        traceback.print_exc()
        answer = {"eval": name, "kind": _kind(error), "error": f"{type(error).__name__}: {error}"}
        if isinstance(error, Refused):
            answer["error"] = str(error)
        temporary = Path(job["answer"])  # in the job's folder, which is removed
        temporary.write_text(json.dumps(answer))
        return 1
    return 0


def _kind(error: BaseException | None) -> str:
    """Whether a user's setting was refused, the hub was not reached, or something else happened."""
    if isinstance(error, Refused):
        return "refused"
    while error is not None:
        if any(kind.__name__ in UNREACHABLE for kind in type(error).__mro__):
            return "hub"
        error = error.__cause__ or error.__context__
    return "other"


@contextlib.contextmanager
def _asked_code(job: dict[str, Any]) -> Iterator[None]:
    """Let data sets run code from the hub only where the job says so."""
    import datasets

    load = datasets.load_dataset

    @functools.wraps(load)
    def asked(*args: Any, **options: Any) -> Any:
        if "trust_remote_code" in options:
            options["trust_remote_code"] = job["trust_remote_code"]
        return load(*args, **options)

    with mock.patch.object(datasets, "load_dataset", asked):
        yield


@contextlib.contextmanager
def _own_model(job: dict[str, Any]) -> Iterator[None]:
    """Let sae-bench's evals have the job's model from TransformerLens, loaded once for all of them."""
    import sae_lens  # noqa: F401 (first: it takes the class itself, not the stand-in)
    import transformer_lens

    @functools.cache
    def load(_name: str, device: str, dtype: Any, **_: Any) -> Any:
        return _load_model(job, transformer_lens, device, dtype)

    kind = _AnyModel("HookedTransformer", (), {"from_pretrained_no_processing": staticmethod(load)})
    kind.original = transformer_lens.HookedTransformer
    with mock.patch.object(transformer_lens, "HookedTransformer", kind):
        general = importlib.import_module("sae_bench.sae_bench_utils.general_utils")
        with mock.patch.object(general, "retry_with_exponential_backoff", lambda **_: lambda function: function):
            yield


class _AnyModel(type):
    """A class that every model is of: sae-bench checks arguments by type, and the bridge's are no HookedTransformer."""

    original: Any

    def __instancecheck__(cls, model: Any) -> bool:
        return True


def _load_model(job: dict[str, Any], transformer_lens: Any, device: str, dtype: Any) -> Any:
    """By the name that TransformerLens has for it, else by its bridge from the folder or the hub."""
    source, code = job["model"], {"trust_remote_code": True} if job["trust_remote_code"] else {}
    try:
        known = transformer_lens.loading_from_pretrained.get_official_model_name(source)
    except ValueError:
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(source, device=device, dtype=dtype, **code)
    return transformer_lens.HookedTransformer.original.from_pretrained_no_processing(
        known, device=device, dtype=dtype, **code
    )


def _load_sae(job: dict[str, Any]) -> Any:
    from sae_lens import SAE

    sae = SAE.load_from_disk(job["sae"], device=job["device"])
    sae.cfg.dtype = job["dtype"]
    return sae


def _core(job: dict[str, Any], sae: Any, given: dict[str, Any]) -> Path:
    """Its core eval on the text that was handed over, or on its own.

    It logs what goes wrong and goes on, so that only the log knows; rows of tokens that come from a folder it would
    look up on the hub.
    """
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_lens.training import activations_store

    taken = inspect.signature(core.multiple_evals).parameters
    allowed = [field.name for field in fields(CoreEvalConfig) if CORE_NAMES.get(field.name, field.name) in taken]
    own = job["text"] or {}
    _check("core", CoreEvalConfig, given, allowed)
    asked = {**CORE, "llm_dtype": job["dtype"], **own, **given}
    out, failures = Path(job["out"]) / "core", _Failures()
    core.logger.addHandler(failures)
    unchecked = mock.patch.object(activations_store, "validate_pretokenized_dataset_tokenizer", lambda *_, **__: None)
    with unchecked if own else contextlib.nullcontext():
        core.multiple_evals(
            selected_saes=[(job["name"], sae)], output_folder=str(out), verbose=True, device=job["device"],
            force_rerun=True, **{CORE_NAMES.get(name, name): value for name, value in asked.items()},
        )  # fmt: skip
    return _result(out, failures.first)


class _Failures(logging.Handler):
    """Keeps the first exception that is logged as an error."""

    first: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and self.first is None:
            self.first = sys.exc_info()[1] or RuntimeError(record.getMessage())


def _by_config(name: str, module: str, config: str, folder: str, **fixed: Any) -> Callable[..., Path]:
    """An eval that takes a configuration; what it keeps on the way is removed with the job's folder."""

    def run(job: dict[str, Any], sae: Any, given: dict[str, Any]) -> Path:
        from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE

        kind = getattr(importlib.import_module(f"sae_bench.evals.{module}.eval_config"), config)
        own = {"model_name": job["model_name"], **fixed}
        allowed = [field.name for field in fields(kind) if field.name not in own]
        size = LLM_NAME_TO_BATCH_SIZE.get(job["model_name"], LLM_BATCH)
        defaults = {"random_seed": SEED, "llm_batch_size": size, "llm_dtype": job["dtype"]}
        settings = _check(name, kind, given, allowed, **defaults, **own)
        out = Path(job["out"])
        importlib.import_module(f"sae_bench.evals.{module}.main").run_eval(
            settings, [(job["name"], sae)], job["device"], str(out if module == "scr_and_tpp" else out / folder),
            force_rerun=True, clean_up_activations=True, save_activations=False,
            artifacts_path=str(out / "artifacts"),
        )  # fmt: skip
        return _result(out / folder)

    return run


def _check(name: str, kind: Any, given: dict[str, Any], allowed: list[str], **own: Any) -> Any:
    """What a user gave, beside our `own`, as sae-bench's class of settings."""
    unknown = sorted(given.keys() - set(allowed))
    if unknown:
        raise Refused(f"{name} has no setting {', '.join(unknown)}: there are {', '.join(sorted(allowed))}")
    try:
        return kind(**own | given)
    except ValueError as error:
        raise Refused(f"{name}: {' '.join(str(error).split())}") from None


def _result(folder: Path, failure: BaseException | None = None) -> Path:
    """The one file of results."""
    files = sorted(folder.glob("*_eval_results.json"))
    if not files:
        raise failure or RuntimeError("no results were written")
    return files[-1]


EVALS = {
    "core": _core,
    "sparse-probing": _by_config("sparse-probing", "sparse_probing", "SparseProbingEvalConfig", "sparse_probing"),
    "scr": _by_config("scr", "scr_and_tpp", "ScrAndTppEvalConfig", "scr", perform_scr=True),
    "tpp": _by_config("tpp", "scr_and_tpp", "ScrAndTppEvalConfig", "tpp", perform_scr=False),
}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
