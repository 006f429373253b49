"""The mirror on W&B against a stand-in of its server: the same names, one run however often resumed, no hindrance."""

import json
from pathlib import Path

import pandas as pd
import pytest
from wandb_stand_in import WandbServer

from sae_train import train
from sae_train.config import resolve
from sae_train.runs import wandb_mirror
from sae_train.runs.wandb_mirror import open_mirror

ONE, TWO = resolve({"width": "1k", "l0": 8}), resolve({"width": "1k", "l0": "8,16"})


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in that W&B's client is told to use, with a key; waiting is short."""
    import wandb

    stand_in = WandbServer()
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # whatever this process set up before knows another address
    monkeypatch.setattr(wandb_mirror, "START_SECONDS", 20)
    monkeypatch.setattr(wandb_mirror, "END_SECONDS", 20)
    yield stand_in
    monkeypatch.setattr(wandb_mirror, "END_SECONDS", 1)
    wandb.teardown()
    stand_in.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "run"
    place.mkdir()
    return place


def row(step: int, sae: str = "topk-1k-l0_8", **more) -> dict:
    return {"sae": sae, "step": step, "tokens": 100 * step, "metrics/l0": 8.0, "metrics/explained_variance": 0.5,
            "absorption/reason": None, "absorption/valid": True, **more}  # fmt: skip


def log(folder: Path, settings, rows, mode="online", show=False) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    mirror = open_mirror(mode, settings, folder)
    for r in rows:
        mirror.log(r)
    if show:
        mirror.show()
    mirror.close()


def test_a_resumed_run_goes_on_in_its_own_wandb_run_with_each_step_once(server, folder):
    histogram = {"sparsity/log10_density_histogram": [1] * 10}
    log(folder, ONE, [row(1), row(2, **histogram), row(3)])
    log(folder, ONE, [row(3), row(4)], show=True)
    (name,) = server.history
    assert set(server.starts) == {name} == {json.loads((folder / "wandb.json").read_text())["id"]}
    assert [r["tokens"] for r in server.history[name]][:4] == [100, 200, 300, 400]
    first, second = server.history[name][:2]
    assert (first["metrics/l0"], first["metrics/explained_variance"], first["tokens"]) == (8.0, 0.5, 100)
    assert second["sparsity/log10_density_histogram"]["values"] == [1] * 10
    assert any(file.startswith("media/images/curves") for file in server.files[name])


def test_saes_of_a_grid_stand_side_by_side_under_their_names(server, folder):
    log(folder, TWO, [row(1), row(2), row(1, "topk-1k-l0_16"), row(2, "topk-1k-l0_16")])
    (rows,) = server.history.values()
    assert [(r["tokens"], *(k for k in r if k.endswith("/metrics/l0"))) for r in rows] == [
        (100, "topk-1k-l0_8/metrics/l0"), (200, "topk-1k-l0_8/metrics/l0"),
        (100, "topk-1k-l0_16/metrics/l0"), (200, "topk-1k-l0_16/metrics/l0"),
    ]  # fmt: skip


def test_without_a_key_it_says_one_line_and_stays_on_this_disk(server, folder, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY")
    log(folder, ONE, [row(1)])
    out, err = capfd.readouterr()
    assert "no API key" in out and "going on offline" in out and "wandb sync" in out and not err
    assert len(out.splitlines()) == 2 and not server.history
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_where_wandb_is_down_at_the_start_it_goes_on_offline(server, folder, monkeypatch, capfd):
    monkeypatch.setattr(wandb_mirror, "START_SECONDS", 2)
    server.down = True
    log(folder, ONE, [row(1)])
    out, _ = capfd.readouterr()
    assert "going on offline" in out.splitlines()[0] and len(out.splitlines()) == 2
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_where_wandb_goes_down_later_nothing_is_raised_and_the_data_stays_here(server, folder, monkeypatch, capfd):
    monkeypatch.setattr(wandb_mirror, "END_SECONDS", 1)
    mirror = open_mirror("online", ONE, folder)
    server.down = True
    mirror.log(row(1))
    mirror.close()
    out, _ = capfd.readouterr()
    assert "wandb sync" in out and len(out.splitlines()) == 1
    assert list(folder.glob("wandb/run-*/run-*.wandb"))


def test_a_mirror_that_breaks_says_so_once(server, folder, capfd):
    class Broken:
        offline = False

        def log(self, *_, **__):
            raise RuntimeError("the service is gone")

    mirror = open_mirror("offline", ONE, folder)
    run, mirror._run = mirror._run, Broken()
    mirror.log(row(1))
    mirror.log(row(2))
    out, _ = capfd.readouterr()
    assert out.count("stopped answering (the service is gone)") == 1
    run.finish()


def test_letters_and_words_of_the_last_evaluation_become_tables(server, folder):
    rows = [{"level": level, "step": step, "sae": "a", "letter": "b", "word": word, "main_latents": [3, 5], "full": 0.5}
            for step in (1, 2) for level, word in (("letter", None), ("word", "bee"), ("word", "bow"))]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "absorption.parquet")
    log(folder, ONE, [row(1)], mode="offline", show=True)
    (words,) = folder.glob("wandb/offline-run-*/files/media/table/absorption/words*.json")
    (letters,) = folder.glob("wandb/offline-run-*/files/media/table/absorption/letters*.json")
    table = json.loads(words.read_text())
    assert [r[table["columns"].index("word")] for r in table["data"]] == ["bee", "bow"]
    assert table["data"][0][table["columns"].index("main_latents")] == "3 5"
    assert len(json.loads(letters.read_text())["data"]) == 1


def test_a_run_is_mirrored_and_finishes(server, tmp_path):
    run = train(model="toy", width=64, l0=3, tokens=25_600, batch_tokens=256, held_out_tokens=2048, device="cpu",
                absorption=False, wandb="online", out=str(tmp_path), name="mine")  # fmt: skip
    (rows,) = server.history.values()
    assert run.info["status"] == "finished"
    ours = run.metrics()
    assert [r["tokens"] for r in rows if "tokens" in r] == ours["tokens"].tolist() + [ours["tokens"].max()] * 2
    assert [r["losses/mse_loss"] for r in rows if "losses/mse_loss" in r] == pytest.approx(
        ours["losses/mse_loss"].dropna().tolist()
    )
    (files,) = server.files.values()
    assert {file.split("/")[1] for file in files if file.startswith("media/")} == {"images", "html"}
