"""Which number format a language model's weights get."""

import pytest
import torch

from sae_train.data.dtypes import choose_dtype
from sae_train.errors import UserError


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "avx2": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "avx2": True}, "float32"),
        ({"avx512_f": True, "vnni": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", torch.device("cpu")) == dtype
    assert choose_dtype("auto", "cpu") == dtype


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_what_is_asked_for_is_taken(asked):
    assert choose_dtype(asked, torch.device("cpu")) == asked


def test_an_unknown_format_is_a_sentence():
    with pytest.raises(UserError, match="choose auto or one of float32"):
        choose_dtype("int8", torch.device("cpu"))
