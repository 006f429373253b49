"""The learner: bit-equal resume, isolation of failures, dead latents, export."""

from __future__ import annotations

import math

import pytest
import torch

from sae_train.config import SAESpec, TrainSettings
from sae_train.sae.files import load_state, save_state
from sae_train.training.architectures import TRAINED
from sae_train.training.learner import Learner
from sae_train.training.start import default_lr, geometric_median, lr_factor

D, BATCH, STEPS = 12, 64, 40
SETTINGS = TrainSettings(tokens=STEPS * BATCH, batch_tokens=BATCH)
ARCHS = list(TRAINED)


def batches(seed: int = 0) -> list[torch.Tensor]:
    x = torch.randn(STEPS * BATCH, D, generator=torch.Generator().manual_seed(seed))
    return list(x.split(BATCH))


def learner(arch: str, seed: int = 0) -> Learner:
    out = Learner(SAESpec(arch=arch, width=128, l0=5, seed=seed), SETTINGS, D, STEPS)
    out.initialise(torch.cat(batches(7)[:8]))
    return out


def weights(a: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in a.sae.parameters()]


def assert_bit_equal(a: Learner, b: Learner) -> None:
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stop", [1, 21])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(arch, stop, tmp_path):
    whole, first, second = (
        learner(arch),
        learner(arch),
        Learner(SAESpec(arch=arch, width=128, l0=5), SETTINGS, D, STEPS),
    )
    logs = [whole.step(x) for x in batches()]
    for x in batches()[:stop]:
        first.step(x)
    save_state(tmp_path, first.state_dict())
    second.load_state_dict(load_state(tmp_path))
    again = [second.step(x) for x in batches()[stop:]]
    assert_bit_equal(whole, second)
    assert second.step_count == STEPS and torch.equal(whole.idle_tokens, second.idle_tokens)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(logs[stop:], again, strict=True) for k in a)
    assert torch.cat([whole.dead, torch.zeros(1)]).equal(torch.cat([second.dead, torch.zeros(1)]))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_nan_ends_its_learner_before_the_optimiser_step_and_no_other(arch):
    hit, control, clean = learner(arch), learner(arch, 1), learner(arch, 1)
    for step, x in enumerate(batches()[:10]):
        control.step(x)
        clean.step(x)
        if step == 6:
            x = x.clone()
            x[3, 2] = float("nan")
            before = weights(hit)
        hit.step(x)
    assert hit.check() == hit.failed == "step 6: the input is not finite"
    assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(before, weights(hit), strict=True))
    assert control.check() is None
    assert_bit_equal(control, clean)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_changes_no_setting_of_the_process(arch, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a setting of the whole process")

    monkeypatch.setattr(torch, "set_float32_matmul_precision", refuse)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", refuse)
    learner(arch).step(batches()[0])


def test_a_weight_that_overflows_is_named():
    hit = learner("topk")
    with torch.no_grad():
        hit.sae.W_dec[:] = float("inf")
    hit.step(batches()[0])
    assert hit.check() == "step 0: mse_loss is not finite"


@pytest.mark.parametrize("arch", ARCHS)
def test_metrics_have_the_promised_names_and_stay_finite(arch):
    found = learner(arch).step(batches()[0])
    names = {"losses/loss", "losses/mse_loss", "losses/aux_loss", "losses/sparsity_loss", "metrics/l0"}
    names |= {"sparsity/dead_features", "details/lr", "details/grad_norm"}
    names |= {"details/l0_coefficient", "details/dense_products"} if arch in ("relu", "jumprelu", "gated") else set()
    names |= {"details/threshold"} if arch in ("batchtopk", "jumprelu", "matryoshka") else set()
    assert found.keys() == names and all(t.isfinite().all() and not t.requires_grad for t in found.values())


def test_learning_lowers_the_loss():
    a = learner("topk")
    logs = [a.step(batches()[0])["losses/mse_loss"].item() for _ in range(STEPS)]
    assert logs[-1] < 0.7 * logs[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_decoder_rows_keep_norm_one_and_start_tied(arch):
    a = learner(arch)
    scale = a.sae.W_enc.norm() / a.sae.W_dec.norm() if arch == "jumprelu" else 1.0
    torch.testing.assert_close(a.sae.W_enc.t(), scale * a.sae.W_dec)
    for x in batches()[:5]:
        a.step(x)
    torch.testing.assert_close(a.sae.W_dec.norm(dim=1), torch.ones(128))


@pytest.mark.parametrize("level", [-30.0, 3.0])
def test_levels_far_from_all_pre_activations_end_in_no_infinity(level):
    a = learner("jumprelu")
    with torch.no_grad():
        a.leaves["log_threshold"].fill_(level)
    a.arch.settle()
    for x in batches():
        a.step(x)
    assert a.check() is None and a.sae.threshold.isfinite().all() and (a.sae.threshold > 0).all()


def test_dead_latents_are_counted_in_tokens_and_revived_by_auxk():
    a = learner("topk")
    with torch.no_grad():
        a.sae.b_enc[:64] = -50.0
    a.dead_tokens = 4 * BATCH
    logs = [a.step(x) for x in batches()[:9]]
    assert [int(m["sparsity/dead_features"]) >= 64 for m in logs] == [False] * 3 + [True] * 6
    assert logs[7]["losses/aux_loss"] == 0 and a.dead.numel() >= 64
    assert default_dead_tokens() == math.ceil(0.05 * STEPS * BATCH)


def default_dead_tokens() -> int:
    return learner("topk").dead_tokens


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_export_takes_raw_activations(arch):
    a, scale = learner(arch), 2.5
    with torch.enable_grad():
        for x in batches()[:5]:
            a.step(x)
    x, mean = batches()[9], torch.linspace(-3, 3, D)
    torch.testing.assert_close(a.export(scale)(x / scale), a.sae(x) / scale, rtol=1e-5, atol=1e-5)
    raw, exported = x / scale + mean, a.export(scale, mean)
    torch.testing.assert_close(exported(raw), a.sae(x) / scale + mean, rtol=1e-5, atol=1e-5)
    latents = a.sae.encode(x) * a.sae.W_dec.norm(dim=1) / scale
    torch.testing.assert_close(exported.encode(raw), latents, rtol=1e-4, atol=1e-4)


def test_learning_rate_rises_holds_and_falls():
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9:81] == [1.0] * 72 and factors[-1] == pytest.approx(0.05)


def test_default_learning_rate_follows_its_formula():
    assert default_lr(SAESpec(arch="topk", width=2**14, l0=5), 30_000) == pytest.approx(2e-4)
    assert default_lr(SAESpec(arch="relu", width=2**12, l0=5), 7_500) == pytest.approx(2.4e-3)


def test_geometric_median_ignores_an_outlier():
    x = torch.cat([torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 1e4)])
    assert geometric_median(x).norm() < 0.5 < x.mean(0).norm()
