"""The SAEBench JSON of a result: required entries and their types, as sae-bench 0.6.0 asks for them.

The table below says by hand what `AbsorptionEvalOutput` and the classes it is made of declare (sae_bench/evals/
absorption/eval_output.py, eval_config.py, base_eval_output.py); tests/crosscheck/saebench_absorption.py lets those
classes themselves judge our files.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eval_fakes import FakeLM, fake_words, word_tokenizer

from sae_train.evals import absorption, assets
from sae_train.evals.baselines import random_sae

TEXT, WHOLE, NUMBER, LIST, TABLE = str, int, (int, float), list, dict
OPTIONAL_TEXT, OPTIONAL_TABLE = (str, type(None)), (dict, type(None))

REQUIRED = {
    "eval_type_id": TEXT, "eval_id": TEXT, "datetime_epoch_millis": WHOLE, "eval_config": TABLE,
    "eval_result_metrics": TABLE, "eval_result_details": LIST, "sae_bench_commit_hash": TEXT,
    "sae_lens_id": OPTIONAL_TEXT, "sae_lens_release_id": OPTIONAL_TEXT, "sae_lens_version": OPTIONAL_TEXT,
    "sae_cfg_dict": OPTIONAL_TABLE,
}  # fmt: skip
OPTIONAL = {"eval_result_unstructured"}
CONFIG = {
    "model_name": TEXT, "random_seed": WHOLE, "f1_jump_threshold": NUMBER, "max_k_value": WHOLE,
    "prompt_template": TEXT, "prompt_token_pos": WHOLE, "llm_batch_size": WHOLE, "llm_dtype": TEXT,
    "k_sparse_probe_l1_decay": NUMBER, "k_sparse_probe_batch_size": WHOLE, "k_sparse_probe_num_epochs": WHOLE,
    "min_GT_probe_f1": NUMBER, "min_feats_for_eval": WHOLE,
}  # fmt: skip
MEANS = {
    f"{kind}_{name}": NUMBER
    for kind in ("mean", "std_dev")
    for name in ("absorption_fraction_score", "full_absorption_score", "num_split_features")
}
LETTER = {
    "first_letter": TEXT, "mean_absorption_fraction": NUMBER, "full_absorption_rate": NUMBER,
    "num_full_absorption": WHOLE, "num_probe_true_positives": WHOLE, "num_split_features": WHOLE,
}  # fmt: skip


@pytest.fixture(scope="module")
def lm():
    return FakeLM(word_tokenizer(fake_words(20)))


@pytest.fixture(scope="module")
def built(lm):
    return assets.build(lm)


def result_of(built):
    like = SimpleNamespace(W_dec=torch.zeros(128, built.x.shape[1]))
    return absorption.evaluate(random_sae(like, built.x, 8.0), built)


def as_read(result, **fields: Any) -> dict[str, Any]:
    """The JSON as another program reads it; NaN, which JSON does not have, is refused."""
    return json.loads(json.dumps(result.to_saebench_json(**fields), allow_nan=False))


def violations(out: dict[str, Any]) -> list[str]:
    """What of a file is not as sae-bench asks."""
    metrics, details = out.get("eval_result_metrics", {}), out.get("eval_result_details", [])
    found = _wrong(out, REQUIRED, "", OPTIONAL) + _wrong(out.get("eval_config", {}), CONFIG, "eval_config.")
    found += _wrong(metrics, {"mean": TABLE}, "eval_result_metrics.")
    found += _wrong(metrics.get("mean", {}), MEANS, "mean.")
    for row in details:
        found += _wrong(row, LETTER, "letter.")
        if not (len(row["first_letter"]) == 1 and row["first_letter"].isalpha()):
            found.append("letter.first_letter is not one letter")
    return found + ["datetime_epoch_millis"] * (not 0 <= out["datetime_epoch_millis"] <= 9999999999999)


def _wrong(part: dict[str, Any], fields: dict[str, Any], where: str, optional: set[str] = frozenset()) -> list[str]:
    unknown = part.keys() - fields.keys() - optional
    bad = [name for name, kind in fields.items() if name not in part or not _is(part[name], kind)]
    return [f"{where}{name}" for name in [*bad, *sorted(unknown)]]


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def test_valid_result_is_as_sae_bench_asks(built):
    out = as_read(result_of(built))
    assert violations(out) == []
    assert out["eval_type_id"] == "absorption_first_letter"
    assert [row["first_letter"] for row in out["eval_result_details"]] == list("abcdefghijklmnopqrstuvwxyz")


def test_every_entry_can_be_filled(built):
    given = {"sae_lens_id": "a", "sae_lens_release_id": "b", "sae_lens_version": "6.0.0", "sae_cfg_dict": {"k": 1}}
    out = as_read(result_of(built), **given)
    assert violations(out) == []
    assert {name: out[name] for name in given} == given


def test_letter_rows_add_up_to_the_means(built):
    out = as_read(result_of(built))
    rows, mean = out["eval_result_details"], out["eval_result_metrics"]["mean"]
    fractions = torch.tensor([row["mean_absorption_fraction"] for row in rows], dtype=torch.float64)
    assert mean["mean_absorption_fraction_score"] == pytest.approx(float(fractions.mean()))
    assert mean["std_dev_absorption_fraction_score"] == pytest.approx(float(fractions.std()))
    for row in rows:
        rate = row["num_full_absorption"] / row["num_probe_true_positives"]
        assert row["full_absorption_rate"] == pytest.approx(rate)


def test_invalid_result_lacks_the_means_and_nothing_else(lm):
    """sae-bench writes no file for such a model; ours has null where there is no mean, and the reason."""
    blind = FakeLM(word_tokenizer(fake_words(20)), letter_scale=0.0)
    out = as_read(result_of(assets.build(blind)))
    assert violations(out) == [f"mean.{name}" for name in MEANS]
    assert set(out["eval_result_metrics"]["mean"].values()) == {None}
    assert out["eval_result_unstructured"]["valid"] is False and out["eval_result_unstructured"]["reason"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out.pop("eval_id"),
        lambda out: out.update(surprise=1),
        lambda out: out["eval_config"].pop("min_GT_probe_f1"),
        lambda out: out["eval_result_metrics"]["mean"].update(mean_num_split_features=None),
        lambda out: out["eval_result_details"][0].update(first_letter="th"),
        lambda out: out["eval_result_details"][0].update(num_full_absorption=0.5),
    ],
)
def test_the_table_notices_a_spoilt_file(built, spoil):
    out = as_read(result_of(built))
    spoil(out)
    assert violations(out)
