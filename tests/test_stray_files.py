"""What stands twice, bears one name or does not belong there: runs, a file manager's files, labels' names."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_report import fake_run, read
from tiny_models import save_tiny_model

from sae_train import train
from sae_train.data.activation_cache import files_of
from sae_train.data.documents import find_documents
from sae_train.data.origin import describe_text
from sae_train.data.pretrained import describe_weights
from sae_train.report import write_report
from sae_train.report.data import load_runs
from sae_train.report.export import gallery
from sae_train.runs.run import Run

STRAY = (".DS_Store", "Thumbs.db", "desktop.ini", "._topk-16k-l0_50")


def litter(folder: Path) -> None:
    """Leave what file managers leave, in a folder and all below it."""
    for each in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in (*STRAY, *(f"._{path.name}" for path in list(each.iterdir()) if not path.name.startswith("."))):
            if not (each / name).exists():
                (each / name).write_bytes(b"\x00\x05\x16\x07 Mac OS X \xff{")


@pytest.mark.parametrize("again", ["", "/.", "/../run", "link"])
def test_a_run_that_is_given_twice_counts_once(again, tmp_path):
    run = fake_run(tmp_path / "run", l0s=(8.0, 50.0), words=30)
    (tmp_path / "link").symlink_to(run)
    second = tmp_path / "link" if again == "link" else Path(f"{run}{again}")
    alone = write_report(run, tmp_path / "alone.html").read_text()
    assert write_report([run, second], tmp_path / "twice.html").read_text() == alone
    assert write_report([run, second]) == run / "report.html"
    assert [name for name, _ in gallery(load_runs([run, second]))] == [name for name, _ in gallery(load_runs([run]))]


@pytest.mark.parametrize(("one", "two"), [("a/run", "b/run"), ("run", "deep/run"), ("a/x/run", "b/x/run")])
def test_two_runs_of_one_name_are_told_apart(one, two, tmp_path):
    runs = [fake_run(tmp_path / one, words=30), fake_run(tmp_path / two, words=30, l0s=(20.0, 40.0))]
    page = read(write_report(runs, tmp_path / "both.html"))
    names = [one, two] if one != "run" else [f"{tmp_path.name}/run", two]
    for name, sae in zip(names, ("topk-16k-l0_50", "topk-16k-l0_20"), strict=True):
        assert f"{name} · {sae}" in page.text
    loaded = load_runs([*runs, fake_run(tmp_path / "other", words=30)])
    assert [run.name for run in loaded] == [*names, "other"]
    files = [name for name, _ in gallery(loaded)]
    assert len(files) == len(set(files)) and all(any(f"saes/{run.name}/" in file for file in files) for run in loaded)
    assert all(file.count("/") == 1 for file in files if not file.startswith("saes/"))


@pytest.mark.parametrize("hierarchy", ["last-letter", "letters/second-letter.json", "word-class"])
def test_a_label_s_name_stands_once_in_each_sentence(hierarchy, tmp_path):
    run = fake_run(tmp_path / "run", words=30)
    facts = json.loads((run / "run.json").read_text())
    facts["settings"]["hierarchy"] = hierarchy
    (run / "run.json").write_text(json.dumps(facts))
    text = read(write_report(run)).text
    first, second = Path(hierarchy).stem.split("-")
    plural = f"{first} {second}{'es' if second == 'class' else 's'}"
    assert f"mean over {plural}" in text and f"{first} {first}" not in text and f"{second} {second}" not in text


def test_stray_files_in_a_run_s_folder_change_nothing(tmp_path):
    toy = {"model": "toy", "width": 32, "l0": 3, "tokens": 6400, "batch_tokens": 64, "held_out_tokens": 512}
    run = train(**toy, absorption=False, device="cpu", out=tmp_path, name="run")
    saes = set(run.saes)
    litter(run.path)
    assert set(Run(run.path).saes) == saes == {"topk-32-l0_3"}
    write_report(run.path)
    fake = fake_run(tmp_path / "fake", words=30)
    (fake / "latents").mkdir()
    (fake / "latents" / "topk-16k-l0_50.jsonl").write_text("")
    before = write_report(fake, tmp_path / "a.html").read_text()
    litter(fake)
    assert write_report(fake, tmp_path / "b.html").read_text() == before


def test_stray_files_beside_text_and_weights_change_nothing(tmp_path):
    model, text = save_tiny_model(tmp_path / "model"), tmp_path / "text" / "part"
    text.mkdir(parents=True)
    (text / "a.jsonl").write_text("".join(json.dumps({"text": f"w{i} w2 w3"}) + "\n" for i in range(50)))

    stream = SimpleNamespace(held_out=torch.zeros(2, 4, dtype=torch.long))

    def known() -> tuple:
        options = {"local_files_only": True}
        reads = [each for _, each in next(find_documents(str(text.parent))[0].reads())]
        made = describe_text(str(text.parent), stream), describe_weights(str(model), str(model), options)
        return *made, files_of(text.parent), reads

    before = known()
    litter(model)
    litter(text.parent)
    shutil.copy(text / "a.jsonl", text / "._a.jsonl")
    assert known() == before
