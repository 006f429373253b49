"""When a step is recorded and when a recording is played, with a stand-in for the recording: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from sae_train.training import recording
from sae_train.training.recording import WARM_UP_STEPS, Recorder


@pytest.fixture
def made(monkeypatch):
    """What happened, in order: "made", "recorded" with the size of the batch, "played"."""
    events = []

    class StandIn:
        def __init__(self, step, x):
            self.step, self.shape = step, x.shape
            events.append(f"recorded {len(x)}")

        def fits(self, x):
            return x.shape == self.shape

        def play(self, x):
            events.append("played")
            return {}

    monkeypatch.setattr(recording, "Recording", StandIn)
    return events


def run(recorder, events, sizes, may_play=True):
    for size in sizes:
        recorder.make(lambda x: events.append("made") or {}, torch.zeros(size), may_play)


def test_steps_are_made_until_all_is_warm_then_recorded_once_and_played(made):
    run(Recorder(), made, [4] * (WARM_UP_STEPS + 3))
    assert made == ["made"] * WARM_UP_STEPS + ["recorded 4"] + ["played"] * 3


def test_a_step_that_may_not_be_played_is_made_and_the_recording_kept(made):
    recorder = Recorder()
    run(recorder, made, [4] * (WARM_UP_STEPS + 1))
    run(recorder, made, [4, 4], may_play=False)
    run(recorder, made, [4])
    assert made[WARM_UP_STEPS:] == ["recorded 4", "played", "made", "made", "played"]


def test_another_batch_size_is_recorded_anew(made):
    run(Recorder(), made, [4] * (WARM_UP_STEPS + 1) + [2])
    assert made[WARM_UP_STEPS:] == ["recorded 4", "played", "recorded 2", "played"]


def test_what_was_recorded_is_forgotten_with_the_state_it_was_made_on(made):
    recorder = Recorder()
    run(recorder, made, [4] * (WARM_UP_STEPS + 1))
    recorder.forget()
    made.clear()
    run(recorder, made, [4] * (WARM_UP_STEPS + 1))
    assert made == ["made"] * WARM_UP_STEPS + ["recorded 4", "played"]
