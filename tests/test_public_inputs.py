"""What people hand to the public methods: all that has one meaning works, the rest is one sentence."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sae_train.sae.model as checked_model
from sae_train import load_sae
from sae_train.config import resolve
from sae_train.errors import UserError
from sae_train.sae.model import ARCHITECTURES, SAE, SAEConfig

D_IN, D_SAE = 6, 32
G = torch.Generator().manual_seed(0)
X = torch.randn(3, 5, D_IN, generator=G)


def random_sae(architecture: str, kind=SAE):
    sae = kind(SAEConfig(architecture, D_IN, D_SAE, k=4 if architecture == "topk" else None))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 2)
        if architecture == "jumprelu":
            sae.threshold.abs_()
    return sae


@pytest.mark.parametrize("shape", [(3, 5), (15,), (5,), (), (0,), (2, 0), (1, 3, 1, 5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_any_leading_dimensions_give_what_rows_give(architecture, shape):
    sae, n = random_sae(architecture), int(np.prod(shape))
    rows = X.reshape(-1, D_IN)[:n]
    x = rows.reshape(*shape, D_IN)
    latents = sae.encode(x)
    assert latents.shape == (*shape, D_SAE) and sae(x).shape == sae.decode(latents).shape == x.shape
    assert torch.equal(latents.reshape(-1, D_SAE), sae.encode(rows))
    assert torch.equal(sae(x).reshape(-1, D_IN), sae(rows))
    assert torch.equal(sae.decode(latents).reshape(-1, D_IN), sae.decode(sae.encode(rows)))
    values, columns, counts = sae.encode_entries(x)
    assert len(counts) == n and int(counts.sum()) == len(values) == len(columns)
    if architecture == "topk":
        assert [part.shape for part in sae.encode_sparse(x)] == [(*shape, 4)] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_any_float_dtype_is_computed_in_the_saes_own(architecture, dtype):
    sae = random_sae(architecture)
    assert torch.equal(sae.encode(X.to(dtype)), sae.encode(X.to(dtype).float()))
    assert sae(X.to(dtype)).dtype == sae.decode(sae.encode(X).to(dtype)).dtype == torch.float32
    narrow = random_sae(architecture).to(dtype)
    for x in (X, X.to(dtype)):
        assert narrow.encode(x).dtype == narrow(x).dtype == dtype and narrow(x).isfinite().all()
        assert len(narrow.encode_entries(x)[2]) == 15


def test_gradients_flow_to_activations_of_any_shape():
    x = X.clone().requires_grad_()
    random_sae("relu")(x).sum().backward()
    assert x.grad.shape == X.shape and x.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def plain():
    """The SAE without the checks of shapes that tests alone have."""
    spec = importlib.util.spec_from_file_location("plain_model", checked_model.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_model"] = module
    spec.loader.exec_module(module)
    yield module.SAE
    del sys.modules["plain_model"]


WRONG = {
    "width": (torch.ones(3, D_IN + 1), r"shape \(3, 7\) do not fit"),
    "transposed": (torch.ones(D_IN, 3), r"shape \(6, 3\) do not fit"),
    "no dimension": (torch.tensor(1.0), r"shape \(\) do not fit"),
    "whole numbers": (torch.ones(3, D_IN, dtype=torch.long), r"floats, not of type torch\.int64"),
    "complex": (torch.ones(3, D_IN, dtype=torch.complex64), "complex64"),
    "an array": (np.ones((3, D_IN), np.float32), "tensor of floats, not of type float32"),
    "a list": ([[1.0] * D_IN], "not of type list"),
    "nothing": (None, "not of type NoneType"),
    "another device": (torch.ones(3, D_IN, device="meta"), "on meta and the SAE is on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_what_does_not_fit_is_one_sentence(architecture, name, plain):
    sae, (x, words) = random_sae(architecture, plain), WRONG[name]
    calls = [sae, sae.encode, sae.encode_entries, *([sae.encode_sparse] if architecture == "topk" else [])]
    for call in calls:
        with pytest.raises(UserError, match=words):
            call(x)
    with pytest.raises(UserError, match="latents"):
        sae.decode(x)


def test_settings_are_taken_as_people_hold_them():
    given = {"out": Path("runs"), "l0": np.array([4.0, 8.0]), "seed": range(3), "width": (np.int64(64), "1k"),
             "tokens": np.int32(10**6), "lr": torch.tensor(1e-3)}  # fmt: skip
    settings = resolve(given)
    assert settings.run.out == "runs" and settings.sae.l0 == (4.0, 8.0) and settings.sae.seed == (0, 1, 2)
    assert settings.sae.width == (64, 1024) and settings.train.tokens == 10**6
    assert settings.train.lr == pytest.approx(1e-3)
    with pytest.raises(UserError, match="l0: text, numbers and lists"):
        resolve({"l0": {4: 5}})


@pytest.mark.parametrize(
    ("path", "given", "words"),
    [
        (5, {}, "not by a int"),
        (None, {}, "not by a NoneType"),
        ("x", {"device": "banana"}, "device 'banana' cannot be used"),
        ("x", {"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ("", {}, "no SAE checkpoint"),
        ("x", {"folder": "../y"}, "no SAE checkpoint"),
    ],
)
def test_load_sae_says_what_it_takes(path, given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        load_sae(path, **given)
