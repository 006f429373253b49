"""Steps that a GPU records never wait for it, and one that found more latents than it had room for is made again.

Under the interpreter on a CPU, in a process of its own, with a stand-in that notices what would wait on a GPU.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs these in another process")
# Tiny, as the interpreter is slow; an L0 that is a large share of the width, so that groups of latents are crowded.
D, WIDTH, BATCH, L0 = 6, 24, 3, 5
RAGGED, ARCHS = ("relu", "jumprelu"), ("topk", "relu", "jumprelu")

if INTERPRETED:
    from triton.runtime.interpreter import GridExecutor

    from sae_train.config import SAESpec, TrainSettings
    from sae_train.kernels import crossover, ops
    from sae_train.training import recording
    from sae_train.training.learner import Learner
    from sae_train.training.precision import matmul_precision


@pytest.mark.skipif(INTERPRETED, reason="the tests below run in this process")
def test_steps_pass_their_tests_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


class Waited(AssertionError):
    """Something would have waited for the device."""


READS_SIZES = ("nonzero", "masked_select", "bincount", "_unique", "unique_dim", "equal", "_local_scalar_dense", "item")


class NoWaits(TorchDispatchMode):
    """Refuses operations that wait for a GPU: those whose result or its size the host reads, and numbers sent to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if "index" in name and (
            len(args) > 1 and isinstance(args[1], list | tuple)
        ) else []  # fmt: skip
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name.startswith(READS_SIZES) or name == "lift_fresh" or masks or sized:
            raise Waited(str(func))
        return func(*args, **kwargs)


@contextmanager
def no_waits():
    """Refuse the same, and what of a tensor becomes Python's or numpy's, outside of Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        inside = [False]
        launch = GridExecutor.__call__

        @functools.wraps(launch)
        def launched(*args, **kwargs):
            with _disable_current_modes():
                inside[0] = True
                try:
                    return launch(*args, **kwargs)
                finally:
                    inside[0] = False

        def refuse(name, method, tensor, *args, **kwargs):
            if not inside[0]:
                raise Waited(name)
            return method(tensor, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", launched)
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, functools.partialmethod(functools.partial(refuse, name, method)))
        with NoWaits():
            yield


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    if INTERPRETED:
        monkeypatch.setitem(ops.DEFAULTS, "cpu", "triton")
        monkeypatch.setattr(recording, "ROOM_STEP", 1)


@pytest.fixture(params=["highest", "high"], ids=["slab", "fused"])
def path(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


def batch(step: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(BATCH, D, generator=torch.Generator().manual_seed(step))


def learner(arch: str, records: bool = True) -> Learner:
    settings = TrainSettings(tokens=100 * BATCH, batch_tokens=BATCH, lr=1e-3)
    out = Learner(SAESpec(arch=arch, width=WIDTH, l0=L0), settings, D, 100)
    out.initialise(torch.cat([batch(i) for i in range(20)]))
    out.records = records
    return out


def recorded_part(found: Learner, x: torch.Tensor) -> None:
    """Take a step whose part on the device may not wait."""
    make = found.recorder.make

    def watched(*args):
        with no_waits():
            return make(*args)

    found.recorder.make = watched
    found.step(x)
    found.recorder.make = make


@interpreted
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_waits_for_nothing(arch, dense, path, monkeypatch):
    if dense and arch == "topk":
        pytest.skip("never dense")
    monkeypatch.setitem(crossover.SHARES, "cpu", 0.0 if dense else 1.0)
    monkeypatch.setattr(crossover, "CROWDED_SHARE", 1.0)
    found = learner(arch)
    found.step(batch(0))  # the first may wait: nothing is known yet
    assert found.arch.crossover.dense is dense or arch == "topk"
    recorded_part(found, batch(1))
    assert (found.unsettled is not None) == (arch in RAGGED)


@interpreted
@pytest.mark.parametrize("arch", RAGGED)
def test_the_stand_in_notices_a_step_that_waits(arch):
    found = learner(arch, records=False)
    with pytest.raises(Waited):
        recorded_part(found, batch(0))


@interpreted
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.new_zeros(3).index_put((x[:3] > 0,), x[0]),
        lambda x: torch.arange(3).repeat_interleave(torch.arange(3)),
        lambda x: x + torch.tensor(1.0),
        lambda x: x.unique(),
    ],
)
def test_the_stand_in_notices_every_kind_of_wait(wait):
    with pytest.raises(Waited), no_waits():
        wait(torch.ones(4))


class PlayedAgain:
    """In place of a recording on a GPU: the step itself, made again."""

    played = 0

    def __init__(self, step, x):
        self.step, self.shape = step, x.shape

    def fits(self, x):
        return x.shape == self.shape

    def play(self, x):
        PlayedAgain.played += 1
        return self.step(x)


# One batch is far larger than those before: with many more active latents.
SIZES = (0.4, 0.4, 0.4, 0.4, 6.0, 0.4, 0.4)


@interpreted
@pytest.mark.parametrize(("arch", "path"), [("relu", "high"), ("jumprelu", "highest")], indirect=["path"])
def test_a_step_without_room_is_made_again_and_the_weights_are_those_of_unrecorded_steps(arch, path, monkeypatch):
    monkeypatch.setattr(recording, "Recording", PlayedAgain)
    monkeypatch.setattr(PlayedAgain, "played", 0)
    monkeypatch.setattr(recording, "WARM_UP_STEPS", 1)
    played, launched, again = learner(arch), learner(arch, records=False), []
    make = played._make

    def noted(x, room):
        again.extend([played.step_count] if room is None else [])
        return make(x, room)

    played._make = noted
    for size in SIZES:
        x = batch(0, size)
        played.last, launched.last = played.step(x), launched.step(x)
        if arch == "jumprelu":  # made again between steps, where other products may be in another precision
            with matmul_precision("high"), torch.no_grad():
                played.check()
    assert_same_state(played, launched)
    assert again == [0, 4] and PlayedAgain.played >= 3


def assert_same_state(a: Learner, b: Learner) -> None:
    one, two = dict(flat(a.state_dict(), "")), dict(flat(b.state_dict(), ""))
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert same, name


def flat(value, name):
    """Yield what is in nested dictionaries and lists, by name."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(part, dict | list):
            yield from flat(part, f"{name}/{key}")
        else:
            yield f"{name}/{key}", part
