"""Whole runs on the embedded model, small: what a run leaves behind, and that nothing disturbs or loses it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sae_train import load_sae, train
from sae_train.cli import main
from sae_train.runs import finisher
from sae_train.runs.run import Run

SMALL = {
    "width": 256,
    "l0": 8,
    "tokens": 30_000,
    "batch_tokens": 256,
    "buffer_tokens": 2048,
    "held_out_tokens": 2048,
    "eval_words": 600,
    "absorption_evals": 2,
    "device": "cpu",
}
NAME = "topk-256-l0_8"
ARCHS = "relu,topk,jumprelu,matryoshka,gated"
NAMES = [f"{arch}-256-l0_8" for arch in ARCHS.split(",")]


def flags(settings: dict) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One small run of five architectures."""
    out = tmp_path_factory.mktemp("runs")
    return train(**SMALL, arch=ARCHS, out=str(out), name="five").path


@pytest.fixture
def no_baselines(monkeypatch) -> None:
    """For tests of weights: scores of random SAEs and the like take half of a small run's time."""
    monkeypatch.setattr(finisher.baselines, "all_scores", lambda *_: {})


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_that_the_design_names(finished):
    for name in (
        "run.json",
        "metrics.jsonl",
        "absorption.parquet",
        "trajectory.parquet",
        "report.html",
    ):
        assert (finished / name).stat().st_size > 0
    for name in NAMES:
        assert {path.name for path in (finished / "saes" / name).iterdir()} == {
            "cfg.json",
            "sae_weights.safetensors",
            "sparsity.safetensors",
            "absorption.json",
            "README.md",
        }
    assert not list(finished.rglob("*.tmp"))


def test_metrics_hold_one_row_per_sae_and_step_with_the_expected_figures(finished):
    rows = rows_of(finished)
    keys = [(row["sae"], row["step"]) for row in rows]
    assert len(keys) == len(set(keys))
    last = {row["sae"]: row for row in rows}
    for name, row in last.items():
        assert row["step"] == 118
        assert row["tokens"] == 118 * 256
        for figure in ("losses/mse_loss", "metrics/l0", "metrics/explained_variance", "metrics/ce_loss_score"):
            assert row[figure] is not None, (name, figure)
        assert row["metrics/explained_variance"] > 0.3
        assert "absorption/valid" in row


def test_absorption_table_has_letters_at_every_look_and_words_at_the_last(finished):
    table = pd.read_parquet(finished / "absorption.parquet")
    letters = table[table["level"] == "letter"]
    assert set(letters["step"]) >= {0, 118}
    assert set(table[table["level"] == "word"]["step"]) == {118}
    assert set(letters["sae"]) == set(NAMES)


def test_every_word_is_followed_and_the_event_log_names_those_carried_by_another_latent_at_the_end(finished):
    run, words = Run(finished), pd.read_parquet(finished / "absorption.parquet").query("level == 'word'")
    followed = pd.read_parquet(finished / "trajectory.parquet")
    looks = pd.read_parquet(finished / "absorption.parquet").query("level == 'letter'").groupby("sae")["step"].nunique()
    assert len(followed) == sum(looks[name] * (words["sae"] == name).sum() for name in NAMES)
    carried = words[words["outcome"] == "carried"]
    keys = ["sae", "letter", "word"]
    log = run.events()
    assert sorted(map(tuple, log[keys].to_numpy())) == sorted(map(tuple, carried[keys].to_numpy()))
    assert set(log["taken_step"]) <= set(followed["step"])


def test_latents_of_letters_are_looked_up_in_held_out_text(finished):
    letters = pd.read_parquet(finished / "absorption.parquet").query("level == 'letter' and step == 118 and counts")
    for name in NAMES:
        lines = (finished / "latents" / f"{name}.jsonl").read_text().splitlines()
        own = {record["latent"]: record for record in map(json.loads, lines)}
        mains = {int(latents[0]) for latents in letters[letters["sae"] == name]["main_latents"] if len(latents)}
        assert mains <= set(own)
        assert any(record["examples"] and record["top"] for record in own.values())


def test_a_saved_sae_takes_raw_activations_and_loads_bit_equal(finished):
    folder = finished / "saes" / NAME
    sae = load_sae(folder)
    saved = weights(folder)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(sae, name), saved[name])
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(256), atol=1e-5)
    assert sae.cfg.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.model_name == "speller"


def test_a_run_with_evals_and_one_without_give_the_same_weights(finished, tmp_path):
    bare = train(**SMALL, arch=ARCHS, out=str(tmp_path), name="bare", absorption=False).path
    for name in NAMES:
        assert_equal_weights(finished / "saes" / name, bare / "saes" / name)


def test_an_sae_of_a_grid_equals_the_one_trained_alone(finished, tmp_path):
    alone = train(**SMALL, arch="topk", out=str(tmp_path), name="alone", absorption=False).path
    assert_equal_weights(finished / "saes" / NAME, alone / "saes" / NAME)


def test_a_killed_run_resumes_to_the_weights_of_the_unbroken_one(finished, tmp_path, no_baselines):
    folder = tmp_path / "killed"
    given = SMALL | {"arch": ARCHS, "out": tmp_path, "name": "killed", "save_every": 10}
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_train", *flags(given)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list(folder.glob("state/step-*[05]")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "saes").exists(), "killed too late for this test to mean anything"
    assert main(["resume", str(folder)]) == 0
    for name in NAMES:
        assert_equal_weights(finished / "saes" / name, folder / "saes" / name)
    whole, again = ([(row["sae"], row["step"]) for row in rows_of(run)] for run in (finished, folder))
    assert again == whole


def test_ctrl_c_saves_says_how_to_resume_and_the_resumed_run_is_the_unbroken_one(finished, tmp_path, no_baselines):
    folder = tmp_path / "broken"
    given = SMALL | {"arch": "topk", "out": tmp_path, "name": "broken"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_train", *flags(given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"sae-train resume {folder}" in said
    assert "Traceback" not in errors
    assert main(["resume", str(folder)]) == 0
    assert_equal_weights(finished / "saes" / NAME, folder / "saes" / NAME)


def test_a_finished_run_and_a_foreign_folder_cannot_be_resumed(finished, tmp_path, capsys):
    assert main(["resume", str(finished)]) == 2
    assert "finished" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    assert main(["resume", str(tmp_path)]) == 2


def test_eval_command_reproduces_the_run_s_own_score(finished, tmp_path, capsys):
    arguments = ["eval", str(finished / "saes" / NAME), "--eval-words", "600", "--out", str(tmp_path)]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "absorption.json").read_text())
    assert content["eval_type_id"] == "absorption_first_letter"
    table = pd.read_parquet(finished / "absorption.parquet")
    then = table[(table["sae"] == NAME) & (table["step"] == 118) & (table["level"] == "letter")].set_index("letter")
    now = pd.read_parquet(tmp_path / "absorption.parquet")
    now = now[now["level"] == "letter"].set_index("letter")
    assert (then["fraction"] - now["fraction"]).abs().max() < 1e-6
    assert (then["asset_hash"] == now["asset_hash"]).all() and (now["preset"] == "saebench").all()
    own = json.loads((finished / "saes" / NAME / "absorption.json").read_text())
    assert own["eval_result_metrics"]["mean"] == pytest.approx(content["eval_result_metrics"]["mean"], abs=1e-6)
    fires, at_the_end = (load_file(at / "sparsity.safetensors") for at in (tmp_path, finished / "saes" / NAME))
    assert torch.equal(fires["sparsity"], at_the_end["sparsity"])
    beside = content["eval_result_unstructured"]["baselines"]
    assert set(beside) == {"random", "random_words", "shuffled_labels", "random_directions", "probe"}
    page = (tmp_path / "absorption.html").read_text()
    assert "shuffled labels" in page and f"{now[now['counts']]['fraction'].mean():.3f}" in page
    assert "random SAE" in capsys.readouterr().out


def test_eval_command_asks_another_hierarchy_or_says_why_not(finished, tmp_path, capsys):
    arguments = ["eval", str(finished / "saes" / NAME), "--eval-words", "600", "--out", str(tmp_path), "--hierarchy"]
    assert main([*arguments, "letter-class"]) == 0
    assert "2 letter classes count" in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "absorption.parquet")
    assert set(table["letter"]) <= {"vowel", "consonant"}
    assert main([*arguments, "first-vowl"]) == 2
    assert "did you mean 'first-vowel'" in capsys.readouterr().err


def test_report_command_compares_runs(finished, tmp_path, capsys):
    page = tmp_path / "both.html"
    assert main(["report", str(finished), str(finished), "--out", str(page)]) == 0
    assert NAME in page.read_text()


def test_a_truncated_checkpoint_is_refused_in_one_sentence(finished, tmp_path, capsys):
    whole = (finished / "saes" / NAME / "sae_weights.safetensors").read_bytes()
    (tmp_path / "cfg.json").write_text((finished / "saes" / NAME / "cfg.json").read_text())
    (tmp_path / "sae_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["eval", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("craftgpt-5m", "text/tinystories/craftgpt_in_vocab_sentences.txt"),
        ("tiny1m", "text/tinystories/toyRNN_tinystories_sample_2MB.txt"),
    ],
)
def test_real_models_train_on_their_text_with_or_without_the_eval(shared_data, tmp_path, model, text):
    run = train(
        **(SMALL | {"tokens": 26_000, "arch": "topk,jumprelu"}),
        model=str(shared_data / "models" / model),
        dataset=str(shared_data / text),
        out=str(tmp_path),
    )
    info = run.info
    assert info["status"] == "finished"
    for sae in info["saes"]:
        assert sae["failed"] is None
        assert sae["final"].get("absorption/valid") is not None or any("absorption" in note for note in info["notes"])


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until the condition holds while the process lives."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.time() < end, "the run took too long to get there"
        time.sleep(0.05)
