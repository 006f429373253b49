"""Activations and evals of a user's own: what train(activations=…, callbacks=…) takes is trained on and reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_train import NumberedBatches, resume, train
from sae_train.data.given import Given, Rows
from sae_train.errors import UserError
from sae_train.runs.run import Run

SMALL = {"width": 48, "l0": 3, "tokens": 12_800, "batch_tokens": 128, "device": "cpu", "absorption_evals": 2}


def planted(n: int = 3000, d_in: int = 16) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, d_in, generator=g), dim=1)
    active = (torch.rand(n, 32, generator=g) < 0.08).float()
    return active @ directions + 0.01 * torch.randn(n, d_in, generator=g)


def run(tmp_path, name, activations, **settings) -> Run:
    return train(activations=activations, out=str(tmp_path), name=name, **(SMALL | settings))


def in_a_file(kind, x, tmp_path):
    path = tmp_path / f"acts.{kind}"
    if kind == "npy":
        np.save(path, x.numpy())
    else:
        save_file({"acts": x, "token_ids": torch.arange(len(x))}, path)
    return path


def test_a_tensor_an_array_and_files_of_them_train_the_same_sae(tmp_path):
    x = planted()
    given = {"tensor": x, "array": x.numpy(), "npy": in_a_file("npy", x, tmp_path)}
    given |= {"tensors": str(in_a_file("safetensors", x, tmp_path))}
    saes = {kind: run(tmp_path, kind, value).saes["topk-48-l0_3"] for kind, value in given.items()}
    assert all(torch.equal(sae.W_enc, saes["tensor"].W_enc) for sae in saes.values())
    final = Run(tmp_path / "npy").info["saes"][0]["final"]
    assert final["metrics/explained_variance"] > 0.4 and final["metrics/l0"] == pytest.approx(3, abs=0.05)
    assert "absorption/valid" not in final and "metrics/ce_loss_score" not in final
    assert (tmp_path / "npy" / "report.html").is_file()


def test_held_out_rows_never_come_up_in_training_and_every_pass_has_another_order():
    x = torch.arange(1000.0)[:, None].expand(1000, 4)
    source = Rows(x, "rows", "", torch.device("cpu"), 100)
    assert source.held_out(1000)[:, 0].tolist() == list(range(900, 1000))
    batches = source.batches(90)
    passes = [torch.cat([next(batches)[:, 0] for _ in range(10)]) for _ in range(2)]
    assert all(sorted(rows.tolist()) == list(range(900)) for rows in passes)
    assert not torch.equal(*passes) and batches.epoch == 2
    state = batches.state_dict()
    ahead = next(batches)
    batches.load_state_dict(state)
    assert torch.equal(next(batches), ahead)


def test_half_precision_and_integers_are_told_apart(tmp_path):
    assert run(tmp_path, "half", planted().bfloat16()).saes["topk-48-l0_3"].W_enc.dtype == torch.float32
    with pytest.raises(UserError, match="int64"):
        run(tmp_path, "ints", torch.ones(3000, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("activations", "words"),
    [
        (torch.zeros(10), r"shape \(10,\)"),
        (torch.zeros(100, 8), "80 rows to train on, less than one batch"),
        (torch.ones(3000, 8), "the same vector for every token"),
        (torch.full((3000, 8), torch.nan), "not finite"),
        ("nowhere.npy", "there is no file"),
        (__file__, "no file of activations that is known"),
        ([[1.0, 2.0]], "type list"),
    ],
)
def test_activations_that_cannot_be_trained_on_are_a_sentence_and_leave_no_folder(activations, words, tmp_path):
    with pytest.raises(UserError, match=words):
        run(tmp_path, "bad", activations)
    assert not (tmp_path / "bad").exists()


def test_settings_of_text_mean_nothing_without_text(tmp_path):
    with pytest.raises(UserError, match=r"drop, eval_words mean nothing with activations of your own"):
        run(tmp_path, "bad", planted(), drop=["a"], eval_words=5)


class Folder:
    """A source as a user writes it."""

    name, hook_name, d_in = "mine", "layer.3", 16

    def __init__(self, x):
        self.x = x

    def held_out(self, n_tokens):
        return self.x[-500:][:n_tokens]

    def batches(self, batch_tokens):
        per_epoch = 2500 // batch_tokens
        make = lambda i: self.x[(i % per_epoch) * batch_tokens :][:batch_tokens]  # noqa: E731
        return NumberedBatches(make, per_epoch)


def test_an_object_with_the_sources_members_is_a_source(tmp_path):
    made = train(activations=Folder(planted()), out=str(tmp_path), **SMALL)
    assert made.path.name == "mine-topk-48-l0_3"
    assert made.info["model"] == "mine" and made.info["hook_name"] == "layer.3" and made.info["epochs"] == 5
    assert made.saes["topk-48-l0_3"].cfg.hook_name == "layer.3"


def test_model_and_hook_say_where_activations_come_from(tmp_path):
    made = run(tmp_path, "named", planted(), model="gpt2", hook="blocks.8.hook_resid_post")
    cfg = made.saes["topk-48-l0_3"].cfg
    assert (cfg.model_name, cfg.hook_name) == ("gpt2", "blocks.8.hook_resid_post")


def test_an_interrupted_run_needs_the_same_activations_again(tmp_path):
    x = planted()
    whole = run(tmp_path, "whole", x, save_every=20)

    def stop(sae, step):
        if step:
            raise KeyboardInterrupt
        return ()

    with pytest.raises(KeyboardInterrupt):
        train(activations=x, callbacks=[stop], out=str(tmp_path), name="cut", **(SMALL | {"save_every": 20}))
    with pytest.raises(UserError, match=r"resume\('.*cut', activations=…\)"):
        resume(tmp_path / "cut")
    with pytest.raises(UserError, match="not those that the run"):
        resume(tmp_path / "cut", activations=x + 1)
    resumed = resume(tmp_path / "cut", activations=x)
    assert torch.equal(resumed.saes["topk-48-l0_3"].W_enc, whole.saes["topk-48-l0_3"].W_enc)


def purity(sae, step):
    """A user's eval."""
    yield "mine/rows", len(sae.W_dec)
    yield "mine/cosine", (sae.W_dec[0] @ sae.W_dec[1]).detach()


def test_what_a_callback_yields_is_logged_kept_and_reported_by_its_name(tmp_path):
    made = train(activations=planted(), callbacks=[purity], out=str(tmp_path), name="own", **SMALL)
    rows = made.metrics()[["step", "mine/rows", "mine/cosine"]].dropna()
    assert {0, 100} <= set(rows["step"]) and (rows["mine/rows"] == 48).all()
    final = made.info["saes"][0]["final"]
    sae = made.saes["topk-48-l0_3"]
    assert final["mine/cosine"] == pytest.approx((sae.W_dec[0] @ sae.W_dec[1]).item(), abs=1e-6)
    assert "mine/cosine" in (made.path / "report.html").read_text()
    assert made.info["command"].startswith("sae_train.train(") and "callbacks=[purity]" in made.info["command"]
    assert "activations=<Tensor (3000, 16)>" in made.info["command"]


@pytest.mark.parametrize("pairs", [[("metrics/l0", 1.0)], [("mine/x", torch.ones(3))], ["mine"], [(3, 1.0)]])
def test_a_callback_that_yields_something_else_is_named_in_a_sentence(pairs, tmp_path):
    def wrong(sae, step):
        return pairs

    with pytest.raises(UserError, match="the callback wrong yielded"):
        train(activations=planted(), callbacks=[wrong], out=str(tmp_path), name="bad", **SMALL)


def test_a_callback_changes_no_weight_of_a_run(tmp_path):
    def draws(sae, step):
        torch.rand(5)
        sae.W_dec.data.zero_()
        return ()

    plain = run(tmp_path, "plain", planted()).saes["topk-48-l0_3"]
    looked = train(activations=planted(), callbacks=[draws], out=str(tmp_path), name="looked", **SMALL)
    assert torch.equal(plain.W_dec, looked.saes["topk-48-l0_3"].W_dec)


def test_the_record_of_activations_is_json(tmp_path):
    assert json.dumps(Given(planted()).record) and json.dumps(Given(Folder(planted())).record)
