"""Publishing against a stand-in of the hub: what goes up comes back, and whatever fails leaves nothing behind."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_fixture import hub  # noqa: F401
from hub_stand_in import TOKEN, Hub, Repo
from safetensors.torch import load_file
from test_readers import PICKLED, assert_computes, pickled

from sae_train import load_sae
from sae_train.cli import main
from sae_train.config import flat, resolve
from sae_train.errors import UserError
from sae_train.publishing.reproduce import command, python_call
from sae_train.sae.files import save_sae
from sae_train.sae.model import SAE, SAEConfig

ARCHS = {"relu": "relu", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "matryoshka": "jumprelu",
         "gated": "gated"}  # fmt: skip
FINAL = {
    "metrics/l0": 4.01, "metrics/explained_variance": 0.9, "metrics/ce_loss_score": 0.97, "sparsity/dead_fraction": 0.1,
    "absorption/valid": True, "absorption/mean_fraction": 0.2, "absorption/mean_fraction_low": 0.15,
    "absorption/mean_fraction_high": 0.25, "absorption/mean_full": 0.1, "absorption/mean_full_low": 0.05,
    "absorption/mean_full_high": 0.15, "absorption/n_letters": 26, "absorption/mean_f1": 0.8,
}  # fmt: skip
RANDOM = {"mean_full": 0.01, "mean_fraction": 0.02}
X = 3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


def random_sae(arch: str, model: str) -> SAE:
    form, g = ARCHS[arch], torch.Generator().manual_seed(list(ARCHS).index(arch))
    known = {"model_name": model, "hook_name": "blocks.1.hook_resid_post", "dataset_path": "org/text", "l0": 4.01}
    sae = SAE(SAEConfig(form, 6, 64, k=4 if form == "topk" else None, metadata={"trained_as": arch}, **known))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.rand(p.shape, generator=g) - 0.3)
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if form == "jumprelu":
            sae.threshold.abs_()
    return sae


def make_run(folder: Path, archs=("topk",), model: str = "org/lm", curves: bool = False, **final) -> Path:
    """A finished run of random SAEs, as training leaves it."""
    settings = flat(resolve({"model": model, "dataset": "org/text", "arch": ",".join(archs), "width": 64, "l0": 4}))
    entries = []
    for arch in archs:
        name = f"{arch}-64-l0_4"
        save_sae(random_sae(arch, model), folder / "saes" / name)
        entries.append({"name": name, "arch": arch, "width": 64, "l0": 4.0, "seed": 0, "failed": None,
                        "final": FINAL | final, "baseline": {"random": RANDOM}})  # fmt: skip
    info = {"settings": settings, "dataset": "org/text", "model": model, "hook_name": "blocks.1.hook_resid_post",
            "d_in": 6, "tokens": 1000, "versions": {"torch": "2"}, "hardware": {"cores": 2, "gpus": []},
            "git_commit": None, "status": "finished", "saes": entries}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    rows = [{"sae": e["name"], "step": s, "tokens": 100 * s, **e["final"]} for s in (1, 2) for e in entries]
    if curves:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def staging(tmp_path, monkeypatch) -> Path:
    """Where temporary folders go."""
    place = tmp_path / "staging"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@torch.no_grad()
def test_every_architecture_comes_back_from_the_hub_in_one_commit_and_only_its_own_files(hub, tmp_path):  # noqa: F811
    run = make_run(tmp_path / "run", ARCHS)
    assert main(["publish", str(run), "--repo", "me/grid"]) == 0
    assert len(hub.repos["me/grid"].commits) == 2, "the empty repo and one commit"
    for arch in ARCHS:
        hub.seen.clear()
        folder = f"{arch}-64-l0_4"
        ours, theirs = load_sae(run / "saes" / folder), load_sae("me/grid", folder)
        assert torch.equal(theirs(X), ours(X)) and torch.equal(theirs.encode(X), ours.encode(X))
        fetched = {Path(path).name for method, path in hub.seen if method == "GET" and "/resolve/" in path}
        assert fetched == {"cfg.json", "sae_weights.safetensors"}
        assert theirs.cfg.hook_name == "blocks.1.hook_resid_post" and theirs.cfg.metadata["trained_as"] == arch


def test_an_evaluation_of_an_sae_on_the_hub_needs_a_folder_for_its_results(hub, tmp_path, capsys):  # noqa: F811
    main(["publish", str(make_run(tmp_path / "run")), "--repo", "me/one"])
    assert main(["eval", "me/one", "--folder", "topk-64-l0_4"]) == 2
    assert "--out" in capsys.readouterr().err


@torch.no_grad()
def test_what_was_fetched_once_serves_without_a_network(hub, tmp_path, monkeypatch):  # noqa: F811
    main(["publish", str(make_run(tmp_path / "run")), "--repo", "me/one"])
    first = load_sae("me/one", "topk-64-l0_4")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert torch.equal(load_sae("me/one", "topk-64-l0_4")(X), first(X)) and not hub.seen


def test_a_repo_without_the_folder_names_those_that_it_has(hub, tmp_path):  # noqa: F811
    main(["publish", str(make_run(tmp_path / "run", ("relu", "topk"))), "--repo", "me/two"])
    for folder in (None, "nothing"):
        with pytest.raises(UserError, match="name one of relu-64-l0_4, topk-64-l0_4"):
            load_sae("me/two", folder)
    with pytest.raises(UserError, match="no such repo"):
        load_sae("me/absent", "x")


def test_a_pickled_sae_on_the_hub_is_read_only_when_that_is_asked_for(hub, tmp_path):  # noqa: F811
    local = pickled(tmp_path / "x", "AutoEncoder")
    hub.repos["me/dictionaries"] = Repo(False, [{f"x/{file.name}": file.read_bytes() for file in local.iterdir()}])
    with pytest.raises(UserError, match="allow_pickle=True"):
        load_sae("me/dictionaries", "x")
    assert not any(path.endswith("ae.pt") for _, path in hub.seen), "it is not even fetched"
    assert_computes(load_sae("me/dictionaries", "x", allow_pickle=True), PICKLED["AutoEncoder"][1])


def test_the_card_says_what_was_measured_and_how_to_make_it_again(hub, tmp_path):  # noqa: F811
    main(["publish", str(make_run(tmp_path / "run", curves=True)), "--repo", "me/one", "--license", "apache-2.0"])
    text = hub.repos["me/one"].files["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "saelens" and "sparse-autoencoder" in front["tags"]
    assert (front["base_model"], front["datasets"], front["license"]) == ("org/lm", ["org/text"], "apache-2.0")
    metrics = {m["type"]: m for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["l0"]["value"] == 4.01 and metrics["full_absorption"]["args"] == {
        "ci95_low": 0.05,
        "ci95_high": 0.15,
    }
    for words in (
        "0.2000 [0.1500, 0.2500] (random SAE 0.0200)",
        'load_sae("me/one", "topk-64-l0_4")',
        "sae-train --width 64 --l0 4 --model org/lm --dataset org/text",
        "curves.png",
    ):
        assert words in text
    assert hub.repos["me/one"].files["curves.png"].startswith(b"\x89PNG")


def test_no_local_path_is_published_and_the_base_model_can_be_named(hub, tmp_path):  # noqa: F811
    local = tmp_path / "my-lm"
    local.mkdir()
    run = make_run(tmp_path / "run", model=str(local))
    assert main(["publish", str(run), "--repo", "me/a"]) == 0
    assert main(["publish", str(run), "--repo", "me/b", "--base-model", "org/lm"]) == 0
    for name in ("me/a", "me/b"):
        assert all(str(tmp_path).encode() not in data for data in hub.repos[name].files.values())
    a, b = (hub.repos[name].files["README.md"].decode() for name in ("me/a", "me/b"))
    assert "base_model:" not in a and "--model my-lm" in a and "base_model: org/lm" in b
    assert json.loads(hub.repos["me/b"].files["topk-64-l0_4/cfg.json"])["metadata"]["model_name"] == "org/lm"


def test_a_dry_run_stages_checks_and_lists_but_sends_nothing(hub, tmp_path, staging, capsys):  # noqa: F811
    run = make_run(tmp_path / "run", ("relu", "gated"), curves=True)
    assert main(["publish", str(run / "saes" / "gated-64-l0_4"), "--repo", "me/one", "--dry-run"]) == 0
    assert not hub.seen
    said = capsys.readouterr().out
    (folder,) = staging.iterdir()
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"README.md", "results.json", "curves.png", "pretrained_saes.yaml", "gated-64-l0_4/cfg.json",
                     "gated-64-l0_4/sae_weights.safetensors"}  # fmt: skip
    assert all(name in said for name in files) and "nothing was uploaded" in said


FAULTS = [
    (("POST", "/repos/create"), 401, "token"),
    (("POST", "/repos/create"), 403, "token"),
    (("POST", "/preupload/"), 429, "too many requests"),
    (("PUT", "/lfs/"), 500, "HTTP 500"),
    (("PUT", "/lfs/"), "cut", "connection"),
    (("POST", "/commit/"), 503, "HTTP 503"),
    (("POST", "/commit/"), 412, "changed meanwhile"),
    (("POST", "/commit/"), "cut", "connection"),
]


@pytest.mark.parametrize(("where", "fault", "words"), FAULTS, ids=lambda value: str(value))
def test_a_failed_upload_is_one_sentence_and_leaves_nothing(where, fault, words, hub, tmp_path, staging, capsys):  # noqa: F811
    run = make_run(tmp_path / "run")
    hub.faults[where] = fault
    assert main(["publish", str(run), "--repo", "me/one"]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
    assert all(set(repo.files) == {".gitattributes"} for repo in hub.repos.values())
    assert not list(staging.iterdir())
    hub.faults.clear()
    assert main(["publish", str(run), "--repo", "me/one"]) == 0, "the same command mends it"


def test_a_commit_whose_answer_is_lost_counts(hub, tmp_path):  # noqa: F811
    hub.faults["POST", "/commit/"] = "lost"
    assert main(["publish", str(make_run(tmp_path / "run")), "--repo", "me/one"]) == 0
    assert "README.md" in hub.repos["me/one"].files


def test_a_full_disk_is_one_sentence_and_nothing_is_sent(hub, tmp_path, staging, capsys, monkeypatch):  # noqa: F811
    run = make_run(tmp_path / "run")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["publish", str(run), "--repo", "me/one"]) == 2
    said = capsys.readouterr().err
    assert "No space left" in said and "TMPDIR" in said and len(said.strip().splitlines()) == 1
    assert not hub.seen and not list(staging.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics/l0": 4.2}, "L0 4.20 where 4 was asked"),
        ({"metrics/l0": None}, "L0 of topk-64-l0_4 was not measured"),
        ({"metrics/l0": float("nan")}, "L0 of topk-64-l0_4 was not measured"),
        ({"absorption/valid": None}, "sae-train eval"),
    ],
)
def test_what_should_not_be_published_is_refused_unless_forced(change, words, hub, tmp_path, capsys):  # noqa: F811
    run = make_run(tmp_path / "run", **change)
    assert main(["publish", str(run), "--repo", "me/one"]) == 2
    said = capsys.readouterr().err
    assert words in said and "--force" in said and not hub.seen
    assert main(["publish", str(run), "--repo", "me/one", "--force"]) == 0


def test_an_unfinished_run_is_refused_and_force_leaves_out_what_is_missing(hub, tmp_path, capsys):  # noqa: F811
    run = make_run(tmp_path / "run", ("relu", "topk"))
    (run / "saes" / "relu-64-l0_4" / "cfg.json").unlink()
    assert main(["publish", str(run), "--repo", "me/one"]) == 2
    assert "relu-64-l0_4 is not finished" in capsys.readouterr().err
    assert main(["publish", str(run), "--repo", "me/one", "--force"]) == 0
    assert not any(name.startswith("relu") for name in hub.repos["me/one"].files)


def test_an_eval_made_later_counts_and_an_sae_in_no_run_needs_force(hub, tmp_path, capsys):  # noqa: F811
    run = make_run(tmp_path / "run", **{"absorption/valid": None})
    sae = run / "saes" / "topk-64-l0_4"
    means = {"mean_absorption_fraction_score": 0.3, "mean_full_absorption_score": 0.123}
    rest = {"valid": True, "reason": None, "mean_f1": 0.7, "baselines": {},
            "intervals": {"mean_fraction": [0.2, 0.4], "mean_full": [0.1, 0.2]}}  # fmt: skip
    result = {"eval_type_id": "absorption_first_letter", "eval_result_metrics": {"mean": means},
              "eval_result_details": [{}] * 26, "eval_result_unstructured": rest}  # fmt: skip
    (sae / "absorption.json").write_text(json.dumps(result))
    assert main(["publish", str(sae), "--repo", "me/one"]) == 0
    assert "0.1230 [0.1000, 0.2000]" in hub.repos["me/one"].files["README.md"].decode()
    alone = sae.rename(tmp_path / "alone")
    assert main(["publish", str(alone), "--repo", "me/two"]) == 2
    assert "in no run's folder" in capsys.readouterr().err
    assert main(["publish", str(alone), "--repo", "me/two", "--force"]) == 0


def test_others_repos_are_not_overwritten_and_private_stays_private(hub, tmp_path, capsys):  # noqa: F811
    run = str(make_run(tmp_path / "run"))
    assert main(["publish", run, "--repo", "me/one"]) == 0
    assert main(["publish", run, "--repo", "me/one"]) == 2 and "holds files already" in capsys.readouterr().err
    assert main(["publish", run, "--repo", "me/one", "--private", "--force"]) == 2
    assert "public" in capsys.readouterr().err and len(hub.repos["me/one"].commits) == 2
    assert main(["publish", run, "--repo", "me/two", "--private"]) == 0 and hub.repos["me/two"].private


@pytest.mark.parametrize("repo", ["one", "a/b/c", "me/na me", "me/..", "/x"])
def test_a_name_that_the_hub_refuses_is_refused_before_anything(repo, hub, tmp_path, capsys):  # noqa: F811
    assert main(["publish", str(make_run(tmp_path / "run")), "--repo", repo]) == 2
    assert "you/name" in capsys.readouterr().err and not hub.seen


def test_decoder_rows_have_norm_one_as_sae_bench_wants_them(hub, tmp_path):  # noqa: F811
    sae = random_sae("jumprelu", "org/lm")
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
    save_sae(sae, tmp_path / "mine")
    assert main(["publish", str(tmp_path / "mine"), "--repo", "me/one", "--force"]) == 0
    published = load_sae("me/one", "mine")
    torch.testing.assert_close(published.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(published(X), sae(X))


def test_the_command_line_publishes_by_the_hubs_own_variables(tmp_path):
    """In a process of its own, as a person runs it: endpoint and token come from the environment."""
    server = Hub()
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                        "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    run = make_run(tmp_path / "run")
    words = [sys.executable, "-m", "sae_train", "publish", str(run), "--repo", "me/one"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    server.close()
    assert done.returncode == 0, done.stderr
    sent = server.repos["me/one"].files["topk-64-l0_4/sae_weights.safetensors"]
    (tmp_path / "sent").write_bytes(sent)
    ours = load_file(run / "saes" / "topk-64-l0_4" / "sae_weights.safetensors")
    assert all(torch.equal(t, ours[name]) for name, t in load_file(tmp_path / "sent").items())


@pytest.mark.parametrize(
    "given",
    [
        {"width": "16k", "l0": 50},
        {"model": "toy", "width": "64,512", "l0": 3, "dataset": "trees"},
        {"model": "org/lm", "arch": "relu,topk", "width": "1000,4k", "l0": "8,32", "seed": "0,1", "lr": 3e-4,
         "absorption": False, "template": "{word} starts with: {label}", "drop": ["a b", ",", "\n"], "name": "mine",
         "eval_cache": "/home/me/words", "activation_cache": "/home/me/x"},
    ],
)  # fmt: skip
def test_the_command_of_a_run_gives_its_settings_again(given, tmp_path):
    settings = flat(resolve(given))
    *before, line = command(settings).splitlines()
    if before:
        subprocess.run(before[0], shell=True, check=True, cwd=tmp_path)
    words, again = shlex.split(line)[1:], {}
    while words:
        flag = words.pop(0).removeprefix("--")
        if flag.startswith("no-"):
            again[flag.removeprefix("no-").replace("-", "_")] = False
        else:
            again[flag.replace("-", "_")] = words.pop(0)
    kept = {"name", "out", "note", "log_every", "save_every", "wandb", "eval_cache", "activation_cache"}
    assert "/home/me" not in line
    file = again.pop("config", None) and tmp_path / "drop.yaml"
    assert {k: v for k, v in flat(resolve(again, file)).items() if k not in kept} == {
        k: v for k, v in settings.items() if k not in kept
    }


def test_a_call_in_python_is_kept_as_it_can_be_typed_again():
    held = {"out": Path("x"), "l0": np.array([8, 16]), "width": (1024, "4k"), "seed": range(2), "lr": np.float64(0.5)}
    assert python_call(held) == "sae_train.train(out='x', l0=[8, 16], width=[1024, '4k'], seed=[0, 1], lr=0.5)"
    assert python_call({"width": {1}}) == "sae_train.train(width={1})"


@pytest.mark.parametrize("arch", ["topk", "relu"])
def test_an_sae_whose_values_are_not_finite_is_not_published(arch, hub, tmp_path, capsys):  # noqa: F811
    sae = random_sae(arch, "org/lm")
    with torch.no_grad():
        sae.W_enc.fill_(3e38)  # each weight is finite, what comes out is not
    save_sae(sae, tmp_path / "mine")
    assert main(["publish", str(tmp_path / "mine"), "--repo", "me/one", "--force"]) == 2
    said = capsys.readouterr().err
    assert "not finite" in said and len(said.strip().splitlines()) == 1 and not hub.seen
