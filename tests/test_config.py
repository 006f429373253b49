"""The settings tree: how values are read, how mistakes are told, and that every shipped file parses."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sae_train.config import CONFIGS, SAESpec, flat, leaves, resolve
from sae_train.config.merge import read_yaml
from sae_train.config.units import parse_count, parse_width, width_label
from sae_train.errors import UserError

N_CONFIGS = 8


@pytest.mark.parametrize(
    ("text", "width"),
    [("16k", 16384), ("1k", 1024), ("65k", 65536), ("131K", 131072), ("1m", 2**20), (5000, 5000), ("1000", 1000)],
)
def test_widths_are_read_as_the_field_writes_them(text, width):
    assert parse_width(text) == width


def test_width_labels_and_widths_are_inverse():
    assert [width_label(parse_width(label)) for label in ("4k", "32k", "65k", "524k", "1m")] == [
        "4k",
        "32k",
        "65k",
        "524k",
        "1m",
    ]
    assert width_label(1000) == "1000"


@pytest.mark.parametrize(("text", "near"), [("3k", "2k, 4k"), ("16x", "4k"), ("64k", "65k"), ("-1", "1k"), ("0", "1k")])
def test_a_width_that_is_none_names_the_nearest(text, near):
    with pytest.raises(ValueError, match=r"not a width") as caught:
        parse_width(text)
    assert near in str(caught.value)


@pytest.mark.parametrize(("text", "count"), [("300k", 300_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), (4096, 4096)])
def test_counts_are_decimal(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["-5", "0", "1.5", "many", "1e", ""])
def test_a_count_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="not a count"):
        parse_count(text)


def test_a_grid_is_the_product_of_its_lists():
    specs = resolve({"arch": "relu,topk", "width": "1k,4k", "l0": "8,32", "seed": "0,1"}).specs
    assert len(specs) == 16
    assert specs[0].name == "relu-1k-l0_8"
    assert specs[-1].name == "topk-4k-l0_32-seed_1"
    assert SAESpec(arch="relu", width=1000, l0=2.5).name == "relu-1000-l0_2.5"


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        resolve({"width": "16x", "l0": 0, "arch": "topkk", "widht": 3, "lr": -1})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert any("did you mean 'width'" in line for line in lines)
    assert any("did you mean topk" in line for line in lines)
    assert not any("pydantic" in line or "https" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"width": 64, "l0": 64}, "not below the width"),
        ({"tokens": 1000, "batch_tokens": 1000}, "under 100 steps"),
        ({"name": "a/b"}, "name"),
        ({"dtype": "float8"}, "float32"),
    ],
)
def test_impossible_settings_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        resolve(given)


def test_flags_win_over_a_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("width: 4k\nl0: 20\nbatch_tokens: 512\n")
    settings = resolve({"l0": "30"}, file)
    assert (settings.sae.width, settings.sae.l0, settings.train.batch_tokens) == ((4096,), (30.0,), 512)


HELD = [
    ("out", Path("x") / "y", "x/y"),
    ("model", Path("models") / "lm", "models/lm"),
    ("dataset", np.str_("text.txt"), "text.txt"),
    ("l0", np.array([8, 16]), (8.0, 16.0)),
    ("l0", np.float32(12), (12.0,)),
    ("l0", torch.tensor([8.0, 16.0]), (8.0, 16.0)),
    ("seed", range(3), (0, 1, 2)),
    ("seed", np.arange(2), (0, 1)),
    ("width", [1024, "4k", np.int64(77)], (1024, 4096, 77)),
    ("width", (np.array(2048), "4k"), (2048, 4096)),
    ("arch", pd.Series(["topk", "relu"]), ("topk", "relu")),
    ("arch", np.array(["topk"]), ("topk",)),
    ("matryoshka_prefixes", (Fraction(1, 4), 0.5, 1), (0.25, 0.5, 1.0)),
    ("tokens", np.float64(1e6), 1_000_000),
    ("lr", np.float64(1e-3), 1e-3),
    ("absorption", np.bool_(False), False),
    ("drop", ("a", "b"), ("a", "b")),
]


@pytest.mark.parametrize(("name", "value", "read"), HELD)
def test_python_users_give_what_they_hold(name, value, read):
    settings = resolve({"dataset": "text.txt", "context": 64, name: value})
    found = getattr(getattr(settings, leaves()[name]), name)
    assert found == read and type(found) is type(read)
    assert resolve(flat(settings)) == settings


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("width", {1024, 2048}, "width: text, numbers and lists of them are taken, not a set"),
        ("width", (w for w in (1024, 2048)), "not a generator"),
        ("width", pd.DataFrame({"width": [1024]}), "not a DataFrame"),
        ("width", {"width": 1024}, "not a dict"),
        ("width", [1024, b"4k"], "not a bytes"),
        ("width", np.array([1024.5]), "1024.5 is not a width"),
        ("width", np.nan, "nan is not a width"),
        ("l0", np.array([]), "the list is empty"),
        ("l0", np.array([8, np.inf]), "inf is not an L0"),
        ("seed", np.array([[0, 1]]), r"\[0, 1\] is not a seed"),
        ("seed", range(-1, 1), "-1 is not a seed"),
        ("lr", np.array([1e-3]), "lr"),
        ("model", [Path("a"), Path("b")], "model"),
        ("out", 5, "out 5"),
    ],
)
def test_what_is_none_of_these_is_refused_in_one_sentence(name, value, words):
    with pytest.raises(UserError, match=words) as caught:
        resolve({name: value})
    assert len(str(caught.value).splitlines()) == 1


def test_the_settings_import_no_numpy():
    code = "import sys, sae_train.config; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_embedded_preset_applies_to_the_embedded_model_only():
    preset = read_yaml(CONFIGS / "speller.yaml")
    assert resolve({}).train.tokens == parse_count(preset["tokens"])
    assert resolve({"model": "gpt2"}).train.tokens == 100_000_000
    assert resolve({}).dataset == "generated"
    assert resolve({"model": "gpt2"}).dataset == "monology/pile-uncopyrighted"


def test_smollm2_needs_no_more_than_its_name():
    settings = resolve({"model": "smollm2", "l0": 25})
    assert (settings.dataset, settings.sae.l0) == ("installed-docs", (25.0,)) and settings.lm.hook


def test_settings_survive_run_json():
    settings = resolve({"width": "1k,4k", "drop": ["a", "b"], "lr": 1e-3, "absorption": False})
    assert resolve(flat(settings)) == settings


def test_leaf_names_are_unique_so_that_flags_can_be_flat():
    from sae_train.config import groups

    assert len(leaves()) == sum(len(model.model_fields) for model in groups().values())


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [1\n", "1: 2\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        resolve({}, file)


def test_every_shipped_config_parses_and_opens_with_its_command():
    designs = sorted(CONFIGS.glob("study*.yaml"))  # test_study.py reads those
    files = sorted(set(CONFIGS.glob("*.yaml")) - set(designs))
    assert len(files) == N_CONFIGS and all(file.read_text().startswith("# sae-train study -") for file in designs)
    for file in files:
        assert resolve({}, file).specs
        assert file.read_text().startswith("# sae-train --")
