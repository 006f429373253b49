"""Mistakes a user can mend: the one exception for them, which the command line prints as a sentence and answers with
exit code 2, and the sentences for wrong settings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Say in one sentence what was wrong, what is allowed, and how to mend it."""


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
