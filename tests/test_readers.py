"""SAEs of other libraries, written here in their layouts: what is read computes their formulas, the rest is refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_train import load_sae
from sae_train.errors import UserError
from sae_train.sae.layouts import DICTIONARIES

D_IN, D_SAE, K = 6, 32, 4
G = torch.Generator().manual_seed(0)
X = 2 * torch.randn(40, D_IN, generator=G)
# Values in each library's own names; the formulas below use these, not what was read.
ENC, DEC = torch.randn(D_SAE, D_IN, generator=G) / 2, torch.randn(D_IN, D_SAE, generator=G) / 4
B_ENC, B_DEC, GATE, MAG, R_MAG = (torch.randn(n, generator=G) / 4 for n in (D_SAE, D_IN, D_SAE, D_SAE, D_SAE))
THRESHOLD = torch.rand(D_SAE, generator=G)


def relu_pre(minus_bias: bool) -> torch.Tensor:
    return ((X - B_DEC if minus_bias else X) @ ENC.T + B_ENC).relu()


def keep_largest(latents: torch.Tensor) -> torch.Tensor:
    return latents * (latents >= latents.topk(K).values[:, -1:])


def gated_latents() -> torch.Tensor:
    s = (X - B_DEC) @ ENC.T
    return (s + GATE > 0) * (R_MAG.exp() * s + MAG).relu()


LINEAR = {"encoder.weight": ENC, "encoder.bias": B_ENC, "decoder.weight": DEC}
MATRICES = {"W_enc": ENC.T, "b_enc": B_ENC, "W_dec": DEC.T, "b_dec": B_DEC}
BUFFERS = {"k": torch.tensor(K), "threshold": torch.tensor(0.3)}
PICKLED = {
    "AutoEncoder": (LINEAR | {"bias": B_DEC}, relu_pre(True)),
    "AutoEncoderNew": (LINEAR | {"decoder.bias": B_DEC}, relu_pre(False)),
    "AutoEncoderTopK": (LINEAR | BUFFERS | {"b_dec": B_DEC}, keep_largest(relu_pre(True))),
    "BatchTopKSAE": (LINEAR | BUFFERS | {"b_dec": B_DEC}, relu_pre(True) * (relu_pre(True) > 0.3)),
    "MatryoshkaBatchTopKSAE": (
        MATRICES | BUFFERS | {"group_sizes": torch.tensor([8, 24])},
        relu_pre(True) * (relu_pre(True) > 0.3),
    ),
    "JumpReluAutoEncoder": (MATRICES | {"threshold": THRESHOLD}, relu_pre(False) * (relu_pre(False) > THRESHOLD)),
    "GatedAutoEncoder": (
        {"encoder.weight": ENC, "decoder.weight": DEC, "decoder_bias": B_DEC, "gate_bias": GATE, "mag_bias": MAG,
         "r_mag": R_MAG},
        gated_latents(),
    ),
}  # fmt: skip


def pickled(folder: Path, name: str, **trainer) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({key: t.clone() for key, t in PICKLED[name][0].items()}, folder / "ae.pt")
    known = {"dict_class": name, "k": K, "layer": 3, "lm_name": "org/lm", "submodule_name": "resid_post_layer_3"}
    config = {"trainer": known | trainer, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_computes(sae, latents: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(X), latents, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sae(X), latents @ DEC.T + B_DEC, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_computes_its_own_formula(name, tmp_path):
    sae = load_sae(pickled(tmp_path, name), allow_pickle=True)
    assert_computes(sae, PICKLED[name][1])
    assert (sae.cfg.hook_name, sae.cfg.model_name, sae.cfg.context_size) == ("blocks.3.hook_resid_post", "org/lm", 128)


def test_a_threshold_that_was_never_set_acts_as_zero(tmp_path):
    pickled(tmp_path, "BatchTopKSAE")
    tensors = PICKLED["BatchTopKSAE"][0] | {"threshold": torch.tensor(-1.0)}
    torch.save(tensors, tmp_path / "ae.pt")
    assert_computes(load_sae(tmp_path, allow_pickle=True), relu_pre(True))


def test_a_pickle_is_read_only_when_that_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="allow_pickle=True"):
        load_sae(pickled(tmp_path, "AutoEncoder"))


class Runs:
    """Unpickles by running a command."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled(tmp_path, "AutoEncoder")
    for data in (pickle.dumps({"bias": Runs()}), pickle.dumps(Runs()), b"no pickle", b""):
        (tmp_path / "ae.pt").write_bytes(data)
        with pytest.raises(UserError, match="something beside tensors"):
            load_sae(tmp_path, allow_pickle=True)
    torch.save({"bias": Runs()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="something beside tensors"):
        load_sae(tmp_path, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("trainer", "words"), [({"dict_class": "CrossCoder"}, "'CrossCoder' is not read"), ({"k": None}, "give k None")]
)
def test_a_class_that_is_not_known_is_refused(trainer, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_sae(pickled(tmp_path, "AutoEncoderTopK", **trainer), allow_pickle=True)


def test_a_pickle_without_its_settings_is_refused(tmp_path):
    (pickled(tmp_path, "AutoEncoder") / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_sae(tmp_path, allow_pickle=True)


JUMPED = relu_pre(False) * (relu_pre(False) > THRESHOLD)


@pytest.mark.parametrize(
    ("repo", "place", "model", "hook"),
    [
        ("google--gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", "google/gemma-2-2b", "hook_resid_post"),
        ("google--gemma-scope-9b-it-mlp", "layer_20/width_16k/average_l0_71", "google/gemma-2-9b-it", "hook_mlp_out"),
    ],
)
def test_gemma_scope_is_read_with_its_origin(repo, place, model, hook, tmp_path):
    folder = tmp_path / repo / place
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in (MATRICES | {"threshold": THRESHOLD}).items()})
    sae = load_sae(folder)
    assert_computes(sae, JUMPED)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == (model, f"blocks.20.{hook}")


def test_gemma_scope_2_is_read_with_its_origin(tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt" / "resid_post" / "layer_13_width_16k_l0_medium"
    folder.mkdir(parents=True)
    tensors = {name.replace("W_", "w_"): t.contiguous() for name, t in MATRICES.items()}
    save_file(tensors | {"threshold": THRESHOLD}, folder / "params.safetensors")
    sae = load_sae(folder)
    assert_computes(sae, JUMPED)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("google/gemma-3-1b-pt", "blocks.13.hook_resid_post")


def test_arrays_that_need_a_pickle_are_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([Runs()], dtype=object))
    with pytest.raises(UserError, match="no archive of arrays"):
        load_sae(tmp_path)


def test_gemma_scopes_embedding_saes_are_refused(tmp_path):
    folder = tmp_path / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=np.zeros(1))
    with pytest.raises(UserError, match="another scale"):
        load_sae(folder)


def sae_lens(folder: Path, cfg: dict, **tensors) -> Path:
    save_file({name: t.contiguous() for name, t in (MATRICES | tensors).items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"} | cfg))
    return folder


def test_saelens_from_before_version_6_is_read(tmp_path):
    cfg = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
           "hook_name": "blocks.5.hook_resid_pre", "model_name": "gpt2", "normalize_activations": False,
           "finetuning_scaling_factor": False}  # fmt: skip
    sae = load_sae(sae_lens(tmp_path, cfg, scaling_factor=torch.ones(D_SAE)))
    assert_computes(sae, keep_largest(relu_pre(True)))
    assert (sae.cfg.hook_name, sae.cfg.model_name) == ("blocks.5.hook_resid_pre", "gpt2")


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu' is not read"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"normalize_activations": True}, "normalize_activations"),
        ({"architecture": "transcoder"}, "'transcoder' is not read"),
    ],
)
def test_saelens_models_that_compute_something_else_are_refused(cfg, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_sae(sae_lens(tmp_path, {"architecture": "standard"} | cfg))


def test_a_scaling_factor_that_scales_is_refused(tmp_path):
    with pytest.raises(UserError, match="scaling_factor"):
        load_sae(sae_lens(tmp_path, {"architecture": "standard"}, scaling_factor=torch.full((D_SAE,), 2.0)))


@pytest.mark.parametrize("cfg", [{"signed": True}, {"transcode": True}, {"activation": "groupmax"}])
def test_sparsify_models_that_compute_something_else_are_refused(cfg, tmp_path):
    save_file({"encoder.weight": ENC, "encoder.bias": B_ENC, "W_dec": DEC.T.contiguous(), "b_dec": B_DEC},
              tmp_path / "sae.safetensors")  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps({"k": K} | cfg))
    with pytest.raises(UserError, match="only topk autoencoders"):
        load_sae(tmp_path)


def test_sparsify_names_its_model_in_the_run_above(tmp_path):
    folder = tmp_path / "layers.3"
    folder.mkdir()
    save_file({"encoder.weight": ENC, "encoder.bias": B_ENC, "W_dec": DEC.T.contiguous(), "b_dec": B_DEC},
              folder / "sae.safetensors")  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({"k": K}))
    (tmp_path / "config.json").write_text(json.dumps({"model": "org/lm", "dataset": "org/text", "ctx_len": 64}))
    sae = load_sae(tmp_path, "layers.3")
    assert_computes(sae, keep_largest(relu_pre(True)))
    assert (sae.cfg.model_name, sae.cfg.dataset_path, sae.cfg.context_size) == ("org/lm", "org/text", 64)
