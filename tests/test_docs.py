"""The pages are held to the code: commands and Python blocks are run, the others checked; settings.md is current.

docs/README.md says how blocks are marked. To be quick, commands that train get the flags in SMALL, which win over the
page's, evals get fewer words, and of an export's figures only some are drawn. Blocks of one page run in order: a
tutorial's in an empty folder, all others in one in which the README's commands have run.
"""

from __future__ import annotations

import json
import re
from unittest.mock import patch

import pytest
from doc_pages import (
    DOCS,
    LANGUAGES,
    MARKS,
    PAGES,
    PROGRAMS,
    README,
    ROOT,
    TUTORIALS,
    anchors,
    blocks,
    check,
    commands_in_text,
    is_run,
    run,
    words_of,
)
from hub_fixture import hub  # noqa: F401

from sae_train.config import CONFIGS
from sae_train.config.page import page
from sae_train.config.units import ARCHITECTURES
from sae_train.report import export
from sae_train.report.export import gallery
from sae_train.runs import run as runs
from sae_train.runs.summary import summary_lines
from sae_train.training.architectures import TRAINED

SMALL_RUN = {"tokens": 13_000, "batch_tokens": 128, "held_out_tokens": 1024, "absorption_evals": 1, "device": "cpu"}
SMALL_TEXT = {"buffer_tokens": 2048, "eval_words": 600}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few figures of an export, few tokens of a run that is started in Python, one random SAE; architectures of a page
    stay its own."""
    train = runs.train

    def quick_train(*given, activations=None, **settings):
        has_text = activations is None and settings.get("model") != "toy"
        small = SMALL_RUN | (SMALL_TEXT if has_text else {})
        return train(*given, activations=activations, **settings | small)

    monkeypatch.setattr(export, "gallery", lambda runs: gallery(runs)[:3])
    monkeypatch.setattr(runs, "train", quick_train)
    with patch.dict(TRAINED), patch.dict(ARCHITECTURES):
        yield


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory):
    """A folder in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        for block in blocks(README):
            if block.language == "sh" and is_run(block):
                for line in block.lines():
                    run(line)
    return folder


def run_blocks(path, chosen) -> None:
    space: dict = {"__name__": "page"}
    for block in chosen:
        if block.language == "python":
            exec(compile(block.text, path.name, "exec"), space)
        else:
            for line in block.lines():
                run(line)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_and_python_block_of_a_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = [block for block in blocks(path) if is_run(block)]
    assert chosen
    run_blocks(path, chosen)


WITH_COMMANDS = [path for path in sorted(DOCS.glob("*.md")) if any(map(is_run, blocks(path)))]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.stem)
def test_every_command_and_python_block_of_a_page_runs(path, readme_folder, hub, monkeypatch):  # noqa: F811
    monkeypatch.chdir(readme_folder)
    monkeypatch.setenv("HOME", str(readme_folder))  # where W&B looks for a key
    run_blocks(path, filter(is_run, blocks(path)))


@pytest.mark.parametrize(
    "block", [block for block in blocks(README) if block.language == "python"], ids=["runs", "own"]
)
def test_each_python_block_of_the_readme_runs(block, readme_folder, monkeypatch):
    monkeypatch.chdir(readme_folder)
    run_blocks(README, [block])


def test_the_readmes_commands_leave_what_it_lists(readme_folder):
    names = {path.name for path in (readme_folder / "checkpoints" / "first").iterdir()}
    assert {"report.html", "run.json", "metrics.jsonl", "absorption.parquet", "trajectory.parquet", "latents", "saes",
            "state"} <= names  # fmt: skip


def entry(first: str, second: str) -> dict:
    """What run.json says of an SAE whose two printed lines these are."""
    l0, reached, ev, random_ev, recovered, dead = map(float, re.findall(r"(?<![\w-])\d+(?:\.\d+)?", first))
    _, *scores, n_letters, f1 = map(float, re.findall(r"(?<![\w-])\d+(?:\.\d+)?", second))
    names = [f"{name}{end}" for name in ("mean_fraction", "mean_full") for end in ("", "_low", "_high")]
    fraction, full = scores[:7], scores[7:]
    own, random = fraction[0:3] + full[0:3], fraction[3:6] + full[3:6]
    on_words = {"mean_fraction": fraction[6], "mean_full": full[6]}
    final = {f"absorption/{name}": score for name, score in zip(names, own, strict=True)}
    final |= {"metrics/l0": reached, "metrics/explained_variance": ev, "metrics/ce_loss_score": recovered,
              "sparsity/dead_fraction": dead / 100, "absorption/valid": True, "absorption/n_letters": int(n_letters),
              "absorption/mean_f1": f1}  # fmt: skip
    beside = {"explained_variance": random_ev, **dict(zip(names, random, strict=True))}
    baseline = {"random": beside, "random_words": on_words}
    return {"name": first.split(":")[0], "l0": l0, "failed": None, "final": final, "baseline": baseline}


def test_the_lines_shown_in_the_readme_are_those_that_a_run_with_these_figures_prints():
    shown = next(block for block in blocks(README) if "L0 asked" in block.text).lines()[:4]
    assert summary_lines({"saes": [entry(*shown[:2]), entry(*shown[2:])]}) == shown


def test_the_readme_has_at_most_150_lines_and_make_train_runs_its_command():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert "sae-train --width 16k --l0 8,50 --note" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_says_what_it_is_and_commands_stand_in_none_but_those_of_commands(path):
    for block in blocks(path):
        assert block.language in LANGUAGES and block.marks <= MARKS, block
        assert not block.marks or block.language in ("sh", "python"), block
        for line in block.lines():
            is_command = line.startswith(tuple(f"{program} " for program in PROGRAMS))
            if block.language != "sh":
                assert not is_command, f"a command outside of an sh block: {line}"
            elif not is_run(block):
                assert words_of(line)[0] in (*PROGRAMS, "pip"), line


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_not_run_has_a_program_options_and_values_that_exist(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for block in blocks(path):
        if block.language == "sh" and block.marks:
            for line in block.lines():
                check(line)
    for line in commands_in_text(path):
        check(line, in_text=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configs_first_comment_is_the_command_that_uses_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split("   ")[0]
    check(line)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "first_sae.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "first_sae.ipynb", "exec"), space)
    assert len(space["latents"]) and space["run"].path.is_dir()


def test_the_page_of_settings_is_current():
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == page(), "run python -m sae_train.config.page"


def test_links_between_pages_lead_somewhere():
    for path in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                there = path.parent / target if target else path
                assert there.exists(), f"{path.name} links to {target}"
                assert not anchor or anchor in anchors(there), f"{path.name} links to {target}#{anchor}"
