"""A process keeps freed memory between steps, and gives it back when a run saves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sae_train import train
from sae_train.runs import runner

GIVING_BACK = """
import psutil, torch
from sae_train.runs.process import give_back_memory, prepare_process

def resident():
    return psutil.Process().memory_info().rss / 2**20

prepare_process()
before = resident()
blocks = [torch.ones(2**20) for _ in range(100)]  # 4 MiB each
last = torch.ones(2**10)  # what lies behind them stays
del blocks
kept = resident() - before
give_back_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone keeps memory and gives it back")
def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", GIVING_BACK], capture_output=True, text=True, check=True)
    kept, left = map(float, done.stdout.split())
    assert kept > 350 and left < 50, "MiB of 400"


def test_a_run_gives_memory_back_at_every_save(tmp_path, monkeypatch):
    called, saved = [], []
    save = runner.session.save
    monkeypatch.setattr(runner, "give_back_memory", lambda: called.append(len(saved)))
    monkeypatch.setattr(runner.session, "save", lambda *args: saved.append(save(*args)))
    train(
        model="toy", width=64, l0=4, tokens="13k", batch_tokens=128, absorption_evals=1, out=str(tmp_path), name="run"
    )
    assert called == list(range(1, len(saved) + 1)) and len(saved) > 1
