"""Hierarchies as data: names, JSON files, their mistakes, and the whole eval on labels that are not letters."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from eval_fakes import D_IN, FakeLM, fake_words, word_tokenizer
from scripts import script
from transformers import AutoTokenizer

from sae_train.data.language_model import load_language_model
from sae_train.errors import UserError
from sae_train.evals import absorption, assets, vocab
from sae_train.evals.hierarchy import RULES, get_hierarchy
from sae_train.evals.intervals import letters_by_seeds
from sae_train.sae.model import SAE, SAEConfig


@pytest.mark.parametrize(
    ("name", "word", "label"),
    [
        ("first-letter", " Short", "S"), ("first-letter", "short", "S"), ("last-letter", " short", "T"),
        ("word-length", " short", "five"), ("word-length", "extraordinarily", "ten"), ("first-vowel", " Street", "E"),
        ("first-vowel", "outer", "O"), ("letter-class", " oak", "vowel"), ("letter-class", "Tree", "consonant"),
    ],
)  # fmt: skip
def test_rules_label_words_with_and_without_a_space(name, word, label):
    hierarchy = RULES[name]
    assert hierarchy.labels[hierarchy.label(word)] == label
    assert hierarchy.label("word2") is None and hierarchy.label(" Élan") is None


def test_a_word_without_a_vowel_has_no_first_one():
    assert RULES["first-vowel"].label(" my") is None and RULES["first-vowel"].label("NBC") is None


@pytest.mark.parametrize(("name", "n_labels", "word", "label"), [
    ("kind", 10, " dogs", "animal"), ("kind", 10, "France", "country"), ("number", 2, " dogs", "plural"),
    ("number", 2, "dog", "singular"),
])  # fmt: skip
def test_hierarchies_of_meaning_are_known_by_name_and_fit_gpt2s_words(name, n_labels, word, label, shared_data):
    hierarchy = get_hierarchy(name)
    assert hierarchy.labels[hierarchy.label(word)] == label and hierarchy.label(" Élan") is None
    found, _ = vocab.entries(AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2"), set(), hierarchy)
    assert len(hierarchy.labels) == n_labels and vocab.count_few(found, hierarchy) == {}


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


@pytest.mark.parametrize("few", [{"grey": 5}, {"grey": 5, "mauve": 0}, {"grey": 19}])
def test_listed_labels_with_few_words_are_left_out_with_a_sentence(tmp_path, colours, few):
    table, words = colours
    lm = ClassLM(word_tokenizer([*words, *(f" {name}" for name in table)]), {})
    whole = {name: own for name, own in table.items() if name not in few}
    listed = whole | {name: table.get(name, ["unheard"])[: max(n, 1)] for name, n in few.items()}
    how = {"template": "{word} has the first letter: {label}"}
    built = assets.build(lm, hierarchy=write(tmp_path, {"colour": listed}), cache_dir=tmp_path, **how)
    there = ", ".join(f"{name} ({n})" for name, n in few.items())
    assert built.notes == [f"labels with fewer than 20 words that are one token of fake are left out: {there}"]
    assert built.label_names == list(whole) and built.settings["left_out"] == few
    without = assets.build(lm, hierarchy=write(tmp_path, {"colour": whole}), **how)
    assert built.words == without.words and torch.equal(built.probe_weight, without.probe_weight)
    assert not without.notes and "left_out" not in without.settings
    again = assets.build(lm, hierarchy=write(tmp_path, {"colour": listed}), cache_dir=tmp_path, **how)
    assert again.hash == built.hash and again.notes == built.notes


def test_a_file_without_two_labels_of_enough_words_is_refused(tmp_path, colours):
    table, words = colours
    few = {"red": table["red"], "green": table["green"][:19], "blue": ["unheard"]}
    with pytest.raises(
        UserError, match=r"two labels with at least 20 words .*'colour' there are green \(19\), blue \(0\)"
    ):
        assets.build(FakeLM(word_tokenizer(words)), hierarchy=write(tmp_path, {"colour": few}), template="{word} has")


def test_all_forms_of_a_listed_word_stand_on_one_side_of_the_split():
    cores = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(10)]
    words = [form for core in cores for form in (core, f" {core}", f" {core.capitalize()}")]
    made = vocab.Vocabulary(words, list(range(300)), [i % 2 for i in range(100) for _ in range(3)])
    sides = vocab.split(made, 0.2, torch.Generator().manual_seed(0), together=True).view(100, 3)
    assert (
        torch.equal(sides.all(1), sides.any(1)) and int(sides[::2].any(1).sum()) == int(sides[1::2].any(1).sum()) == 10
    )
    apart = vocab.split(made, 0.2, torch.Generator().manual_seed(0)).view(100, 3)
    assert not torch.equal(apart.all(1), apart.any(1))
    single = made.subset(list(range(0, 300, 3)))
    alone = [vocab.split(single, 0.2, torch.Generator().manual_seed(0), together=t) for t in (False, True)]
    assert torch.equal(*alone)


def test_the_eval_keeps_the_forms_of_listed_words_together(tmp_path, colours):
    table, words = colours
    both = sorted({form for word in words for form in (word.strip(), f" {word.strip()}")})
    lm = ClassLM(word_tokenizer([*both, *(f" {name}" for name in table)]), {})
    built = assets.build(
        lm, hierarchy=write(tmp_path, {"colour": table}), template="{word} has the first letter: {label}"
    )
    sides = [{word.strip() for word, t in zip(built.words, built.is_test, strict=True) if t == test} for test in (0, 1)]
    assert len(built.words) == len(both) and not set.intersection(*sides)


@pytest.mark.parametrize("rule", ["first-letter", "word-length"])
def test_a_file_with_a_rules_labels_gives_the_rules_scores(tmp_path, rule):
    """Of the embedded model, whose words have one form each."""
    lm, hierarchy = load_language_model("speller"), get_hierarchy(rule)
    template = "{word} has the first letter: {label}" if rule == "first-letter" else "the word is {word}"
    found, _ = vocab.entries(lm.tokenizer, lm.special_ids, hierarchy)
    words = {name: [] for name in hierarchy.labels}
    for word, label in zip(found.words, found.labels, strict=True):
        words[hierarchy.labels[label]].append(word.strip())
    kept = [label for label, own in enumerate(words.values()) if len(own) >= vocab.LEAST_WORDS]
    listed = {hierarchy.labels[label]: words[hierarchy.labels[label]] for label in kept}
    assert rule != "first-letter" or len(kept) == 26
    path = write(tmp_path, {"mine": listed})
    ours, theirs = (assets.build(lm, hierarchy=h, template=template) for h in (path, hierarchy.keep(kept)))
    assert ours.settings["hierarchy"] == "mine" and ours.hash != theirs.hash
    sae = SAE(SAEConfig("topk", lm.d_in, 512, 8))
    results = [absorption.evaluate(sae, built, baseline=True) for built in (ours, theirs)]
    for table in ("by_letter", "words"):
        assert getattr(results[0], table).equals(getattr(results[1], table))


def test_scores_of_several_seeds_are_averaged_over_the_labels_that_count_for_all(tmp_path):
    rng, labels = np.random.default_rng(0), ("animal", "city", "food")
    rows = [
        {"sae": f"topk-1k-l0_8{end}", "task": "kind", "label": label, **dict.fromkeys(("f1", "recall"), 0.5)}
        | dict(zip(("fraction", "full", "full_family", "full_by_chance"), rng.random(4).round(4), strict=True))
        for end in ("", "-seed_1", "-seed_2")
        for label in labels
        if (end, label) != ("-seed_1", "city")
    ]
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "labels.csv", index=False)
    head, _, row = script("beyond_letters", "--seeds", tmp_path / "labels.csv").stdout.splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    kept = table[table["label"] != "city"]
    matrix = kept.pivot(index="sae", columns="label", values="full").to_numpy(copy=True)
    own = letters_by_seeds(torch.tensor(matrix))
    assert row.startswith("| kind | topk-1k-l0_8 | 3 | 2 |")
    assert cells["full"] == f"{own.mean:.3f} [{own.low:.3f}, {own.high:.3f}]".replace("0.", ".")
    beyond = (kept["full"] - kept["full_by_chance"]).mean()
    assert cells["beyond chance"].startswith(f"{beyond:.3f}".replace("0.", "."))
