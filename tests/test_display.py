"""What a run shows from its first second on, and how Ctrl-C ends its set-up."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sae_train.cli import main
from sae_train.evals import assets
from sae_train.interrupts import interrupts_wait
from sae_train.runs import activity as activity_module
from sae_train.runs import display as display_module
from sae_train.runs.activity import Activity
from sae_train.runs.display import Display


@pytest.fixture(autouse=True)
def no_progress_after_seconds() -> None:
    """Leave the times as users have them, which other tests do not."""


def show(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    monkeypatch.setattr(display_module, "FIRST_LINE", 0.05)
    monkeypatch.setattr(display_module, "LONGEST_SILENCE", 0.1)
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=100, color_system=None)) as display:
        display("reading words", 0, 31_586)
        time.sleep(0.4)
        display("reading words", 12_000, 31_586)
        time.sleep(0.4)
    return out.getvalue()


def test_a_plain_line_every_few_seconds_says_how_far_it_is_and_how_long_it_takes(monkeypatch):
    lines = show(monkeypatch, terminal=False).splitlines()
    assert lines[0] == "reading words: 0 of 31,586" and 5 <= len(lines) <= 9
    assert re.fullmatch(r"reading words: 12,000 of 31,586, about \d+ s left", lines[-1])


def test_a_terminal_has_one_live_line(monkeypatch):
    shown = show(monkeypatch, terminal=True)
    assert "reading words: 12,000 of 31,586, about" in shown and "\x1b[2K" in shown


def test_what_is_over_at_once_is_not_mentioned(capsys):
    with Display() as display:
        display("reading words", 5, 10)
    assert capsys.readouterr().out == ""


def test_what_is_left_is_told_from_what_was_done_since_it_began():
    activity = Activity()
    activity("training steps", 900, 1000)  # a resumed run
    time.sleep(0.2)
    activity("training steps", 950, 1000)
    assert activity.sentence() == "training steps: 950 of 1,000, about 0 s left"


def test_how_long_is_told_where_nobody_counts_and_what_is_left_does_not_grow_in_a_pause(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(activity_module.time, "perf_counter", lambda: clock[0])
    activity = Activity()
    activity("ranking latents")
    assert activity.sentence() == "ranking latents"
    clock[0] += 6
    assert activity.sentence() == "ranking latents, 6 s so far"
    activity("reading words", 0, 100)
    clock[0] += 10
    activity("reading words", 10, 100)
    assert activity.sentence() == "reading words: 10 of 100, about 90 s left"
    clock[0] += 30  # nothing is read meanwhile
    assert activity.sentence() == "reading words: 10 of 100, about 60 s left"


def row(step: int) -> dict:
    return {"sae": "topk-16k-l0_50", "step": step, "tokens": step * 4, "metrics/l0": 49.5, "losses/loss": 1.0}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_shows_figures_and_what_goes_on_between_them(monkeypatch, terminal):
    monkeypatch.setattr(display_module, "LONGEST_SILENCE", 0.1)
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=100, color_system=None)) as display:
        display.begin({"topk-16k-l0_50": 50.0}, 100, 4)
        display.row(row(0))
        display("topk-16k-l0_50: ranking latents")
        time.sleep(0.6)
        display.row(row(100))
        display.end()
    shown = out.getvalue()
    assert "49.5 / 50" in shown and "topk-16k-l0_50: ranking latents" in shown
    assert terminal or "step 100/100, 400 tokens" in shown


def test_ctrl_c_says_where_and_what_to_do(capsys):
    with pytest.raises(KeyboardInterrupt), Display() as display:
        display("reading words", 5, 10)
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "interrupted while reading words; nothing of it is kept: start again\n"


def interrupt_now():
    os.kill(os.getpid(), signal.SIGINT)


class Dropped:
    """Python drops what is raised where something is deleted, as in much of what happens in an import."""

    def __del__(self):
        interrupt_now()


def test_ctrl_c_while_modules_are_imported_waits_and_is_not_lost_and_a_second_one_breaks_in():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        Dropped()
        reached.append("the end")
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        interrupt_now()
        reached.append("once")
        interrupt_now()
        reached.append("twice")
    assert reached == ["the end", "once"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup leaves it
    with interrupts_wait():
        interrupt_now()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_in_the_set_up_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "sae_train", "--out", str(tmp_path / "runs"), "--eval-contexts", "each"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 130 and errors == "", errors
    assert first.rstrip() and "interrupted while" in said and "start again" in said
    assert not list(tmp_path.rglob("*.json")) and not (tmp_path / "runs").exists()


def test_ctrl_c_while_the_assets_are_written_keeps_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def interrupt(*_):
        raise KeyboardInterrupt

    def write(*arguments):
        monkeypatch.setattr(os, "fsync", interrupt)
        return write_tensors(*arguments)

    write_tensors = assets.asset_cache.write_tensors
    monkeypatch.setattr(assets.asset_cache, "write_tensors", write)
    small = ["--eval-words", "200", "--tokens", "30k", "--batch-tokens", "256", "--held-out-tokens", "2048"]
    with pytest.raises(SystemExit, match="130"):
        main(["--out", str(tmp_path / "runs"), *small])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("interrupted while")
    assert not list((tmp_path / "cache" / "sae-train").iterdir()) and not (tmp_path / "runs").exists()
