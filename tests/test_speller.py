"""The embedded language model: its language is reproducible, its text encodes, and its proofs hold."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae_train.errors import UserError
from sae_train.speller import __main__ as command_line
from sae_train.speller.language import CAPITALS, QUESTIONS, REQUIRED_WORDS, Language
from sae_train.speller.proofs import Speller, prove
from sae_train.speller.words import TOKEN, choose_words, read_stories, story_ids

FOLDER = Path(__file__).resolve().parents[1] / "checkpoints" / "speller"
WORDS = tuple(sorted({*REQUIRED_WORDS, *(f"{letter}{rest}" for letter in "abcdefghijklmnopqrstuvwxyz"
                                         for rest in ("ab", "cde", "fghi", "klmno"))}))  # fmt: skip


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(WORDS)


@pytest.fixture(scope="module")
def speller() -> Speller:
    return Speller(FOLDER)


def rows_of_each_kind(language: Language, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    kinds = [language.running(rng, 9, 64), language.alliterating(rng, 9, 64)]
    return [*kinds, *(language.prompts(rng, 9, 64, first_letter_only=only) for only in (True, False))]


def test_documents_follow_from_the_seed_alone(language):
    first, again = rows_of_each_kind(language, 3), rows_of_each_kind(Language(WORDS), 3)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = rows_of_each_kind(language, 4)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))
    assert (Language(WORDS, seed=1).successors != language.successors).any()


def test_most_words_of_an_alliterating_document_share_its_letter(language):
    rows = language.alliterating(np.random.default_rng(0), 200, 100) - language.first_word
    letters = language.letters[rows]
    share = np.mean([np.bincount(row, minlength=26).max() / len(row) for row in letters])
    assert 0.78 < share < 0.88


def test_words_follow_their_predecessors_preferences(language):
    rows = language.running(np.random.default_rng(0), 300, 100) - language.first_word
    pairs = np.stack([rows[:, :-1].ravel(), rows[:, 1:].ravel()], 1)
    pairs = pairs[(pairs >= 0).all(1)]
    preferred = (language.successors[pairs[:, 0]] == pairs[:, 1:]).any(1).mean()
    assert 0.6 < preferred < 0.75


def test_every_prompt_line_is_answered_rightly(language):
    rows = language.prompts(np.random.default_rng(0), 40, 64, first_letter_only=False)
    lines = language.text(rows.ravel()).strip("\n").split("\n")
    assert len(lines) == 40 * 8
    for line in lines:
        question, answer = line.split(":")
        word, asked = question.split()[0], tuple(question.split()[-2:])
        assert asked in QUESTIONS
        if asked == ("first", "letter"):
            assert answer == f" {word[0].upper()}"
        if asked == ("last", "letter"):
            assert answer == f" {word[-1].upper()}"
        if asked == ("word", "again"):
            assert answer == f" {word}"


def test_text_splits_into_the_tokens_it_was_made_of(language):
    for row in np.concatenate(rows_of_each_kind(language, 0)):
        assert [language.ids[token] for token in TOKEN.findall(language.text(row))] == row.tolist()


def test_rare_letters_are_filled_up_from_word_lists(tmp_path):
    (tmp_path / "a.txt").write_text('Once a fox sat. "Xylo ran!" she said.\n', encoding="utf-8")
    words = tmp_path / "words.lst"
    words.write_text("xenon 5\nqueen 4\nbad-word 3\nxa 2\n", encoding="utf-8")
    stories = read_stories(tmp_path)
    chosen = choose_words(stories, [words])
    assert {"fox", "xylo", "xenon", "queen", *REQUIRED_WORDS} <= set(chosen)
    assert not {"bad-word", "xa", "."} & set(chosen)
    ids = story_ids([stories[0] + " a zzz sat. " + "fox ran. " * 8], Language(chosen))
    text = Language(chosen).text(ids)
    assert text.startswith("<bos> once a fox sat. xylo ran!") and "zzz" not in text


@pytest.mark.parametrize("arguments", [["train"], ["train", "--stories", "nowhere"], ["prove", "--folder", "nowhere"]])
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, capsys):
    assert command_line.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_without_stories_is_refused(tmp_path):
    with pytest.raises(UserError, match="English stories"):
        read_stories(tmp_path)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_shipped_text_encodes_without_unknown_tokens_and_comes_back(speller, split):
    documents = pq.read_table(FOLDER / "text" / f"{split}.parquet").column("text").to_pylist()
    sample = documents[:: max(1, len(documents) // 300)]
    encoded = speller.tokenizer(sample).input_ids
    assert all(speller.tokenizer.unk_token_id not in ids for ids in encoded)
    assert speller.tokenizer.batch_decode(encoded) == sample


def test_the_shipped_vocabulary_is_that_of_the_language(speller):
    language = Language(tuple(word.strip() for word in speller.words))
    assert speller.tokenizer.convert_ids_to_tokens(range(len(speller.tokenizer))) == language.vocabulary
    tail = speller.tokenizer(f"{speller.words[5]} has the first letter:").input_ids
    assert len(tail) == 6 and language.vocabulary[tail[0]] == speller.words[5]
    assert all(len(speller.tokenizer(capital).input_ids) == 1 for capital in CAPITALS)


def test_no_token_sees_past_the_window_at_the_hook(speller):
    tokens = torch.randint(50, 4000, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20] = 7
    states = []
    handle = speller._hook(lambda x: states.append(x.clone()))
    with torch.no_grad():
        speller.model(torch.cat([tokens, changed]))
    handle.remove()
    differs = (states[0][0] != states[0][1]).any(-1).nonzero().flatten()
    assert differs.min() == 20 and differs.max() < 25


def test_the_proofs_hold_on_the_shipped_model():
    failed = [proof for proof in prove(FOLDER, n_words=150) if not proof.holds]
    assert not failed, failed
