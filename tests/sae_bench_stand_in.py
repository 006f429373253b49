"""A stand-in for an environment with sae-bench: an interpreter with small packages that note what they are given and
write results of sae-bench 0.6.0's layout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

NOTE = """
import json, os
def note(**what):
    with open(os.environ["STAND_IN_NOTES"], "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")
def fails(name):
    how = os.environ.get("STAND_IN_FAILS", "")
    if how == "crash " + name:
        os._exit(9)
    if how == "hub " + name:
        raise ConnectionError(f"Couldn't reach 'some/texts of {name}' on the Hub")
    if how == "other " + name:
        raise RuntimeError("two tensors\\nof other shapes")
    if how == "silence " + name:
        import time
        print("waiting", os.getpid(), flush=True)
        time.sleep(120)
def write(folder, release, metrics, **beside):
    os.makedirs(folder, exist_ok=True)
    content = {"eval_result_metrics": metrics, "sae_lens_release_id": release, "sae_lens_id": "custom_sae", **beside}
    with open(os.path.join(folder, f"{release}_custom_sae_eval_results.json"), "w") as file:
        json.dump(content, file)
"""
SAE_LENS = """
import json, os
from types import SimpleNamespace
from stand_in_notes import note
class SAE:
    @classmethod
    def load_from_disk(cls, path, device="cpu"):
        sae = cls()
        with open(os.path.join(path, "cfg.json")) as file:
            sae.cfg = SimpleNamespace(**json.load(file))
        note(sae=sae.cfg.__dict__, files=sorted(os.listdir(path)), device=device)
        return sae
"""
DATASETS = """
from stand_in_notes import note
def load_dataset(name, **options):
    note(loaded=name, **options)
"""
TRANSFORMER_LENS = """
from types import SimpleNamespace
from stand_in_notes import note
def known(name):
    if name != "gpt2":
        raise ValueError(f"{name} not found")
    return "gpt2"
loading_from_pretrained = SimpleNamespace(get_official_model_name=known)
class HookedTransformer:
    @classmethod
    def from_pretrained_no_processing(cls, name, **options):
        note(by_name=name, **options)
        return cls()
"""
MODEL_BRIDGE = """
import os
from stand_in_notes import note
class TransformerBridge:
    @classmethod
    def boot_transformers(cls, source, **options):
        note(bridged=source, there=sorted(os.listdir(source)) if os.path.isdir(source) else [], **options)
        return cls()
"""
UTILS = """
def retry_with_exponential_backoff(retries=5, **options):
    raise AssertionError("what is not there is asked for again and again")
"""
CORE = """
import logging
from dataclasses import dataclass
from datasets import load_dataset
from transformer_lens import HookedTransformer
from stand_in_notes import fails, note, write
from sae_bench.sae_bench_utils import general_utils
logger = logging.getLogger(__name__)
def multiple_evals(selected_saes, n_eval_reconstruction_batches, n_eval_sparsity_variance_batches,
                   eval_batch_size_prompts=8, compute_featurewise_density_statistics=False,
                   compute_featurewise_weight_based_metrics=False, exclude_special_tokens_from_reconstruction=False,
                   dataset="Skylion007/openwebtext", context_size=128, output_folder="eval_results", verbose=False,
                   dtype="float32", device="cuda", force_rerun=False):
    given = dict(locals())
    [(release, sae)] = given.pop("selected_saes")
    import os, sys
    note(eval="core", release=release, texts=sorted(os.listdir(dataset)) if os.path.isdir(dataset) else None, **given)
    load_dataset(dataset, split="train", trust_remote_code=True)
    if os.path.isdir(dataset):
        from shutil import copyfile
        copyfile(os.path.join(dataset, "train.parquet"), os.environ["STAND_IN_NOTES"] + ".parquet")
    load = general_utils.retry_with_exponential_backoff(retries=5)(HookedTransformer.from_pretrained_no_processing)
    assert isinstance(load("speller", device=device, dtype=dtype), HookedTransformer)
    try:
        fails("core")
    except (ConnectionError, RuntimeError) as error:
        logger.error(f"Failed to evaluate: {error}")
        return []
    for done in range(3):
        sys.stderr.write(f"\\rReconstruction Batches:  {done}0%|##  | {done}/3 [00:00<00:01,  1.00it/s]")
    write(output_folder, release, {
        "model_behavior_preservation": {"kl_div_score": -1, "kl_div_with_ablation": 8.6, "kl_div_with_sae": 0.52},
        "model_performance_preservation": {"ce_loss_score": 0.9462, "ce_loss_with_ablation": 12.5,
                                           "ce_loss_with_sae": 4.3, "ce_loss_without_sae": 3.8},
        "reconstruction_quality": {"explained_variance": 0.5012, "explained_variance_legacy": 0.7221, "mse": 1.67,
                                   "cossim": 0.8641},
        "shrinkage": {"l2_norm_in": 74.0, "l2_norm_out": 62.5, "l2_ratio": 0.869, "relative_reconstruction_bias": 1.0},
        "sparsity": {"l0": 7.97, "l1": 114.9}, "token_stats": {"total_tokens_eval_reconstruction": 16384},
        "misc_metrics": {"frac_alive": 0.9961},
    }, eval_type_id="core", eval_config={"dataset": dataset, "context_size": context_size})
"""
CORE_CONFIG = """
from dataclasses import dataclass
@dataclass
class CoreEvalConfig:
    model_name: str = ""
    llm_dtype: str = "float32"
    batch_size_prompts: int = 16
    n_eval_reconstruction_batches: int = 10
    n_eval_sparsity_variance_batches: int = 1
    dataset: str = "Skylion007/openwebtext"
    context_size: int = 128
    compute_kl: bool = False
    compute_featurewise_density_statistics: bool = False
    exclude_special_tokens_from_reconstruction: bool = False
    verbose: bool = False
"""
RUN_EVAL = """
import os
from dataclasses import asdict
from transformer_lens import HookedTransformer
from stand_in_notes import fails, note, write
def run_eval(config, selected_saes, device, output_path, force_rerun=False, clean_up_activations=False,
             save_activations=True, artifacts_path="artifacts"):
    kind = {True: "scr", False: "tpp", None: "sparse-probing"}[getattr(config, "perform_scr", None)]
    [(release, sae)] = selected_saes
    note(eval=kind, release=release, config=asdict(config), force_rerun=force_rerun, save=save_activations,
         artifacts=artifacts_path)
    HookedTransformer.from_pretrained_no_processing(config.model_name, device=device, dtype=config.llm_dtype)
    fails(kind)
    metrics = {
        "sparse-probing": {"llm": {"llm_test_accuracy": 0.95, "llm_top_1_test_accuracy": 0.6,
                                   "llm_top_2_test_accuracy": 0.65, "llm_top_10_test_accuracy": None},
                           "sae": {"sae_test_accuracy": 0.94, "sae_top_1_test_accuracy": 0.71,
                                   "sae_top_2_test_accuracy": 0.77, "sae_top_10_test_accuracy": None}},
        "scr": {"scr_metrics": {"scr_metric_threshold_2": 0.1, "scr_metric_threshold_10": 0.2,
                                "scr_dir1_threshold_2": 1}},
        "tpp": {"tpp_metrics": {"tpp_threshold_2_total_metric": 0.01, "tpp_threshold_10_total_metric": 0.03}},
    }[kind]
    where = output_path if kind == "sparse-probing" else os.path.join(output_path, kind)
    write(where, release, metrics, eval_type_id=kind, eval_config=asdict(config))
"""
CONFIG = """
from pydantic.dataclasses import dataclass
from dataclasses import field
@dataclass
class {name}:
    random_seed: int = 0
    dataset_names: list[str] = field(default_factory=lambda: ["LabHC/bias_in_bios_class_set1"])
    {own}: int = 4000
    llm_batch_size: int | None = None
    llm_dtype: str = ""
    model_name: str = ""
"""
FILES = {
    "stand_in_notes.py": NOTE,
    "datasets.py": DATASETS,
    "sae_lens/__init__.py": SAE_LENS,
    "sae_lens/training/activations_store.py": "def validate_pretokenized_dataset_tokenizer(*_, **__): pass",
    "transformer_lens/__init__.py": TRANSFORMER_LENS,
    "transformer_lens/model_bridge.py": MODEL_BRIDGE,
    "sae_bench/sae_bench_utils/general_utils.py": UTILS,
    "sae_bench/sae_bench_utils/activation_collection.py": 'LLM_NAME_TO_BATCH_SIZE = {"gemma-2-2b": 32}',
    "sae_bench/evals/core/main.py": CORE,
    "sae_bench/evals/core/eval_config.py": CORE_CONFIG,
    "sae_bench/evals/sparse_probing/main.py": RUN_EVAL,
    "sae_bench/evals/sparse_probing/eval_config.py": CONFIG.format(
        name="SparseProbingEvalConfig", own="probe_train_set_size"
    ),
    "sae_bench/evals/scr_and_tpp/main.py": RUN_EVAL,
    "sae_bench/evals/scr_and_tpp/eval_config.py": CONFIG.format(name="ScrAndTppEvalConfig", own="train_set_size")
    + "    perform_scr: bool = True\n",
}
VERSIONS = {"sae-bench": "0.6.0", "sae-lens": "6.54.12", "transformer-lens": "3.9.0"}


class StandIn:
    """The interpreter, and what its packages noted; `fails`: "hub core", "other core", "crash scr" and the like."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        packages = folder / "packages"
        for name, text in FILES.items():
            (packages / name).parent.mkdir(parents=True, exist_ok=True)
            (packages / name).write_text(text)
        for package, version in VERSIONS.items():
            info = packages / f"{package.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
        self.python.chmod(0o755)
        self.file = folder / "notes"
        self._patch = monkeypatch
        monkeypatch.setenv("STAND_IN_NOTES", str(self.file))

    def fail(self, how: str) -> None:
        self._patch.setenv("STAND_IN_FAILS", how)

    def notes(self, *names: str) -> list[dict[str, Any]]:
        """What was noted, of those notes that have one of the names; all of it without names."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        found = [json.loads(line) for line in lines]
        return [note for note in found if not names or any(name in note for name in names)]


def is_running(pid: int) -> bool:
    """Whether a process lives, as far as the system says."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
