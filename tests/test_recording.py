"""Recorded steps on a GPU: the bits of steps launched one by one, through dead latents, failures and a resume.

relu and jumprelu find more active latents than they had room for now and then: such steps are made again.
"""

from __future__ import annotations

import pytest
import torch

from sae_train.config import SAESpec, TrainSettings
from sae_train.training.learner import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
D, BATCH, STEPS = 64, 256, 60


def batches() -> list[torch.Tensor]:
    x = torch.randn(STEPS * BATCH, D, generator=torch.Generator().manual_seed(0))
    return list(x.cuda().split(BATCH))


each_arch = pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu"])


def learner(arch: str, records: bool = True, dead_tokens: int | None = None, seed: int = 0) -> Learner:
    settings = TrainSettings(tokens=STEPS * BATCH, batch_tokens=BATCH, dead_tokens=dead_tokens)
    out = Learner(SAESpec(arch=arch, width=512, l0=5, seed=seed), settings, D, STEPS, "cuda")
    out.initialise(torch.cat(batches()[:8]))
    assert out.records
    out.records = records
    return out


def assert_same_bits(a: Learner, b: Learner) -> None:
    assert a.check() is None and b.check() is None
    for x, y in zip((*a.sae.parameters(), a.idle_tokens), (*b.sae.parameters(), b.idle_tokens), strict=True):
        assert torch.equal(x, y)


@each_arch
def test_recorded_steps_have_the_bits_and_the_numbers_of_others(arch):
    played, launched = learner(arch), learner(arch, records=False)
    for step, x in enumerate(batches()):
        played.last, b = played.step(x), launched.step(x)
        played.check()  # a step that found no room is made again here
        a = played.last
        assert {name: float(value) for name, value in a.items()} == pytest.approx(
            {name: float(value) for name, value in b.items()}, rel=1e-6
        ), step
    assert played.recorder.recording is not None and launched.recorder.recording is None
    assert_same_bits(played, launched)


@each_arch
def test_two_learners_in_turn_do_not_disturb_each_other(arch):
    one, other, alone = learner(arch), learner(arch, seed=1), learner(arch)
    for x in batches():
        one.step(x)
        other.step(x)
    for x in batches():
        alone.step(x)
    assert_same_bits(one, alone)


def test_dead_latents_are_revived_between_recorded_steps():
    played, launched = (learner("topk", records, dead_tokens=4 * BATCH) for records in (True, False))
    revived = 0
    for x in batches():
        revived += float(played.step(x)["losses/aux_loss"]) > 0
        launched.step(x)
    assert 0 < revived < STEPS and played.recorder.recording is not None
    assert_same_bits(played, launched)


@each_arch
def test_a_nan_in_a_recorded_step_is_named_and_leaves_the_weights(arch):
    hit = learner(arch)
    for step, x in enumerate(batches()[:20]):
        if step == 13:
            x = x.clone()
            x[3, 2] = float("nan")
            hit.check()
            before = [p.detach().clone() for p in hit.sae.parameters()]
        hit.step(x)
    assert hit.check() == "step 13: the input is not finite"
    assert all(torch.equal(a, b) for a, b in zip(before, hit.sae.parameters(), strict=True))


@each_arch
def test_a_resumed_learner_goes_on_with_the_same_bits(arch):
    whole, first, second = learner(arch), learner(arch), learner(arch)
    for x in batches():
        whole.step(x)
    for x in batches()[:31]:
        first.step(x)
    second.step(batches()[0])
    second.load_state_dict(first.state_dict())
    for x in batches()[31:]:
        second.step(x)
    assert_same_bits(whole, second)


@each_arch
def test_a_batch_of_another_size_is_recorded_anew(arch):
    played, launched = learner(arch), learner(arch, records=False)
    for step, x in enumerate(batches()):
        part = x[: BATCH // 2] if step % 10 == 9 else x
        played.step(part)
        launched.step(part)
    assert_same_bits(played, launched)
