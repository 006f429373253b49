"""Where text comes from, by a dataset's name: what is embedded or installed here, local files, the hub.

Documents are its texts in order, some characters' worth at a time, which can be entered again at any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_train.data.installed_docs import InstalledDocs
from sae_train.data.pretrained import EMBEDDED, hub_trouble
from sae_train.data.text_files import SUFFIXES, find_files
from sae_train.errors import UserError, explaining, first_line

EMBEDDED_TEXT = EMBEDDED / "text"
INSTALLED_DOCS = "installed-docs"
CHARACTERS_PER_READ = 500_000
DOCUMENTS_AT_A_TIME = 16  # that a reader gives: few enough to be whole books


@dataclass(frozen=True)
class Documents:
    """A dataset that can be opened at its start any number of times."""

    name: str
    open: Callable[[], Any]
    text_column: str
    packages: dict[str, str] | None = None
    """versions of the packages that the texts are from, where they are"""
    notes: tuple[str, ...] = ()
    """for a person: which files are apart, or not read"""

    def reads(
        self, start: dict[str, Any] | None = None, characters: int | None = None
    ) -> Iterator[list[tuple[dict[str, Any], str]]]:
        """Yield the next texts, each with its place, as few at a time as have so many characters (CHARACTERS_PER_READ).

        They begin at the first text, or at the one whose place is `start`.
        """
        read, size = [], 0
        for place, text in self._places(start):
            read.append((place, text))
            size += len(text)
            if size >= (characters or CHARACTERS_PER_READ):
                yield read
                read, size = [], 0
        if read:
            yield read

    def _places(self, start: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield every text with its place: a state of the reader, and how many texts after it this one comes."""
        with _read_errors(self.name):
            dataset = self.open()
            if start is not None:
                dataset.load_state_dict(start["reader"])
            reader, skip = (start["reader"], start["skip"]) if start else (dataset.state_dict(), 0)
            batches = dataset.iter(batch_size=DOCUMENTS_AT_A_TIME)
        while True:
            with _read_errors(self.name):
                batch = next(batches, None)
            if batch is None:
                return
            texts = self._texts(batch)
            for i, text in enumerate(texts[skip:], start=skip):
                yield {"reader": reader, "skip": i}, text
            reader, skip = dataset.state_dict(), max(0, skip - len(texts))

    def _texts(self, batch: dict[str, list]) -> list[str]:
        if self.text_column not in batch:
            raise UserError(
                f"the dataset {self.name} has no column {self.text_column!r}; its columns are "
                f"{', '.join(sorted(batch))}."
            )
        texts = batch[self.text_column]
        wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
        if wrong is not None:
            raise UserError(f"the column {self.text_column!r} of {self.name} holds {type(wrong).__name__}, not text.")
        return [text or "" for text in texts]


def find_documents(name: str, text_column: str = "text") -> tuple[Documents, Documents | None]:
    """Find a dataset: (its documents, its own held-out documents if it brings any).

    A path that exists wins, but for "generated", the embedded text, and "installed-docs", the documentation strings of
    installed packages; anything else is a hub id, `owner/name` or `owner/name:configuration`, of which the train split
    is streamed.
    """
    if name == INSTALLED_DOCS:
        docs = InstalledDocs.find()
        return Documents(name, docs.open, "text", docs.packages), None
    if name == "generated":
        train, held_out = (
            _local(name, EMBEDDED_TEXT / f"{split}.parquet", text_column)[0] for split in ("train", "held_out")
        )
        return train, held_out
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path, text_column)
    if name.startswith((".", "/", "~")) or path.suffix in (*SUFFIXES, ".gz") or not re.fullmatch(r"[\w./:-]+", name):
        raise UserError(
            f"there is no dataset {name!r}; give a parquet, jsonl, json or txt file, a folder of them, a hub "
            f"id, {INSTALLED_DOCS} or generated."
        )
    return _hub(name, text_column), None


def _local(name: str, path: Path, text_column: str) -> tuple[Documents, Documents | None]:
    train, apart, notes = find_files(name, path, text_column)
    held_out = Documents(name, apart.open, text_column) if apart else None
    return Documents(name, train.open, text_column, notes=notes), held_out


def _hub(name: str, text_column: str) -> Documents:
    repo, _, configuration = name.partition(":")
    if trouble := hub_trouble(repo, "dataset"):
        raise UserError(
            f"cannot stream {name!r}: no file or folder of this name is here, and {trouble}; "
            f"give a local parquet, jsonl, json or txt file, {INSTALLED_DOCS} (documentation strings of the installed "
            "packages) or generated."
        )
    return Documents(name, lambda: _load(repo, configuration or None), text_column)


def _load(*where: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    # It logs a traceback's worth before it raises; what it raises is told in one sentence here.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(*where, split="train", streaming=True)


def _read_errors(name: str) -> AbstractContextManager[None]:
    """Turn whatever the readers raise for bad data, or for a lost connection, into one sentence.

    The errors of datasets, pyarrow, the hub's client and the decompressors share no base.
    """
    return explaining(lambda error: f"cannot read the dataset {name}: {first_line(error, 'no rows')}")
