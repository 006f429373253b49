"""Hierarchies as data: names, JSON files, their mistakes, and the whole eval on labels that are not letters."""

from __future__ import annotations

import json

import pytest
import torch
from eval_fakes import D_IN, FakeLM, fake_words, word_tokenizer

from sae_train.errors import UserError
from sae_train.evals import absorption, assets
from sae_train.evals.hierarchy import RULES, get_hierarchy
from sae_train.sae.model import SAE, SAEConfig


@pytest.mark.parametrize(
    ("name", "word", "label"),
    [
        ("first-letter", " Short", "S"), ("first-letter", "short", "S"), ("last-letter", " short", "T"),
        ("word-length", " short", "five"), ("word-length", "extraordinarily", "ten"), ("first-vowel", " oak", "vowel"),
        ("first-vowel", "Tree", "consonant"),
    ],
)  # fmt: skip
def test_rules_label_words_with_and_without_a_space(name, word, label):
    hierarchy = RULES[name]
    assert hierarchy.labels[hierarchy.label(word)] == label
    assert hierarchy.label("word2") is None and hierarchy.label(" Élan") is None


def test_embedded_words_have_their_class():
    hierarchy = get_hierarchy("word-class")
    assert len(hierarchy.labels) == 12 and hierarchy.template == "{word} has the word class: {label}"
    assert hierarchy.label(" dog") is not None and hierarchy.label(" Dog") is None


def write(tmp_path, content) -> str:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not readable JSON"),
        ([1], "must be a JSON object"),
        ({"a": {"x": ["b"], "y": ["c"]}, "d": {"x": ["b"], "y": ["c"]}}, "one parent.*'a', 'd'"),
        ({}, "one parent.*none"),
        ({"a": ["b"]}, "one parent"),
        ({"a": {"x": ["b"]}}, "at least two labels"),
        ({"a": {"x": ["b"], "y": []}}, "at least two labels"),
        ({"a": {"x": ["b"], "y": ["b"]}}, "'b' under 'x' and 'y'"),
        ({"a": {"x": ["b"], "y": [3]}}, "lists 3 under 'y'"),
        ({"template": 4, "a": {"x": ["b"], "y": ["c"]}}, "its template a string"),
    ],
)
def test_mistakes_in_a_file_are_sentences(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        get_hierarchy(write(tmp_path, content))


def test_unknown_names_and_absent_files_are_sentences():
    with pytest.raises(UserError, match="did you mean 'last-letter'"):
        get_hierarchy("last-leter")
    with pytest.raises(UserError, match="no hierarchy file"):
        get_hierarchy("absent.json")


class ClassLM(FakeLM):
    """A word's class, not its letter, is a direction of its activation."""

    def __init__(self, tokenizer, classes, seed: int = 0):
        super().__init__(tokenizer, letter_scale=0.0, seed=seed)
        for word, token_id in tokenizer.get_vocab().items():
            if word.strip() in classes:
                self.table[token_id] += 4 * self.letters[classes[word.strip()]]


@pytest.fixture(scope="module")
def colours():
    words = fake_words(20)
    names = ("red", "green", "blue", "grey")
    return {name: [w.strip() for w in words[i::4]] for i, name in enumerate(names)}, words


@torch.no_grad()
def tied_sae(directions: torch.Tensor, k: int) -> SAE:
    """A topk SAE that reads and writes the same unit directions."""
    sae = SAE(SAEConfig("topk", D_IN, len(directions), k))
    sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    return sae


def test_a_file_of_classes_runs_through_the_whole_eval(tmp_path, colours):
    table, words = colours
    path = write(tmp_path, {"colour": table, "template": "{word} has the first letter: {label}"})
    tokenizer = word_tokenizer([*words, *(f" {name}" for name in table)])
    lm = ClassLM(tokenizer, {w: i for i, own in enumerate(table.values()) for w in own})
    built = assets.build(lm, hierarchy=path, cache_dir=tmp_path)
    assert built.label_names == list(table) and len(built.words) == len(words)
    assert built.counts["dropped: not a word of 'colour'"] > 0
    assert tokenizer.convert_ids_to_tokens(built.answer_ids.tolist()) == [f" {name}" for name in table]
    W_dec = torch.cat([lm.letters[:4], torch.randn(60, D_IN, generator=torch.Generator().manual_seed(0))])
    result = absorption.evaluate(tied_sae(W_dec, k=4), built)
    assert result.valid and result.n_letters == 4 and result.by_letter["letter"].tolist() == list(table)
    assert [main[0] for main in result.by_letter["main_latents"]] == [0, 1, 2, 3]
    out = json.loads(json.dumps(result.to_saebench_json()))
    assert out["eval_type_id"] == "absorption_colour"

    table["red"], table["blue"] = table["blue"], table["red"]  # another file under the same name
    assert assets.build(lm, hierarchy=write(tmp_path, {"colour": table}), template="{word} has", cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_hierarchy_that_the_model_does_not_tell_is_no_score(colours):
    _, words = colours
    result = absorption.evaluate(
        tied_sae(torch.eye(D_IN), k=4),
        assets.build(FakeLM(word_tokenizer(words)), hierarchy="last-letter", template="{word} has"),
    )
    assert not result.valid and "of 26 labels can be read off" in result.reason
