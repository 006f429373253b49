"""Outliers are kept away from SAEs, and nothing else changes: sinks of a hundred times the norm leave no trace."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_tokens import sentences, write
from tiny_models import save_tiny_model

from sae_train import NumberedBatches, resume, train
from sae_train.cli import main
from sae_train.config import resolve
from sae_train.data import outliers
from sae_train.data.language_model import LanguageModel
from sae_train.data.outliers import WithoutOutliers, is_kept, norm_limit
from sae_train.errors import UserError
from sae_train.runs import stream

D, N = 16, 6000
EVERY = 16  # rows of which the first is a sink
SMALL = {
    "width": 48, "l0": 3, "tokens": "6k", "batch_tokens": 60, "absorption_evals": 2, "save_every": 30, "device": "cpu",
}  # fmt: skip
ARCHS = ["relu", "topk", "jumprelu", "batchtopk", "gated"]
NAME = "topk-48-l0_3"


def planted(n: int = N, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(32, D, generator=generator), dim=1)
    active = (torch.rand(n, 32, generator=generator) < 0.1).float()
    return active @ directions + 0.05 * torch.randn(n, D, generator=generator) + 0.5


def with_sinks(x: torch.Tensor, times: float) -> torch.Tensor:
    """Put a row of so many times the usual norm before every EVERY - 1 rows."""
    groups = x.view(-1, EVERY - 1, D)
    sinks = times * x.norm(dim=1).median() * torch.nn.functional.normalize(torch.arange(1.0, D + 1), dim=0)
    return torch.cat([sinks.expand(len(groups), 1, D), groups], dim=1).flatten(0, 1)


class Stream:
    """Rows in their order, over and over; others are held out."""

    name, hook_name, d_in = "stream", "layer.1", D

    def __init__(self, x, held_out):
        self.x, self.apart = x, held_out

    def held_out(self, n_tokens):
        return self.apart

    def batches(self, batch_tokens):
        rows = lambda i: torch.arange(i * batch_tokens, (i + 1) * batch_tokens) % len(self.x)  # noqa: E731
        return NumberedBatches(lambda i: self.x[rows(i)], len(self.x) // batch_tokens)


def make(tmp_path: Path, name: str, times: float | None, monkeypatch, **more):
    """A run on the stream with sinks, or without any."""
    x, apart = planted(), planted(1500, seed=1)
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", 1500 if times is None else 1600)  # the same sample without the sinks
    if times is not None:
        x, apart = with_sinks(x, times), with_sinks(apart, times)
    return train(activations=Stream(x, apart), out=str(tmp_path), name=name, **(SMALL | more))


@pytest.mark.parametrize(("times", "center"), [(100.0, False), (12.0, True)])
def test_a_run_with_sinks_is_the_run_without_them_bit_for_bit(times, center, tmp_path, monkeypatch):
    more = {"arch": ARCHS, "center": center}
    clean = make(tmp_path, "clean", None, monkeypatch, **more)
    sinks = make(tmp_path, "sinks", times, monkeypatch, **more)
    assert clean.info["scale"] == sinks.info["scale"]
    assert clean.info["outliers"]["trained"] == clean.info["outliers"]["held_out"] == 0
    assert sinks.info["outliers"]["held_out"] == 100 and 396 <= sinks.info["outliers"]["trained"] <= 404
    for one, two in zip(clean.info["saes"], sinks.info["saes"], strict=True):
        figures = {name for name in one["final"] if "second" not in name}
        assert {"metrics/explained_variance", "metrics/l0", "sparsity/dead_fraction"} < figures
        assert {name: one["final"][name] for name in figures} == {name: two["final"][name] for name in figures}
        a, b = clean.saes[one["name"]], sinks.saes[one["name"]]
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_outliers_that_are_kept_take_the_figures_over(tmp_path, monkeypatch):
    left_out = make(tmp_path, "out", 100.0, monkeypatch).info
    kept = make(tmp_path, "kept", 100.0, monkeypatch, outlier_norm="none").info
    ev = [info["saes"][0]["final"]["metrics/explained_variance"] for info in (left_out, kept)]
    assert ev[0] < 0.95 < ev[1] and kept["outliers"] is None and kept["scale"] < left_out["scale"] / 5


@pytest.mark.parametrize("times", [100.0, None])
def test_an_interrupted_run_goes_on_with_the_same_limit_mean_and_rows(times, tmp_path, monkeypatch):
    whole = make(tmp_path, "whole", times, monkeypatch, center=True, arch="topk,gated")
    x, apart = planted(), planted(1500, seed=1)
    if times:
        x, apart = with_sinks(x, times), with_sinks(apart, times)

    def stop(sae, step):
        if step:
            raise KeyboardInterrupt
        return ()

    more = SMALL | {"center": True, "arch": "topk,gated"}
    with pytest.raises(KeyboardInterrupt):
        train(activations=Stream(x, apart), callbacks=[stop], out=str(tmp_path), name="cut", **more)
    monkeypatch.setattr(stream, "norm_limit", None)  # the limit is not estimated anew
    resumed = resume(tmp_path / "cut", activations=Stream(x, apart))
    for name, sae in whole.saes.items():
        assert all(map(torch.equal, sae.state_dict().values(), resumed.saes[name].state_dict().values()))
    assert resumed.info["outliers"] == whole.info["outliers"] and resumed.info["scale"] == whole.info["scale"]


def test_a_run_that_began_before_outliers_were_left_out_keeps_them(tmp_path):
    x = with_sinks(planted(), 100.0)
    more = SMALL | {"outlier_norm": "none"}
    whole = train(activations=x, out=str(tmp_path), name="whole", **more)

    def stop(sae, step):
        if step:
            raise KeyboardInterrupt
        return ()

    with pytest.raises(KeyboardInterrupt):
        train(activations=x, callbacks=[stop], out=str(tmp_path), name="cut", **more)
    path = tmp_path / "cut" / "run.json"
    info = json.loads(path.read_text())
    del info["settings"]["outlier_norm"], info["settings"]["center"]
    path.write_text(json.dumps(info))
    resumed = resume(tmp_path / "cut", activations=x)
    assert torch.equal(resumed.saes[NAME].W_enc, whole.saes[NAME].W_enc)


def rows_of(x: torch.Tensor, batch: int = 10) -> NumberedBatches:
    return Stream(x, x).batches(batch)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("together", [1, 4])
def test_batches_hold_the_kept_rows_in_order_and_resume_at_every_position(share, together, monkeypatch):
    monkeypatch.setattr(outliers, "_n_together", lambda x: together)  # on a GPU several
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(1.0, 201).repeat_interleave(2).view(200, 2)
    x[torch.rand(200, generator=generator) < share] *= 1000
    limit = 300.0
    kept = x[x.norm(dim=1) <= limit]
    batches = WithoutOutliers(rows_of(x), 10)
    batches.limit = limit
    states, given, counts = [], [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(batches.state_dict())))
        counts.append((batches.left_out, batches.epoch))
        given.append(next(batches))
    assert torch.equal(torch.cat(given), kept.repeat(30, 1)[:300])
    monkeypatch.undo()  # a position is one wherever the run goes on
    for i, state in enumerate(states):
        again = WithoutOutliers(rows_of(x), 10)
        again.limit = limit
        again.load_state_dict(state)
        assert (again.left_out, again.epoch) == counts[i]
        assert torch.equal(again.peek(40)[:1], given[i][:1])
        assert all(torch.equal(next(again), batch) for batch in given[i : i + 5])
    if not share:
        plain = rows_of(x)
        assert all(torch.equal(next(plain), batch) for batch in given)
    assert share or batches.left_out == 0


def test_what_is_not_finite_is_no_outlier_but_a_fault_that_is_seen():
    x = torch.ones(5, 3)
    x[1], x[2], x[3] = math.nan, math.inf, 100
    assert is_kept(x, 10.0).tolist() == [True, True, True, False, True]
    assert norm_limit(torch.zeros(5, 3), 10) == math.inf
    assert norm_limit(torch.ones(5, 4), 10) == 20


def test_data_of_outliers_alone_ends_in_a_sentence(tmp_path):
    x = planted()
    far = torch.cat([x[:500], 100 * x])
    with pytest.raises(UserError, match=r"\d of \d+ held-out activations have a norm of at most .*--outlier-norm none"):
        train(activations=Stream(x, far[-500:]), out=str(tmp_path), name="held", **SMALL)
    batches = WithoutOutliers(rows_of(100 * x), 10)
    batches.limit = norm_limit(x, 10)
    with pytest.raises(UserError, match=r"no activation of 100 batches .*--outlier-norm none"):
        next(batches)


@pytest.mark.parametrize("value", ["0", "1", "-3", "nan", "inf", "ten"])
def test_a_norm_that_is_no_multiple_is_refused(value, capsys):
    assert main(["--outlier-norm", value, "--dry-run"]) == 2
    assert "give a number above 1 such as 10, or none" in capsys.readouterr().err
    assert resolve({"outlier_norm": "None"}).outlier_norm is None and resolve({"outlier_norm": 3}).outlier_norm == 3


@pytest.mark.parametrize("bos", [True, False])
def test_sinks_of_a_language_model_are_left_out_counted_and_told(bos, tmp_path, monkeypatch, capsys):
    model = save_tiny_model(tmp_path / "model", bos=bos, eos=bos)
    text = write(tmp_path / "a.jsonl", sentences(2000))
    whole = LanguageModel.activations

    def made(name: str, place: int, **more):
        def activations(self, tokens):
            x = whole(self, tokens)
            if place and x.shape[1] > place:
                x[:, place] *= 100
            return x

        monkeypatch.setattr(LanguageModel, "activations", activations)
        return train(
            model=str(model), hook="blocks.1.hook_resid_post", dataset=str(text), context=16, absorption=False,
            out=str(tmp_path), name=name, buffer_tokens=2048, held_out_tokens=1500, **(SMALL | {"width": 64} | more),
        )  # fmt: skip

    clean, sinks, kept = made("clean", 0), made("sinks", 5), made("kept", 5, outlier_norm="none")
    evs = [run.info["saes"][0]["final"]["metrics/explained_variance"] for run in (clean, sinks, kept)]
    assert abs(evs[0] - evs[1]) < 0.03 and abs(evs[0] - evs[2]) > 0.05
    assert sinks.info["scale"] == pytest.approx(clean.info["scale"], rel=0.02)
    assert clean.info["outliers"]["first_position"] is not bos
    assert sinks.info["outliers"]["trained"] == pytest.approx(6_000 / 14, rel=0.2)
    said = "training activations ("
    assert said in capsys.readouterr().out and said in (sinks.path / "report.html").read_text()
    card = (sinks.path / "saes" / "topk-64-l0_3" / "README.md").read_text()
    assert "Left out of training and of all figures but loss recovered" in card
    assert ("the first position of each sequence" in card) is not bos
