"""L0 control: the controller on a synthetic plant and in training, the quantile start, the final bisection."""

from __future__ import annotations

import math

import pytest
import torch

from sae_train.config import SAESpec, TrainSettings
from sae_train.training.architectures import TRAINED
from sae_train.training.l0 import L0Controller, LevelController, level_for, level_on
from sae_train.training.learner import Learner
from sae_train.training.metrics import held_out_metrics


@pytest.mark.parametrize("target", [8.0, 32.0, 200.0])
@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_the_controller_brings_a_slow_noisy_plant_to_its_target(target, gain):
    """log L0 follows 5 − gain·log λ with a lag of 15 steps and 3 % noise."""
    g = torch.Generator().manual_seed(0)
    control, state, seen = L0Controller(target, 1.0, 0), torch.tensor(6.0), []
    for step in range(1500):
        state = state + (5 - gain * control.coefficient.log() - state) / 15
        l0 = (state + 0.03 * torch.randn((), generator=g)).exp()
        control.update(l0, step)
        seen.append(l0)
    assert torch.stack(seen[-200:]).mean().item() == pytest.approx(target, rel=0.02)


def test_the_coefficient_does_not_wind_up_without_grip():
    control = L0Controller(10.0, 1.0, 0)
    for step in range(3000):
        control.update(torch.tensor(1000.0), step)
    assert control.coefficient.log().item() <= math.log(control.MAX_FACTOR) + 1.01 * control.PROPORTIONAL


@pytest.mark.parametrize("target", [8.0, 32.0, 200.0])
@pytest.mark.parametrize("pull", [-0.1, 0.0, 0.1])
def test_levels_bring_a_noisy_plant_to_its_target_and_the_price_ends_their_work(target, pull):
    """log L0 falls by 1.5 times what the levels rise, and drifts by `pull` less what the price holds against it."""
    g = torch.Generator().manual_seed(0)
    control, log_l0, seen = LevelController(target, 1.0, 0), torch.tensor(6.0), []
    for step in range(2000):
        l0 = (log_l0 + 0.03 * torch.randn((), generator=g)).exp()
        control.update(l0, step)
        log_l0 = log_l0 + pull - 0.1 * control.coefficient.log() - 1.5 * control.rise(l0, torch.tensor(1.0))
        seen.append(l0)
    assert torch.stack(seen[30:100]).mean().item() == pytest.approx(target, rel=0.25)
    assert torch.stack(seen[-200:]).mean().item() == pytest.approx(target, rel=0.01)
    assert control.coefficient.log().item() == pytest.approx(pull / 0.1, abs=0.1)


@pytest.mark.parametrize("by", [0.5, -0.5])
def test_levels_move_for_latents_that_fired_alone(by):
    """Step after step, what was silent is neither pushed further away until it is dead, nor drawn in until it fires."""
    learner = Learner(SAESpec(arch="jumprelu", width=4, l0=1), TrainSettings(tokens=25600, batch_tokens=256), 16, 100)
    before = learner.leaves["log_threshold"].clone()
    learner.arch.raise_levels(torch.tensor(by), torch.tensor([3.0, 0.0, 1.0, 0.0]))
    moved = (learner.leaves["log_threshold"] - before).tolist()
    assert moved == pytest.approx([by, 0.0, by, 0.0])


def test_an_update_that_is_not_kept_changes_nothing():
    control = L0Controller(10.0, 1.0, 0)
    control.update(torch.tensor(20.0), 0)
    before = control.state_dict()
    control.update(torch.tensor(float("nan")), 1, torch.tensor(False))
    assert all(torch.equal(before[key], value) for key, value in control.state_dict().items())


def test_level_for_leaves_l0_pre_activations_above_it():
    pre = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert (pre > level_for(pre, 5)).sum().item() == pytest.approx(5 * 500, abs=1)


@pytest.mark.parametrize("floors", [(0.0, -9.0), (2.5, 0.0), (-9.0,)])
def test_level_on_leaves_exactly_l0_margins_above_it_from_any_floor(floors):
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    assert (x > level_on(lambda rows: rows, x, 1.5, floors)).sum().item() == 4500


@pytest.mark.parametrize("arch", ["relu", "batchtopk", "jumprelu", "matryoshka", "gated"])
def test_calibration_mends_an_l0_that_is_far_off(arch):
    learner = Learner(SAESpec(arch=arch, width=128, l0=6), TrainSettings(tokens=25600, batch_tokens=256), 16, 100)
    learner.initialise(features(1024, 1))
    if "threshold" in learner.arch.state:
        learner.arch.state["threshold"] *= 0.7
        learner.arch.settle()
    assert held_out_metrics(learner.sae, features(2048, 2))["metrics/l0"] > 8
    learner.calibrate(features(2048, 2))
    assert held_out_metrics(learner.sae, features(2048, 2))["metrics/l0"] == pytest.approx(6, rel=2e-3)


def features(n: int, seed: int) -> torch.Tensor:
    """Sparse non-negative combinations of 48 fixed directions in 16 dimensions, scaled to ⟨‖x‖²⟩ = 16."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(48, 16, generator=torch.Generator().manual_seed(99))
    x = (torch.rand(n, 48, generator=g) < 0.08).float() * torch.rand(n, 48, generator=g) @ directions
    return x * (16 / x.square().sum(1).mean()).sqrt()


@pytest.mark.parametrize("arch", TRAINED)
def test_training_reaches_the_l0_asked_for_on_held_out_data(arch):
    n_steps, batch = 400, 256
    learner = Learner(
        SAESpec(arch=arch, width=128, l0=6), TrainSettings(tokens=n_steps * batch, batch_tokens=batch), 16, n_steps
    )
    learner.initialise(features(2048, 1))
    stream = features(n_steps * batch, 2)
    for x in stream.split(batch):
        learner.step(x)
    learner.calibrate(features(4096, 3))
    found = held_out_metrics(learner.sae, features(4096, 4))
    assert learner.check() is None
    assert found["metrics/l0"] == pytest.approx(6, rel=0.05)
    assert found["metrics/explained_variance"] > 0.6
