"""Words, prompts, the ground-truth probe and the cache, on a tiny model with a real tokenizer."""

from __future__ import annotations

import pytest
import torch
from eval_fakes import FakeLM, fake_words, word_tokenizer

from sae_train.data.language_model import load_language_model
from sae_train.errors import UserError
from sae_train.evals import assets, contexts, prompts, vocab
from sae_train.evals.hierarchy import FIRST_LETTER
from sae_train.evals.presets import get_preset


@pytest.fixture(scope="module")
def lm():
    return FakeLM(word_tokenizer([*fake_words(), "word2", " Élan", "<tag>"]))


@pytest.fixture(scope="module")
def built(lm):
    return assets.build(lm)


def test_words_and_what_was_dropped(lm, built):
    assert built.token_ids.tolist() == sorted(built.token_ids.tolist())
    assert set(fake_words()) <= set(built.words)
    assert all(w.removeprefix(" ").isalpha() and w.isascii() for w in built.words)
    assert built.counts["kept"] == len(built.words)
    assert sum(built.counts.values()) == len(lm.tokenizer)
    assert built.counts["dropped: special token"] == 2
    assert built.sampled_from is None


def test_split_is_stratified_and_seeded(built):
    for letter in range(26):
        side = built.is_test[built.labels == letter]
        assert int(side.sum()) == round(0.2 * len(side))
    words = vocab.Vocabulary(built.words, built.token_ids.tolist(), built.labels.tolist())
    again = vocab.split(words, 0.2, assets._generator(0, "split"))
    assert torch.equal(again, built.is_test)
    assert not torch.equal(vocab.split(words, 0.2, assets._generator(1, "split")), built.is_test)


def test_position_and_prompt_are_as_the_eval_says(lm):
    found, _ = vocab.entries(lm.tokenizer, lm.special_ids, FIRST_LETTER)
    fmt = prompts.fit_format(lm, FIRST_LETTER, found, get_preset("saebench"))
    assert (fmt.word_position, fmt.n_examples, fmt.prefix) == (-6, 10, "\n")
    text = fmt.text(" dog", ["cat", " Egg"])
    assert text == "\ncat has the first letter: C\n Egg has the first letter: E\n dog has the first letter:"
    answers = lm.tokenizer.convert_ids_to_tokens(list(fmt.answer_ids))
    assert answers == [f" {letter}" for letter in FIRST_LETTER.labels]


def test_examples_are_distinct_and_never_the_word_itself():
    g = torch.Generator().manual_seed(0)
    own = torch.arange(40)
    drawn = prompts.draw_examples(own, 40, 10, g)
    rows = torch.cat([own[:, None], drawn], 1)
    assert all(len(set(row)) == 11 for row in rows.tolist()) and set(drawn.flatten().tolist()) <= set(range(40))
    assert prompts.draw_examples(torch.arange(3), 3, 10, g).sort(1).values.tolist() == [[1, 2], [0, 2], [0, 1]]
    many = prompts.draw_examples(torch.zeros(20_000, dtype=torch.long), 5, 1, g).flatten().bincount(minlength=5)
    assert many[0] == 0 and int(many[1:].min()) > 4_700


def test_words_that_share_contexts_are_spread_over_them_and_never_in_their_own():
    g = torch.Generator().manual_seed(0)
    drawn = contexts.draw(torch.arange(4000), 4000, 10, 64, g)
    sets, sizes = drawn.unique(dim=0, return_counts=True)
    assert len(sets) == 64 and int(sizes.min()) >= 60 and int(sizes.max()) <= 66
    assert all(len(set(row)) == 10 for row in sets.tolist()) and int(drawn.max()) < 4000
    assert not (drawn == torch.arange(4000)[:, None]).any()
    crowded = contexts.draw(torch.arange(12), 12, 10, 2, g)  # most words stand in both
    assert all(len({own, *row}) == 11 for own, row in enumerate(crowded.tolist()))
    assert contexts.draw(torch.arange(2), 2, 10, 64, g).tolist() == [[1], [0]]
    assert contexts.draw(torch.arange(5), 5, 0, 64, g).shape == (5, 0)


@pytest.mark.parametrize("drawn", ["each", 64, 3])
def test_examples_come_from_the_words_own_split(lm, built, drawn):
    words = vocab.Vocabulary(built.words, built.token_ids.tolist(), built.labels.tolist())
    found, _ = vocab.entries(lm.tokenizer, lm.special_ids, FIRST_LETTER)
    fmt = prompts.fit_format(lm, FIRST_LETTER, found, get_preset("saebench"))
    side = dict(zip(built.token_ids.tolist(), built.is_test.tolist(), strict=True))
    skip = set(fmt.answer_ids)
    g = assets._generator(0, "prompts")
    rows = contexts.own_split_prompts(lm, fmt, words, built.is_test, drawn, g)
    for ids, is_test in zip(rows, built.is_test.tolist(), strict=True):
        # every third word-like token of a line is its word: template words are in the vocabulary too
        shown = [t for i, t in enumerate(ids) if i > 1 and ids[i - 1] == 2 and t not in skip]
        assert {side[t] for t in shown} == {is_test}


def test_probe_and_true_positives(built):
    assert int(built.letters_that_count.sum()) == 26
    assert built.probe_figures[:, 0].mean() > 0.9 and built.probe_figures[:, 3].min() > 0.9
    assert built.is_test[built.tp_rows].all() and built.tp_x.shape == (len(built.tp_rows), built.x.shape[1])
    words_read = built.tp_tokens[:, built.settings["word_position"]]
    assert torch.equal(words_read, built.token_ids[built.tp_rows]) and len(built.answer_ids) == 26
    logits = built.probe.logits(built.x[built.tp_rows])
    assert (logits.gather(1, built.tp_labels[:, None]) > 0).all()
    assert 0 <= built.model_accuracy <= 1


def test_same_seed_same_assets_and_global_generator_untouched(lm, built):
    before = torch.get_rng_state()
    assert assets.build(lm).hash == built.hash
    assert assets.build(lm, seed=1).hash != built.hash
    assert torch.equal(before, torch.get_rng_state())


def test_sample_of_words_is_stratified_and_says_so(lm, built):
    small = assets.build(lm, n_words=130)
    assert small.sampled_from == len(built.words)
    assert abs(len(small.words) - 130) < 15 and len(set(small.labels.tolist())) == 26


def test_each_word_has_a_context_of_its_own_if_asked(lm, built):
    each = assets.build(lm, contexts="each")
    prefixes = {tuple(row) for row in each.tp_tokens[:, : each.settings["word_position"]].tolist()}
    shared = {tuple(row) for row in built.tp_tokens[:, : built.settings["word_position"]].tolist()}
    assert len(prefixes) == len(each.tp_rows) > len(shared) and len(shared) <= 64
    assert torch.equal(each.is_test, built.is_test)
    assert each.hash == assets.build(lm, contexts="each").hash != built.hash
    with pytest.raises(UserError, match="no number of contexts"):
        assets.build(lm, contexts=0)


class Forgetful(FakeLM):
    """A model that keeps no cache."""

    def activations_after(self, prefix, tokens):
        return None


class Wrong(FakeLM):
    """A model whose cache loses the prefix."""

    def activations_after(self, prefix, tokens):
        return self.activations(tokens)


@pytest.mark.parametrize("kind", [Forgetful, Wrong])
def test_a_model_that_cannot_share_contexts_reads_whole_prompts_and_says_so(lm, built, kind):
    whole = assets.build(kind(lm.tokenizer))
    assert built.notes == [] and len(whole.notes) == 1 and "whole prompts" in whole.notes[0]
    assert torch.equal(whole.tp_tokens, built.tp_tokens) and whole.model_accuracy is not None
    torch.testing.assert_close(whole.x, built.x)
    torch.testing.assert_close(whole.tp_x, built.tp_x)


def test_shared_contexts_on_the_embedded_model_equal_whole_prompts():
    lm, told = load_language_model("speller"), []
    built = assets.build(lm, n_words=400, contexts=8, progress=lambda *now: told.append(now))
    rows = [[t for t in row if t >= 0] for row in built.tp_tokens.tolist()]
    place = built.settings["word_position"]
    assert len(contexts.shared_prefixes(rows, place)) == 8
    whole = torch.stack([lm.activations(torch.tensor([ids]))[0, place] for ids in rows])
    assert float(((built.tp_x - whole).norm(dim=1) / whole.norm(dim=1)).max()) < 1e-5
    assert built.model_accuracy > 0.9
    stages = {doing: (done, of) for doing, done, of in told}
    assert stages["reading words"] == (len(built.words),) * 2
    assert stages["reading true positives"] == (len(built.tp_rows),) * 2


def test_tokenizer_that_cannot_write_the_template_says_what_is_missing():
    poor = FakeLM(word_tokenizer([w.lower() for w in fake_words()], (" has", " the", " first", " word", " is")))
    with pytest.raises(UserError, match=r"no token for newline, 'letter:', which"):
        assets.build(poor)
    built = assets.build(poor, template="the word is {word}")
    assert built.model_accuracy is None and built.settings["word_position"] == -1


def test_short_context_shrinks_the_examples(lm):
    short = FakeLM(lm.tokenizer, context=30)
    assert assets.build(short).settings["n_examples"] == 2
    with pytest.raises(UserError, match="does not fit"):
        assets.build(FakeLM(lm.tokenizer, context=5))


def test_user_mistakes_are_sentences(lm):
    with pytest.raises(UserError, match="must contain"):
        assets.build(lm, template="no word here")
    with pytest.raises(UserError, match="hooked at"):
        assets.build(lm, "blocks.9.hook_resid_post")
    with pytest.raises(UserError, match="did you mean saebench"):
        assets.build(lm, preset="saebnch")
    with pytest.raises(UserError, match="at least 26"):
        assets.build(lm, n_words=3)


def test_real_tokenizers(shared_data):
    from transformers import PreTrainedTokenizerFast

    folder = shared_data / "models" / "craftgpt-5m"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    craft = FakeLM(tokenizer, letter_scale=0.0, context=64)
    with pytest.raises(UserError, match="newline"):
        assets.build(craft)
    plain = prompts.with_template(FIRST_LETTER, "the word is {word}")
    found, dropped = vocab.entries(tokenizer, craft.special_ids, plain)
    fmt = prompts.fit_format(craft, plain, found, get_preset("saebench"))
    words = vocab.keep_single_tokens(found, dropped, lambda v: prompts.single_token_words(craft, fmt, v))
    assert len(words) > 1500 and fmt.n_examples == 10
