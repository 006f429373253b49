"""Llama Scope's and Qwen-Scope's files compute what their authors' code does; SAELens' short names of models."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_readers import B_DEC, B_ENC, D_IN, D_SAE, DEC, ENC, LINEAR, MATRICES, K, X, assert_computes, sae_lens

from sae_train import load_sae
from sae_train.errors import UserError
from sae_train.sae.fetch import fetch
from sae_train.sae.layouts import files_of_layouts, hub_id

LONG_ROWS = DEC * (0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(5)))
NORM, THETA = 17.125, 0.6
HOOK = "blocks.19.hook_resid_post"
LLAMA = {
    "dtype": "torch.bfloat16", "hook_point_in": HOOK, "hook_point_out": HOOK, "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 8, "d_model": D_IN, "d_sae": D_SAE,
    "act_fn": "jumprelu", "jump_relu_threshold": THETA, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": NORM, "out": NORM}, "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False, "top_k": 50, "l1_coefficient": 8e-05, "tp_size": 1,
}  # fmt: skip


def llama_scope(folder: Path, **changes) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    tensors = LINEAR | {"decoder.weight": LONG_ROWS, "decoder.bias": B_DEC}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(LLAMA | changes))
    return folder


def by_the_authors_code(scale: float, pre_encoder: bool = False, decoder_norm: bool = True) -> torch.Tensor:
    """x̂ as lm-saes computes it, step by step in normalised activations, brought back to raw ones."""
    x = X * scale - (B_DEC if pre_encoder else 0)
    hidden = (x @ ENC.T + B_ENC) / scale
    scores = hidden * LONG_ROWS.norm(dim=0) if decoder_norm else hidden
    return (hidden * scores.gt(THETA)) @ LONG_ROWS.T + B_DEC / scale


@pytest.mark.parametrize("options", [{}, {"pre_encoder": True}, {"decoder_norm": False}], ids=str)
def test_llama_scope_computes_what_its_authors_code_does(options, tmp_path):
    names = {"pre_encoder": "apply_decoder_bias_to_pre_encoder", "decoder_norm": "sparsity_include_decoder_norm"}
    changes = {names[key]: value for key, value in options.items()}
    sae = load_sae(llama_scope(tmp_path / "Llama3_1-8B-Base-L19R-8x", **changes))
    want = by_the_authors_code(math.sqrt(D_IN) / NORM, **options)
    with torch.no_grad():
        torch.testing.assert_close(sae(X), want, rtol=1e-5, atol=1e-4)
    assert 0 < (sae.encode(X) > 0).float().mean() < 1
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("meta-llama/Llama-3.1-8B", HOOK)


def test_llama_scope_that_is_folded_already_is_not_scaled(tmp_path):
    sae = load_sae(llama_scope(tmp_path / "L19R", norm_activation="inference"))
    with torch.no_grad():
        torch.testing.assert_close(sae(X), by_the_authors_code(1.0), rtol=1e-5, atol=1e-5)
    assert sae.cfg.model_name == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hook_point_out": "blocks.19.hook_mlp_out"}, "transcoders are not read"),
        ({"dataset_average_activation_norm": {"in": 1.0, "out": 2.0}}, "transcoders are not read"),
        ({"act_fn": "topk"}, "act_fn 'topk' is not read"),
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise'"),
        ({"dataset_average_activation_norm": None}, "which is missing"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 0}}, "greater than 0"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"d_model": D_IN + 1}, "give d_model 7 and its weights have 6"),
    ],
)
def test_llama_scope_files_of_other_things_are_refused_in_a_sentence(changes, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        load_sae(llama_scope(tmp_path / "x", **changes))
    assert "\n" not in str(caught.value)


def test_incomplete_and_later_files_of_openmoss_are_refused_in_a_sentence(tmp_path):
    folder = llama_scope(tmp_path / "x")
    (folder / "checkpoints" / "final.safetensors").unlink()
    with pytest.raises(UserError, match=r"final\.safetensors does not exist"):
        load_sae(folder)
    later = tmp_path / "later"
    later.mkdir()
    save_file({"encoder.weight": ENC}, later / "sae_weights.safetensors")
    (later / "config.json").write_text(json.dumps({"hook_point_in": HOOK, "act_fn": "jumprelu"}))
    with pytest.raises(UserError, match="later layout of OpenMOSS"):
        load_sae(later)


def qwen_scope(folder: Path, layer: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"layer{layer}.sae.pt"
    torch.save({"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC}, file)
    return file


def test_qwen_scope_computes_its_formula_with_the_k_of_its_repositorys_name(tmp_path):
    width = 1024
    file = tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W1K-L0_{K}" / "layer20.sae.pt"
    file.parent.mkdir()
    enc = torch.randn(width, D_IN, generator=torch.Generator().manual_seed(3))
    dec, b_enc = torch.randn(D_IN, width, generator=torch.Generator().manual_seed(4)), torch.linspace(-1, 1, width)
    torch.save({"W_enc": enc, "W_dec": dec, "b_enc": b_enc, "b_dec": B_DEC}, file)
    values, indices = (X @ enc.T + b_enc).topk(K)
    latents = torch.zeros(len(X), width).scatter(1, indices, values)
    for sae in (load_sae(file, allow_pickle=True), load_sae(file.parent, "layer20.sae.pt", allow_pickle=True)):
        with torch.no_grad():
            torch.testing.assert_close(sae(X), latents @ dec.T + B_DEC, rtol=1e-4, atol=1e-4)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("Qwen/Qwen3-1.7B-Base", "blocks.20.hook_resid_post")


def test_qwen_scope_files_that_cannot_be_read_are_refused_in_a_sentence(tmp_path):
    file = qwen_scope(tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    with pytest.raises(UserError, match="allow_pickle=True"):
        load_sae(file)
    with pytest.raises(UserError, match=f"give width 32768 and its weights have {D_SAE}"):
        load_sae(file, allow_pickle=True)
    with pytest.raises(UserError, match=r"choose one of .*layer20\.sae\.pt"):
        load_sae(file.parent, allow_pickle=True)
    with pytest.raises(UserError, match="in the name of Qwen-Scope's repository"):
        load_sae(qwen_scope(tmp_path / "mine"), allow_pickle=True)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_sae(file, allow_pickle=True)


def test_of_the_hub_the_files_of_one_sae_are_fetched(tmp_path, monkeypatch):
    """The cache's folders stand for the hub: what is asked for, and where it is then."""
    from huggingface_hub import HfApi

    asked = []
    qwen = tmp_path / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W1K-L0_4" / "snapshots" / "abc"
    qwen_scope(qwen)
    llama = tmp_path / "models--fnlp--Llama3_1-8B-Base-LXR-8x" / "snapshots" / "abc"
    llama_scope(llama / "Llama3_1-8B-Base-L19R-8x")

    def download(repo, revision, allow_patterns):
        asked.extend(allow_patterns)
        return qwen if repo.startswith("Qwen") else llama

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=f"give width 1024 and its weights have {D_SAE}"):
        load_sae("Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_4", "layer20.sae.pt", allow_pickle=True)
    assert asked == ["layer20.sae.pt", "config.json"]
    assert load_sae("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L19R-8x").cfg.model_name.endswith("Llama-3.1-8B")
    names = ["layer0.sae.pt", "Llama3_1-8B-Base-L0R-8x/checkpoints/final.safetensors"]
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: names[:1])
    with pytest.raises(UserError, match=r"such as layer0\.sae\.pt, with allow_pickle=True"):
        fetch("Qwen/x", None, files_of_layouts(False))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: names[1:])
    with pytest.raises(UserError, match="name one of Llama3_1-8B-Base-L0R-8x"):
        fetch("fnlp/x", None, files_of_layouts(False))


SHORT = ["gpt2-small", "pythia-70m-deduped", "gemma-2-2b", "gemma-2-9b-it", "gemma-2-27b", "gemma-2b", "gemma-2b-it",
         "mistral-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b"]  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_saelens_short_names_of_models_are_what_transformerlens_means_by_them(name):
    from transformer_lens.supported_models import MODEL_ALIASES

    ids = {alias: hub for hub, aliases in MODEL_ALIASES.items() for alias in aliases}
    assert hub_id(name) == ids[name]


@pytest.mark.parametrize("name", ["gpt2", "google/gemma-2-2b", "speller", "org/pythia-70m", "", None])
def test_names_that_are_no_short_ones_stay(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("cfg", [{"model_name": "gpt2-small"}, {"metadata": {"model_name": "gpt2-small"}}])
def test_an_old_sae_names_its_model_by_the_hubs_id(cfg, tmp_path):
    assert load_sae(sae_lens(tmp_path, {"architecture": "standard"} | cfg)).cfg.model_name == "gpt2"
    assert_computes(load_sae(tmp_path), ((X - B_DEC) @ MATRICES["W_enc"] + B_ENC).relu())
