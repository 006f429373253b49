"""Grids: SAEs that train side by side, in one pass or several, and what is left to do after an interruption."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sae_train import train
from sae_train.cli import main
from sae_train.config import SAESpec, resolve
from sae_train.errors import UserError
from sae_train.runs import disk, finisher, runner
from sae_train.runs.plan import GIB, find_passes, make_plan, split
from sae_train.runs.session import begin, enter
from sae_train.training.learner import Learner

SMALL = {
    "width": "64,128", "l0": 8, "arch": "batchtopk,jumprelu", "tokens": 6500, "batch_tokens": 64,
    "buffer_tokens": 640, "held_out_tokens": 2048, "absorption": False, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip
N_BLOCKS = 11  # of 10 steps each
NAMES = [f"{arch}-{width}-l0_8" for arch in ("batchtopk", "jumprelu") for width in (64, 128)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A small grid that ran through."""
    return train(**SMALL, out=str(tmp_path_factory.mktemp("grid")), name="unbroken").path


def assert_same_saes(a: Path, b: Path, names: list[str]) -> None:
    for name in names:
        one, two = (load_file(run / "saes" / name / "sae_weights.safetensors") for run in (a, b))
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one), name


def test_a_grid_that_ended_while_it_wrote_its_saes_goes_on_with_those_that_are_missing(
    unbroken, tmp_path, monkeypatch
):  # fmt: skip
    saved = []

    def save_two(sae, folder):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(folder.name)
        save_sae(sae, folder)

    save_sae = finisher.save_sae
    monkeypatch.setattr(finisher, "save_sae", save_two)
    with pytest.raises(KeyboardInterrupt):
        train(**SMALL, out=str(tmp_path), name="broken")
    noted = json.loads((tmp_path / "broken" / "run.json").read_text())
    assert [sae["written"] for sae in noted["saes"]] == [True, True, False, False]
    noted["saes"][0]["baseline"] = {"random": {"mean_fraction": 0.5}}
    (tmp_path / "broken" / "run.json").write_text(json.dumps(noted))
    monkeypatch.setattr(finisher, "save_sae", lambda sae, folder: saved.append(folder.name) or save_sae(sae, folder))
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert saved == NAMES
    assert_same_saes(unbroken, tmp_path / "broken", NAMES)
    finished = json.loads((tmp_path / "broken" / "run.json").read_text())
    assert finished["saes"][0]["baseline"] == {"random": {"mean_fraction": 0.5}}, "measured before, not again"


def budget_below(**settings) -> float:
    """Memory in GiB that all SAEs together exceed by a little."""
    plan = make_plan(resolve(settings))
    return sum(plan.memory.values()) / GIB - 1e-6


def rows_of(run: Path) -> dict:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "details/tokens_per_second", "absorption/seconds")
    return {(row["sae"], row["step"]): {k: v for k, v in row.items() if k not in timed} for row in rows}


def test_a_grid_in_two_passes_ends_with_the_bits_and_figures_of_one_pass(unbroken, tmp_path, monkeypatch, capsys):
    def in_memory_now():
        gc.collect()
        return sum(type(thing) is Learner for thing in gc.get_objects())

    in_memory, before = [], in_memory_now()

    def begin_and_count(opened):
        in_memory.append(in_memory_now() - before)
        begin(opened)

    monkeypatch.setattr(runner.session, "begin", begin_and_count)
    split = train(**SMALL, out=str(tmp_path), name="split", memory_gib=budget_below(**SMALL)).path
    passes = json.loads((split / "run.json").read_text())["passes"]
    assert len(passes) == 2 and sorted(name for names in passes for name in names) == sorted(NAMES)
    assert_same_saes(unbroken, split, NAMES)
    assert rows_of(split) == rows_of(unbroken)
    assert in_memory == [len(names) for names in passes]
    assert not (split / "activations").exists()
    said = capsys.readouterr().out
    assert "trained in 2 passes" in said and f"{N_BLOCKS} blocks written, {N_BLOCKS} read" in said


def test_an_interrupted_grid_goes_on_in_its_pass_and_makes_spoilt_activations_anew(
    unbroken, tmp_path, monkeypatch, capsys
):  # fmt: skip
    class Crash(Exception):
        """What a kill is to a test."""

    def enter_the_first_only(opened, number):
        if number:
            raise Crash
        enter(opened, number)

    given = SMALL | {"out": str(tmp_path)}
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(runner.session, "enter", enter_the_first_only)
        train(**given, name="broken", memory_gib=budget_below(**given))
    blocks = sorted((tmp_path / "broken" / "activations").rglob("*.safetensors"))
    blocks[1].write_bytes(blocks[1].read_bytes()[:-1])
    stepped = set()
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda learner, x: stepped.add(learner.name) or step(learner, x))
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert stepped == set(json.loads((tmp_path / "broken" / "run.json").read_text())["passes"][1])
    assert_same_saes(unbroken, tmp_path / "broken", NAMES)
    said = capsys.readouterr().out
    assert "1 blocks written (1 of them in the place of damaged ones)" in said
    assert "shard-01.safetensors is damaged; block 0 is made anew" in said
    assert {key: row["losses/loss"] for key, row in rows_of(tmp_path / "broken").items() if key[1]} == {
        key: row["losses/loss"] for key, row in rows_of(unbroken).items() if key[1]
    }


def test_activations_that_were_asked_to_be_kept_serve_the_next_run(unbroken, tmp_path, capsys):
    kept = {"out": str(tmp_path), "activation_cache": str(tmp_path / "kept")}
    first = train(**SMALL | kept | {"arch": "jumprelu"}).path
    capsys.readouterr()
    second = train(**SMALL | kept | {"arch": "batchtopk"}).path
    assert f"0 blocks written, {N_BLOCKS} read" in capsys.readouterr().out
    assert_same_saes(unbroken, first, NAMES[2:])
    assert_same_saes(unbroken, second, NAMES[:2])


def test_activations_are_told_by_what_a_text_says_wherever_it_lies(tmp_path, capsys):
    lines = ["the cat sat on the mat and saw a short story start", "some words begin with one letter and some do not"]
    kept = SMALL | {"arch": "batchtopk", "width": "64", "activation_cache": str(tmp_path / "kept")}
    for folder, text, found in (("a", lines, "0 read"), ("b", lines, "0 blocks written"), ("b", lines[::-1], "0 read")):
        path = tmp_path / folder / "text.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(text * 500))
        train(**kept, dataset=str(path), out=str(tmp_path / f"{folder}{text[0][:3]}"))
        assert found in capsys.readouterr().out, folder


def test_a_toy_s_passes_need_no_disk_and_end_alike(tmp_path, capsys):
    toy = {"model": "toy", "width": "32,64", "l0": 3, "tokens": 6400, "batch_tokens": 64, "device": "cpu"}
    toy |= {"absorption": False, "absorption_evals": 1, "held_out_tokens": 512, "out": str(tmp_path)}
    whole = train(**toy).path
    split = train(**toy, memory_gib=budget_below(**toy)).path
    assert_same_saes(whole, split, ["topk-32-l0_3", "topk-64-l0_3"])
    said = capsys.readouterr().out
    assert "trained in 2 passes" in said and "on disk" not in said


def test_the_plan_shows_passes_and_disk_and_refuses_what_has_no_room(tmp_path, monkeypatch, capsys):
    settings = resolve(SMALL | {"memory_gib": budget_below(**SMALL), "out": str(tmp_path)})
    text = make_plan(settings).text()
    assert "2, since the SAEs do not fit into memory together" in text and "pass 2" in text
    assert "0.01 GiB of activations" in text and "removed at the end" in text
    assert "to write them" in text
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GiB on disk"):
        make_plan(settings).check()
    with pytest.raises(UserError, match="GiB of memory on cpu"):
        make_plan(resolve(SMALL | {"memory_gib": 0.001})).check()


def test_passes_hold_what_fits_the_widest_first_in_grid_order():
    specs = [SAESpec(arch="topk", width=width, l0=8) for width in (64, 128, 256, 512)]
    passes = split(specs, lambda members: sum(spec.width for spec in members) <= 600)
    assert [[spec.width for spec in members] for members in passes] == [[64, 512], [128, 256]]
    assert split(specs, lambda members: True) == (tuple(specs),)
    assert len(split(specs, lambda members: False)) == 4
    names = [[spec.name for spec in members] for members in passes]
    assert find_passes(specs, names) == passes
    for other in (names[:1], [*names, names[0]], [*names, ["topk-32-l0_8"]]):  # one missing, one twice, one unknown
        with pytest.raises(UserError, match=r"run\.json's passes hold other SAEs"):
            find_passes(specs, other)
