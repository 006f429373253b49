"""sae-train resume RUN --tokens N: a finished run is trained further, bit-equal also where it is interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_train import resume, train
from sae_train.cli import main
from sae_train.errors import UserError
from sae_train.publishing.reproduce import command
from sae_train.runs.runner import Runner
from sae_train.sae.files import load_state
from sae_train.training import loop
from sae_train.training.start import lr_factor

SMALL = {"width": 64, "l0": 4, "tokens": 6400, "batch_tokens": 64, "held_out_tokens": 512, "absorption_evals": 2,
         "arch": "topk,jumprelu", "device": "cpu"}  # fmt: skip
NAMES = ["topk-64-l0_4", "jumprelu-64-l0_4"]
MORE, BEGUN, END = 12_800, 100, 200


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    code = torch.rand(4000, 40, generator=torch.Generator().manual_seed(1))
    return (code * (code > 0.9)) @ torch.randn(40, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def finished(x, tmp_path_factory) -> Path:
    return train(activations=x, **SMALL, out=tmp_path_factory.mktemp("runs"), name="first").path


@pytest.fixture(scope="module")
def further(x, finished) -> Path:
    folder = finished.with_name("further")
    shutil.copytree(finished, folder)
    return resume(folder, activations=x, tokens=MORE).path


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "saes" / name / "sae_weights.safetensors")


def test_a_finished_run_goes_on_with_its_weights_its_rows_and_a_second_schedule(finished, further):
    info = json.loads((further / "run.json").read_text())
    assert (info["status"], info["tokens"], info["stages"]) == ("finished", MORE, [6400])
    assert any("the learning rate, which had fallen to 0, rises" in note for note in info["notes"])
    assert info["command"].endswith(f"--tokens {MORE}")
    before, after = ((folder / "metrics.jsonl").read_text() for folder in (finished, further))
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.splitlines() if json.loads(line)["sae"] == NAMES[0]]
    rates = {row["step"]: row["details/lr"] for row in rows if row["step"]}
    assert sorted(rates) == list(rates) and max(rates) == END
    full = max(rates[step] for step in rates if step > BEGUN)
    for step in (step for step in rates if step > BEGUN):
        assert rates[step] == pytest.approx(full * lr_factor(step - 1 - BEGUN, END - BEGUN, 0.05, 0.2), rel=1e-5)
    assert rates[BEGUN] < 0.1 * full and rates[END] < 0.1 * full
    for name in NAMES:
        assert not torch.equal(weights(finished, name)["W_dec"], weights(further, name)["W_dec"])
    for sae in info["saes"]:
        assert sae["written"] and sae["final"]["metrics/l0"] == pytest.approx(4, rel=0.02)
        assert "After 6,400 tokens the learning rate" in (further / "saes" / sae["name"] / "README.md").read_text()


def test_it_is_the_same_to_the_bit_where_it_is_interrupted(x, finished, further, tmp_path, monkeypatch):
    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    log = Runner.log

    def stop(self, learner, step, values):
        log(self, learner, step, values)
        self.session.stop.requested = step >= 150

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "log", stop)
        with pytest.raises(loop.Stopped):
            resume(folder, activations=x, tokens=MORE)
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    resume(folder, activations=x)
    for name in NAMES:
        mine, theirs = weights(folder, name), weights(further, name)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert len((folder / "metrics.jsonl").read_text()) and (folder / "report.html").is_file()


def test_it_starts_from_the_finished_runs_moments(finished):
    """What it goes on from is all there: Adam's moments and counters, not weights alone."""
    state = load_state(next((finished / "state").iterdir()) / NAMES[0])
    assert state["step_count"] == BEGUN and float(state["adam"]["W_dec"]["exp_avg"].abs().sum()) > 0


@pytest.mark.parametrize(
    ("change", "tokens", "words"),
    [
        ({}, "6400", "has had 6,400 tokens already: give more"),
        ({}, "some", "'some' is not a count"),
        ({"status": "interrupted"}, "2M", "is interrupted, not finished: go on with it first"),
        ({"passes": [["topk-64-l0_4"], ["jumprelu-64-l0_4"]]}, "2M", "start new runs from its SAEs by --init-from"),
    ],
)
def test_what_cannot_go_on_is_one_sentence_and_stays_as_it_is(change, tokens, words, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    text = json.dumps(json.loads((folder / "run.json").read_text()) | change)
    (folder / "run.json").write_text(text)
    assert main(["resume", str(folder), "--tokens", tokens]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert (folder / "run.json").read_text() == text


def test_a_finished_run_says_how_it_can_go_on(finished, x):
    with pytest.raises(UserError, match=r"--tokens NUMBER trains it further, to more than its 6,400 tokens"):
        resume(finished, activations=x)


def test_the_command_of_a_card_has_a_line_for_each_part():
    from sae_train.config import flat, resolve

    settings = flat(resolve({"tokens": 12_800_000, "width": "1k"}))
    first, second = command(settings, [6_400_000]).splitlines()
    assert "--tokens 6400000" in first and second == "sae-train resume RUN --tokens 12800000"
