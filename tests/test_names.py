"""Names of runs and SAEs: each has its own, whoever begins together, and a run is found again from anywhere."""

import json
import random
import shutil
import threading
from pathlib import Path

import pytest
from tiny_models import WORDS, save_tiny_model

from sae_train import train
from sae_train.cli import main
from sae_train.config import resolve
from sae_train.data.toy_source import ToyStream
from sae_train.errors import UserError
from sae_train.runs.folder import alone_in, default_name, reserve
from sae_train.runs.run import resume

TOY = {
    "model": "toy", "width": 32, "l0": 3, "tokens": 6400, "batch_tokens": 64, "held_out_tokens": 512,
    "absorption": False, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("l0", [["8", "8.0000001"], ["16.00001", "16.00002"], ["3", "3.0000000001"]])
def test_two_l0_that_differ_have_two_names(l0):
    specs = resolve({"l0": ",".join(l0), "arch": "relu"}).specs
    assert [spec.name for spec in specs] == [f"relu-16k-l0_{each}" for each in l0]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"model": "a/pythia", "hook": "blocks.8.hook_resid_post"}, "pythia-blocks.8.hook_resid_post-topk-16k-l0_50"),
        ({"model": "gpt2", "hook": "blocks.3.hook_mlp_out", "l0": 50}, "gpt2-blocks.3.hook_mlp_out-topk-16k-l0_50"),
        ({"model": "a/tiny[1]", "l0": "8,32", "seed": 1}, "tiny_1_-topk-16k-l0_8+32-seed_1"),
        ({"model": "speller", "l0": 8}, "speller-topk-16k-l0_8"),
        ({"model": "gpt2", "l0": [i + 0.5 for i in range(1, 80)], "arch": "relu"}, "gpt2-79_saes"),
    ],
)  # fmt: skip
def test_a_derived_name_says_what_the_run_is_and_fits_a_file_system(given, name):
    assert default_name(resolve(given)) == name


@pytest.mark.parametrize("name", [".", "..", "...", "x" * 300, "a/b", "", " "])
def test_a_name_that_is_no_folder_s_is_refused(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "toy", "--name", name]) == 2
    assert "name" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, "mine"])
def test_runs_that_begin_together_each_get_a_folder_or_a_sentence(name, tmp_path):
    settings, folders, refused = resolve(TOY | {"out": tmp_path, "name": name}), [], []

    def begin(i):
        try:
            folders.append(reserve(settings, {"command": str(i)}))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin, args=(i,)) for i in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(folders)) == len(folders) == (1 if name else 12) and len(refused) == 12 - len(folders)
    assert len({json.loads((folder / "run.json").read_text())["command"] for folder in folders}) == len(folders)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders}


@pytest.mark.parametrize("name", [None, "tiny[1]"[:4]])
def test_a_taken_name_is_told_before_anything_long(name, tmp_path, capsys):
    given = ["--model", "toy", "--out", str(tmp_path)] + (["--name", name] if name else [])
    (tmp_path / (name or default_name(resolve({"model": "toy"})))).mkdir()
    assert main([*given, "--dry-run"]) == (2 if name else 0)
    assert not name or "resume" in capsys.readouterr().err


def test_only_one_process_works_on_a_run(tmp_path):
    with pytest.raises(ConnectionError), pytest.MonkeyPatch.context() as patched:
        patched.setattr(ToyStream, "__next__", _gone)
        train(**TOY, out=tmp_path, name="run")
    with alone_in(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        resume(tmp_path / "run")
    half_written = [tmp_path / "run" / ".run.json.0a1b.tmp", tmp_path / "run" / "saes" / "toy" / ".cfg.json.2c3d.tmp"]
    for path in half_written:  # by a process that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert resume(tmp_path / "run").info["status"] == "finished"
    assert not any(path.exists() for path in half_written)


def _gone(_):
    raise ConnectionError("gone")


def test_an_out_that_cannot_hold_a_folder_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert main(["--model", "toy", "--out", str(out)]) == 2
        assert "run folder" in capsys.readouterr().err


draw = random.Random(0)
TEXT = "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(400))


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """A run on a model and a text with relative paths that ended early; its folder."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    Path("text.txt").write_text(TEXT)
    given = TOY | {"model": "model", "hook": "blocks.0.hook_resid_post", "dataset": "text.txt", "context": 16}
    with pytest.raises(ConnectionError), pytest.MonkeyPatch.context() as patched:
        patched.setattr("sae_train.runs.runner.RunLog.log", lambda *_: _gone(_))
        train(**given, buffer_tokens=256, out="out", name="run")
    return tmp_path / "out" / "run"


def test_a_run_with_relative_paths_goes_on_and_is_evaluated_from_another_folder(begun, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = resume(begun)
    assert run.info["status"] == "finished"
    (name,) = run.saes
    checkpoint = begun / "saes" / name
    cfg = json.loads((checkpoint / "cfg.json").read_text())
    cfg["metadata"]["model_name"] = "model"  # as a run that was not resumed has it
    (checkpoint / "cfg.json").write_text(json.dumps(cfg))
    assert main(["eval", str(checkpoint)]) == 2
    assert "the absorption eval cannot run on" in capsys.readouterr().err, "a tiny model has no words"


CHANGES = {
    "a word of the text": lambda root: _edit(root / "text.txt", TEXT[-80:], TEXT[-80:].replace("w1", "w2")),
    "the end of the text": lambda root: (root / "text.txt").open("a").write("more\n"),
    "another text": lambda root: (root / "text.txt").write_text("\n".join(reversed(TEXT.split("\n")))),
    "the weights": lambda root: _retrain(root / "model"),
    "the configuration": lambda root: _edit(root / "model" / "config.json", '_epsilon": 1e-05', '_epsilon": 3.0'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_refuses_a_model_or_a_text_that_changed_under_its_name(what, begun, tmp_path):
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-kept"))
    CHANGES[what](tmp_path)
    with pytest.raises(UserError, match="changed"):
        resume(begun)
    shutil.rmtree(tmp_path / "model")
    for name in ("model", "text.txt"):
        kept = tmp_path.with_name(tmp_path.name + "-kept") / name
        shutil.copytree(kept, tmp_path / name) if kept.is_dir() else shutil.copy(kept, tmp_path / name)
    assert resume(begun).info["status"] == "finished", "what was put back has other times of change and serves"


def _edit(path: Path, old: str, new: str, times: int = 1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, times))


def _retrain(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights = {name: x * 1.001 if x.is_floating_point() else x for name, x in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
