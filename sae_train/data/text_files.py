"""Texts of local files: which files of a folder are data, which of those are apart from training, and what they hold.

A file's format is told by its content. Only a row's text is kept: other columns may be of any type, come and go.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sae_train.errors import UserError, explaining, first_line

SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")  # also with .gz after them
PARQUET, GZIP = b"PAR1", b"\x1f\x8b"
ROWS_LOOKED_AT = 1000  # of a JSON file, for one that has the text's column
ROWS_AT_A_TIME = 16  # of a parquet file: few enough to be whole books
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test",
          "evaluation": "test"}  # fmt: skip


@dataclass(frozen=True)
class TextFile:
    """A file with texts in it, one a row, or one a line where it is plain text."""

    path: Path
    name: str
    """its path in the data set's folder"""
    kind: str
    """parquet, json or text"""

    @classmethod
    def find(cls, path: Path, root: Path) -> TextFile:
        """Tell a file's kind by its first bytes, and JSON from plain text by its name."""
        with path.open("rb") as stream:
            kind = "parquet" if stream.read(len(PARQUET)) == PARQUET else _kind_named(path)
        return cls(path, path.relative_to(root).as_posix(), kind)

    def columns(self, column: str) -> set[str] | None:
        """Return the names of its columns, None where it has no rows; what needs no name counts as `column`.

        That is the lines of plain text, and JSON strings that stand alone.
        """
        if self.path.stat().st_size == 0:
            return None
        if self.kind == "parquet":
            with _open_parquet(self.path) as file:
                return set(file.schema_arrow.names) if file.metadata.num_rows else None
        if self.kind == "text":
            with _open_text(self.path) as stream:
                return {column} if any(line.strip() for line in stream) else None
        names: set[str] | None = None
        for row in islice(_json_rows(self.path), ROWS_LOOKED_AT):
            if row is not None:
                own = row.keys() if isinstance(row, dict) else {column} if isinstance(row, str) else ()
                names = (names or set()).union(own)
            if names and column in names:
                break
        return names

    def texts(self, column: str, start: int = 0) -> Iterator[str | None]:
        """Yield the text of each row from number `start` on, None for a row without; ValueError for what is no text."""
        if self.kind == "text":
            with _open_text(self.path) as stream:
                yield from (line.rstrip("\n") for line in islice(stream, start, None))
            return
        if self.kind == "parquet":
            rows = _parquet_rows(self.path, column, start)
        else:
            rows = (_value(row, column) for row in islice(_json_rows(self.path), start, None))
        for number, text in enumerate(rows, start=start + 1):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"row {number}: the column {column!r} holds {type(text).__name__}, not text")
            yield text


@dataclass(frozen=True)
class TextFiles:
    """The files of a data set, in order, which can be opened at their start any number of times."""

    dataset: str
    column: str
    files: tuple[TextFile, ...]

    def open(self) -> Reader:
        """Return a reader at the start."""
        return Reader(self)


class Reader:
    """Reads on from a position, which is (file, row in it), as `Documents` asks."""

    def __init__(self, texts: TextFiles) -> None:
        self._texts = texts
        self._file = self._row = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; UserError for one that an earlier version wrote."""
        if state.keys() != {"file", "row"}:
            raise UserError(
                f"this position in {self._texts.dataset} was saved by an earlier version of sae-train, which read "
                "files in another way: start the run again."
            )
        self._file, self._row = state["file"], state["row"]

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str | None]]]:
        """Yield the next texts, `batch_size` at a time."""
        texts = self._read_on()
        while batch := list(islice(texts, batch_size)):
            yield {self._texts.column: batch}

    def _read_on(self) -> Iterator[str | None]:
        for file in self._texts.files[self._file :]:
            with reading(self._texts.dataset, file.name):
                for text in file.texts(self._texts.column, self._row):
                    self._row += 1
                    yield text
            self._file, self._row = self._file + 1, 0


def find_files(dataset: str, path: Path, column: str) -> tuple[TextFiles, TextFiles | None, tuple[str, ...]]:
    """Find the texts of a file, or of a folder's files of one kind in the order of their paths.

    Return those to train on, those that are apart where file names say validation or test, and a note on what is
    apart or not read. UserError where there is no text, or where it is not clear which files are data.
    """
    paths = data_files(path)
    if not paths:
        raise UserError(f"{dataset} holds no data: parquet, jsonl, json or txt files are read.")
    root, full, without = (path.parent if path.is_file() else path), [], {}
    for each in paths:
        with reading(dataset, each.relative_to(root).as_posix()):
            file = TextFile.find(each, root)
            columns = file.columns(column)
        if columns is not None:
            full.append(file)
            if column not in columns:
                without[file] = columns
    if not full:
        raise UserError(f"the dataset {dataset} is empty: give a file with text in it.")
    files = [file for file in full if file not in without]
    if not files:
        names = ", ".join(sorted(set().union(*without.values()))) or "none"
        raise UserError(f"the dataset {dataset} has no column {column!r}; its columns are {names}.")
    kinds = sorted({file.kind for file in files})
    if len(kinds) > 1:
        raise UserError(f"the folder {dataset} mixes {', '.join(kinds)} files; point to those of one kind.")
    train, apart = _divide(files)
    notes = [f"not read, as they have no column {column!r}: {_some(list(without))}"] if without else []
    notes += [f"held out, and not trained on, is the text of {_some(apart)}, as the names say"] if apart else []
    texts = TextFiles(dataset, column, tuple(train))
    return texts, TextFiles(dataset, column, tuple(apart)) if apart else None, tuple(notes)


def data_files(path: Path) -> list[Path]:
    """Return the file, or the files below a folder, in order, whose names are those of data; hidden ones are not."""
    if path.is_file():
        return [path] if _kind_named(path) else []
    shown = (file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts))
    return sorted(file for file in shown if file.is_file() and _kind_named(file))


def split_of(name: str) -> str | None:
    """Return "train", "validation" or "test" where the first or last word of a path's part says so, the outermost one.

    Shards' numbers are no words: `c4-validation.00000-of-00512.json.gz` says validation.
    """
    for part in name.lower().split("/"):
        plain = re.sub(rf"({'|'.join(map(re.escape, SUFFIXES))})?(\.gz)?$", "", part)
        words = re.findall(r"[^\W\d_]+", re.sub(r"\d+-of-\d+", "", plain))
        for word in (words[0], words[-1]) if words else ():
            if word in SPLITS:
                return SPLITS[word]
    return None


def _divide(files: list[TextFile]) -> tuple[list[TextFile], list[TextFile]]:
    """Put validation and test files apart, in this order; all are trained on where there are no others."""
    apart = [file for split in ("validation", "test") for file in files if split_of(file.name) == split]
    train = [file for file in files if split_of(file.name) not in ("validation", "test")]
    return (train, apart) if train else (files, [])


def reading(dataset: str, file: str) -> AbstractContextManager[None]:
    """Turn whatever readers raise for a bad file into one sentence; their errors share no base."""

    def explain(error: Exception) -> str:
        wrong_bytes = isinstance(error, UnicodeDecodeError)
        return f"cannot read the dataset {dataset}: {file}: {'no UTF-8 text' if wrong_bytes else first_line(error)}"

    return explaining(explain)


def _kind_named(path: Path) -> str:
    """The kind of data that a file's name says; nothing where it says none."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return {".parquet": "parquet", ".txt": "text"}.get(suffix, "json") if suffix in SUFFIXES else ""


def _open_text(path: Path) -> IO[str]:
    """Open a file of UTF-8 text, packed or not, with or without a mark of byte order."""
    with path.open("rb") as stream:
        packed = stream.read(len(GZIP)) == GZIP
    return io.TextIOWrapper(gzip.open(path) if packed else path.open("rb"), encoding="utf-8-sig")


def _open_parquet(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(path)


def _parquet_rows(path: Path, column: str, start: int) -> Iterator[Any]:
    """Yield a column's values from row number `start` on; row groups before it are not read."""
    with _open_parquet(path) as file:
        groups = list(range(file.metadata.num_row_groups))
        while groups and start >= (n := file.metadata.row_group(groups[0]).num_rows):
            start, groups = start - n, groups[1:]
        batches = file.iter_batches(ROWS_AT_A_TIME, groups, columns=[column])
        yield from islice((text for batch in batches for text in batch.column(column).to_pylist()), start, None)


def _json_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of JSON lines, None for a blank one, or those of one list or one object that is the whole file."""
    with _open_text(path) as stream:
        first = True
        for number, line in enumerate(stream, start=1):
            if first and (line.lstrip().startswith("[") or line.strip() == "{"):
                whole = json.loads(line + stream.read())
                yield from whole if isinstance(whole, list) else [whole]
                return
            first = first and not line.strip()
            try:
                yield json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error


def _value(row: Any, column: str) -> Any:
    """What a JSON row's column holds, or the row itself, without what UTF-8 cannot write: half of a surrogate pair."""
    text = row.get(column) if isinstance(row, dict) else row
    return text.encode(errors="ignore").decode() if isinstance(text, str) and not text.isascii() else text


def _some(files: list[TextFile]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{', '.join(file.name for file in files[:3])}{more}"
