"""Real English text that every machine has: the documentation strings of the packages that sae-train depends on.

Python files are parsed, never run, and only as far as documents are asked for: parsing all takes a minute or two.
"""

from __future__ import annotations

import ast
import re
import warnings
import zlib
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from sae_train.errors import UserError

LEAST_CHARACTERS = 200
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# plotly's are made by a program: a few sentences over and over, a sixth of all text.
LEFT_OUT = {"sae-train", "plotly"}


class InstalledDocs:
    """The strings of a fixed list of files, each string once; those of the files read so far stay in memory.

    Which string counts as a repetition depends on all files before its own, so a position is reached by reading them.
    """

    def __init__(self, files: list[Path], packages: dict[str, str]) -> None:
        self.packages = packages
        self.key = zlib.crc32(repr((sorted(packages.items()), len(files))).encode())
        self.n_files = len(files)
        self._files = files
        self._texts: list[list[str]] = []
        self._seen: set[str] = set()

    @classmethod
    def find(cls, package: str = "sae-train") -> InstalledDocs:
        """Find the Python files of what a package requires, directly or not, in an order that mixes the packages."""
        distributions = required_by(package)
        files = [file for each in distributions.values() for file in each.files or () if file.suffix == ".py"]
        files.sort(key=lambda file: (zlib.crc32(file.as_posix().encode()), file.as_posix()))
        versions = {name: each.version for name, each in distributions.items()}
        return cls([Path(file.locate()) for file in files], versions)

    def open(self) -> Reader:
        """Return a reader at the start."""
        return Reader(self)

    def texts(self, i: int) -> list[str]:
        """Return the strings of the i-th file that no file before it holds."""
        while len(self._texts) <= i:
            new = [text for text in dict.fromkeys(docstrings(self._files[len(self._texts)])) if text not in self._seen]
            self._seen.update(new)
            self._texts.append(new)
        return self._texts[i]


class Reader:
    """Reads on from a position, which is (file, string in it), as `Documents` asks."""

    def __init__(self, docs: InstalledDocs) -> None:
        self._docs = docs
        self._file = self._string = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position, and a key of the packages in which it means something."""
        return {"file": self._file, "string": self._string, "packages": self._docs.key}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; UserError where other versions of the packages are installed than when it was saved."""
        if state["packages"] != self._docs.key:
            raise UserError(
                "the installed packages are not those that this run read its text from: install the versions that "
                "run.json names under text_packages, or start anew."
            )
        self._file, self._string = state["file"], state["string"]

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
        """Yield the next strings, `batch_size` at a time."""
        texts = self._texts()
        while batch := list(islice(texts, batch_size)):
            yield {"text": batch}

    def _texts(self) -> Iterator[str]:
        while self._file < self._docs.n_files:
            texts = self._docs.texts(self._file)
            if self._string < len(texts):
                self._string += 1
                yield texts[self._string - 1]
            else:
                self._file, self._string = self._file + 1, 0


def required_by(package: str) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that a package requires, directly or not, without extras, by name."""
    found: dict[str, Any] = {}
    waiting = [package]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = None
            continue
        requirements = [line for line in found[name].requires or () if not re.search(r"\bextra\s*==", line)]
        waiting += [re.match(r"[\w.-]+", line)[0] for line in requirements]
    if found[next(iter(found))] is None:
        raise UserError(f"the packages that {package} requires are not known: install it with pip, or name a dataset.")
    return {name: found[name] for name in sorted(found) if found[name] and name not in LEFT_OUT}


def docstrings(file: Path) -> list[str]:
    """Return the documentation strings of a Python file that are long enough; none where it cannot be parsed."""
    try:
        source = file.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings with odd escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    # What UTF-8 cannot write, half of a surrogate pair, no tokenizer takes.
    texts = [text.encode(errors="ignore").decode() for text in texts]
    return [text for text in texts if len(text) >= LEAST_CHARACTERS]
