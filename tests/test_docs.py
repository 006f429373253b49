"""The documentation is run: every command and Python block of the tutorials, the notebook; settings.md is current.

Commands of ```sh blocks are called in this process, Python blocks of one tutorial share a namespace, and both run in an
empty folder. To be quick, commands that train get the flags in SMALL, which win over the tutorial's, evals get fewer
words, and of an export's figures only some are drawn. Blocks of another language are not run.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from sae_train.cli import main
from sae_train.config.page import page
from sae_train.report import export
from sae_train.report.gallery import gallery

DOCS = Path(__file__).resolve().parents[1] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
SMALL = {
    "--tokens": "13k", "--batch-tokens": "128", "--buffer-tokens": "2048", "--held-out-tokens": "1024",
    "--eval-words": "600", "--absorption-evals": "1", "--device": "cpu",
}  # fmt: skip
SMALL_EVAL = {"--eval-words": "600", "--device": "cpu"}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def smaller(words: list[str]) -> list[str]:
    """A command's arguments with the flags that make it quick."""
    if words[0] == "report":
        return words
    flags = SMALL_EVAL if words[0] == "eval" else SMALL
    kept = [word for i, word in enumerate(words) if word not in flags and words[i - 1] not in flags]
    return kept + [part for pair in flags.items() for part in pair]


def run_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "sae-train", f"only sae-train is run here: {line}"
    assert main(smaller(words[1:])) == 0, line


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_and_python_block_of_a_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "gallery", lambda runs: gallery(runs)[:3])
    space: dict = {"__name__": "tutorial"}
    found = blocks(path.read_text(encoding="utf-8"))
    assert {"sh", "python"} & {language for language, _ in found}
    for language, content in found:
        if language == "sh":
            for line in filter(None, content.splitlines()):
                run_command(line)
        elif language == "python":
            exec(compile(content, path.name, "exec"), space)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "first_sae.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace(
                "tokens=300_000", "tokens=13_000, batch_tokens=128, eval_words=600, absorption_evals=1"
            )
            exec(compile(source, "first_sae.ipynb", "exec"), space)
    assert len(space["latents"]) and space["run"].path.is_dir()


def test_the_page_of_settings_is_current():
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == page(), "run python -m sae_train.config.page"


def test_links_between_pages_lead_somewhere():
    for path in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
