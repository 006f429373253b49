"""Runs that start from an SAE: step 0 is that SAE, another L0 is reached, and what does not fit is one sentence."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train import load_sae, train
from sae_train.cli import main
from sae_train.config import SAESpec, TrainSettings
from sae_train.data.language_model import load_language_model
from sae_train.errors import UserError
from sae_train.publishing.card import started_sentence
from sae_train.publishing.publish import publish
from sae_train.runs import display
from sae_train.runs.initial import InitialSAE
from sae_train.sae.files import save_sae
from sae_train.sae.model import SAE, SAEConfig
from sae_train.training.architectures import TRAINED
from sae_train.training.learner import Learner

WIDTH, L0, HOOK, D_IN = 256, 8, "blocks.1.hook_resid_post", 256
SMALL = {
    "tokens": 13_000, "batch_tokens": 128, "buffer_tokens": 2048, "held_out_tokens": 1024, "absorption": False,
    "absorption_evals": 1, "device": "cpu",
}  # fmt: skip
STEPS, BATCH, SCALE = 250, 128, 0.37
TRAINING = TrainSettings(tokens=STEPS * BATCH, batch_tokens=BATCH)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Activations of the embedded model on random words."""
    lm = load_language_model("speller", HOOK, dtype="float32")
    tokens = torch.randint(5, 900, (160, 32), generator=torch.Generator().manual_seed(2))
    return lm.activations(tokens).flatten(0, 1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, x) -> Path:
    """An SAE of each architecture with about the L0 that it was trained for."""
    out = tmp_path_factory.mktemp("sources")
    for arch in TRAINED:
        sae = finished(begin(arch, L0, x, None), x, None, n_steps=60)
        sae.cfg = replace(sae.cfg, hook_name=HOOK, model_name="speller", l0=float(L0))
        save_sae(sae, out / arch)
    return out


def normalised(x: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    return SCALE * (x if mean is None else x - mean)


def begin(arch: str, l0: float, x: torch.Tensor, mean: torch.Tensor | None, source: SAE | None = None) -> Learner:
    settings = TRAINING if source is None else TRAINING.model_copy(update={"init_from": "source"})
    learner = Learner(SAESpec(arch=arch, width=WIDTH, l0=l0), settings, D_IN, STEPS)
    if source is None:
        learner.initialise(normalised(x, mean))
    else:
        learner.inherit(source, SCALE, mean)
    return learner


def finished(learner: Learner, x: torch.Tensor, mean: torch.Tensor | None, n_steps: int = STEPS) -> SAE:
    y = normalised(x, mean)
    for step in range(n_steps):
        learner.step(y[torch.randint(len(y), (BATCH,), generator=torch.Generator().manual_seed(step))])
    assert learner.check() is None
    learner.calibrate(y[::3])
    return learner.export(SCALE, mean)


def as_saelens(source: Path, folder: Path, **cfg) -> Path:
    """A copy as SAELens may have it: b_dec is not taken from the input, decoder rows are of any length."""
    tensors = load_file(source / "sae_weights.safetensors")
    long = 0.5 + 2 * torch.rand(WIDTH, 1, generator=torch.Generator().manual_seed(1))
    tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    for name in ("b_enc", "threshold"):
        if name in tensors:
            tensors[name] = tensors[name] / long[:, 0]
    tensors |= {"W_enc": (tensors["W_enc"] / long[:, 0]).contiguous(), "W_dec": tensors["W_dec"] * long}
    tensors["W_dec"][3], tensors["b_enc"][3] = 0.0, -1.0  # a latent without a direction
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    known = {"d_in": 256, "d_sae": WIDTH, "dtype": "float32", "apply_b_dec_to_input": False, "hook_name": HOOK}
    (folder / "cfg.json").write_text(json.dumps(known | {"model_name": "speller"} | cfg))
    return folder


def as_sparsify(source: Path, folder: Path) -> Path:
    tensors = load_file(source / "sae_weights.safetensors")
    folder.mkdir(parents=True)
    names = {"encoder.weight": tensors["W_enc"].t().contiguous(), "encoder.bias": tensors["b_enc"]}
    save_file(names | {n: tensors[n] for n in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": L0, "num_latents": WIDTH, "d_in": 256}))
    (folder.parent / "config.json").write_text(json.dumps({"model": "speller", "ctx_len": 32}))
    return folder


def source_of(kind: str, ours: Path, tmp_path: Path) -> Path:
    name, _, layout = kind.partition(" as ")
    match layout:
        case "saelens":
            theirs = {"relu": "standard", "jumprelu": "jumprelu"}[name]
            return as_saelens(ours / name, tmp_path / "theirs", architecture=theirs)
        case "sparsify":
            return as_sparsify(ours / name, tmp_path / "run" / "layers.1")
    return ours / name


def distance(sae: SAE, source: SAE, x: torch.Tensor) -> float:
    """How far a reconstruction is from the source's, relative to its norm."""
    with torch.no_grad():
        want = source(x)
        return float((sae(x) - want).norm() / want.norm())


KINDS = [*TRAINED, "relu as saelens", "jumprelu as saelens", "topk as sparsify"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_starts_as_the_source_and_reaches_half_its_l0(kind, x, ours, tmp_path):
    source, arch = load_sae(source_of(kind, ours, tmp_path)), kind.split()[0]
    for mean in (None, x.mean(0)):
        same = begin(arch, L0, x, mean, source)
        assert distance(same.export(SCALE, mean), source, x) < 1e-5
    half = begin(arch, L0 / 2, x, mean, source)
    sae = finished(half, x, mean)
    held_out = x[::3]  # all rows have 2 % less or more, by chance
    assert float((sae.encode(held_out) > 0).sum(1).float().mean()) == pytest.approx(L0 / 2, rel=0.02)
    assert distance(sae, source, x) > 1e-3


@pytest.mark.parametrize(("form", "arch"), [("jumprelu", "batchtopk"), ("batchtopk", "jumprelu")])
def test_another_architecture_of_the_same_form_goes_on(form, arch, x, ours):
    source = load_sae(ours / form)
    learner = begin(arch, L0, x, None, source)
    assert distance(learner.export(SCALE), source, x) < 1e-5
    learner.step(normalised(x, None)[:BATCH])
    assert learner.check() is None and 1e-6 < distance(learner.export(SCALE), source, x) < 0.2


def seen_beside(source: SAE, x: torch.Tensor):
    """A callback that logs the distance to the source."""
    return lambda sae, step: [("mine/distance", distance(sae, source, x))]


def test_what_the_sae_says_is_the_default_and_what_it_was_is_written_down(x, ours, tmp_path, monkeypatch):
    source = ours / "batchtopk"
    monkeypatch.chdir(tmp_path)
    beside = seen_beside(load_sae(source), x)
    run = train(**SMALL | {"absorption_evals": 2}, init_from=source, center=True, name="on", callbacks=[beside])
    info = run.info
    assert run.metrics()["mine/distance"].iloc[0] < 1e-5
    assert [sae["name"] for sae in info["saes"]] == ["batchtopk-256-l0_8"]
    assert (info["hook_name"], info["model"]) == (HOOK, "speller")
    weights = hashlib.sha256((source / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert info["init_from"]["sha256"] == weights and info["init_from"]["path"] == str(source)
    assert any("starts from the SAE" in note for note in info["notes"])
    card = (run.path / "saes" / "batchtopk-256-l0_8" / "README.md").read_text()
    assert weights in card and str(source.parent) not in card


def test_activations_of_ones_own_can_go_on(x, ours, tmp_path):
    beside = seen_beside(load_sae(ours / "relu"), x)
    run = train(activations=x, init_from=ours / "relu", batch_tokens=32, tokens=3200, out=tmp_path, absorption_evals=2,
                callbacks=[beside])  # fmt: skip
    assert run.metrics()["mine/distance"].iloc[0] < 1e-5
    assert [sae["name"] for sae in run.info["saes"]] == ["relu-256-l0_8"]


BAD = [
    ({"--width": "512"}, "width 512 is not that of"),
    ({"--hook": "blocks.2.hook_resid_post"}, "is of blocks.1.hook_resid_post, not of blocks.2.hook_resid_post"),
    ({"--arch": "topk,relu"}, "relu cannot start from .* which is a topk SAE: choose from topk"),
    ({"--seed": "0,1"}, "several seeds make no difference"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[next(iter(flags)) for flags, _ in BAD])
def test_what_does_not_fit_is_one_sentence(flags, words, ours, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--init-from", str(ours / "topk"), *(part for pair in flags.items() for part in pair)]
    refused(arguments, words, capsys)
    refused([*arguments, "--dry-run"], words, capsys)
    assert not list(tmp_path.iterdir())


def refused(arguments: list[str], words: str, capsys) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert len([line for line in said.splitlines() if line.startswith("sae-train: ")]) == 1, said
    assert "Traceback" not in said and re.search(words, said), said


def test_saes_that_are_not_there_or_not_of_this_model_are_one_sentence(ours, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["--init-from", "./none"], "is no SAE checkpoint", capsys)
    refused(["--init-from", "checkpoints/a/saes/none"], "no SAE 'checkpoints/a/saes/none' is in a folder", capsys)
    refused(["--init-from", "you/name"], "HF_HUB_OFFLINE", capsys)
    other = SAE(SAEConfig("topk", 12, WIDTH, k=4, hook_name=HOOK))
    with torch.no_grad():
        other.W_dec.fill_(1.0)
    save_sae(other, tmp_path / "narrow")
    refused(["--init-from", "narrow"], "takes 12 values a token and blocks.1.hook_resid_post has 256", capsys)
    with torch.no_grad():
        other.W_dec[0] *= 3
    save_sae(other, tmp_path / "narrow")
    assert main(["--init-from", "narrow"]) == 2
    assert "topk SAEs are trained with rows of one norm" in capsys.readouterr().err
    save_sae(SAE(SAEConfig("relu", 256, WIDTH)), tmp_path / "unknown")
    refused(["--init-from", "unknown"], "does not say what L0 it has: give --l0", capsys)
    (tmp_path / "unknown" / "cfg.json").unlink()
    refused(["--init-from", "unknown", "--l0", "4"], "cfg.json does not exist", capsys)


def test_of_the_hub_a_folder_and_a_revision_can_be_named_and_the_commit_is_kept(ours, tmp_path, monkeypatch):
    """The cache's folders stand for the hub."""
    commit = tmp_path / "models--you--name" / "snapshots" / "c0ffee"
    shutil.copytree(ours / "topk", commit / "deep" / "topk")
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns[0]))
        return commit

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    record = InitialSAE("you/name@v2/deep/topk").record
    assert (record["name"], record["path"], record["revision"]) == ("you/name@v2/deep/topk", None, "c0ffee")
    assert InitialSAE("you/name/deep/topk", before=record).sae.cfg.k == L0
    assert asked == [("you/name", "v2", "deep/topk/cfg.json"), ("you/name", "c0ffee", "deep/topk/cfg.json")]
    assert f"`you/name@v2/deep/topk`, revision c0ffee (its weights: sha256 {record['sha256']})" in started_sentence(
        {"init_from": record}
    )
    tensors = load_file(ours / "topk" / "sae_weights.safetensors")
    save_file(tensors | {"b_dec": tensors["b_dec"] + 1}, commit / "deep" / "topk" / "sae_weights.safetensors")
    with pytest.raises(UserError, match="changed since the run began"):
        _ = InitialSAE("you/name/deep/topk", before=record).sae


@pytest.mark.parametrize("dry_run", [True, False])
def test_reading_an_sae_that_takes_long_is_said_and_what_is_wrong_with_it_still_is(
    ours, dry_run, tmp_path, monkeypatch, capsys
):
    known = InitialSAE.defaults

    def slowly(self):
        time.sleep(0.5)
        return known(self)

    monkeypatch.setattr(InitialSAE, "defaults", slowly)
    monkeypatch.setattr(display, "FIRST_LINE", 0.05)
    flags = ["--width", "64", "--out", str(tmp_path), "--no-absorption", *(["--dry-run"] if dry_run else [])]
    assert main(["--init-from", str(ours / "topk"), *flags]) == 2
    said = capsys.readouterr().err
    assert f"reading the SAE {ours / 'topk'}" in said and "leave --width out" in said


def test_a_run_that_began_from_an_sae_is_published_with_its_name_and_without_its_folder(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(**SMALL, init_from=str(ours / "topk"), out=str(tmp_path), name="continued")
    card = (Path(publish(run.path, "you/continued", dry_run=True, force=True)) / "README.md").read_text()
    assert "--init-from topk" in card and str(ours) not in card
