"""The command line as a person meets it: help at once, one sentence and exit 2 for every mistake."""

import subprocess
import sys
from dataclasses import fields

import pytest

from sae_train.cli import EvalFlags, TrainFlags, main
from sae_train.config import EvalSettings, LMSettings, leaves
from sae_train.sae.files import save_sae
from sae_train.sae.model import SAE, SAEConfig

HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "accelerate", "pandas", "wandb", "matplotlib")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from sae_train.cli import main; main(['--help']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
    for word in ("--width", "--l0", "resume", "report", "eval", "publish", "export-neuronpedia", "--dry-run"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "16x"], "16x"),
        (["--width", "0"], "not a width"),
        (["--width", "-1"], "not a width"),
        (["--l0", "0"], "not an L0"),
        (["--l0", "16k", "--width", "1k"], "not an L0"),
        (["--l0", "64", "--width", "64"], "not below the width"),
        (["--arch", "tpok"], "did you mean topk"),
        (["--widht", "1k"], "--width"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--device", "cuda:77", "--dry-run"], "not available"),
        (["--device", "cpu", "--precision", "bfloat16"], "take auto or float32"),
        (["--model", "./no-such-folder"], "no-such-folder"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--hook", "blocks.77.hook_resid_post"], "blocks."),
        (["--hook", "blocks.1.hook_resid_pst"], "blocks.1.hook_resid_post"),
        (["--dataset", "./absent.txt"], "absent.txt"),
        (["--context", "100000"], "context"),
        (["--drop", "no such token"], "single token"),
        (["--width", "2m", "--seed", "0,1,2,3,4,5,6,7"], "memory"),
        (["--template", "{word} nothing here {letter}{letter}"], "template"),
        (["frobnicate"], "frobnicate"),
        (["resume", "nowhere"], "nowhere"),
        (["resume"], "--run"),
        (["eval", "nowhere"], "nowhere"),
        (["publish", "nowhere", "--repo", "you/name"], "nowhere"),
        (["publish", "nowhere", "--repo", "name"], "you/name"),
        (["publish", "nowhere"], "--repo"),
        (["report"], "no run"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "a refused run leaves nothing behind"


def test_flags_are_the_settings_of_the_tree_and_an_eval_takes_those_that_it_uses():
    training, evaluation = ({field.name for field in fields(kind)} for kind in (TrainFlags, EvalFlags))
    assert training == set(leaves())
    used = LMSettings.model_fields.keys() | EvalSettings.model_fields.keys()
    of_text = {"dataset", "text_column"}  # that random SAEs are fitted on
    assert evaluation == of_text | used - {"absorption", "absorption_evals"}  # whether and how often along a run


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("--preset", "papr", "did you mean paper?"), ("--eval-words", "few", "not a count"),
     ("--eval-seed", "-1", "greater than or equal to 0"), ("--dtype", "float8", "float32")],
)  # fmt: skip
def test_an_evals_settings_are_read_as_those_of_a_training(flag, value, words, capsys, tmp_path):
    save_sae(SAE(SAEConfig("relu", 2, 4, model_name="speller", hook_name="blocks.1.hook_resid_post")), tmp_path)
    for command in ([], ["eval", str(tmp_path)]):
        assert main([*command, flag, value]) == 2
        told = capsys.readouterr().err
        assert words in told and len(told.strip().splitlines()) == 1


def test_an_existing_run_folder_is_not_touched(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    assert main(["--out", str(tmp_path), "--name", "mine"]) == 2
    assert "resume" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_empty_dataset_is_refused(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["--dataset", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "empty" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--width", "1k,4k", "--l0", "8", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for words in ("topk-1k-l0_8", "topk-4k-l0_8", "blocks.", "GiB", "time"):
        assert words in plan
    assert list(tmp_path.iterdir()) == []
