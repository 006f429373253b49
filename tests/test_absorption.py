"""The absorption metric: reference vectors, cases by hand, a planted model word by word, and broken SAEs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from eval_fakes import D_IN, Decodes, FakeLM, fake_words, word_tokenizer

from sae_train.config import EvalSettings
from sae_train.errors import UserError
from sae_train.evals import absorption, assets
from sae_train.evals.absorption import score_projections, score_words
from sae_train.evals.baselines import random_sae
from sae_train.evals.hierarchy import FIRST_LETTER
from sae_train.runs.callbacks import Absorption


@pytest.fixture(scope="module")
def lm():
    return FakeLM(word_tokenizer(fake_words(20)))


@pytest.fixture(scope="module")
def built(lm):
    return assets.build(lm)


class Planted(Decodes):
    """Latent c is letter c; latent 26 + w fires on word w alone and, for an absorbed word, carries its letter.

    Letter latents are silent on absorbed words. Activations come as a table over the model's words.
    """

    def __init__(self, lm, built, absorbed):
        words = len(built.words)
        direction = lm.letters[built.labels]
        noise = torch.randn(words, D_IN, generator=torch.Generator().manual_seed(9))
        noise -= (noise @ lm.letters.T) @ lm.letters  # at right angles to every letter
        noise /= noise.norm(dim=1, keepdim=True)
        own = torch.where(absorbed[:, None], direction, noise)
        self.W_dec = torch.cat([lm.letters, own / own.norm(dim=1, keepdim=True)])
        self.lm, self.absorbed, self.labels = lm, absorbed, built.labels
        self.keys = lm.table[built.token_ids]

    def encode(self, x):
        word = torch.cdist(x, self.keys).argmin(1)
        latents = torch.zeros(len(x), len(self.W_dec))
        rows = torch.arange(len(x))
        latents[rows, 26 + word] = 4.0
        latents[rows, self.labels[word]] = torch.where(self.absorbed[word], 0.0, 4.0)
        return latents


@pytest.fixture(scope="module")
def planted(lm, built):
    absorbed = torch.zeros(len(built.words), dtype=torch.bool)
    for letter in range(26):
        rows = built.tp_rows[built.tp_labels == letter]
        absorbed[rows[: letter % 3]] = True
    sae = Planted(lm, built, absorbed)
    return sae, absorption.evaluate(sae, built)


def test_planted_absorption_is_found_word_by_word(built, planted):
    sae, result = planted
    assert result.valid and result.n_letters == 26
    truth = sae.absorbed[built.tp_rows].tolist()
    assert result.words["full"].tolist() == truth
    assert result.words["fraction"].tolist() == pytest.approx([float(t) for t in truth])
    for row, word, absorbed in zip(built.tp_rows.tolist(), result.words.to_dict("records"), truth, strict=True):
        assert word["main_latents"] == [FIRST_LETTER.labels.index(word["letter"])]
        assert (word["main_act"] == 0) == absorbed
        if absorbed:
            assert word["absorbers"] == [26 + row]


def test_planted_letters_means_and_intervals(planted):
    _, result = planted
    table = result.by_letter
    assert (table["n_split"] == 1).all() and table["n_tp"].sum() == len(result.words)
    assert result.mean_full == pytest.approx((table["n_full"] / table["n_tp"]).mean())
    assert result.std_full == pytest.approx(table["full"].std(ddof=1))
    assert (table["recall_main"] == 1 - table["full"]).all()
    low, high = result.interval("mean_full")
    assert low < result.mean_full < high and result.interval("mean_full") == (low, high)
    with pytest.raises(UserError, match="no interval"):
        result.interval("mean_f1")


def test_saebench_json(planted):
    _, result = planted
    out = json.loads(json.dumps(result.to_saebench_json(sae_lens_id="x")))
    assert out["eval_type_id"] == "absorption_first_letter" and out["sae_lens_id"] == "x"
    mean = out["eval_result_metrics"]["mean"]
    assert mean["mean_full_absorption_score"] == result.mean_full and len(mean) == 6
    assert len(out["eval_result_details"]) == 26
    assert set(out["eval_result_details"][1]) == {
        "first_letter", "mean_absorption_fraction", "full_absorption_rate", "num_full_absorption",
        "num_probe_true_positives", "num_split_features",
    }  # fmt: skip
    assert out["eval_config"]["prompt_token_pos"] == -6
    assert out["eval_config"]["prompt_template"] == "{word} has the first letter:"


def test_evaluation_is_repeatable_and_disturbs_nothing(built, planted):
    sae, result = planted
    sae.W_dec.requires_grad_(True)
    before, weights = torch.get_rng_state(), sae.W_dec.detach().clone()
    with torch.enable_grad():
        again = absorption.evaluate(sae, built)
        assert torch.is_grad_enabled()
    sae.W_dec.requires_grad_(False)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(weights, sae.W_dec)
    assert again.words.equals(result.words) and again.by_letter.equals(result.by_letter)


def test_reference_vectors(shared_data):
    data = json.loads((shared_data / "absorption_vectors.json").read_text())
    cos = torch.tensor(data["cos_sims"], dtype=torch.float64)
    for case in data["cases"]:
        acts = torch.tensor([case["acts"]], dtype=torch.float64)
        a = torch.tensor([case["x_dot_p"]], dtype=torch.float64)
        fraction, full = score_projections(acts, cos, a, case["main"])
        assert fraction.item() == pytest.approx(case["fraction"], abs=1e-6), case["name"]
        assert full.item() == case["full"], case["name"]


# latents: 0 main (cos 1), 1 absorber (cos .6), 2 weak (cos .05), 3 against (cos -.5)
COS = torch.tensor([1.0, 0.6, 0.05, -0.5])


@pytest.mark.parametrize(
    ("acts", "a", "fraction", "full"),
    [
        ([0, 5, 0, 0], 4.0, 1.0, True),  # 3 of 4 carried by the absorber
        ([0, 2, 0, 0], 4.0, 0.0, False),  # 1.2 of 4 is less than 40 %
        ([1, 5, 0, 0], 4.0, 0.75, False),  # b = min(3, 3): 3/(3 + 1)
        ([1, 10, 0, 0], 4.0, 0.75, False),  # no more than A − M counts
        ([4, 5, 0, 0], 4.0, 0.0, False),  # the main latent does it all
        ([0, 0, 40, 0], 4.0, 0.0, True),  # cos below .1 but above .025
        ([0, 5, 0, 0], 0.0, 0.0, True),  # A = 0: no fraction
        ([0, 5, 0, 0], -1.0, 0.0, False),
        ([0, 0, 0, 0], 0.0, 0.0, False),
    ],
)
def test_cases_by_hand(acts, a, fraction, full):
    found = score_projections(torch.tensor([acts], dtype=torch.float32), COS, torch.tensor([a]), [0])
    assert found[0].item() == pytest.approx(fraction) and found[1].item() == full


def test_older_fraction_counts_all_projections():
    acts = torch.tensor([[1.0, 5.0, 0.0, 1.0], [4.0, 5.0, 0, 0], [0.0, 0.0, 0.0, 2.0]])
    fraction, _ = score_projections(acts, COS, torch.tensor([4.0, 4.0, 4.0]), [0], "saebench-0.3")
    assert fraction.tolist() == pytest.approx([2.5 / 3.5, 0.0, 0.0])


def test_words_and_projections_agree_for_any_decoder_norm():
    g = torch.Generator().manual_seed(0)
    latents = torch.rand(20, 30, generator=g) * (torch.rand(20, 30, generator=g) < 0.2)
    W_dec, x, p = torch.randn(30, 8, generator=g), torch.randn(20, 8, generator=g) * 3, torch.randn(8, generator=g)
    norms = W_dec.norm(dim=1)
    plain = score_words(latents, W_dec, p, x, [0, 4])
    scaled = score_words(latents * norms, W_dec / norms[:, None], 7 * p, x, [0, 4])
    assert torch.allclose(plain[0], scaled[0], atol=1e-5) and torch.equal(plain[1], scaled[1])


class Tied(Decodes):
    """The k largest positive pre-activations above a threshold, along the decoder's own rows."""

    def __init__(self, W_dec, k, threshold=0.0):
        self.W_dec, self.k, self.threshold = W_dec, k, threshold
        self.cfg = SimpleNamespace(k=k)

    def encode(self, x):
        values, latents = (x @ self.W_enc).topk(self.k, dim=1)
        values = values * (values > self.threshold)
        return x.new_zeros(len(x), len(self.W_dec)).scatter(1, latents, values)


def test_unreadable_letters_are_a_reason_and_no_score():
    blank = assets.build(FakeLM(word_tokenizer(fake_words()), letter_scale=0.0))
    result = absorption.evaluate(Tied(torch.eye(D_IN), k=4), blank)
    assert not result.valid and "linear probe" in result.reason
    assert result.mean_fraction != result.mean_fraction and result.interval("mean_full")[0] != 0
    assert len(result.by_letter) == 26


class Noise(Tied):
    """Latents that have nothing to do with the words."""

    def encode(self, x):
        drawn = torch.rand(len(x), len(self.W_dec), generator=torch.Generator().manual_seed(len(x)))
        return torch.where(drawn > 0.9, drawn, 0.0)


class Constant(Tied):
    """The same latents for every word."""

    def encode(self, x):
        return torch.zeros(len(x), len(self.W_dec)).index_fill_(1, torch.arange(6), 1.0)


def test_an_idle_sae_may_be_a_baseline(built):
    assert absorption.evaluate(_broken("noise"), built, baseline=True).valid


def _broken(kind):
    W_dec = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    sae = Tied(W_dec, k=6)
    if kind == "nan":
        W_dec[3] = float("nan")
    if kind == "zero rows":
        W_dec[::2] = 0
    if kind == "narrow":
        sae = Tied(W_dec[:3], k=2)
    if kind == "one latent":
        sae = Tied(W_dec[:1], k=1)
    if kind == "asleep":
        sae = Tied(W_dec, k=6, threshold=15.0)
    if kind == "constant":
        sae = Constant(W_dec, k=6)
    if kind == "noise":
        sae = Noise(W_dec, k=6)
    if kind == "dead":
        sae = Tied(W_dec, k=6, threshold=1e9)
    return sae


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "not finite"),
        ("dead", "no latent"),
        ("zero rows", ""),
        ("narrow", ""),
        ("one latent", "silent on 5"),
        ("asleep", "silent on 9"),
        ("constant", "tell no labels apart"),
        ("noise", "tell no labels apart"),
    ],
)
def test_broken_saes_give_a_result(built, kind, reason):
    result = absorption.evaluate(_broken(kind), built)
    assert result.valid == (not reason) and reason in result.reason
    json.dumps(result.to_saebench_json(), allow_nan=False)
    assert result.n_letters in (0, 26) and (result.valid or result.mean_full != result.mean_full)


def test_letters_without_words_do_not_count():
    words = [w for w in fake_words(20) if w.strip()[0].upper() not in "QXZ"]
    result = absorption.evaluate(_broken(""), assets.build(FakeLM(word_tokenizer(words))))
    table = result.by_letter.set_index("letter")
    assert result.valid and result.n_letters == 23 and not table.loc[["Q", "X", "Z"], "counts"].any()


def test_random_sae_absorbs_next_to_nothing(built):
    result = absorption.evaluate(random_sae(_broken(""), built.x), built)
    assert result.valid and result.mean_full < 0.2 and result.ev == result.ev


@pytest.mark.parametrize(
    ("reached", "step", "valid"),
    [(7.5, 9, True), (3.0, 9, False), (float("nan"), 9, False), (11.0, None, False), (3.0, 4, True)],
)
def test_at_the_end_of_a_run_a_score_needs_an_sae_near_its_l0(built, reached, step, valid):
    learner = SimpleNamespace(name="a", spec=SimpleNamespace(l0=8.0), export=lambda scale: _broken(""))
    lm = SimpleNamespace(device="cpu")
    export = lambda each: each.export(1.0)  # noqa: E731
    look = Absorption(lm, built, EvalSettings(), export, 9, lambda *_: None, lambda _: reached)
    result = look.result_of(learner, step)
    assert result.valid == valid and ("where 8 was asked" in result.reason) == (not valid)
    assert len(result.by_letter) == 26, "what was measured stays"
