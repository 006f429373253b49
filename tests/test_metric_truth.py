"""The maths by which the absorption metric is judged: made-up tables and SAEs whose answers are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation_tables
import absorption_events as events
import agreement as ag
import planted
import toy_scores

from sae_train.data.toy import open_toy
from sae_train.evals.events import NEVER, event_log
from sae_train.evals.latents import from_dense


def spread(n: int, n_rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n) % n_rows, torch.arange(n) // n_rows


def test_correlations_are_those_of_numpy_and_scipy_and_their_intervals_hold_them():
    from scipy.stats import spearmanr

    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=g).round(decimals=1)  # with ties
    y = x.exp() + 0.5 * torch.randn(60, generator=g)
    rows, columns = spread(60)
    pearson = ag.correlation(x, y, rows, columns)
    spearman = ag.correlation(x, y, rows, columns, by_rank=True)
    assert pearson.mean == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    assert spearman.mean == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-9)
    assert all(it.low < it.mean < it.high and it.visible > 0 for it in (pearson, spearman))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_is_the_truth_or_its_opposite_has_a_sure_correlation(sign):
    y = torch.arange(20.0)
    it = ag.correlation(sign * y, y, *spread(20))
    assert (it.mean, it.low, it.high) == pytest.approx((sign, sign, sign))
    gap = ag.correlation_gap(sign * y, y, y, *spread(20))
    assert gap.mean == pytest.approx(1 - sign)


def test_a_score_that_does_not_vary_has_no_correlation():
    it = ag.correlation(torch.ones(20), torch.arange(20.0), *spread(20))
    assert it.mean != it.mean and ag.shown(it) == "–"


def test_precision_recall_and_false_alarms_are_counted():
    flag = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
    truth = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])
    sums = ag.cluster_sums(ag.hits(flag, truth), *spread(8))
    assert ag.two_way(sums, ag.precision).mean == pytest.approx(2 / 3)
    assert ag.two_way(sums, ag.recall).mean == pytest.approx(2 / 3)
    assert ag.two_way(sums, ag.f1).mean == pytest.approx(2 / 3)
    assert ag.two_way(sums, ag.false_rate).mean == pytest.approx(1 / 5)


def test_an_interval_comes_from_clusters_not_from_rows():
    """A hundred copies of each value say no more than one."""
    values, rows, columns = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    once = ag.mean(values, rows, columns)
    often = ag.mean(*(v.repeat(100) for v in (values, rows, columns)))
    assert (once.mean, once.low, once.high) == pytest.approx((often.mean, often.low, often.high))
    assert once.low == 0 and once.high == 1
    with_nan = ag.mean(torch.tensor([1.0, float("nan")]), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert with_nan.mean == 1


@pytest.fixture(scope="module")
def toy():
    return open_toy("letters")


@pytest.fixture(scope="module")
def rendered(toy):
    return planted.render(toy, times=2)


def truth_of(sae, toy, rendered):
    return planted.truth(from_dense(sae.latents), sae.W_dec, rendered, toy)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_true_dictionary_and_split_parents_carry_all_of_the_parent_and_absorb_nothing(toy, rendered, parts):
    sae = planted.split(toy, rendered, parts)
    found = truth_of(sae, toy, rendered)
    torch.testing.assert_close(found.shared, torch.ones_like(found.shared), rtol=0, atol=1e-4)
    assert float(found.others.abs().max()) < 1e-4 and not found.absorbed().any()
    x = sae.decode(sae.latents)
    torch.testing.assert_close(x, rendered.x, rtol=0, atol=0.15)  # all but the noise


@pytest.mark.parametrize(("share", "degree"), [(0.3, 1.0), (0.3, 0.5), (0.6, 0.25)])
def test_a_built_absorption_has_the_degree_that_was_asked_for_on_the_words_that_were_chosen(
    toy, rendered, share, degree
):
    sae, chosen = planted.absorb(toy, rendered, share, degree, seed=0)
    found = truth_of(sae, toy, rendered)
    kept = torch.full_like(found.shared[chosen], 1 - degree)
    torch.testing.assert_close(found.shared[chosen], kept, rtol=0, atol=1e-3)
    magnitude = rendered.magnitudes[chosen, 1] / rendered.magnitudes[chosen, 0]  # of the child, by the parent's
    torch.testing.assert_close(found.others[chosen], degree * magnitude, rtol=0, atol=1e-3)
    assert not found.absorbed()[~chosen].any()
    assert torch.equal(found.absorbed(), chosen & (found.others >= 0.5) & (degree == 1))


def test_lost_words_and_random_directions_are_no_absorption(toy, rendered):
    lost = truth_of(planted.lose(toy, rendered, 0.3, 0), toy, rendered)
    assert lost.silent.any() and not lost.absorbed().any() and float(lost.gap.max()) < 1e-3
    assert not truth_of(planted.randomise(toy, rendered, 0), toy, rendered).absorbed().any()


def test_full_absorption_by_hand_is_what_the_eval_reports_and_the_true_dictionary_has_none(toy, rendered):
    answer = toy_scores.answer_directions(toy, 4096)
    bench = toy_scores.Bench(toy, rendered, planted.folds(toy, rendered)[:1], answer)
    for sae in (planted.dictionary(toy, rendered), planted.absorb(toy, rendered, 0.1, 1.0, 0)[0]):
        table, curves = toy_scores.measure(bench, sae, {"name": "it"}, from_dense(sae.latents))
        assert (table["full"] == table["absorbed"]).mean() >= 0.95
        assert table["absorbed"].any() or not table["full"].any()
        one_main = curves[(curves["threshold"] == "f1_jump") & (curves["value"] == toy_scores.NO_SECOND)]
        assert one_main["false"].sum() <= 0.05 * len(table)
        same = curves[(curves["threshold"] == "absorbed_share") & (curves["value"] == 0.4)]
        assert same["right"].sum() + same["false"].sum() == table["full"].sum()
        assert curves.groupby(["threshold", "value"])[[*toy_scores.COUNTS]].sum().sum(axis=1).eq(len(table)).all()


STEPS = (10, 20, 30, 40)


def trajectory() -> pd.DataFrame:
    """Three words of one letter: outcome and the strongest other latent, look by look."""
    courses = {
        "apple": (1.0, [("recalled", 5), ("below", 7), ("carried", 7), ("carried", 7)]),
        "amber": (3.0, [("recalled", 7), ("carried", 9), ("carried", 9), ("carried", 9)]),
        "actor": (2.0, [("recalled", 5), ("recalled", 9), ("carried", 9), ("recalled", 9)]),
    }
    return pd.DataFrame([
        {"sae": "one", "step": step, "letter": "A", "word": word, "token_id": i, "outcome": outcome,
         "absorber": absorber, "absorber_cos": 0.2, "frequency": frequency}
        for i, (word, (frequency, course)) in enumerate(courses.items())
        for step, (outcome, absorber) in zip(STEPS, course, strict=True)
    ])  # fmt: skip


def letters(n_split: list[int]) -> pd.DataFrame:
    return pd.DataFrame({
        "sae": "one", "letter": "A", "step": STEPS, "counts": True, "n_split": n_split,
        "main_latents": [[1, 2][:n] for n in n_split],
    })  # fmt: skip


def test_the_events_of_a_made_up_course_are_measured():
    course = trajectory()
    found = dict(events.measure(course, letters([1, 1, 2, 2]), event_log(course)))
    assert set(found) == set(events.MEASURES)
    expected = {
        "absorbed": 2 / 3, "kept": 1.0, "recovered": 0.0, "rarer": 0.0, "taken": (30 + 20) / 2 / 40, "early": 0.0,
        "never_recalled": 0.0, "order": -1.0, "chosen_anew": 0.5, "before": 0.5, "lived": (20 + 0) / 2 / 40,
        "lived_here": (10 + 0) / 2 / 40, "splits": 1.0, "absorbs": 1.0, "both": 1.0, "split_first": 0.0,
        "split_after": 1.0, "split_same": 0.0,
    }  # fmt: skip
    assert {name: found[name].mean for name in expected} == pytest.approx(expected)


def test_a_word_that_no_main_latent_ever_recalled_has_no_before_and_no_absorbed_word_is_no_crash():
    course = trajectory()
    always = course[course["word"] == "amber"].assign(word="ant", token_id=9, outcome="carried")
    more = pd.concat([course, always], ignore_index=True)
    found = dict(events.measure(more, letters([1, 1, 2, 2]), event_log(more)))
    assert (found["before"].mean, found["never_recalled"].mean) == (0.5, pytest.approx(1 / 3))
    none = course.assign(outcome="recalled")
    found = dict(events.measure(none, letters([1, 1, 2, 2]), event_log(none)))
    assert found["absorbed"].mean == 0 and all(math.isnan(found[name].mean) for name in ("order", "before", "taken"))


@pytest.mark.parametrize(("n_split", "step"), [([2, 2, 2, 2], 10), ([2, 1, 2, 2], 30), ([1, 2, 2, 1], NEVER)])
def test_splitting_counts_from_where_it_lasts(n_split, step):
    table = events.split_and_absorb(letters(n_split), event_log(trajectory()))
    assert table[["split_step", "taken_step"]].values.tolist() == [[step, 20]]


def test_disagreements_are_full_words_that_owe_little_and_silent_ones_that_owe_much():
    words = pd.DataFrame({
        "sae": "s", "word": ["alpha", "bravo", "charlie", "delta"], "full": [1, 1, 0, 0], "silent": [1, 1, 1, 0],
        "absorber": 1, "cos": 0.2, "share": 0.5, "effect": [0.0, 0.9, 0.1, 0.1], "most": [0.1, 0.9, 0.8, 0.9],
        "control": 0.0, "letter": 5.0,
    })  # fmt: skip
    assert ablation_tables.disagreements(words)["word"].tolist() == ["alpha", "bravo", "charlie"]
    other = words.assign(sae="t", full=[0, 1, 1, 0], effect=[0.0, -0.5, 0.2, 0.0], most=[0.95, 0.0, 0.0, 0.0])
    both = ablation_tables.disagreements(pd.concat([words, other]))  # each word from the SAE that shows it most
    assert both[["sae", "word"]].values.tolist() == [
        ["t", "bravo"], ["s", "alpha"], ["t", "charlie"], ["t", "alpha"], ["s", "charlie"]
    ]  # fmt: skip
