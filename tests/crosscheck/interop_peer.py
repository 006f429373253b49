"""The other side of interop.py; it runs in an environment with sae-lens, eai-sparsify and dictionary-learning, or with
sae-bench.

    python tests/crosscheck/interop_peer.py JOB.json

Reads our SAEs and writes its own, all with reconstructions of the same x, into the job's folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PACKAGES = ("sae-lens", "eai-sparsify", "dictionary-learning", "sae-bench", "transformer-lens", "torch")
D_SAE, K, STEPS = 512, 8, 30


def main(job_file: Path) -> None:
    """Carry out the job and write its answer."""
    job = json.loads(job_file.read_text())
    folder, torch_threads = Path(job["folder"]), job["threads"]
    torch.set_num_threads(torch_threads)
    torch.manual_seed(0)
    x = load_file(folder / "x.safetensors")["x"]
    if job["side"] == "sae-bench":
        answer: dict[str, Any] = {"unit_norm": {name: _unit_norm(folder / "ours" / name) for name in job["ours"]}}
    else:
        answer = {"saes": []}
        recons = {}
        for key, made_with, recon in _everything(folder, x, job):
            recons[key] = recon.detach().float().contiguous()
            answer["saes"].append([key, made_with])
        save_file(recons, folder / "recons.safetensors")
    answer["versions"] = {package: found for package in PACKAGES if (found := _version(package))}
    Path(job["output"]).write_text(json.dumps(answer))


def _everything(folder: Path, x: torch.Tensor, job: dict[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(key, what read or wrote it, reconstruction): keys of ours begin with read/, of theirs with write/."""
    from sae_lens import SAE

    with torch.no_grad():
        for name in job["ours"]:
            yield f"read/disk/{name}", "SAE.load_from_disk", SAE.load_from_disk(folder / "ours" / name)(x)
            yield f"read/hub/{name}", "SAE.from_pretrained", SAE.from_pretrained(job["repo"], name)(x)
    yield from _sae_lens(folder / "write", x)
    yield from _sparsify(folder / "write", x)
    yield from _dictionary_learning(folder / "write", x)
    yield from _gemma_scope(x, job)


def _sae_lens(folder: Path, x: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
    """SAELens' inference classes with random weights, and its two batch-wise trained ones, saved for inference."""
    import sae_lens as s

    common = {"d_in": x.shape[1], "d_sae": D_SAE}
    made = {
        "standard": s.StandardSAE(s.StandardSAEConfig(**common)),
        "standard-without-b_dec": s.StandardSAE(s.StandardSAEConfig(**common, apply_b_dec_to_input=False)),
        "topk": s.TopKSAE(s.TopKSAEConfig(**common, k=K)),
        "topk-rescaled": s.TopKSAE(s.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)),
        "jumprelu": s.JumpReLUSAE(s.JumpReLUSAEConfig(**common)),
        "gated": s.GatedSAE(s.GatedSAEConfig(**common)),
    }
    for name, sae in made.items():
        _randomise(sae)
        sae.save_model(folder / "sae-lens" / name)
        with torch.no_grad():
            yield f"write/sae-lens/{name}", f"{type(sae).__name__}.save_model", sae(x)
    widths = [D_SAE // 4, D_SAE]
    trained = {
        "batchtopk": s.BatchTopKTrainingSAE(s.BatchTopKTrainingSAEConfig(**common, k=K)),
        "matryoshka": s.MatryoshkaBatchTopKTrainingSAE(
            s.MatryoshkaBatchTopKTrainingSAEConfig(**common, k=K, matryoshka_widths=widths)
        ),
    }
    for name, sae in trained.items():
        for _ in range(STEPS):
            sae.training_forward_pass(_step_input(x))
        sae.save_inference_model(folder / "sae-lens" / name)
        with torch.no_grad():
            recon = s.SAE.load_from_disk(folder / "sae-lens" / name)(x)
        yield f"write/sae-lens/{name}", f"{type(sae).__name__}.save_inference_model", recon


def _step_input(x: torch.Tensor) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    return TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)


@torch.no_grad()
def _randomise(module: torch.nn.Module) -> None:
    """Random values everywhere, so that no bias or threshold is zero by default; rows of unequal norm."""
    for name, p in module.named_parameters():
        p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1 * torch.randn(p.shape))
        if "threshold" in name:
            p.abs_()


def _sparsify(folder: Path, x: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=D_SAE, k=K))
    _randomise(sae)
    sae.save_to_disk(folder / "sparsify" / "layers.3")
    yield "write/sparsify/layers.3", "SparseCoder.save_to_disk", sae(x).sae_out


def _dictionary_learning(folder: Path, x: torch.Tensor) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Its own trainer on x, input scale folded in by it; one class that no trainer makes, with random weights."""
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    where, configs = folder / "dictionary_learning", _trainers(x.shape[1])
    names = list(configs)
    trainSAE(
        iter([x.clone() for _ in range(300)]), list(configs.values()), steps=STEPS, save_dir=str(where),
        normalize_activations=True, device="cpu",
    )  # fmt: skip
    for i, name in enumerate(names):
        (where / f"trainer_{i}").rename(where / name)
    new = AutoEncoderNew(x.shape[1], D_SAE)
    _randomise(new)
    (where / "autoencoder-new").mkdir()
    torch.save(new.state_dict(), where / "autoencoder-new" / "ae.pt")
    config = {"trainer": {"dict_class": "AutoEncoderNew", "layer": 3, "lm_name": "org/lm", "submodule_name": "x"}}
    (where / "autoencoder-new" / "config.json").write_text(json.dumps(config))
    for name in [*names, "autoencoder-new"]:
        sae, config = load_dictionary(str(where / name), "cpu")
        with torch.no_grad():
            by = "torch.save" if name == "autoencoder-new" else "trainSAE"
            yield f"write/dictionary_learning/{name}", f"{by}, {config['trainer']['dict_class']}", sae(x)


def _trainers(d_in: int) -> dict[str, dict[str, Any]]:
    from dictionary_learning import trainers as t
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    common = {"activation_dim": d_in, "dict_size": D_SAE, "layer": 3, "lm_name": "org/lm", "device": "cpu",
              "submodule_name": "resid_post_layer_3", "warmup_steps": 2, "steps": STEPS}  # fmt: skip
    top = common | {"k": K, "threshold_start_step": 0}
    sparse = common | {"sparsity_warmup_steps": 4}
    return {
        "standard": sparse | {"trainer": t.StandardTrainer},
        "gated": sparse | {"trainer": t.GatedSAETrainer},
        "topk": top | {"trainer": t.TopKTrainer},
        "batchtopk": top | {"trainer": t.BatchTopKTrainer},
        "matryoshka": top | {"trainer": MatryoshkaBatchTopKTrainer, "group_fractions": [0.25, 0.75]},
        "jumprelu": sparse | {"trainer": t.JumpReluTrainer},
    }


def _gemma_scope(x: torch.Tensor, job: dict[str, Any]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """No library writes this format; SAELens' readers say what our files of it mean."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    readers = {"npz": loaders.gemma_2_sae_huggingface_loader, "safetensors": loaders.gemma_3_sae_huggingface_loader}
    for kind, (repo, folder) in job["gemma_scope"].items():
        sizes = {"d_in": x.shape[1], "d_sae": D_SAE, "dtype": "float32"}
        cfg, tensors, _ = readers[kind](repo, folder, device="cpu", cfg_overrides=sizes)
        sae = SAE.from_dict(loaders.handle_config_defaulting(cfg))
        sae.process_state_dict_for_loading(tensors)
        sae.load_state_dict(tensors)
        with torch.no_grad():
            yield f"read/gemma_scope/{kind}", readers[kind].__name__, sae(x)


def _unit_norm(folder: Path) -> bool:
    """sae-bench's own check of a decoder."""
    from sae_bench.custom_saes.base_sae import BaseSAE
    from sae_lens import SAE

    return bool(BaseSAE.check_decoder_norms(SAE.load_from_disk(folder)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
