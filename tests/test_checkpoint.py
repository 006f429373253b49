"""Checkpoints: exact round trips, SAELens' layout, foreign layouts, and damage told in one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train.errors import UserError
from sae_train.sae.files import load_sae, load_state, save_sae, save_state
from sae_train.sae.model import ARCHITECTURES, SAE, SAEConfig

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


def random_sae(architecture: str) -> SAE:
    g = torch.Generator().manual_seed(0)
    known = {"hook_name": "blocks.1.hook_resid_post", "model_name": "m", "l0": 4.0, "context_size": 16}
    sae = SAE(SAEConfig(architecture, 6, 32, k=4 if architecture == "topk" else None, **known))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.rand(p.shape, generator=g) - 0.3)
        if architecture == "jumprelu":
            sae.threshold.abs_()
    return sae


def edit(folder, **changes) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_an_sae_comes_back_bit_for_bit_with_its_provenance(architecture, tmp_path):
    sae = random_sae(architecture)
    save_sae(sae, tmp_path)
    again = load_sae(tmp_path)
    assert again.cfg == SAEConfig(**vars(sae.cfg) | {"metadata": {"sae_lens_version": "6.54.12"}})
    assert torch.equal(again(X), sae(X)) and torch.equal(again.encode(X), sae.encode(X))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("architecture", "theirs"), [("relu", "standard"), ("topk", "topk"), ("jumprelu", "jumprelu"), ("gated", "gated")]
)
def test_files_are_those_of_saelens(architecture, theirs, tmp_path):
    save_sae(random_sae(architecture), tmp_path)
    cfg, tensors = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    vectors = {"jumprelu": {"b_enc", "threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}}
    assert tensors.keys() == {"W_enc", "W_dec", "b_dec"} | vectors.get(architecture, {"b_enc"})
    assert tensors["W_enc"].shape == (6, 32) and tensors["W_dec"].shape == (32, 6)
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (theirs, 6, 32, "float32")
    assert cfg["apply_b_dec_to_input"] is True and cfg["normalize_activations"] == "none"
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0" and cfg["metadata"]["hook_name"]
    assert ("k" in cfg) == (architecture == "topk")


@torch.no_grad()
def test_saelens_conventions_are_honoured_on_reading(tmp_path):
    sae = random_sae("topk")
    save_sae(sae, tmp_path)
    edit(tmp_path, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    pre = (X @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
    latents = pre.relu() * (pre >= pre.topk(4).values[:, -1:])
    expected = (latents / sae.W_dec.norm(dim=1)) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(load_sae(tmp_path)(X), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_negative_threshold_acts_as_zero(tmp_path):
    sae = random_sae("jumprelu")
    sae.threshold.fill_(-1.0)
    save_sae(sae, tmp_path)
    pre = (X - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(load_sae(tmp_path).encode(X), pre.relu())


@torch.no_grad()
def test_a_sparsify_checkpoint_loads(tmp_path):
    sae = random_sae("topk")
    folder = tmp_path / "layers.3"
    folder.mkdir()
    names = {"encoder.weight": sae.W_enc.t(), "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: t.detach().contiguous() for name, t in names.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 4, "num_latents": 32, "d_in": 6}))
    again = load_sae(folder)
    assert torch.equal(again(X), sae(X)) and again.cfg.hook_name == "blocks.3.hook_resid_post"


def damaged(kind: str, folder) -> None:
    save_sae(random_sae("topk"), folder)
    weights = folder / "sae_weights.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif kind == "cut in its header":
        weights.write_bytes(weights.read_bytes()[:5])
    elif kind == "without weights":
        weights.unlink()
    elif kind == "temporal":
        edit(folder, architecture="temporal")
    elif kind == "normalised":
        edit(folder, normalize_activations="layer_norm")
    elif kind == "k missing":
        edit(folder, k=None)
    elif kind == "extra tensor":
        save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights)
    elif kind == "bad json":
        (folder / "cfg.json").write_text("{")
    elif kind == "pickle":
        weights.rename(folder / "ae.pt")
    elif kind == "run folder":
        (folder / "saes" / "a").mkdir(parents=True)
        for file in (folder / "cfg.json", weights):
            file.rename(folder / "saes" / "a" / file.name)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "truncated"),
        ("cut in its header", "truncated"),
        ("without weights", "does not exist"),
        ("temporal", "'temporal' is not read"),
        ("normalised", "normalize_activations 'layer_norm'"),
        ("k missing", "give k None"),
        ("extra tensor", "extra"),
        ("bad json", "not readable JSON"),
        ("pickle", "ae.pt"),
        ("run folder", "choose one of .*saes/a"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_sentence(kind, says, tmp_path):
    damaged(kind, tmp_path)
    with pytest.raises(UserError, match=says):
        load_sae(tmp_path)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no SAE checkpoint"):
        load_sae(tmp_path / "nothing")


def test_a_state_comes_back_with_its_types(tmp_path):
    state = {"a": {"b": torch.arange(3), "none": None, "empty": {}}, "n": 3, "f": 0.1, "s": "x", "l": [1, 2]}
    save_state(tmp_path, state)
    again = load_state(tmp_path)
    assert torch.equal(again["a"].pop("b"), state["a"].pop("b")) and again == state


def test_a_foreign_or_truncated_state_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="no training state"):
        load_state(tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="truncated"):
        load_state(tmp_path)
