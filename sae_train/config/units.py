"""Readers of what people type or hold in Python; a ValueError says what may be."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from numbers import Real
from typing import Any

from sae_train.errors import UserError

ARCHITECTURES = {  # what --arch takes, and the class that trains it: a new one is a file and a line here
    name: f"sae_train.training.architectures.{name}:{cls}"
    for name, cls in {
        "relu": "ReLU",
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "jumprelu": "JumpReLU",
        "matryoshka": "Matryoshka",
        "gated": "Gated",
    }.items()
}
EACH = "each"  # a set of in-context examples for each word of the eval
NONE = "none"  # no activation is an outlier
EVAL_PRESETS = ("saebench", "saebench-adam", "saebench-0.3", "paper", "paper-exact", "paper-released")
LARGEST_SEED = 2**63 - 1  # that torch takes
WIDTH_LABELS = {f"{2**i}k": 2 ** (i + 10) for i in range(6)} | {
    "65k": 2**16,
    "131k": 2**17,
    "262k": 2**18,
    "524k": 2**19,
    "1m": 2**20,
    "2m": 2**21,
}


def width_label(width: int) -> str:
    """Write a width as the field does: 16384 is '16k', 65536 is '65k', 1000 stays '1000'."""
    return next((label for label, value in WIDTH_LABELS.items() if value == width), str(width))


def l0_label(l0: float) -> str:
    """Write an L0 in full, so that two that differ have two names: 50.0 is '50'."""
    return f"{l0:g}" if float(f"{l0:g}") == l0 else repr(l0).removesuffix(".0")


def parse_width(value: object) -> int:
    """Read '16k' as 16,384 (labels are powers of two) and '5000' as itself; raise ValueError otherwise."""
    text = str(value).strip().lower().replace("_", "")
    if text in WIDTH_LABELS:
        return WIDTH_LABELS[text]
    if re.fullmatch(r"[+]?\d+", text) and int(text) > 0:
        return int(text)
    number = re.match(r"-?\d+(\.\d+)?", text)
    size = float(number[0]) * (1024 if "k" in text else 2**20 if "m" in text else 1) if number else 2**14
    near = sorted(WIDTH_LABELS, key=lambda label: abs(math.log2(WIDTH_LABELS[label] / max(size, 1))))[:3]
    near.sort(key=WIDTH_LABELS.get)
    raise ValueError(f"{value!r} is not a width: give a positive integer or a label such as {', '.join(near)}")


def parse_count(value: object) -> int:
    """Read a number of tokens: 1_000_000, 1,000,000, '300k', '1.5M' or '2B' (decimal suffixes); raise ValueError
    otherwise. A comma stands between groups of three digits alone, and a fraction of a thousand or more.
    """
    text = str(value).strip().lower().replace("_", "")
    if re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+[kmb]?", text):
        text = text.replace(",", "")
    match = re.fullmatch(r"(\d+(?:\.\d+(?=e|[kmb])|\.0)?(?:e\+?\d+)?)([kmb]?)", text)
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]] if match else 0
    if number < 1 or number != int(number):
        raise ValueError(f"{value!r} is not a count: give a positive whole number such as 4096, 300k, 1.5M or 2B")
    return int(number)


def read_count(what: str, value: object) -> int:
    """Read a number of tokens that is no setting; UserError, which begins with `what`, for anything else."""
    try:
        return parse_count(value)
    except ValueError as error:
        raise UserError(f"{what} {error}") from None


def parse_l0(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not (number >= 1 and math.isfinite(number)):
        raise ValueError(f"{value!r} is not an L0: give a number of active latents per token, at least 1, such as 50")
    return number


def parse_hook(value: object) -> str:
    """Read hook names and patterns, as text with commas or as a list; return them with commas, without repeats."""
    return ",".join(listed(lambda item: str(item).strip())(value))


def parse_arch(value: object) -> str:
    return choose(value, ARCHITECTURES, "an architecture")


def parse_preset(value: object) -> str:
    return choose(value, EVAL_PRESETS, "a preset")


def parse_contexts(value: object) -> int | str:
    """Read how many contexts the eval's words share, or 'each'; raise ValueError otherwise."""
    text = str(value).strip().lower()
    if text == EACH:
        return EACH
    try:
        return parse_count(text)
    except ValueError:
        raise ValueError(
            f"{value!r} is no number of contexts: give a positive whole number such as 64, or each"
        ) from None


def parse_outlier_norm(value: object) -> float | str:
    """Read a multiple of the median norm, or 'none'; raise ValueError otherwise."""
    text = str(value).strip().lower()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if text != NONE and not 1 < number < math.inf:
        raise ValueError(f"{value!r} is no multiple of the median norm: give a number above 1 such as 10, or none")
    return NONE if text == NONE else number


def choose(value: object, names: Iterable[str], kind: str) -> str:
    """Read one of some names; raise ValueError that says which is near otherwise."""
    text, names = str(value).strip().lower(), list(names)
    if text not in names:
        near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{value!r} is not {kind}{hint}: choose from {', '.join(names)}")
    return text


def parse_share(value: object) -> float:
    """Read a share of a whole: .25 or 1/4, above 0 and at most 1; raise ValueError otherwise."""
    try:
        share = float(Fraction(str(value).strip()))
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"{value!r} is not a share: give a number above 0 and at most 1, such as 1/4 or .25")
    return share


def parse_name(value: object) -> str:
    """Read the name of a folder: no path, not only dots, at most 200 bytes; raise ValueError otherwise."""
    text = str(value)
    if not re.fullmatch(r"[\w.+-]+", text) or not text.strip(".") or len(text.encode()) > 200:
        raise ValueError(f"{text[:60]!r} is not a name: give letters, digits, '_', '.', '+' and '-', at most 200 bytes")
    return text


def parse_seed(value: object) -> int:
    text = str(value).strip()
    if not re.fullmatch(r"\d+", text) or int(text) > LARGEST_SEED:
        raise ValueError(f"{value!r} is not a seed: give a whole number from 0 to {LARGEST_SEED}")
    return int(text)


def plain(value: Any) -> Any:
    """Text, a number, or a list of such, of what people hold: paths, ranges, tuples, arrays and their numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # of numpy, torch and pandas
        value = value.tolist()
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | Real):
        return value
    raise ValueError(f"text, numbers and lists of them are taken, not a {type(value).__name__}")


def listed(parse: Callable[[object], Any]) -> Callable[[object], tuple]:
    """Make a reader that turns '1k,4k', ['1k', 4096] or a lone value into a tuple without repeats."""

    def read(value: object) -> tuple:
        items = value.split(",") if isinstance(value, str) else value
        items = items if isinstance(items, list | tuple) else [items]
        parsed = [parse(item) for item in items if str(item).strip() != ""]
        if not parsed:
            raise ValueError("the list is empty: give at least one value")
        return tuple(dict.fromkeys(parsed))

    return read


def strings(value: object) -> tuple:
    return tuple(str(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
