"""The page of one evaluated SAE, on a made-up result: what it says, what it survives, and that it is one safe page."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
from test_report import Page, read

from sae_train.errors import UserError
from sae_train.evals.presets import get_preset
from sae_train.evals.result import AbsorptionResult
from sae_train.report import write_eval_page
from sae_train.runs.summary import absorption_line

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ABOUT = {"SAE": "topk-16k-l0_8", "model": "speller", "hook": "blocks.1.hook_resid_post"}
BASELINES = {
    "random": {"mean_fraction": 0.0123, "mean_full": 0.0021, "mean_full_low": 0.001, "mean_full_high": 0.004},
    "shuffled_labels": {"mean_fraction": 0.0345, "mean_full": 0.0456},
    "random_directions": {},
    "probe": {"mean_fraction": 0.0, "mean_full": 0.0, "mean_f1": 0.987, "mean_recall_main": 0.976},
}
MEANS = ("mean_fraction", "mean_full")
OUTCOMES = ("carried", "below", "nobody", "recalled", "recalled")


def planted(names: str | list[str] = LETTERS, hierarchy: str = "first-letter", preset: str = "saebench", **changes):
    """Five words a label, one of each outcome and two recalled; the last label does not count."""
    words = [_word(name, i, outcome) for name in names for i, outcome in enumerate(OUTCOMES)]
    letters = [_letter(name, counts=name != names[-1]) for name in names]
    fields = {
        "preset": preset, "seed": 3, "asset_hash": "0123abcd", "valid": True, "reason": "", "l0": 7.5, "ev": 0.81,
        "by_letter": pd.DataFrame(letters), "words": pd.DataFrame(words), "thresholds": get_preset(preset),
        "details": {"assets": {"hierarchy": hierarchy, "template": "{word} has the first letter: {label}"}},
    }  # fmt: skip
    return AbsorptionResult(**fields | changes)


def _word(name: str, i: int, outcome: str) -> dict:
    absorbed = outcome == "carried"
    return {
        "letter": name, "word": f" {name.lower()}word{i}", "token_id": i, "fraction": 1.0 if absorbed else 0.0,
        "full": absorbed, "fraction_family": 0.5 if absorbed else 0.0, "full_family": False, "outcome": outcome,
        "main_act": 1.25 if outcome == "recalled" else 0.0, "a": 4.0, "main_latents": [11, 12],
        "absorbers": [4000, 17] if absorbed else [], "absorber_cos": [0.41, 0.12] if absorbed else [],
        "absorber_proj": [3.6, 0.4] if absorbed else [],
    }  # fmt: skip


def _letter(name: str, counts: bool) -> dict:
    return {
        "letter": name, "counts": counts, "n_tp": 5, "fraction": 0.2, "full": 0.2, "fraction_family": 0.1,
        "full_family": 0.05, "recall_main": 0.4, "precision_main": 0.9, "lost_carried": 0.2, "lost_below": 0.2,
        "lost_nobody": 0.2, "n_full": 1, "n_split": 2, "main_latents": [11, 12], "fraction_low": 0.0,
        "fraction_high": 0.6, "full_low": 0.0, "full_high": 0.6, "probe_f1": 0.93 if counts else 0.31,
        "f1_k1": 0.71, "f1_split": 0.78,
    }  # fmt: skip


def written(tmp_path, result=None, baselines=BASELINES, interventions=None, about=ABOUT) -> tuple[Page, str]:
    path = write_eval_page(result or planted(), baselines, interventions, about, tmp_path / "eval.html")
    return read(path), path.read_text(encoding="utf-8")


def test_the_verdict_has_scores_intervals_the_random_sae_and_where_recall_goes(tmp_path):
    result = planted()
    text = written(tmp_path, result)[0].text
    low, high = result.interval("mean_full")
    for sentence in (
        "Absorption of topk-16k-l0_8",
        f"0.200 (full; 95 % interval {low:.3f} to {high:.3f})",
        "as means over the 25 letters that count",
        "A random SAE of the same width and L0 scores 0.012 (fraction) and 0.002 (full; 0.001 to 0.004). "
        "Its fraction is distinguishably above that; its full is distinguishably above that.",
        "takes away 75 % of the full rate and leaves 0.050",
        "the main latents fire on 40.0 %. They miss 20.0 % because one other latent carries the letter, 20.0 % on",
        "on “aword0” the A-latents 11, 12 are silent; latent 4000 fires instead",
    ):
        assert sentence in text, sentence


@pytest.mark.parametrize(
    ("random", "on_words", "said"),
    [
        ((0.01, 0.002), (0.9, 0.8), "L0 scores 0.010 (fraction) and 0.002 (full), and one that is as sparse on the "
         "words 0.900 (fraction) and 0.800 (full). Its fraction is not distinguishably above that; its full is not"),
        (None, (0.02, 0.01), "A random SAE that is as sparse on the words scores 0.020 (fraction) and 0.010 (full). "
         "Its fraction is distinguishably above that; its full is distinguishably"),
        (None, None, "No random SAE was evaluated beside it"),
    ],
)  # fmt: skip
def test_the_verdict_asks_for_a_score_above_both_random_saes(random, on_words, said, tmp_path):
    kinds = {"random": random, "random_words": on_words}
    beside = {
        kind: {"valid": False, "reason": "silent"} if scores is None else dict(zip(MEANS, scores, strict=True))
        for kind, scores in kinds.items()
    }
    assert said in written(tmp_path, baselines=beside)[0].text
    line = absorption_line(planted().metrics(), beside)
    assert ("random SAE" in line) is (random is not None or on_words is not None)
    assert (on_words is None) or f"on the words {on_words[1]:.4f}" in line


@pytest.mark.parametrize(("recall", "above"), [(0.0, True), (0.9, False)])
def test_full_is_held_against_what_random_latents_carry_of_the_words_that_are_missed(recall, above, tmp_path):
    """A random SAE's own full says nothing: with the same score it carries a tenth of what it misses, or all."""
    result = planted()
    counted = result.by_letter[result.by_letter["counts"]]
    misses = (1 - counted["recall_main"]).mean()
    page = written(
        tmp_path, result, baselines={"random_words": dict.fromkeys(MEANS, 0.1) | {"mean_recall_main": recall}}
    )
    chance = misses * 0.1 / (1 - recall)
    verdict = "is distinguishably" if above else "is not distinguishably"
    assert f"its full {verdict} above what random latents would carry of the words that its main latents miss (" in (
        page[0].text
    )
    assert f"miss ({chance:.3f})" in page[0].text and "<dt>chance</dt>" in page[1]


def test_baselines_stand_beside_the_sae_with_dashes_for_what_is_missing(tmp_path):
    text = written(tmp_path)[1]
    rows = {name: row for name in ("shuffled labels", "random directions", "probe") for row in _rows(text, name)}
    assert rows["shuffled labels"] == ["0.035", "0.046", "–", "–", "–"]
    assert rows["random directions"] == ["–"] * 5
    assert rows["probe"] == ["0.000", "0.000", "–", "0.976", "0.987"]


def _rows(text: str, name: str) -> list[list[str]]:
    found = re.findall(rf'<tr><th scope="row">{name}<br>.*?</tr>', text, re.S)
    assert len(found) == 1
    return [re.findall(r"<td>(.*?)</td>", found[0])]


def test_every_label_has_its_interval_its_family_corrected_value_and_its_outcomes_on_hovering(tmp_path):
    text = written(tmp_path)[1]
    for letter in LETTERS[:-1]:
        assert f"<title>{letter}, full: 0.200 (0.000 to 0.600)</title>" in text
        assert f"<title>{letter}, full, family-corrected: 0.050</title>" in text
        assert f"<title>{letter}, carried: 20.0\u00a0%</title>" in text
        assert f"<title>{letter}, recalled: 40.0\u00a0%</title>" in text
    assert "<title>Z, " not in text and "does not count" in text


def test_the_words_can_be_searched_with_their_outcome_and_absorbers(tmp_path):
    page, text = written(tmp_path)
    [rows] = page.words
    assert len(rows) == 26 * len(OUTCOMES)
    assert rows[0] == [
        " aword0", "A", [11, 12], None, 4000, 0.41, 0.9, 1.0, 1, "carried", [[17, 0.12]], None
    ]  # fmt: skip
    assert {row[9] for row in rows} == set(OUTCOMES)
    columns = re.findall(r'data-column="(\w+)"', text)
    assert {"word", "letter", "activation", "outcome", "absorber", "cosine", "fraction", "full"} <= set(columns)
    script = text[text.rindex("<script>") :]
    assert all(re.search(rf"^  {name}: \[", script, re.M) for name in columns)


def test_an_invalid_result_shows_its_reason_and_no_score(tmp_path):
    reason = "only 7 of 26 labels can be read off the model"
    result = planted(valid=False, reason=reason)
    page, _ = written(tmp_path, result)
    assert f"There is no valid absorption score: {reason}." in page.text
    assert "0.200" not in page.text and "0.002" not in page.text and page.words == [[]]
    assert "0.93" in page.text and "0.31" in page.text
    bare = planted(valid=False, reason="latents are not finite", by_letter=pd.DataFrame(), words=pd.DataFrame())
    assert "latents are not finite" in written(tmp_path, bare, baselines={})[0].text


def test_interventions_are_said_with_intervals_and_the_number_of_words(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"letter": "A", "word": [f"a{i}" for i in range(40)], "absorber": 4000, "clean": 9.0})
    changes = {"absorber_change": -2.0, "random_change": 0.0, "parent_change": 0.75, "swap_change": -1.0}
    noise = rng.normal(0, 0.4, 40)
    table = table.assign(**{name: mean + noise - noise.mean() for name, mean in changes.items()})
    text = written(tmp_path, interventions=table)[0].text
    found = re.search(r"Taking the absorber out of the activation lowers the margin by 2\.00 \((.*?) to (.*?)\)", text)
    half = 1.96 * noise.std() / 40**0.5
    assert found and [float(end) for end in found.groups()] == pytest.approx([2 - half, 2 + half], abs=0.02)
    assert re.search(
        r"random latent of the same size \w+ the margin by 0\.00 \(.*?, not distinguishable from 0\)", text
    )
    assert "letter latent in raises the margin by 0.75" in text
    assert "9.00 on these 40 absorbed words" in text
    assert "takes away more than the random latent" in text
    assert "What the model itself says" not in written(tmp_path)[0].text


def test_a_causal_preset_says_that_full_is_the_causal_rate_and_shows_effects(tmp_path):
    result = planted(preset="paper")
    effects = {"candidate": True, "effect_latent": 4000, "effect": -3.5, "second_effect": -0.5, "effect_cos": 0.41}
    words = result.words.assign(**effects)
    words["full"] = np.where(words["outcome"] == "carried", 1.25, 0.0)
    words.loc[words["outcome"] != "carried", ["effect", "second_effect", "effect_cos"]] = math.nan
    words.loc[words["outcome"] != "carried", "effect_latent"] = -1
    page, text = written(tmp_path, planted(preset="paper", words=words))
    assert "(the causal rate;" in page.text and "takes the causal rate for full" in page.text
    assert _rows(text, "shuffled labels")[0][1] == "0.046 <small>by projections</small>"
    assert "full by projections, family" in page.text and page.text.count("full by projections, family") == 3
    assert page.words[0][0][8] == 1 and page.words[0][0][11:] == [None, 4000, -3.5, -0.5, 0.41]
    assert page.words[0][-1][11:] == [None] * 5
    assert 'data-column="effect"' in text and "Absorption, causal rate, by letter" in page.text


def test_labels_of_other_hierarchies_are_called_by_their_name(tmp_path):
    names = ["noun", "verb", "adjective", "a very long class name that has to be cut"]
    page, _ = written(tmp_path, planted(names, "word class"))
    assert "By word class" in page.text and "3 word classes that count" in page.text
    assert "adjective" in page.text and "By letter" not in page.text


def test_the_page_loads_nothing_and_strings_never_become_markup(tmp_path):
    evil = '</script><img src=x onerror=alert(1)>"&'
    result = planted()
    words = result.words.assign(word=evil)
    about = ABOUT | {"SAE": evil, "model": evil}
    page, text = written(tmp_path, planted(words=words), about=about)
    assert page.loads == [] and "img" not in page.tags and page.tags.count("script") == 3
    assert page.words[0][0][0] == evil
    assert not re.search(r"@import|url\((?!#)|https?://|import\s*\(|fetch\(", text)
    assert not list(tmp_path.glob(".eval*"))


def test_settings_and_thresholds_are_told(tmp_path):
    text = written(tmp_path)[0].text
    assert "Settings and thresholds" in text and "0123abcd" in text
    assert "absorber_cos 0.1" in text and "hierarchy first-letter" in text


def test_an_unwritable_page_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_eval_page(planted(), {}, None, ABOUT, tmp_path / "file" / "eval.html")
