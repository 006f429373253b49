"""What test_docs.py knows of the pages: their blocks and commands, and how a command is run quickly or only checked."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import cyclopts
import pytest
from processes import Launched

from sae_train.cli import app, main
from sae_train.config import resolve

ROOT = Path(__file__).resolve().parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = [
    README,
    *sorted(DOCS.glob("*.md")),
    *TUTORIALS,
    ROOT / "kernels/README.md",
    ROOT / "checkpoints/speller/README.md",
]
LANGUAGES = {"sh", "python", "json", "yaml", "text"}
MARKS = {"network", "gpu", "peer", "long"}
PROGRAMS = ("sae-train", "python", "make", "torchrun", "accelerate")
SMALL = {
    "--tokens": "6500", "--batch-tokens": "64", "--buffer-tokens": "2048", "--held-out-tokens": "1024",
    "--eval-words": "600", "--absorption-evals": "1", "--device": "cpu",
}  # fmt: skip
SMALL_TOY = {flag: value for flag, value in SMALL.items() if flag not in ("--buffer-tokens", "--eval-words")}
SMALL_EVAL = {"--eval-words": "600", "--device": "cpu"}
SMALLER = {
    "eval": SMALL_EVAL,
    "watch": {"--port": "0"},
    "report": {},
    "resume": {},
    "publish": {},
    "export-neuronpedia": {"--tokens": "4k"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the marks behind it that say why it is not run, its text."""

    language: str
    marks: frozenset[str]
    text: str

    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def blocks(page: Path) -> list[Block]:
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block((info.split() or [""])[0], frozenset(info.split()[1:]), text) for info, text in fences]


def anchors(page: Path) -> set[str]:
    """Where a link into a page can lead: its headings as GitHub writes them into addresses."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_run(block: Block) -> bool:
    return block.language in ("sh", "python") and not block.marks


def words_of(line: str) -> list[str]:
    """A command's words without comment, redirection, ellipses and the folder of its program."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    words = [word for word in words if word != "…"]
    return [Path(words[0]).name.replace("python3", "python"), *words[1:]] if words else []


def commands_in_text(page: Path) -> list[str]:
    """Commands in a sentence, between backticks: a program with at least one word behind it."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    return [span for span in spans if span.startswith(tuple(f"{program} " for program in PROGRAMS))]


def smaller(words: list[str]) -> list[str]:
    """sae-train's arguments with the flags that make it quick."""
    flags = SMALL_TOY if "toy" in words else SMALLER.get(words[0], SMALL)
    if words[0] == "resume" and "--tokens" in words:
        flags = {"--tokens": "13k"}
    kept = [word for i, word in enumerate(words) if word not in flags and words[i - 1] not in flags]
    return kept + [part for pair in flags.items() for part in pair]


def run(line: str) -> None:
    """Run a command of a page: sae-train in this process; torchrun's processes up to the plan, test_ranks.py trains."""
    program, *words = words_of(line)
    if program == "torchrun":
        n, words = int(words[words.index("--nproc-per-node") + 1]), words[words.index("sae_train") + 1 :]
        codes, _, errors = Launched(*words, "--dry-run", processes=n).end()
        assert codes == [0] * n, (line, errors)
        return
    assert program == "sae-train", f"only sae-train and torchrun are run here: {line}"
    if words[0] == "resume" and "--tokens" not in words:
        interrupt(Path(words[1]))
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "watch":
            patch.setattr(ThreadingHTTPServer, "serve_forever", lambda _: None)
        assert main(smaller(words)) == 0, line


def interrupt(run: Path) -> None:
    """Make a finished run look like one that was stopped after its last step."""
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"status": "interrupted"}))


def check(line: str, in_text: bool = False) -> None:
    """Say by an assertion or an exception if a command that is not run could not be: its program, options, values."""
    program, *words = words_of(line)
    if program == "sae-train":
        check_sae_train(words, in_text)
    elif program == "torchrun":
        check_sae_train(words[words.index("sae_train") + 1 :], in_text)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), line
    elif program == "python" and words != ["-m", "venv", ".venv"]:
        check_python(words, in_text)


def check_sae_train(words: list[str], in_text: bool) -> None:
    """Read the arguments as the command line does, and a training command's settings."""
    try:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except cyclopts.MissingArgumentError:
        assert in_text, words  # a sentence may name a command alone
        return
    if command is app.default_command:
        flags = bound.kwargs.get("flags")
        resolve(vars(flags) if flags else {}, bound.kwargs.get("config"))


class OptionsRead(BaseException):
    """Ends a script when its options have been read."""


def check_python(words: list[str], in_text: bool) -> None:
    """Start a script or module and end it as soon as it has read its options; of one named alone, show the help."""
    read = argparse.ArgumentParser.parse_args

    def read_and_stop(self, *given):
        read(self, *given)
        raise OptionsRead

    is_module = words[0] == "-m"
    name, *options = words[is_module:]
    options = options or (["--help"] if in_text else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read_and_stop)
        patch.setattr(sys, "argv", [name, *options])
        patch.syspath_prepend(str(ROOT if is_module else (ROOT / name).parent))
        try:
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except OptionsRead:
            pass
        except SystemExit as end:
            assert end.code == 0, words
