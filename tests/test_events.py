"""The event log of absorption and the pages of single latents, on words and latents made by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from eval_fakes import D_IN, Decodes, FakeLM, fake_words, word_tokenizer

from sae_train.evals import latent_pages
from sae_train.evals.events import NEVER, count_recovered, event_log

STEPS = (0, 10, 20, 30, 40)
# outcome and strongest other latent at each step
WORDS = {
    "lost once": [("carried", 9), ("recalled", 5), ("recalled", 7), ("carried", 7), ("carried", 7)],
    "changed hands": [("recalled", 9), ("nobody", -1), ("carried", 5), ("carried", 7), ("carried", 7)],
    "came back": [("recalled", 9), ("carried", 5), ("carried", 5), ("recalled", -1), ("recalled", -1)],
    "below": [("carried", 9), ("recalled", 5), ("below", 5), ("below", 5), ("below", 5)],
    "late": [("recalled", 7), ("recalled", 7), ("recalled", -1), ("below", 7), ("carried", 7)],
}


def trajectory(sae: str = "one") -> pd.DataFrame:
    rows = [
        {"sae": sae, "step": step, "letter": word[0], "word": word, "token_id": i, "outcome": outcome,
         "absorber": absorber, "absorber_cos": 0.1 * absorber}
        for i, (word, course) in enumerate(WORDS.items())
        for step, (outcome, absorber) in zip(STEPS, course, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_each_absorbed_word_has_the_steps_at_which_it_fell_silent_and_was_taken_over():
    log = event_log(trajectory()).set_index("word")
    assert list(log.index) == ["changed hands", "lost once", "late"]  # in the order of being taken over
    columns = ["recalled_step", "silent_step", "first_step", "taken_step", "absorber"]
    assert log.loc["lost once", columns].tolist() == [20, 30, 20, 30, 7]
    assert log.loc["changed hands", columns].tolist() == [NEVER, 10, 30, 30, 7]
    assert log.loc["late", columns].tolist() == [20, 30, 10, 40, 7]
    assert log["absorber_cos"].tolist() == pytest.approx([0.7] * 3)


def test_sae_s_are_followed_apart_and_words_that_came_back_are_counted():
    both = pd.concat([trajectory("one"), trajectory("two").query("word == 'came back'")])
    assert event_log(both)["sae"].tolist() == ["one"] * 3
    assert count_recovered(both) == {"one": 1, "two": 1}


class OneWordEach(Decodes):
    """Latent i fires on word i alone, as strongly as its row says; decoder rows are unit vectors of the model."""

    def __init__(self, lm, ids, strength):
        self.keys, self.strength = lm.table[ids], strength
        self.W_dec = torch.eye(D_IN)[: len(ids)]

    def encode(self, x):
        near = torch.cdist(x, self.keys)
        hit = near.argmin(1)
        latents = torch.zeros(len(x), len(self.keys))
        rows = torch.arange(len(x))
        latents[rows, hit] = torch.where(near.min(1).values < 0.5, self.strength[hit], 0.0)
        return latents


@pytest.fixture(scope="module")
def lm():
    return FakeLM(word_tokenizer(fake_words(4)))


def test_a_latent_s_record_says_how_often_where_and_for_which_tokens_it_fires(lm):
    vocab = lm.tokenizer.get_vocab()
    a, b, filler = (vocab[word] for word in (fake_words(4)[0], fake_words(4)[5], fake_words(4)[9]))
    rows = torch.full((4, 20), filler)
    rows[0, 7] = rows[2, 3] = a
    rows[:, 0] = lm.bos_id
    sae = OneWordEach(lm, torch.tensor([a, b]), torch.tensor([2.5, 1.0]))
    text = latent_pages.sample(lm, rows, lambda tokens, x: tokens != lm.bos_id)
    assert text.seen.sum() == 4 * 19 and len(text.x) == 4 * 19
    roles = {0: {"main_of": ["A"], "absorbs": []}, 1: {"main_of": [], "absorbs": ["w"]}}
    first, second = latent_pages.describe(sae, roles, text, lm)
    assert first["density"] == pytest.approx(2 / 76) and first["max"] == 2.5 and sum(first["histogram"]) == 2
    assert first["main_of"] == ["A"] and len(first["examples"]) == 2
    shown = first["examples"][0]
    assert shown["tokens"][shown["acts"].index(2.5)] == lm.tokenizer.decode([a])
    assert sum(act > 0 for act in shown["acts"]) == 1
    assert second["density"] == 0 and second["examples"] == [] and second["histogram"] == []
    best = int(lm.unembed[0].argmax())
    assert first["top"][0][0] == lm.tokenizer.decode([best]) and len(first["bottom"]) == 8


def test_main_latents_of_labels_that_count_and_busy_absorbers_get_a_page(monkeypatch):
    from test_eval_page import planted

    result = planted()
    roles = latent_pages.choose(result)
    assert set(roles) == {11, 12, 4000}
    assert roles[11]["main_of"] == list(result.by_letter["letter"])[:-1] and len(roles[4000]["absorbs"]) == 26
    monkeypatch.setattr(latent_pages, "MOST_LATENTS", 2)
    assert set(latent_pages.choose(result)) == {11, 12}
    assert latent_pages.choose(None) == {}
