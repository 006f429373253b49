"""Studies: a small one runs, is interrupted, goes on and reproduces; claims hold, fail or stay open as planted."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from planted_cells import cell, claim_of, table
from scripts import script

from sae_train.cli import main
from sae_train.config import CONFIGS
from sae_train.config.study import FULL, QUICK, read_design
from sae_train.errors import UserError
from sae_train.report.cells import Cell
from sae_train.report.claims import FAILS, FEW, FOUND, HOLDS, UNSEEN, claims, signed
from sae_train.report.study import Study, findings, least, onset
from sae_train.runs import estimate, finisher, study
from sae_train.runs.plan import make_plan
from sae_train.runs.study_folder import check_same
from sae_train.training.learner import Learner

SMALL = {
    "model": "speller", "tokens": 13_000, "batch_tokens": 128, "buffer_tokens": 2048, "held_out_tokens": 1024,
    "eval_words": 600, "absorption_evals": 1, "device": "cpu",
    "grids": [{"arch": "topk", "width": [64, 128], "l0": [4, 8]}],
}  # fmt: skip
BESIDE = {"random_words": {"mean_full": 0.1, "mean_recall_main": 0.5}}  # a fifth of what is missed is carried
PARTS = ["topk-64-l0_4+8-seed_0", "topk-128-l0_4+8-seed_0"]
TABLES = ("study.json", "claims.csv", "cells.csv", "saes.csv", "letters.csv", "study.html")


def write_design(folder: Path, **changes) -> Path:
    """The small design as a file, with changes; a key whose value is None is left out."""
    path = folder / "design.yaml"
    content = {key: value for key, value in (SMALL | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """A small study that ran through, without the slow baselines."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finisher.baselines, "all_scores", lambda *_: BESIDE)
        assert main(["study", "--config", str(write_design(folder)), "--out", str(folder / "study")]) == 0
    return folder / "study"


def test_a_study_leaves_runs_tables_and_a_page_that_loads_nothing(studied):
    assert {path.name for path in studied.iterdir()} == {*PARTS, *TABLES, "activations"}
    assert all((studied / part / "report.html").exists() for part in PARTS)
    page = (studied / "study.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for words in ("Does absorption rise with width", "too few seeds", "random SAEs", "Pythia-1.4B", "Splitting"):
        assert words in page
    found = json.loads((studied / "study.json").read_text())
    assert [sae["name"] for sae in found["saes"]] == [f"topk-{w}-l0_{l0}" for w in (64, 128) for l0 in (4, 8)]
    rise = next(claim for claim in found["claims"] if claim["main"] and claim["metric"] == "full")
    by_width = [np.mean([sae["mean_full"] for sae in found["saes"] if sae["width"] == w]) for w in (64, 128)]
    assert rise["difference"] == pytest.approx(by_width[1] - by_width[0], abs=2e-6)
    letters = pd.read_csv(studied / "letters.csv")
    missed = 1 - letters["recall_main"]
    np.testing.assert_allclose(letters["full_beyond"], letters["full"] - 0.2 * missed, atol=2e-6)
    chance = pd.read_csv(studied / "cells.csv")["chance"]
    np.testing.assert_allclose(chance, 0.2 * missed.groupby([letters["width"], letters["l0"]]).mean(), atol=2e-6)
    saes = pd.read_csv(studied / "saes.csv")
    np.testing.assert_allclose(saes["l0_words"], saes["l0"])  # topk: as many on every token


def test_charts_of_a_study_are_drawn_from_its_tables_each_with_its_own_legend(studied, tmp_path):
    refused = script("draw_study", studied, "--out", tmp_path / "none.svg", "--charts", "nothing")
    assert refused.returncode == 2 and not (tmp_path / "none.svg").exists()
    assert "allowed: svg" in script("draw_study", studied, "--out", tmp_path / "no_kind").stderr
    names = re.search("there are (.*)", refused.stderr)[1].split(", ")
    assert script("draw_study", studied, "--out", tmp_path / "all.svg", "--charts", ",".join(names)).returncode == 0
    drawn = (tmp_path / "all.svg").read_text()
    assert drawn.count("Full absorption against") == sum(name.startswith(("width-", "l0-", "ev-")) for name in names)
    assert "width 64" in drawn and "L0 8" in drawn  # what lines are told apart by


def test_parts_of_a_design_pool_to_the_tables_of_the_whole_by_their_letters_alone(studied, tmp_path):
    for width in (64, 128):
        part = tmp_path / str(width)
        part.mkdir()
        (part / "study.json").write_text((studied / "study.json").read_text())
        for name in ("saes.csv", "letters.csv"):
            table = pd.read_csv(studied / name)
            table[table["width"] == width].to_csv(part / name, index=False)
    pool = partial(script, "pool_studies", "--out", tmp_path / "pooled")
    assert pool(tmp_path / "128", tmp_path / "64", tmp_path / "64").returncode == 0
    for name in ("claims.csv", "cells.csv", "saes.csv", "letters.csv"):
        whole, pooled = (pd.read_csv(folder / name) for folder in (studied, tmp_path / "pooled"))
        for metric in whole.columns.difference(["sentence"]):
            if whole[metric].dtype == float:  # letters' values have six digits
                np.testing.assert_allclose(pooled[metric], whole[metric], atol=2e-5, err_msg=f"{name}, {metric}")
            elif metric != "means":
                assert list(pooled[metric].fillna("")) == list(whole[metric].fillna("")), (name, metric)
    letters = pd.read_csv(tmp_path / "64/letters.csv")
    other = tmp_path / "other"  # has more letters of the SAEs of 64, one of which failed there
    shutil.copytree(tmp_path / "64", other)
    saes = pd.read_csv(other / "saes.csv")
    saes.assign(left_out=np.where(saes["l0"] == 4, "it failed", None)).to_csv(other / "saes.csv", index=False)
    denser = letters[letters["l0"] == 8]
    pd.concat([denser, denser.head(1).assign(letter="é")]).to_csv(other / "letters.csv", index=False)
    assert pool(other, tmp_path / "64").returncode == 0
    pooled = pd.read_csv(tmp_path / "pooled/letters.csv")
    assert len(pooled) == len(letters) + 1, (
        "of an SAE that both have the first one's letters, of the failed the other's"
    )
    found = json.loads((tmp_path / "64/study.json").read_text())
    found["settings"]["tokens"] += 1
    (tmp_path / "64/study.json").write_text(json.dumps(found))
    said = pool(tmp_path / "128", tmp_path / "64")
    assert said.returncode == 2 and "differ in tokens" in said.stderr
    found["settings"]["dataset"] = None  # a model's own text
    (tmp_path / "64/study.json").write_text(json.dumps(found))
    for folder in (tmp_path / "64", other):  # of an SAE without letters another study's letters count
        (folder / "study.json").write_text(json.dumps(found))
    denser.to_csv(tmp_path / "64/letters.csv", index=False)
    saes.to_csv(other / "saes.csv", index=False)
    letters.to_csv(other / "letters.csv", index=False)
    assert pool(tmp_path / "64", other).returncode == 0
    assert len(pd.read_csv(tmp_path / "pooled/letters.csv")) == len(letters)
    said = pool(tmp_path / "none")
    assert said.returncode == 2 and "none/study.json" in said.stderr


def test_letters_that_a_seed_lacks_are_left_out_of_differences_between_l0(studied, tmp_path):
    letters = pd.read_csv(studied / "letters.csv")
    seeds = pd.concat([letters, letters.assign(seed=1)])
    lacking = (seeds["letter"] == letters["letter"].min()) & (seeds["seed"] == 1) & (seeds["l0"] == 8)
    seeds[~lacking].to_csv(tmp_path / "letters.csv", index=False)
    said = script("told_letters", tmp_path, "--floor", "0").stdout
    assert "nan" not in said and said.count("2 seeds: too few (25)") == 4  # all letters, and those told, of two widths
    wrong = script("told_letters", tmp_path / "none")
    assert wrong.returncode == 2 and "letters.csv" in wrong.stderr


def test_what_intervals_are_worth_is_told_from_the_letters_of_a_study(studied, tmp_path):
    letters = pd.read_csv(studied / "letters.csv")
    wrong = script("interval_coverage", studied)
    assert wrong.returncode == 2 and "no cell with 3 training seeds" in wrong.stderr
    shifted = [
        letters.assign(seed=seed, full=letters["full"] + 0.1 * seed) for seed in range(3)
    ]  # on all letters alike
    pd.concat(shifted).to_csv(tmp_path / "letters.csv", index=False)
    said = script("interval_coverage", tmp_path, "--runs", "20").stdout
    (row,) = [line.split(" | ") for line in said.splitlines() if line.startswith(f"| {tmp_path.name}, topk")]
    assert row[1:3] == ["4", "100 %"] and float(row[3].split()[0]) == pytest.approx(math.sqrt(2 / 3), abs=0.05)


def test_training_lengths_are_compared_letter_by_letter_and_only_by_their_tokens(studied, tmp_path):
    longer = tmp_path / "longer"
    longer.mkdir()
    found = json.loads((studied / "study.json").read_text())
    found["settings"]["tokens"] *= 2
    (longer / "study.json").write_text(json.dumps(found))
    pd.read_csv(studied / "saes.csv").to_csv(longer / "saes.csv", index=False)
    letters = pd.read_csv(studied / "letters.csv")
    shorter = letters[letters["letter"] != letters["letter"].max()]  # a letter that is not at both lengths is left out
    shorter.assign(full=shorter["full"] + 0.05, n_split=1.0).to_csv(longer / "letters.csv", index=False)
    compare = partial(script, "training_length", "--tables", tmp_path / "tables")
    said, again = compare("--made", longer, studied).stdout, compare().stdout
    moved = [line.split(" | ") for line in said.splitlines() if "26,000 minus 13,000" in line]
    assert again == said and [line[0] for line in moved][-1] == "| topk, mean" and len(moved) == 5
    kept = sorted(set(shorter["letter"]))
    for cells, (_, own) in zip(moved, [*letters.groupby(["width", "l0"]), ("", letters)], strict=True):
        assert cells[5].startswith("+0.050 [+0.050, +0.050], visible 0.000")
        fewer = 1 - own[own["letter"].isin(kept)]["n_split"].mean()
        assert float(cells[8].split(" [")[0]) == pytest.approx(fewer, abs=1e-3)
    sparser = [line.split(" | ") for line in said.splitlines() if " | 13,000 | 8 minus 4 | " in line]
    full = letters.groupby(["width", "l0"])["full"].mean()
    assert [float(cells[6].split(" [")[0]) for cells in sparser] == [
        pytest.approx(full[width, 8] - full[width, 4], abs=1e-3) for width in (64, 128)
    ]
    more = pd.read_csv(tmp_path / "tables/letters.csv")
    of_a_seed = more.assign(seed=1)[more["width"] == 64]  # whose other SAEs failed: it is in no mean over SAEs
    pd.concat([more, of_a_seed]).to_csv(tmp_path / "tables/letters.csv", index=False)
    without = compare().stdout
    mean = [[line for line in printed.splitlines() if line.startswith("| topk, mean")] for printed in (said, without)]
    assert mean[0] == mean[1] and "nan" not in without
    saes = pd.read_csv(longer / "saes.csv")  # one was idle, of one nothing was scored: other lengths leave them out too
    saes.assign(left_out=np.where(saes["l0"] == 4, "idle", None))[saes["width"] == 64].to_csv(
        longer / "saes.csv", index=False
    )
    fewer = compare("--made", longer, studied).stdout
    assert {line.split(" | ")[0] for line in fewer.splitlines()[2:4]} == {"| topk, 64, L0 8"} and "1 seed: too" in fewer
    saes.assign(left_out="idle").to_csv(longer / "saes.csv", index=False)
    lost = compare("--made", longer, studied)
    assert lost.returncode == 2 and "there at every length" in lost.stderr
    saes.to_csv(longer / "saes.csv", index=False)
    twice = compare("--made", studied, studied)
    assert twice.returncode == 2 and "two studies have 13000 tokens" in twice.stderr
    alone = compare("--tables", tmp_path / "alone", "--made", studied)
    assert alone.returncode == 0 and "minus 13,000" not in alone.stdout
    found["settings"]["eval_words"] = 599
    (longer / "study.json").write_text(json.dumps(found))
    wrong = compare("--made", longer, studied)
    assert wrong.returncode == 2 and "differ in eval_words" in wrong.stderr


def test_an_interrupted_study_goes_on_skips_what_is_finished_and_ends_with_the_same_tables(
    studied, tmp_path, monkeypatch, capsys
):  # fmt: skip
    monkeypatch.setattr(finisher.baselines, "all_scores", lambda *_: BESIDE)
    call = ["study", "--config", str(write_design(tmp_path)), "--out", str(tmp_path / "study")]
    save_sae = finisher.save_sae
    with monkeypatch.context() as patch:

        def save_one(sae, folder):
            if folder.name == "topk-128-l0_8":
                raise KeyboardInterrupt
            save_sae(sae, folder)

        patch.setattr(finisher, "save_sae", save_one)
        with pytest.raises(SystemExit, match="130"):
            main(call)
    assert "go on with: sae-train study --config" in capsys.readouterr().out
    so_far = json.loads((tmp_path / "study" / "study.json").read_text())
    assert so_far["left_out"] == [f"{PARTS[1]}: not trained yet"] and {sae["width"] for sae in so_far["saes"]} == {64}
    assert f"{PARTS[1]}: not trained yet" in (tmp_path / "study" / "study.html").read_text()

    trained = []
    monkeypatch.setattr(Learner, "step", lambda *_: trained.append(1))
    write_design(tmp_path, activation_cache=str(tmp_path / "elsewhere"))  # such as a disk with more room
    assert main(call) == 0
    begun = json.loads((tmp_path / "study" / PARTS[1] / "run.json").read_text())
    assert begun["settings"]["activation_cache"] == str(tmp_path / "elsewhere")
    assert not trained, "all steps were made before the interruption"
    assert f"part 1 of 2, {PARTS[0]}: finished" in capsys.readouterr().out
    for name in TABLES:
        assert (tmp_path / "study" / name).read_bytes() == (studied / name).read_bytes(), name
    assert main([*call, "--dry-run"]) == 0
    assert "nothing is left to train" in capsys.readouterr().out

    record = tmp_path / "study" / PARTS[0] / "run.json"
    said = json.loads(record.read_text())
    said["made_from"]["text"]["held_out_tokens"] = "another"
    before = record.read_text()
    record.write_text(json.dumps(said))
    shutil.rmtree(tmp_path / "study" / PARTS[1])
    assert main(call) == 2
    assert f"changed since {PARTS[0]} was trained, and a study is of one text and model" in capsys.readouterr().err
    assert not (tmp_path / "study" / PARTS[1]).exists()
    record.write_text(before)

    write_design(tmp_path, tokens=14_000)
    assert main(call) == 2
    assert "made with other settings (tokens)" in capsys.readouterr().err


def test_a_dry_run_names_the_parts_with_their_time_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "matrix_rate", lambda *_: 1e8)
    design = write_design(tmp_path)
    assert main(["study", "--config", str(design), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 SAEs in 2 parts, each a run in checkpoints/design" in said
    assert all(f"{part}: 2 SAEs, about " in said for part in PARTS) and "for 2 parts" in said
    assert list(tmp_path.iterdir()) == [design]
    parts = make_plan(read_design(design, "out")[1])
    first, later = parts.seconds(), parts.seconds(after_another=True)
    assert later["training"] < first["training"] and later["set-up of the eval"] <= first["set-up of the eval"]
    assert later["looks"] == first["looks"]


def test_what_a_finished_part_has_is_not_trained_again_and_stays_on_the_page(studied, tmp_path, capsys):
    shutil.copytree(studied, tmp_path / "study")
    for grid in ({"l0": [4, 8, 16]}, {"l0": [8, 4]}, {"arch": ["topk", "relu"], "l0": [4, 8]}):
        design = write_design(tmp_path, grids=[{"arch": "topk", "width": [64, 128]} | grid])
        call = ["study", "--config", str(design), "--out", str(tmp_path / "study")]
        for more in ([], ["--dry-run"]):
            assert main([*call, *more]) == 2
            said = capsys.readouterr().err
            assert "would train again topk-64-l0_" in said and f"({PARTS[0]})" in said
    record = tmp_path / "study" / PARTS[0] / "run.json"
    begun = record.read_text().replace('"status": "finished"', '"status": "interrupted"')
    record.write_text(begun)
    assert main(call) == 2 and "leave the grid of what is there as it was" in capsys.readouterr().err
    record.write_text(begun.replace('"status": "interrupted"', '"status": "finished"'))
    write_design(tmp_path, grids=[{"arch": "topk", "width": 64, "l0": [16, 32]}])
    assert main([*call, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"beside     {part}: finished" in said for part in PARTS) and "for 1 part and the page" in said
    write_design(tmp_path, grids=[{"arch": "topk", "width": 64, "l0": [4, 8]}])
    (tmp_path / "study/cells.csv").unlink()
    assert main(call) == 0
    assert (tmp_path / "study/cells.csv").read_bytes() == (studied / "cells.csv").read_bytes()
    text = '"held_out_tokens": "another"'  # as where a file's content changed
    record.write_text(re.sub(r'"held_out_tokens": "[^"]*"', text, record.read_text()))
    write_design(tmp_path, grids=[{"arch": "topk", "width": 64, "l0": [16, 32]}])
    assert main(call) == 2 and f"changed since {PARTS[0]} was trained" in capsys.readouterr().err
    of_other_tokens = tmp_path / "study" / PARTS[1] / "run.json"
    of_other_tokens.write_text(of_other_tokens.read_text().replace('"tokens": 13000', '"tokens": 14000'))
    capsys.readouterr()
    assert main([*call, "--dry-run"]) == 0 and PARTS[1] not in capsys.readouterr().out


def test_a_dry_run_sees_what_is_there(studied, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "matrix_rate", lambda *_: 1e7)
    shutil.copytree(studied, tmp_path / "study")
    call = ["study", "--config", str(write_design(tmp_path)), "--out", str(tmp_path / "study"), "--dry-run"]
    record = tmp_path / "study" / PARTS[1] / "run.json"
    shutil.rmtree(tmp_path / "study" / PARTS[0])

    def lines() -> list[str]:
        assert main(call) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("part ")]

    with_activations = lines()[0]
    shutil.rmtree(tmp_path / "study/activations")
    assert lines()[0] != with_activations, "without them the language model runs again, in the first part that is left"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    assert lines()[1].endswith("2 SAEs, failed")
    record.write_text(record.read_text().replace('"status": "failed"', '"status": "interrupted"'))
    assert "2 SAEs, begun, at most about" in lines()[1]


def test_a_study_that_its_disk_cannot_hold_is_refused_at_once(tmp_path, monkeypatch, capsys):
    call = ["study", "--config", str(write_design(tmp_path)), "--out", str(tmp_path / "study")]
    assert main([*call, "--dry-run"]) == 0
    needed = float(re.search(r"disk +([\d.]+) GiB at most of saved states and SAEs", capsys.readouterr().out)[1])
    monkeypatch.setattr(study, "disk_of", lambda settings, cache=True: (tmp_path, int(needed * 2**30 / 2)))
    for more in ([], ["--dry-run"]):
        assert main([*call, *more]) == 2
        assert "saved states and SAEs of 2 parts take up to" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_path_is_the_same_however_it_is_written(studied, tmp_path, monkeypatch):
    shutil.copytree(studied, tmp_path / "study")
    record = tmp_path / "study" / PARTS[0] / "run.json"
    info = json.loads(record.read_text())
    info["settings"]["hierarchy"] = str(tmp_path / "h.yaml")  # as it stands there after a resume in another folder
    record.write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    part = read_design(write_design(tmp_path), tmp_path / "study")[0]
    named = lambda path: part.model_copy(update={"eval": part.eval.model_copy(update={"hierarchy": path})})  # noqa: E731
    check_same(named("h.yaml"))
    with pytest.raises(UserError, match="other settings \\(hierarchy\\)"):
        check_same(named("g.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grids: [{arch: topk, width: 64, l0: 4, l0: 8}]", "says l0 twice"),
        ("tokens: 13k\ntokens: 26k\ngrids: []", "says tokens twice"),
        ("grids: []\ntokens: 1\ngrids: []", "says grids twice"),
        ("grids: [{arch: topk, width: , l0: [4, 8]}]", "lacks width"),
        ("grids: [{arch: topk, width: 64, <<: {l0: 4}, <<: {seed: 0}}]", "nothing to compare"),
        (
            "model: speller\ninit_from: x/topk\ngrids: [{arch: topk, width: 64, l0: [4, 8], seed: [0, 1]}]",
            "several seeds, which make no difference",
        ),
    ],
)
def test_what_a_design_says_twice_not_at_all_or_in_vain_is_one_sentence(text, words, tmp_path, capsys):
    (tmp_path / "design.yaml").write_text(text)
    assert main(["study", "--config", str(tmp_path / "design.yaml"), "--out", str(tmp_path / "s"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": None}, "needs a list of grids"),
        ({"grids": []}, "needs a list of grids"),
        ({"grids": [{"arch": "topk", "width": 64}]}, "lacks l0"),
        ({"grids": [{"arch": "topk", "width": 64, "l0": 4, "tokens": 5}]}, "holds 'tokens'"),
        ({"grids": [{"arch": "topk", "width": 64, "l0": 4}]}, "nothing to compare"),
        ({"grids": [{"arch": "topk", "width": 64, "l0": 4, "seed": [0, 1, 2]}]}, "nothing to compare"),
        ({"grids": [{"arch": "topk", "width": 64, "l0": [4, 8]}] * 2}, "two grids"),
        ({"grids": [{"arch": "tpok", "width": 64, "l0": [4, 8]}]}, "did you mean topk"),
        ({"grids": [{"arch": "topk", "width": [64, 128], "l0": 64}]}, "not below the width"),
        ({"width": 64}, "width stands beside the grids"),
        ({"absorption": False}, "set by the study"),
        ({"model": "toy", "buffer_tokens": None, "eval_words": None}, "the toy has none"),
        ({"hook": "blocks.77.hook_resid_post"}, "blocks."),
        ({"tokes": 3}, "did you mean 'tokens'"),
    ],
)
def test_a_bad_design_is_one_sentence_with_exit_code_2(changes, words, tmp_path, capsys):
    path = write_design(tmp_path, **changes)
    assert main(["study", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_quick_and_a_design_are_not_asked_for_together(capsys):
    assert main(["study", "--quick", "--config", "mine.yaml"]) == 2
    assert "one of them" in capsys.readouterr().err
    assert main(["study", "--config", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_the_shipped_designs_are_those_of_the_documentation():
    names = [f"study{name}" for name in ("", "_quick", "_speller", "_two_widths", "_low_l0", "_length", "_16k")]
    full, quick, whole, two, low, length, wide = (read_design(CONFIGS / f"{name}.yaml", "out") for name in names)
    assert (CONFIGS / "study.yaml", CONFIGS / "study_quick.yaml") == (FULL, QUICK)
    small = read_design(CONFIGS / "study_length_speller.yaml", "out")
    count = lambda parts: sum(len(part.specs) for part in parts)  # noqa: E731
    assert [(len(parts), count(parts)) for parts in (full, quick, whole)] == [(12, 96), (9, 54), (9, 144)]
    assert [(len(parts), count(parts)) for parts in (two, low, length, small, wide)] == [
        (12, 96), (3, 6), (3, 12), (3, 6), (7, 40)
    ]  # fmt: skip
    assert sum(part in full for part in two) == 8, "its relu and matryoshka have two more training seeds"
    assert {part.train.tokens for part in full + two + low + wide} == {2_000_000} and full[0].lm.dtype == "bfloat16"
    assert {part.train.batch_tokens for part in two + low + length + wide} == {2048}, (
        "so that their SAEs can be compared"
    )
    assert {part.data.activation_cache for part in full + quick} == {"out/activations"}
    assert {path.stem for path in CONFIGS.glob("study*")} == {*names, "study_length_speller"}


# --- what is said of planted tables ---


def numpy_bootstrap(a: np.ndarray, b: np.ndarray, n: int = 8_000) -> np.ndarray:
    """Draws of mean(b) − mean(a), letters together and the seeds of each side on their own."""
    rng = np.random.default_rng(5)
    draws = np.empty(n)
    for i in range(n):
        letters = rng.integers(0, a.shape[1], a.shape[1])
        rows_a, rows_b = rng.integers(0, len(a), len(a)), rng.integers(0, len(b), len(b))
        draws[i] = b[rows_b][:, letters].mean() - a[rows_a][:, letters].mean()
    return draws


@pytest.mark.parametrize(
    ("change", "seeds", "verdict", "said"),
    [(0.05, 3, HOLDS, "rises with width"), (0.0, 3, UNSEEN, "with width: not distinguishable"),
     (-0.05, 3, FAILS, "falls with width, against what is expected"), (0.05, 2, FEW, "with width: too few seeds")],
)  # fmt: skip
def test_a_rise_with_width_is_judged_as_an_independent_bootstrap_does(change, seeds, verdict, said):
    narrow, wide = ([table(0.2 + i * change, seeds, draw=10 * i + j) for j in (0, 1)] for i in (0, 1))
    claim = claim_of([cell("topk", 64 * (1 + i), 8 * (1 + j), (narrow, wide)[i][j]) for i in (0, 1) for j in (0, 1)])
    draws = numpy_bootstrap(sum(narrow) / 2, sum(wide) / 2)
    assert claim.verdict == verdict and said in claim.sentence and f"{seeds} seeds" in claim.sentence
    assert claim.difference.mean == pytest.approx(change, abs=1e-9)
    assert claim.difference.visible == pytest.approx(2.8 * draws.std(), rel=0.06)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (claim.difference.low, claim.difference.high) == pytest.approx((low, high), abs=0.12 * (high - low))
    assert claim.means == pytest.approx((0.2, 0.2 + change)) and claim.labels == 26


def test_absorption_that_falls_with_l0_is_what_is_expected_and_parts_are_said_beside_the_mean():
    cells = [cell("topk", w, l0, table(m, draw=w + l0)) for w in (64, 128) for l0, m in ((8, 0.2), (32, 0.1))]
    claim = claim_of(cells, "l0")
    assert claim.verdict == HOLDS and claim.where == "topk, mean over width 64, 128" and claim.ends == ("8", "32")
    parts = [c for c in claims(cells) if (c.question, c.metric, c.pooled) == ("l0", "full", False)]
    assert [c.where for c in parts] == ["topk at width 64", "topk at width 128"]
    across = [cell("topk", w, l0, table(0.1, draw=w + l0)) for w, l0 in ((64, 8), (64, 32), (128, 8))]  # a cross
    assert (claim_of(across).where, claim_of(across, "l0").where) == ("topk at L0 8", "topk at width 64")


def test_widths_whose_l0_differ_are_interpolated_or_left_out_with_the_reason():
    score = lambda l0: 0.3 - 0.05 * math.log2(l0)  # noqa: E731

    def of(l0s):
        """Narrow cells reach their L0; wide ones too at both ends, and between them 10 % more than was asked for."""
        off = {l0: l0 * (1.1 if 4 < l0 < 32 else 1) for l0 in l0s}
        narrow = [cell("jumprelu", 64, l0, table(score(l0), draw=l0)) for l0 in l0s]
        wide = [cell("jumprelu", 128, l0, table(score(off[l0]) + 0.1, draw=9 + l0), reached=off[l0]) for l0 in l0s]
        return narrow + wide

    parts = [c for c in claims(of((4, 8, 16, 32))) if (c.question, c.metric, c.pooled) == ("width", "full", False)]
    assert [c.how for c in parts] == ["L0 as reached", "L0 interpolated", "L0 interpolated", "L0 as reached"]
    assert [c.difference.mean for c in parts] == pytest.approx([0.1] * 4)
    two = claims(of((8, 16)))
    assert {c.verdict for c in two if c.question == "width"} == {"not compared: L0 10.0\u00a0% apart"}


def test_architectures_at_the_same_ev_are_interpolated_between_their_l0():
    topk = {8: table(0.20, draw=1), 16: table(0.10, draw=2)}
    nested = {8: table(0.14, draw=3), 16: table(0.04, draw=4)}
    ev = {("topk", 8): 0.80, ("topk", 16): 0.90, ("matryoshka", 8): 0.70, ("matryoshka", 16): 0.85}
    cells = [
        cell(arch, 64, l0, t, ev=ev[arch, l0])
        for arch, own in (("topk", topk), ("matryoshka", nested))
        for l0, t in own.items()
    ]
    at_ev, at_l0 = claim_of(cells, "arch at EV"), claim_of(cells, "arch at L0")
    assert at_l0.ends == ("topk", "matryoshka") and at_l0.difference.mean == pytest.approx(-0.06)
    mine = (0.20 + 0.15) / 2  # of topk at EV .80 and .85
    theirs = (0.14 - 0.10 * (0.10 / 0.15) + 0.04) / 2
    assert at_ev.difference.mean == pytest.approx(theirs - mine) and at_ev.verdict == FOUND
    study = Study([], cells, claims(cells), [], ((), 0))
    assert least(study, "L0") == (
        "At the same L0, matryoshka has less full absorption than topk (width 64, mean over L0 8, 16): matryoshka "
        f"minus topk {at_l0.figures}."
    )
    assert "is less in matryoshka than in topk" in findings(study)[1]["Pairs of architectures"][0]
    assert all("fraction" in line for line in findings(study)[1]["Pairs of architectures"]), "full is said above"


def test_what_chance_gives_is_taken_away_letter_by_letter_and_may_turn_a_comparison_round():
    """One architecture has less full absorption, but by chance it would have still less."""
    full = {"topk": 0.20, "jumprelu": 0.15}
    chance = {"topk": 0.15, "jumprelu": 0.02}
    cells = [
        cell(arch, 64, l0, t, full_beyond=t - chance[arch], fraction=0.5 - t)
        for arch in full
        for l0 in (8, 16)
        for t in [table(full[arch], draw=l0 + len(arch))]
    ]
    study = Study([], cells, claims(cells), [], ((), 0))
    said = findings(study)[0]
    assert said["Architectures"][0].startswith("At the same L0, jumprelu has less full absorption than topk (width 64")
    assert "By the fraction it has more: jumprelu minus topk +0.050" in said["Architectures"][0]
    assert "topk has less full absorption beyond chance than jumprelu" in said["Beyond chance"][-1]
    without = claims([cell("topk", w, 8, table(0.1, draw=w)) for w in (64, 128)])
    assert "full_beyond" not in {claim.metric for claim in without}


def test_a_trend_that_turns_round_on_its_way_says_so_and_a_sign_is_that_of_the_value():
    means = {8: 0.10, 16: 0.14, 32: 0.02}
    cells = [cell("topk", 64, l0, table(m, draw=l0)) for l0, m in means.items()]
    said = claim_of(cells, "l0").sentence
    assert "falls with L0 (8 to 32, but not at every step: 0.100 → 0.140 → 0.020; topk" in said
    assert "step" not in claim_of(cells[1:], "l0").sentence
    assert (signed(0.0004), signed(-0.0004), signed(0.0), signed(0.05)) == ("+0.000", "−0.000", "0.000", "+0.050")


def test_the_page_says_what_it_is_about_and_where_the_best_latent_tells_most(studied):
    page = " ".join((studied / "study.html").read_text().split())
    for words in (
        "4 sparse autoencoders (SAEs) of the activations of speller at",
        "topk, width 64 and 128, L0 4 and 8, 1 training seed, 13,000 training tokens each",
        "measured on 600 words",
        "F1 of the best latent is highest",
    ):
        assert words in page  # fmt: skip


def test_architectures_that_are_denser_on_the_words_are_also_compared_at_their_l0_there():
    """Three times as many latents on the words: at the same L0 there they absorb as much, at that on text less."""
    score = lambda words_l0: 0.3 - 0.05 * math.log2(words_l0)  # noqa: E731
    cells = [
        cell(arch, 64, l0, table(score(times * l0), draw=l0 + times), words_l0=times * l0)
        for arch, times in (("topk", 1), ("jumprelu", 4))
        for l0 in (8, 16, 32, 64)
    ]
    on_text, on_words = claim_of(cells, "arch at L0"), claim_of(cells, "arch at L0 on the words")
    assert on_text.difference.mean == pytest.approx(-0.1) and on_text.verdict == FOUND
    assert on_words.difference.mean == pytest.approx(0.0, abs=1e-9) and on_words.verdict == UNSEEN
    assert on_words.where == "at the same L0 on the words, width 64, mean over 2 L0 on the words"  # 32 and 64
    said = findings(Study([], cells, claims(cells), [], ((), 0)))[0]
    assert said["What the cells are worth"] == [
        "L0 on the eval's words is so many times that on text: topk 1.00 and jumprelu 4.00."
    ]


def test_no_architecture_is_the_least_where_a_pair_cannot_be_told_apart():
    cells = [cell(arch, 64, l0, table(0.1, draw=i + l0)) for i, arch in enumerate(("relu", "topk")) for l0 in (8, 16)]
    said = least(Study([], cells, claims(cells), [], ((), 0)), "L0")
    assert "no architecture is shown" in said and "relu and topk (not distinguishable, smallest visible 0.0" in said


def test_cells_at_chance_and_cells_with_many_dead_latents_are_named():
    cells = [cell("topk", w, 8, table(0.1, draw=w), dead=d) for w, d in ((64, 0.02), (128, 0.243))]
    said = findings(Study([], cells, claims(cells), [], (("topk, 64, L0 8",), 2)))[0]["What the cells are worth"]
    assert "in 1 of 2 cells (topk, 64, L0 8); elsewhere it may be what random latents" in said[0]
    assert "dead in 1 of 2 cells (topk, 128, L0 8: 24.3\u00a0%)" in said[1] and len(said) == 2


def test_a_study_says_a_splitting_claim_once_and_keeps_its_parts():
    cells = [cell("topk", w, l0, table(0.1, draw=w + l0), n_split=table(1 + w / 64, draw=l0)) for w in (64, 128)
             for l0 in (8, 16)]  # fmt: skip
    own = Study([], cells, claims(cells), [], ((), 0)).of("splitting")
    pooled = [claim for claim in own if claim.pooled]
    assert len(pooled) == 2 and {claim.ends for claim in pooled} == {("64", "128"), ("8", "16")}
    assert sum(not claim.pooled for claim in own) == 4


def test_splitting_sets_in_at_the_first_width_with_more_main_latents():
    counts = {64: 1.0, 128: 1.0, 256: 1.5, 512: 2.0}
    split = {(w, l0): table(m, draw=w + l0) for w, m in counts.items() for l0 in (8, 16)}
    cells = [cell("topk", w, l0, table(0.1, draw=w), n_split=t) for (w, l0), t in split.items()]
    claim = claim_of(cells, "splitting", "n_split")
    assert onset(claim).startswith("Splitting sets in at width 256 in topk: 1.50 main latents per letter against 1.00")
    flat = [c for c in cells if c.width < 256]
    assert "is not seen to set in up to width 128" in onset(claim_of(flat, "splitting", "n_split"))


def test_letters_without_a_value_and_cells_with_other_seeds_are_left_out_of_a_mean():
    recall = [table(0.5, draw=i) for i in range(4)]
    recall[0][1, 3] = math.nan
    cells = [
        cell("topk", w, l0, table(0.1, draw=w + l0), recall_main=recall[2 * i + j])
        for i, w in enumerate((64, 128)) for j, l0 in enumerate((8, 16))
    ]  # fmt: skip
    claim = claim_of(cells, metric="recall_main")
    assert claim.labels == 25 and claim_of(cells).labels == 26
    fewer = [*cells[:3], Cell((), "topk", 128, 16.0, cells[3].saes[:2])]
    assert claim_of(fewer).where == "topk at L0 8" and claim_of(fewer).seeds == (3, 3)
