"""What a release holds beside weights and card: metadata as SAELens writes it, how often latents fire, results where
sae-bench keeps its own, and an entry for SAELens' registry.

Names and layouts are those of sae-lens 6.54.12 (since 6.47 it writes the same metadata) and sae-bench 0.6.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sae_train.config import leaves
from sae_train.config.record import EvalFile, fits
from sae_train.files import read_json, write_json, write_text
from sae_train.publishing.hub import Origin
from sae_train.report.text import number
from sae_train.sae.files import SAE_LENS_VERSION, SPARSITY, load_sparsity, sae_lens_cfg
from sae_train.sae.model import SAE, SAEConfig
from sae_train.sae.tensor_files import write_tensors

# What SAELens calls the architectures in training; one of a user's own keeps its name.
TRAINED_AS = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
RESULTS = Path("eval_results", "absorption")  # where sae-bench writes those of this eval
REGISTRY = "pretrained_saes.yaml"
HOW_TO_REGISTER = """\
# SAEs of this repo for SAELens' registry: add this entry to sae_lens/pretrained_saes.yaml of
# https://github.com/decoderesearch/SAELens in a pull request, and SAE.from_pretrained({release!r}, {first!r})
# loads them by that name. SAE.from_pretrained({repo!r}, {first!r}) loads them without it.
"""


def training_metadata(entry: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What SAELens keeps of an SAE's training, as far as its run says it.

    The version that SAELens trained it with is none: where the field is missing, SAELens takes its own.
    """
    final, arch = entry["final"], entry["arch"]
    asked = {name: value for name, value in (info.get("settings") or {}).items() if leaves().get(name) == "train"}
    details = asked | {name: entry[name] for name in ("l0", "seed") if entry.get(name) is not None}
    dead = number(final.get("sparsity/dead_fraction"))
    known = {
        "l0": number(final.get("metrics/l0")),
        "num_dead_features": None if dead is None else round(dead * entry["width"]),
        "training_architecture": TRAINED_AS.get(arch, arch),
        "training_architecture_details": details or None,
        "training_tokens": info.get("tokens"),
    }
    return {name: value for name, value in known.items() if value is not None} | {"sae_lens_training_version": None}


def stage_sparsity(folder: Path, staged: Path, d_sae: int) -> bool:
    """Take over how often latents fire, where an SAE's folder says it; UserError for a file of another SAE."""
    values = load_sparsity(folder, d_sae)
    if values is None:
        return False
    write_tensors({"sparsity": values}, staged / SPARSITY)
    return True


def stage_result(folder: Path, staged: Path, sae: SAE, name: str, origin: Origin) -> bool:
    """Put a valid first-letter result where sae-bench looks for it, without this machine's paths; say if there is one.

    Its file names are a release's and an SAE's: the repo, and the folder in it.
    """
    path = folder / "absorption.json"
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict) or content.get("eval_type_id") != "absorption_first_letter":
        return False
    if not fits(EvalFile, content) or not isinstance(content.get("eval_config"), dict):
        return False
    if not content["eval_result_unstructured"]["valid"]:
        return False
    result = _without_paths(content) | {
        "sae_lens_id": name,
        "sae_lens_release_id": origin.repo,
        "sae_lens_version": SAE_LENS_VERSION,
        "sae_cfg_dict": _flat_cfg(sae.cfg),
    }
    result["eval_config"]["model_name"] = origin.model
    file = f"{origin.repo}_{name}_eval_results.json".replace("/", "_")
    write_json(staged / RESULTS / file, result)
    return True


def _flat_cfg(cfg: SAEConfig) -> dict[str, Any]:
    """The configuration with its metadata beside the rest, where sae-bench's figures look for the training tokens."""
    written = sae_lens_cfg(cfg)
    return written | written["metadata"]


def _without_paths(value: Any) -> Any:
    """The same, with the last part alone of what is a path of this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value


def write_registry(staged: Path, entries: list[dict[str, Any]], origin: Origin) -> None:
    """Write the entry for SAELens' registry, with a word on what to do with it."""
    release = origin.repo.split("/")[-1]
    saes = []
    for entry in entries:
        final = entry["final"]
        figures = {
            "l0": number(final.get("metrics/l0")),
            "variance_explained": number(final.get("metrics/explained_variance")),
        }
        known = {name: float(f"{value:.6g}") for name, value in figures.items() if value is not None}
        saes.append({"id": entry["name"], "path": entry["name"], **known})
    registered = {release: {"conversion_func": None, "model": origin.model, "repo_id": origin.repo, "saes": saes}}
    how = HOW_TO_REGISTER.format(release=release, first=entries[0]["name"], repo=origin.repo)
    write_text(staged / REGISTRY, how + yaml.safe_dump(registered, sort_keys=False))
