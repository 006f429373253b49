"""The causal presets on a model whose answer is linear in the word's activation, so that every effect is known by hand,
and what absorption does to that model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eval_fakes import D_IN, Decodes, FakeLM, fake_words, word_tokenizer

from sae_train.errors import UserError
from sae_train.evals import absorption, assets, baselines, causal_rate
from sae_train.evals.interventions import interventions
from sae_train.evals.presets import PRESETS

ACT = 4.0
PRESET_NAMES = ["paper", "paper-exact"]


class LinearLM(FakeLM):
    """The answer's logits are gain times the word's activation along the letters' directions."""

    gain = 1.0

    def logits(self, tokens, edit=None):
        x = self.activations(tokens)
        x = x if edit is None else edit(x)
        out = torch.zeros(*x.shape[:2], len(self.tokenizer), dtype=x.dtype)
        answers = self.tokenizer.convert_tokens_to_ids([f" {chr(65 + i)}" for i in range(26)])
        word = torch.nn.functional.pad(x, (0, 0, 5, 0))[:, : x.shape[1]]  # five tokens before the last
        out[..., answers] = self.gain * word @ self.letters.T
        return out


class Planted(Decodes):
    """Latent c is letter c, latent 26 + w word w. On absorbed words the letter latent is silent and the word latent, at
    a slant to the letter, carries it."""

    def __init__(self, lm, built, absorbed):
        n = len(built.words)
        noise = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(9))
        noise -= (noise @ lm.letters.T) @ lm.letters
        noise /= noise.norm(dim=1, keepdim=True)
        own = torch.where(absorbed[:, None], 0.8 * lm.letters[built.labels] + 0.6 * noise, noise)
        self.W_dec = torch.cat([lm.letters, own])
        self.absorbed, self.labels, self.keys = absorbed, built.labels, lm.table[built.token_ids]

    def encode(self, x):
        word, rows = torch.cdist(x, self.keys).argmin(1), torch.arange(len(x))
        latents = torch.zeros(len(x), len(self.W_dec))
        latents[rows, 26 + word] = ACT
        latents[rows, self.labels[word]] = torch.where(self.absorbed[word], 0.0, ACT)
        return latents


@pytest.fixture(scope="module")
def lm():
    return LinearLM(word_tokenizer(fake_words(20)))


@pytest.fixture(scope="module")
def built(lm):
    return assets.build(lm, preset="paper")


@pytest.fixture(scope="module")
def planted(lm, built):
    absorbed = torch.zeros(len(built.words), dtype=torch.bool)
    for letter in range(26):
        absorbed[built.tp_rows[built.tp_labels == letter][: letter % 3]] = True
    return Planted(lm, built, absorbed)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_absorbed_words_are_found_with_the_effect_known_by_hand(lm, built, planted, preset):
    result = absorption.evaluate(planted, built, preset, lm=lm)
    truth = planted.absorbed[built.tp_rows].tolist()
    words = result.words
    assert result.valid and words["candidate"].tolist() == truth and (words["full"] > 0).tolist() == truth
    found = words[words["candidate"]]
    # f·cos(W_dec, letter)·gain: nothing else of the word reaches the answer.
    assert found["effect"].to_numpy() == pytest.approx(-ACT * 0.8, rel=1e-4)
    assert found["second_effect"].to_numpy() == pytest.approx(0, abs=1e-4)
    assert found["effect_latent"].tolist() == [26 + row for row in built.tp_rows[torch.tensor(truth)].tolist()]
    assert result.mean_full == pytest.approx((result.by_letter["n_full"] / result.by_letter["n_tp"]).mean())


@pytest.mark.parametrize(("gain", "absorbs"), [(0.32, True), (0.30, False)])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_first_effect_must_exceed_the_second_by_one_logit(built, planted, gain, absorbs, preset):
    weak = LinearLM(word_tokenizer(fake_words(20)))
    weak.gain = gain  # 4·.8·.32 = 1.024, 4·.8·.30 = .96
    result = absorption.evaluate(planted, built, preset, lm=weak)
    assert (result.mean_full > 0) == absorbs and result.words["candidate"].sum() == planted.absorbed.sum()


def test_contexts_that_are_read_once_change_no_exact_effect(lm, built, planted, monkeypatch):
    behind = absorption.evaluate(planted, built, "paper-exact", lm=lm)
    reads = []
    monkeypatch.setattr(causal_rate, "_can_share", lambda *_: False)
    monkeypatch.setattr(LinearLM, "logits_after", lambda *_: reads.append(1))
    whole = absorption.evaluate(planted, built, "paper-exact", lm=lm)
    assert not reads and behind.mean_full == whole.mean_full > 0
    assert torch.allclose(*(torch.tensor(r.words["effect"].dropna().to_numpy()) for r in (behind, whole)), atol=1e-4)


def test_letters_without_candidates_count_as_zero_or_are_dropped(lm, built, planted):
    kept = absorption.evaluate(planted, built, "paper", lm=lm)
    dropping = replace(PRESETS["paper"], letters_without_candidates="drop", min_letters=10)
    dropped = absorption.evaluate(planted, built, dropping, lm=lm)
    with_candidates = kept.by_letter[kept.by_letter["n_full"] > 0]
    assert kept.n_letters == 26 and dropped.n_letters == len(with_candidates) == 17
    assert dropped.mean_full == pytest.approx(with_candidates["full"].mean()) and dropped.mean_full > kept.mean_full


def test_a_sample_of_candidates_is_scaled_up(lm, built, planted):
    one = absorption.evaluate(planted, built, replace(PRESETS["paper"], max_candidates=1), lm=lm)
    every = absorption.evaluate(planted, built, "paper", lm=lm)
    assert one.words["candidate"].sum() == 17 < every.words["candidate"].sum()
    assert one.by_letter["full"].tolist() == pytest.approx(every.by_letter["full"].tolist())


def test_the_released_answer_token_is_an_option(lm, built, planted):
    result = absorption.evaluate(planted, built, replace(PRESETS["paper"], lower_case_answer=True), lm=lm)
    # The lower-case token says nothing here: what is left is the mean of the other 25 letters, which the absorber
    # leaves as it is.
    found = result.words[result.words["candidate"]]
    assert found["effect"].abs().max() < 1e-4 and result.mean_full == 0


def test_what_the_causal_presets_need_is_said(lm, built, planted):
    with pytest.raises(UserError, match="give it as lm"):
        absorption.evaluate(planted, built, "paper")
    with pytest.raises(UserError, match="built with leading_newline = False"):
        absorption.evaluate(planted, built, "saebench")
    silent = absorption.evaluate(planted, replace(built, answer_ids=built.answer_ids[:0]), "paper", lm=lm)
    assert not silent.valid and "asks for no answer" in silent.reason


def test_taking_the_absorber_out_costs_the_margin_and_the_parent_brings_it_back(lm, planted):
    built = assets.build(lm)
    result = absorption.evaluate(planted, built)
    table = interventions(planted, lm, built, result)
    assert len(table) == int(result.words["full"].sum()) > 10
    assert table["absorber_change"].to_numpy() == pytest.approx(-ACT * 0.8, rel=1e-4)
    assert table["parent_change"].to_numpy() == pytest.approx(ACT, rel=1e-4)
    assert table["swap_change"].to_numpy() == pytest.approx(ACT * 0.2, rel=1e-3)
    assert table["random_change"].isna().all()  # no other latent fires on these words
    assert table["clean"].gt(2).all()


def test_outcomes_add_up_and_families_are_splitting(lm, planted):
    """A second latent that half of a letter's words use, with the main one silent on them, is splitting."""
    built = assets.build(lm)
    letters = absorption.evaluate(planted, built).by_letter
    total = letters[["recall_main", "lost_carried", "lost_below", "lost_nobody"]].sum(axis=1)
    assert total.tolist() == pytest.approx([1.0] * 26) and letters["lost_carried"].tolist() == letters["full"].tolist()
    assert letters["full_family"].tolist() == letters["full"].tolist()  # word latents fire on one word: no family

    class Split(Planted):
        def encode(self, x):
            word, rows = torch.cdist(x, self.keys).argmin(1), torch.arange(len(x))
            second = word % 3 == 0
            latents = torch.zeros(len(x), len(self.W_dec))
            latents[rows, self.labels[word]] = torch.where(second, 0.0, ACT)
            latents[rows[second], 26 + self.labels[word[second]]] = ACT
            return latents

    split = Split(lm, built, torch.zeros(len(built.words), dtype=torch.bool))
    split.W_dec = torch.cat([lm.letters, 0.9 * lm.letters + 0.1 * split.W_dec[26:52]])
    # A rule that never takes a second latent leaves the split words to the family correction.
    result = absorption.evaluate(split, built, replace(PRESETS["saebench"], f1_jump=2.0))
    assert (result.by_letter["n_split"] == 1).all() and result.mean_full > 0.1
    assert result.mean_full_family == 0 and result.mean_fraction_family < 0.01


def test_baselines_bracket_the_score(lm, planted):
    built = assets.build(lm)
    result = absorption.evaluate(planted, built)
    heard = set()
    found = baselines.all_scores(planted, built.x, built, result, progress=lambda doing, *counted: heard.add(doing))
    kinds = (f"random SAEs fitted on {baselines.WORDS}", "shuffled labels, ranking latents")
    assert heard >= {f"measuring {what}" for what in kinds}
    assert set(found) == {"random", "random_words", "shuffled_labels", "random_directions", "probe"}
    assert found["probe"]["mean_full"] == found["probe"]["mean_fraction"] == 0
    assert found["probe"]["mean_f1"] > 0.95 and found["probe"]["mean_recall_main"] > 0.95
    assert 0 <= found["random_directions"]["mean_full"] < 0.5
    assert found["shuffled_labels"]["n_letters"] > 0 and "explained_variance" in found["random"]
    assert found == baselines.all_scores(planted, built.x, built, result)
