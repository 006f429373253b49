"""Probes, rankings and figures against autograd, torch.optim and scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from sae_train.evals import k_sparse, lasso
from sae_train.evals.figures import auroc, f1_precision_recall
from sae_train.evals.latents import encode, from_dense
from sae_train.evals.presets import SAEBENCH, get_preset
from sae_train.evals.probes import Schedule, fit_dense, fit_sparse, ranking_schedule
from sae_train.evals.ranking import rank_latents
from sae_train.evals.threads import flushed_denormals
from sae_train.sae.model import SAE, SAEConfig


def _data(n=200, d=40, share=0.06, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 26, (n,), generator=g)
    x = torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) < share)
    x[torch.arange(n), labels] += 0.5
    return x, labels


def _by_autograd(x, labels, s, g):
    """The definition, with autograd and the plain optimiser."""
    weight, bias = (torch.zeros(x.shape[1], 26, requires_grad=True), torch.zeros(26, requires_grad=True))
    y = one_hot(labels, 26).float()
    n = y.sum(0)
    pos_weight = (len(x) - n) / n.clamp(min=1)
    adam = torch.optim.Adam([weight, bias], lr=s.lr, weight_decay=s.weight_decay)
    for epoch in range(s.epochs):
        adam.param_groups[0]["lr"] = s.lr * (s.end_lr / s.lr) ** (epoch / s.epochs)
        for rows in torch.randperm(len(x), generator=g).split(s.batch):
            loss = binary_cross_entropy_with_logits(x[rows] @ weight + bias, y[rows], pos_weight=pos_weight)
            loss = loss + s.l1 * weight.abs().sum(0).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("fit", ["dense", "sparse"])
def test_probe_follows_its_definition(fit):
    x, labels = _data(share=0.02)
    s = Schedule(1e-2, 1e-5, 1e-4, epochs=6, batch=17, l1=0.01)
    weight, bias = _by_autograd(x, labels, s, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    probe = fit_dense(x, labels, 26, s, g) if fit == "dense" else fit_sparse(from_dense(x), labels, 26, s, g)
    assert torch.allclose(probe.weight, weight, atol=2e-5)
    assert torch.allclose(probe.bias, bias, atol=2e-5)


def test_probe_leaves_the_global_generator_alone():
    x, labels = _data()
    before = torch.get_rng_state()
    fit_dense(x, labels, 26, Schedule(1e-2, 1e-5, 0.0, 2, 16), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_ranking_schedule_takes_enough_steps():
    few = ranking_schedule(600, epochs=50, max_batch=4096, min_steps=1500, lr=1, end_lr=1, weight_decay=0)
    assert few.batch == 20 and few.epochs * 30 >= 1500
    many = ranking_schedule(400_000, epochs=50, max_batch=4096, min_steps=1500, lr=1, end_lr=1, weight_decay=0)
    assert many.batch == 4096 and many.epochs == 50
    tiny = ranking_schedule(7, epochs=50, max_batch=4096, min_steps=1500, lr=1, end_lr=1, weight_decay=0)
    assert tiny.batch == 1 and tiny.epochs * 7 >= 1500


@pytest.mark.parametrize("ranking", ["optimum", "adam"])
def test_ranking_finds_the_letter_latents_and_skips_silent_ones(ranking):
    x, labels = _data(n=600, d=60, share=0.02)
    x[:, 50:] = 0
    preset = replace(SAEBENCH, ranking=ranking, l1_min_steps=300)
    found, how = rank_latents(from_dense(x), labels, 26, preset, seed=0)
    assert found.shape == (26, 10) and how["method"] == ranking and how["n_firing"] == 50
    assert torch.equal(found[:, 0], torch.arange(26))
    assert int(found.max()) < 50
    assert rank_latents(from_dense(x[:, :3]), labels, 26, preset, seed=0)[0].shape == (26, 3)


def _kkt_residual(x, labels, weight, bias, l1, l2):
    """Largest violation of the optimality conditions of the L1 problem, by autograd in float64."""
    x, y = x.double(), one_hot(labels, 26).double()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    n = y.sum(0)
    loss = binary_cross_entropy_with_logits(
        x @ weight + bias, y, pos_weight=(len(x) - n) / n.clamp(min=1), reduction="none"
    )  # fmt: skip
    (loss.mean(0).sum() + l2 / 2 * (weight.square().sum() + bias.square().sum())).backward()
    at_zero = (weight.grad.abs() - l1).clamp(min=0)
    elsewhere = (weight.grad + l1 * weight.sign()).abs()
    return max(torch.where(weight == 0, at_zero, elsewhere).max().item(), bias.grad.abs().max().item())


@pytest.mark.parametrize("kind", ["plain", "duplicates", "few rows", "missing letters", "large values"])
def test_l1_problem_is_solved_to_its_optimum(kind):
    x, labels = _data(n=60 if kind == "few rows" else 500, d=80, share=0.05)
    if kind == "duplicates":
        x[:, 40:60] = x[:, :20]
    if kind == "missing letters":
        labels = labels % 20
    if kind == "large values":
        x *= 40
    found = lasso.fit(from_dense(x), labels, 26, l1=0.01, l2=26e-6, tolerance=1e-4)
    assert found.residual <= 1e-4 and found.steps < 100
    assert _kkt_residual(x, labels, found.weight, found.bias, 0.01, 26e-6) < 1e-4 * 0.01 + 1e-7
    assert 0 < (found.weight != 0).double().mean() < 0.5
    if kind == "duplicates":  # the quadratic term shares a weight between equal latents
        assert torch.allclose(found.weight[40:60], found.weight[:20], atol=1e-3)


def test_adam_goes_where_the_optimum_is():
    x, labels = _data(n=300, d=40, share=0.05)
    latents = from_dense(x)
    best = lasso.fit(latents, labels, 26, l1=0.01, l2=26e-6)
    s = Schedule(0.2, 1e-4, 1e-6, epochs=3000, batch=300, l1=0.01)
    probe = fit_sparse(latents, labels, 26, s, torch.Generator().manual_seed(0))
    assert torch.allclose(probe.weight.double(), best.weight, atol=0.05)


def test_newton_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, labels = _data(n=400, d=40, share=0.1)
    y = one_hot(labels, 26).bool()
    ranking = torch.stack([torch.tensor([c, (c + 3) % 40, 30, 31, 32]) for c in range(26)])
    latents = from_dense(x)
    found = k_sparse.fit(latents, y, latents, y, ranking, 0.03)
    for c in (0, 7, 25):
        for k in (1, 3, 5):
            part = x[:, ranking[c, :k]].double().numpy()
            model = LogisticRegression(C=1, class_weight="balanced", tol=1e-8, max_iter=1000).fit(part, y[:, c].numpy())
            predicted = torch.tensor(model.predict(part))
            if k <= found.n_main[c] + 1:  # beyond, the splitting rule has stopped
                assert found.f1[c, k - 1] == pytest.approx(
                    float(f1_precision_recall(predicted[:, None], y[:, [c]])[0]), abs=1e-9
                )
            else:
                assert found.f1[c, k - 1].isnan()
            if k == found.n_main[c]:
                assert np.allclose(found.logits[:, c], model.decision_function(part), atol=1e-3)


def test_newton_weights_match_scikit_learn_and_folding_is_exact():
    from sklearn.linear_model import LogisticRegression

    g = torch.Generator().manual_seed(3)
    x = torch.rand(300, 1, 4, generator=g, dtype=torch.float64) * 20
    x[torch.rand(300, generator=g) < 0.7] = 0
    y = (x[:, :, 0] > 2) ^ (torch.rand(300, 1, generator=g) < 0.1)
    rows, targets, weight = k_sparse._fold_silent_rows(x, y)
    assert rows.shape[1] < 300
    w = k_sparse.newton(rows, targets, weight, torch.zeros(1, 5, dtype=torch.float64))[0]
    model = LogisticRegression(C=1, class_weight="balanced", tol=1e-10, max_iter=5000)
    model.fit(x[:, 0].numpy(), y[:, 0].numpy())
    assert np.allclose(w[:4], model.coef_[0], atol=1e-4) and np.allclose(w[4], model.intercept_[0], atol=1e-4)


@pytest.mark.parametrize(
    ("f1", "n_main"),
    [
        ([0.50, 0.54, 0.56, 0.60], 2), ([0.50, 0.53, 0.90], 1), ([0.50, 0.5301, 0.5602], 3), ([0.60, 0.50, 0.90], 1),
        ([0.05 * i for i in range(1, 11)], 10), ([0.0, 0.0], 1), ([float("nan"), 0.5], 0),
    ],
)  # fmt: skip
def test_splitting_rule(f1, n_main):
    assert k_sparse.split_features(f1) == n_main


def test_figures_agree_with_scikit_learn():
    from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

    g = torch.Generator().manual_seed(0)
    scores = (torch.randn(300, 3, generator=g) * 3).round()  # rounded: ties
    truth = torch.rand(300, 3, generator=g) < 0.2
    f1, precision, recall = f1_precision_recall(scores > 0, truth)
    area = auroc(scores, truth)
    for c in range(3):
        y, z = truth[:, c].numpy(), (scores[:, c] > 0).numpy()
        assert f1[c] == pytest.approx(f1_score(y, z)) and precision[c] == pytest.approx(precision_score(y, z))
        assert recall[c] == pytest.approx(recall_score(y, z))
        assert area[c] == pytest.approx(roc_auc_score(y, scores[:, c].numpy()))
    nothing = torch.zeros(5, 1, dtype=torch.bool)
    assert f1_precision_recall(nothing, nothing)[0].item() == 0
    assert auroc(torch.zeros(5, 1), nothing).isnan().all()


def test_latents_table_round_trips():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(30, 12, generator=g) * (torch.rand(30, 12, generator=g) < 0.3)
    x[4] = 0
    table = from_dense(x)
    assert torch.equal(table.dense(), x) and table.l0 == pytest.approx(float((x != 0).sum(1).float().mean()))
    columns = torch.tensor([3, 3, 11, 0])
    assert torch.equal(table.take(columns), x[:, columns])
    values, where = table.padded()
    assert torch.equal(torch.zeros_like(x).scatter_add_(1, where, values), x)
    assert torch.equal(table.head(7).dense(), x[:7])
    assert torch.equal(table.fires(), (x != 0).any(0))


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_encoding_is_the_same_by_entries_and_dense(architecture):
    k = 5 if architecture == "topk" else None
    sae = SAE(SAEConfig(architecture=architecture, d_in=6, d_sae=40, k=k))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g))
        if architecture == "jumprelu":
            sae.threshold.abs_()

    class Dense:
        W_dec, encode = sae.W_dec, sae.encode

    x = torch.randn(50, 6, generator=g)
    with torch.no_grad():
        entries, dense = encode(sae, x), encode(Dense(), x)
    assert torch.allclose(entries.dense(), dense.dense(), atol=1e-5) and 0 < entries.l0 < 40
    assert torch.equal(entries.dense() != 0, dense.dense() != 0)


@pytest.mark.parametrize("before", [False, True])
def test_numbers_too_small_for_float32_are_0_inside_and_as_they_were_after(before):
    tiny = torch.full((), torch.finfo(torch.float32).tiny)
    torch.set_flush_denormal(before)
    try:
        with flushed_denormals():
            assert tiny.mul(0.5) == 0
        assert bool(tiny.mul(0.5) == 0) is before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("d", "share"), [(80, 0.02), (300, 0.1)])
def test_without_mkl_the_solution_is_the_same(d, share, monkeypatch):
    x, labels = _data(n=500, d=d, share=share)
    found = lasso.fit(from_dense(x), labels, 26, l1=0.002, l2=26e-6, tolerance=1e-6)
    assert _kkt_residual(x, labels, found.weight, found.bias, 0.002, 26e-6) < 1e-6
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(lasso, "_dense_product", lambda *_: pytest.fail("torch multiplies sparse matrices by MKL"))
    without = lasso.fit(from_dense(x), labels, 26, l1=0.002, l2=26e-6, tolerance=1e-6)
    assert torch.allclose(found.weight, without.weight, atol=1e-6)


@pytest.mark.parametrize("preset", ["saebench", "saebench-adam"])
def test_a_ranking_says_how_far_it_is(preset, one_thread):
    x, labels = _data(n=300, d=40, share=0.05)
    heard = []
    rank_latents(from_dense(x), labels, 26, get_preset(preset), 0, lambda *said: heard.append(said))
    doing, done, of = zip(*heard, strict=True)
    assert set(doing) == {"ranking latents"} and len(set(of)) == 1
    assert list(done) == sorted(set(done)) and len(done) > 2 and done[0] == 0 and done[-1] < of[0]


def test_memory_stays_flat_over_looks_at_the_ranking():
    """On a CPU torch never frees what a sparse product of two sparse matrices holds."""
    x, labels = _data(n=2000, d=600, share=0.02)
    latents, process = from_dense(x), psutil.Process()
    held = []
    for _ in range(24):
        lasso.fit(latents, labels, 26, l1=0.002, l2=26e-6)
        held.append(process.memory_info().rss)
    assert held[-1] - held[7] < 4e6
