"""Triton's interpreter without what it does again and again, which is half of its time.

A call of a device function puts the interpreter's functions in the place of the language's, although the launch that it
is part of, or a call before it, has put them there.
"""

from __future__ import annotations

from types import FunctionType

from triton import language
from triton.runtime import interpreter

MODULES = language, language.core
put = interpreter._patch_lang
there: set[int] = set()
"""the modules that have the interpreter's functions, until a launch ends and takes them back"""


class Scope(interpreter._LangPatchScope):
    def restore(self) -> None:
        super().restore()
        there.clear()


def put_once(function: FunctionType) -> Scope:
    """Do what `_patch_lang` does, for modules that do not have it yet."""
    scope, used = Scope(), {id(value) for value in function.__globals__.values() if any(value is m for m in MODULES)}
    if not used <= there:
        there.update(used)
        scope._changes = put(function)._changes
    return scope


def quicken() -> None:
    interpreter._patch_lang = put_once
