"""The random SAE beside an SAE is one thing: fitted on held-out text, the same in a run and in `sae-train eval`."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from sae_train import train
from sae_train.cli import main
from sae_train.data.documents import EMBEDDED_TEXT
from sae_train.evals import baselines
from sae_train.evals.baselines import TEXT, WORDS
from sae_train.files import write_json
from sae_train.publishing.card import card
from sae_train.publishing.hub import Origin
from sae_train.publishing.publish import _candidate

SMALL = {
    "width": 256, "l0": 8, "tokens": 12_800, "batch_tokens": 128, "buffer_tokens": 2048, "held_out_tokens": 1024,
    "eval_words": 600, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def two_draws() -> Iterator[None]:
    """A mean of several, as users have it; elsewhere tests draw one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(baselines, "random_score", partial(baselines.random_score.func, draws=2))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    texts = pd.read_parquet(EMBEDDED_TEXT / "held_out.parquet")["text"]
    path.write_text("\n".join(" ".join(each.split()) for each in texts[:1500]))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text) -> dict[str, Path]:
    """An SAE with a k and one with thresholds on the embedded text; one on its own text, with outliers left out."""
    out = tmp_path_factory.mktemp("runs")
    both = train(**SMALL, arch="topk,jumprelu", eval_seed=3, out=out, name="both").path
    own = train(**SMALL, dataset=text, context=16, outlier_norm=1.2, drop=" the", out=out, name="own").path
    return {"topk": both, "jumprelu": both, "own": own}


def sae_in(run: Path, arch: str) -> Path:
    return run / "saes" / f"{arch}-256-l0_8"


def evaluate(sae: Path, out: Path, *more: str) -> dict:
    """The random SAE's figures that `sae-train eval` writes."""
    return evaluate_beside(sae, out, *more)["random"]


def evaluate_beside(sae: Path, out: Path, *more: str) -> dict:
    assert main(["eval", str(sae), "--eval-words", "600", "--out", str(out), *more]) == 0
    return json.loads((out / "absorption.json").read_text())["eval_result_unstructured"]["baselines"]


@pytest.mark.parametrize(
    ("name", "arch", "seed"), [("topk", "topk", 3), ("jumprelu", "jumprelu", 3), ("own", "topk", 0)]
)
def test_a_run_and_its_evaluation_have_the_same_random_sae(name, arch, seed, runs, tmp_path, capsys):
    info = json.loads((runs[name] / "run.json").read_text())
    assert (info["outliers"]["held_out"] > 0) is (name == "own")
    entry = next(entry for entry in info["saes"] if entry["arch"] == arch)
    of_run, on_words = entry["baseline"]["random"], entry["baseline"]["random_words"]
    capsys.readouterr()
    of_eval = evaluate_beside(sae_in(runs[name], arch), tmp_path, "--eval-seed", str(seed))
    assert of_eval["random"] == of_run and of_run["fitted_on"] == TEXT
    assert of_eval["random_words"] == on_words and on_words["fitted_on"] == WORDS
    assert on_words["l0_words"] == pytest.approx(entry["final"]["absorption/l0_words"], rel=0.1)
    shown = f"(random SAE {of_run['mean_fraction']:.4f} [{of_run['mean_fraction_low']:.4f}, "
    shown += f"{of_run['mean_fraction_high']:.4f}], on the words {on_words['mean_fraction']:.4f})"
    assert shown in capsys.readouterr().out and shown in (sae_in(runs[name], arch) / "README.md").read_text()
    for page in (runs[name] / "report.html", tmp_path / "absorption.html"):
        assert f"same width and L0, fitted on {TEXT}" in page.read_text()


def test_a_text_that_is_here_by_its_name_serves_an_sae_outside_its_run(runs, tmp_path):
    shutil.copytree(sae_in(runs["jumprelu"], "jumprelu"), tmp_path / "alone")
    assert evaluate(tmp_path / "alone", tmp_path / "out")["fitted_on"] == TEXT


@pytest.mark.parametrize("gone", ["the text", "the run's settings", "the run's activations"])
def test_without_text_it_is_fitted_on_the_words_and_everything_says_so(gone, runs, tmp_path, capsys):
    run = shutil.copytree(runs["own"], tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    if gone == "the text":
        info["settings"]["dataset"] = str(tmp_path / "gone.txt")
    elif gone == "the run's settings":
        info["settings"]["no_such_setting"] = 1
    else:
        info["activations"] = {"file": "x.npy"}
    write_json(run / "run.json", info)
    sae = sae_in(run, "topk")
    beside = evaluate_beside(sae, sae)
    random = beside["random"]
    assert beside["random_words"] == random
    assert random["fitted_on"] == WORDS and random != info["saes"][0]["baseline"]["random"]
    assert "are fitted on the eval's words (" in capsys.readouterr().out
    assert "fitted on the eval&#39;s words" in (sae / "absorption.html").read_text()
    entry = _candidate(sae, {"name": sae.name, "l0": 8.0, "width": 256, "final": {}}).entry
    published = card(Origin("you/name", "mit", "speller", "x", {"d_in": 256}, None, None, None), [entry], False)
    assert f"same width and L0, fitted on {WORDS}." in published


def test_a_text_can_be_named_and_one_that_is_not_there_is_told_before_anything(runs, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["eval", str(sae_in(runs["topk"], "topk")), "--dataset", "gone.txt", "--out", str(out)]) == 2
    assert "there is no dataset 'gone.txt'" in capsys.readouterr().err and not out.exists()
    own = evaluate(sae_in(runs["topk"], "topk"), out, "--eval-seed", "3")
    other = evaluate(sae_in(runs["topk"], "topk"), out, "--eval-seed", "3", "--dataset", str(text))
    assert other["fitted_on"] == TEXT and other != own
    assert f"held-out activations of {text}" in capsys.readouterr().out
