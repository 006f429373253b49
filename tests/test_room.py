"""What a plan says of room: memory under a container's limit, disk, folders, activations that were kept before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sae_train.cli import main
from sae_train.config import resolve
from sae_train.data import activation_cache
from sae_train.errors import UserError
from sae_train.runs import disk, memory
from sae_train.runs.plan import GIB, make_plan

SMALL = {"width": 64, "l0": 4, "tokens": 26_000, "batch_tokens": 256, "buffer_tokens": 8192, "device": "cpu"}


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit)
    (folder / names[1]).write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]}{cached}\n")


@pytest.mark.parametrize(
    ("names", "line", "top"), [(memory.V2, "0::/a/b\n", ""), (memory.V1, "4:cpu,memory:/a/b\n", "memory")]
)
def test_a_containers_limit_and_those_above_it_bound_the_memory(names, line, top, tmp_path, monkeypatch):
    own, root = tmp_path / "self", tmp_path / "root"
    own.write_text(f"1:cpuset:/elsewhere\n{line}")
    group(root / top / "a/b", names, "max\n", 10, 0)
    group(root / top / "a", names, str(8 * GIB), 3 * GIB, GIB)
    assert memory._left_by_limits(root, own) == [6 * GIB]
    assert memory._left_by_limits(root, tmp_path / "none") == []
    monkeypatch.setattr(memory, "_left_by_limits", lambda: [5.0])
    assert memory.free_memory(torch.device("cpu")) == 5.0


@pytest.mark.parametrize("name", ["out", "activation_cache"])
def test_a_folder_that_is_a_file_or_not_ones_own_is_refused_by_a_dry_run_too(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "notes.txt").touch()
    flag = f"--{name.replace('_', '-')}"
    for place in ("notes.txt", "notes.txt/below"):
        assert main(["--width", "64", "--l0", "4", flag, str(tmp_path / place), "--dry-run"]) == 2
        assert f"{tmp_path / 'notes.txt'} is a file: name a folder" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    assert main(["--width", "64", "--l0", "4", flag, str(tmp_path / "x"), "--dry-run"]) == 2
    assert f"you may not write in {tmp_path}" in capsys.readouterr().err


def test_a_study_into_a_file_is_refused_in_a_sentence(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert main(["study", "--quick", "--out", str(tmp_path / "notes.txt")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err


def test_activations_that_are_there_are_neither_made_nor_written_again_in_a_plan(tmp_path, monkeypatch):
    settings = resolve(SMALL | {"activation_cache": str(tmp_path)})
    plan = make_plan(settings)
    whole = plan.cache_bytes()
    before = plan.seconds()["training"]
    (facts,) = plan.facts.values()
    about = disk.about_cache(settings, facts.hook_name, facts.dtype, settings.context(facts.context))
    n_tokens = settings.n_steps * settings.train.batch_tokens

    def keep(folder: str, of: dict, tokens: int, size: int) -> None:
        block = tmp_path / folder / "block-000000"
        block.mkdir(parents=True)
        (block.parent / activation_cache.ABOUT).write_text(json.dumps(of))
        (block / "block.json").write_text(json.dumps({"bounds": [0, tokens]}))
        with (block / "shard-00.safetensors").open("wb") as file:
            file.truncate(size)

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("", (), {"free": whole / 2})())
    keep("other", about | {"model": "another"}, n_tokens, 10 * int(whole))  # says nothing of this run's room
    with pytest.raises(UserError, match=r"the activations to be kept take 0\.0 GiB on disk"):
        plan.check()
    assert "are there" not in plan.text() and plan.seconds()["training"] == pytest.approx(before, rel=0.5)
    keep("own", about, n_tokens, int(whole))
    plan.check()
    assert f"{whole / GIB:.2f} GiB of them are there" in plan.text()
    assert plan.seconds()["training"] < plan.seconds(after_another=False)["start"] + before
    (tmp_path / "own" / activation_cache.ABOUT).write_text("{")
    assert "are there" not in plan.text()


def test_states_and_saes_need_room_on_disk_too(tmp_path, monkeypatch):
    plan = make_plan(resolve(SMALL | {"out": str(tmp_path), "width": "1k,2k"}))
    n = sum((2 * 256 + 1) * width + 256 for width in (1024, 2048))  # weights of topk on the embedded model
    assert plan.files_bytes() == 4 * (2 * 3 * n + n)
    assert f"{plan.files_bytes() / GIB:.2f} GiB at most of saved states and SAEs in {tmp_path}" in plan.text()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("", (), {"free": plan.files_bytes()})())
    with pytest.raises(UserError, match="saved states and SAEs take up to"):
        plan.check()
