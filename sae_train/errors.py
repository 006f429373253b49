"""Mistakes a user can mend: the one exception for them, which the command line prints as a sentence and answers with
exit code 2, and the sentences for wrong settings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Say in one sentence what was wrong, what is allowed, and how to mend it."""


@contextmanager
def explaining(sentence: Callable[[Any], str], *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a library raises into a UserError with `sentence(error)`; a UserError passes as it is.

    Without `kinds` every exception counts: some libraries' errors share no base.
    """
    kinds = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(sentence(error)) from error


def first_line(error: Exception, silent: str = "") -> str:
    """The first line of what an error says, at most 300 characters of it; `silent`, or its type, if that is nothing."""
    return str(error).strip().split("\n")[0][:300] or silent or type(error).__name__


def unknown_setting(key: str, known: Iterable[str]) -> str:
    """Say that a setting does not exist, and which one is near."""
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    return f"unknown setting {key!r}" + (f": did you mean {near[0]!r}?" if near else ": see sae-train --help")


def sentences_of(item: Any) -> list[str]:
    """Turn one pydantic error into sentences without its URLs and jargon."""
    message = re.sub(r"^Value error, ", "", item["msg"])
    if len(item["loc"]) < 2:
        return message.split("\n")
    name = item["loc"][1]
    return [
        message if item["type"] == "value_error" else f"{name} {item['input']!r}: {message[:1].lower()}{message[1:]}"
    ]


def fault_of(error: Any) -> str:
    """The first of a pydantic error's faults: the value's place in the file, the value, and what it should be."""
    first, *_ = error.errors(include_url=False)
    place = ".".join(map(str, first["loc"])) or "its content"
    value = repr(first["input"])
    shown = value if len(value) <= 80 else f"{value[:77]}…"
    message = re.sub(r"^Value error, ", "", first["msg"])
    return f"{place} {shown}: {message[:1].lower()}{message[1:]}"
