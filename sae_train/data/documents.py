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
from sae_train.errors import UserError, explaining, first_line

EMBEDDED_TEXT = EMBEDDED / "text"
INSTALLED_DOCS = "installed-docs"
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
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
            _local(name, EMBEDDED_TEXT / f"{split}.parquet", text_column) for split in ("train", "held_out")
        )
        return train, held_out
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path, text_column), None
    if name.startswith((".", "/", "~")) or path.suffix in READERS or not re.fullmatch(r"[\w./:-]+", name):
        raise UserError(
            f"there is no dataset {name!r}; give a parquet, jsonl, json or txt file, a folder of them, a hub "
            f"id, {INSTALLED_DOCS} or generated."
        )
    return _hub(name, text_column), None


def _local(name: str, path: Path, text_column: str) -> Documents:
    """A file, or a folder's files of one kind in the order of their paths; a line of a txt is a document."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if is_data(file, path))
    kinds = {READERS.get(file.suffix) for file in files}
    if not files or kinds == {None}:
        raise UserError(f"{name} holds no data: parquet, jsonl, json or txt files are read.")
    if len(kinds) > 1:
        raise UserError(
            f"the folder {name} mixes {', '.join(sorted(map(str, kinds)))} files; point to those of one kind."
        )
    (kind,) = kinds
    with _read_errors(name):
        files = [str(file) for file in files if not _is_empty(file)]
    if not files:
        raise UserError(f"the dataset {name} is empty: give a file with text in it.")
    return Documents(name, lambda: _load(kind, data_files=files), text_column)


def is_data(file: Path, root: Path) -> bool:
    """Tell whether a file below a folder holds text; what file managers leave there is hidden or of other kinds."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and file.suffix in READERS and not hidden


def _is_empty(file: Path) -> bool:
    """Tell whether a file has no rows; the readers fail on such files instead of skipping them."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return file.stat().st_size == 0 or parquet.read_metadata(file).num_rows == 0
    with file.open("rb") as stream:
        return not any(chunk.strip() for chunk in iter(lambda: stream.read(65536), b""))


def _hub(name: str, text_column: str) -> Documents:
    repo, _, configuration = name.partition(":")
    if trouble := hub_trouble(repo, "dataset"):
        raise UserError(
            f"cannot stream {name!r}: no file or folder of this name is here, and {trouble}; "
            f"give a local parquet, jsonl, json or txt file, {INSTALLED_DOCS} (documentation strings of the installed "
            "packages) or generated."
        )
    return Documents(name, lambda: _load(repo, configuration or None), text_column)


def _load(*where: Any, **files: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    # It logs a traceback's worth before it raises; what it raises is told in one sentence here.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(*where, split="train", streaming=True, **files)


def _read_errors(name: str) -> AbstractContextManager[None]:
    """Turn what the readers raise for bad data into one sentence."""
    kinds = (OSError, ValueError, StopIteration)
    return explaining(lambda error: f"cannot read the dataset {name}: {first_line(error, 'no rows')}", *kinds)
