"""What other libraries' files say of an SAE: a setting that changes its function is acted on, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_readers import D_IN, D_SAE, JUMPED, MATRICES, THRESHOLD, K, X, assert_computes, pickled, relu_pre, sae_lens

from sae_train import load_sae
from sae_train.errors import UserError
from sae_train.sae.files import save_sae
from sae_train.sae.model import SAE, SAEConfig, fold_decoder_norm

OF_OTHER_ACTIVATIONS = [
    ("center_writing_weights", {"model_from_pretrained_kwargs": {"center_writing_weights": True}}),
    ("checkpoint_index", {"model_from_pretrained_kwargs": {"checkpoint_index": 3}}),
    ("fold_ln", {"model_from_pretrained_kwargs": {"fold_ln": True}, "hook_name": "blocks.1.ln1.hook_normalized"}),
    ("hook_name_out", {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}),
    ("hook_head_index", {"hook_head_index": 0}),
    ("seqpos_slice", {"seqpos_slice": [5, -5]}),
    ("randomize_llm_weights", {"randomize_llm_weights": "true"}),
]


@pytest.mark.parametrize("place", ["top", "metadata"])
@pytest.mark.parametrize(("name", "settings"), OF_OTHER_ACTIVATIONS, ids=[name for name, _ in OF_OTHER_ACTIVATIONS])
def test_saes_of_other_activations_are_refused_by_the_settings_name(name, settings, place, tmp_path):
    cfg = settings if place == "top" else {"metadata": settings}
    with pytest.raises(UserError, match=name) as caught:
        load_sae(sae_lens(tmp_path, {"architecture": "standard"} | cfg))
    assert str(caught.value).count("\n") == 0


def test_settings_that_change_no_activation_here_are_let_through(tmp_path):
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": True},
                "hook_name": "blocks.1.hook_resid_post", "seqpos_slice": [1, None], "hook_head_index": None,
                "exclude_special_tokens": [0, 1], "sae_lens_version": "6.0.0", "my_note": {"a": [1]}}  # fmt: skip
    training = {"lr": 1e-3, "l1_coefficient": 5.0, "dead_feature_window": 9, "seed": 7, "is_dataset_tokenized": True}
    sae = load_sae(sae_lens(tmp_path, {"architecture": "standard", "metadata": metadata} | training))
    assert_computes(sae, relu_pre(True))
    assert sae.cfg.hook_name == "blocks.1.hook_resid_post" and sae.cfg.metadata["my_note"] == {"a": [1]}


@pytest.mark.parametrize("word", ["False", "false", 0])
def test_truth_values_in_words_mean_what_they_say(word, tmp_path):
    cfg = {"architecture": "standard", "apply_b_dec_to_input": word, "prepend_bos": word}
    sae = load_sae(sae_lens(tmp_path, cfg))
    assert_computes(sae, relu_pre(False))
    assert sae.cfg.prepend_bos is False


def test_names_from_before_version_3_are_read(tmp_path):
    sae = load_sae(sae_lens(tmp_path, {"hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2}))
    assert sae.cfg.hook_name == "blocks.2.hook_resid_pre"
    with pytest.raises(UserError, match="hook_head_index"):
        load_sae(sae_lens(tmp_path, {"hook_point_head_index": 4}))


@pytest.mark.parametrize(("setting", "value"), [("input_transform", "log"), ("absolute_values", True)])
def test_a_setting_that_nobody_knows_is_refused_unless_it_is_off(setting, value, tmp_path):
    with pytest.raises(UserError, match=f"{setting} .* is not known"):
        load_sae(sae_lens(tmp_path, {"architecture": "standard", setting: value}))
    assert_computes(load_sae(sae_lens(tmp_path, {"architecture": "standard", setting: None})), relu_pre(True))


def sparsify(folder: Path, cfg: dict, run: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    tensors = {names.get(name, name): t.t() if name == "W_enc" else t for name, t in MATRICES.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K} | cfg))
    if run is not None:
        (folder.parent / "config.json").write_text(json.dumps(run))
    return folder


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda f: sae_lens(f, {"d_in": D_IN + 1}), "give d_in 7 and its weights have 6"),
        (lambda f: sae_lens(f, {"d_sae": 5}), "give d_sae 5 and its weights have 32"),
        (lambda f: sparsify(f, {"d_in": 7}), "give d_in 7"),
        (lambda f: sparsify(f, {"num_latents": 64}), "give num_latents 64"),
        (lambda f: pickled(f, "AutoEncoder", activation_dim=7), "give activation_dim 7"),
        (lambda f: pickled(f, "AutoEncoder", dict_size=64), "give dict_size 64"),
        (
            lambda f: sae_lens(f, {"architecture": "topk", "k": 4, "activation_fn_kwargs": {"k": 5}}),
            "k 4 and k 5",
        ),
    ],
)  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(write, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_sae(write(tmp_path), allow_pickle=True)


@pytest.mark.parametrize(
    ("cfg", "run", "words"),
    [
        ({}, {"sae": {"transcode": True}, "ctx_len": 64}, "transcode: of sparsify"),
        ({}, {"sae": {}, "transcode": True}, "transcode: of sparsify"),
        ({"skip_connection": True}, None, "skip_connection"),
        ({"gram_lookup": True}, None, "gram_lookup"),
        ({"something_new": 3}, None, "something_new"),
    ],
)
def test_sparsify_runs_of_other_things_are_refused(cfg, run, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_sae(sparsify(tmp_path / "layers.3", cfg, run))


def test_a_config_above_that_is_not_sparsifys_says_nothing(tmp_path):
    run = {"model": ["my", "own"], "architectures": ["GPT2LMHeadModel"]}
    assert load_sae(sparsify(tmp_path / "layers.3", {}, run)).cfg.model_name == ""


def test_dictionary_learnings_transcoders_are_refused(tmp_path):
    pickled(tmp_path, "AutoEncoder")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in_and_out"}}))
    with pytest.raises(UserError, match="transcoders are not read"):
        load_sae(tmp_path, allow_pickle=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"buffer": {"io": "in"}}))
    assert load_sae(tmp_path, allow_pickle=True).cfg.hook_name == ""


def gemma(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    if config is None:
        np.savez(
            folder / "params.npz", **{name: t.numpy() for name, t in (MATRICES | {"threshold": THRESHOLD}).items()}
        )
    else:
        save_file({n: t.contiguous() for n, t in (MATRICES | {"threshold": THRESHOLD}).items()},
                  folder / "params.safetensors")  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_76",
        "models--google--gemma-scope-2b-pt-transcoders/snapshots/abc/layer_3/width_16k/average_l0_76",
        "copies/my-transcoders/layer_3/width_16k/average_l0_76",
        "gemma-scope-2-1b-pt/transcoder_all/layer_13_width_16k_l0_small",
        "gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_65k_l0_medium",
        "gemma-scope-2-1b-it/clt/width_262k_l0_big",
        "models--google--gemma-scope-2-4b-it/snapshots/abc/clt/width_262k_l0_big",
        "gemma-scope-2b-pt-something/layer_3/width_16k/average_l0_76",
    ],
)
def test_what_is_no_sae_of_gemma_scope_is_refused(place, tmp_path):
    with pytest.raises(UserError, match="is not read; of Gemma Scope SAEs"):
        load_sae(gemma(tmp_path / place))


@pytest.mark.parametrize(
    "config",
    [
        {"type": "transcoder"},
        {"affine_connection": True},
        {"architecture": "topk"},
        {"hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
         "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output"},
    ],
)  # fmt: skip
def test_gemma_scopes_own_settings_tell_what_is_no_sae(config, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_sae(gemma(tmp_path / "x", {"architecture": "jump_relu"} | config))


@pytest.mark.parametrize(
    ("place", "model", "hook"),
    [
        ("layer_3_mine/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "google/gemma-2-2b",
         "20.hook_resid_post"),
        ("my-transcoders/mlp/gemma-scope-9b-it-att/layer_7/width_16k/canonical", "google/gemma-2-9b-it",
         "7.attn.hook_z"),
        ("models--google--gemma-scope-2b-pt-mlp/snapshots/ab/layer_1/width_16k/average_l0_7", "google/gemma-2-2b",
         "1.hook_mlp_out"),
        ("gemma-scope-2b-pt-res/layer_9/mine", "", None),
        ("layer_9/mlp/copy", "", None),
        ("gemma-scope-2b-pt-res/copies/layer_20/width_16k/average_l0_71", "", None),
    ],
)  # fmt: skip
def test_the_users_own_folders_say_nothing_of_an_sae(place, model, hook, tmp_path, monkeypatch):
    folder = gemma(tmp_path / place)
    monkeypatch.chdir(folder)
    for given in (folder, "."):
        sae = load_sae(given)
        assert_computes(sae, JUMPED)
        assert (sae.cfg.model_name, sae.cfg.hook_name) == (model, f"blocks.{hook}" if hook else "")


def test_gemma_scope_2_names_its_place_itself(tmp_path):
    config = {"model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "hf_hook_point_out": None}
    sae = load_sae(gemma(tmp_path / "mine", config | {"hf_hook_point_in": "model.layers.17.output"}))
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("google/gemma-3-1b-pt", "blocks.17.hook_resid_post")


def sae_of(architecture: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    sae = SAE(SAEConfig(architecture, D_IN, D_SAE, k=4 if architecture == "topk" else None))
    return {name: (torch.rand(p.shape, generator=g) - 0.4).to(dtype) for name, p in sae.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
@torch.no_grad()
def test_sixteen_bit_files_are_computed_in_float32_and_nothing_is_rounded(architecture, dtype, tmp_path):
    tensors = sae_of(architecture, dtype)
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(D_SAE, generator=torch.Generator().manual_seed(1))
    theirs = {"relu": "standard"}.get(architecture, architecture)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": theirs, "k": 4, "dtype": str(dtype)[6:]}))
    sae = load_sae(tmp_path)
    assert {p.dtype for p in sae.parameters()} == {torch.float32} and sae.cfg.dtype == "float32"
    for name, tensor in tensors.items():
        expected = tensor.float().clamp(min=0) if name == "threshold" else tensor.float()
        assert torch.equal(getattr(sae, name), expected), name
    assert sae(X).isfinite().all()
    save_sae(sae, tmp_path / "again")
    assert torch.equal(load_sae(tmp_path / "again")(X), sae(X))


def test_a_float64_tensor_makes_all_float64(tmp_path):
    sae = load_sae(sae_lens(tmp_path, {"architecture": "standard"}, b_dec=MATRICES["b_dec"].double() + 1e-12))
    assert sae.W_enc.dtype == torch.float64 and torch.equal(sae.b_dec, MATRICES["b_dec"].double() + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_rescaling_leaves_a_zero_row_zero_in_every_precision(dtype):
    sae = SAE(SAEConfig("relu", D_IN, D_SAE, dtype=str(dtype).removeprefix("torch.")))
    sae.load_state_dict(sae_of("relu", dtype))
    sae.W_dec[3], sae.W_dec[4] = 0, 1e-6
    folded = fold_decoder_norm(sae)
    assert folded.W_dec[3].abs().max() == 0
    assert all(p.isfinite().all() for p in folded.parameters())


def test_a_sixteen_bit_file_with_a_zero_row_is_rescaled(tmp_path):
    half = {name: t.half().contiguous() for name, t in MATRICES.items()}
    half["W_dec"][3] = 0
    sae = load_sae(sae_lens(tmp_path, {"architecture": "standard", "rescale_acts_by_decoder_norm": True}, **half))
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_types_are_refused(dtype, tmp_path):
    with pytest.raises(UserError, match=f"W_dec is of type {str(dtype)[6:]}; read are float16"):
        load_sae(sae_lens(tmp_path, {"architecture": "standard"}, W_dec=torch.ones(D_SAE, D_IN).to(dtype)))
