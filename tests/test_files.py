"""Files are whole at any moment, whichever module writes them; a library's error becomes a sentence."""

import ast
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from sae_train.errors import UserError, explaining, first_line
from sae_train.files import (
    read_json,
    read_lines,
    read_metrics,
    whole,
    write_json,
    write_lines,
    write_parquet,
    write_text,
)
from sae_train.publishing.curves import write_curves
from sae_train.report import _write as write_page
from sae_train.report.export import _csv as write_csv
from sae_train.sae.files import save_sae, save_state
from sae_train.sae.model import SAE, SAEConfig
from sae_train.sae.tensor_files import write_tensors

ROOT = Path(__file__).resolve().parents[1]
WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "lines": lambda path: write_lines(path, [{"new": 1}]),
    "parquet": lambda path: write_parquet(path, pd.DataFrame({"new": [1]})),
    "tensors": lambda path: write_tensors({"new": torch.ones(3)}, path),
    "curves": lambda path: write_curves([{"sae": "a", "tokens": 1, "metrics/explained_variance": 0.5}], path),
    "csv": lambda path: write_csv(path, ["new"], [[1]]),
    "page": lambda path: write_page(path, "new"),
    "sae": lambda path: save_sae(SAE(SAEConfig("relu", 2, 4)), path.parent),
    "state": lambda path: save_state(path.parent, {"new": torch.ones(3)}),
}
NAMES = {"sae": "sae_weights.safetensors", "state": "state.safetensors"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(kind, tmp_path, monkeypatch):
    path = tmp_path / NAMES.get(kind, "file")
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises((OSError, UserError), match="No space left"):
            WRITERS[kind](path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    WRITERS[kind](path)
    assert path.read_bytes() != b"old" and not list(tmp_path.glob(".*"))
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_writer_that_raises_midway_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "new" / "file"
    for old in (None, "old"):
        if old:
            write_text(path, old)
        with pytest.raises(ZeroDivisionError), whole(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
        assert [file.read_text() for file in path.parent.iterdir()] == ([old] if old else [])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_writing_leaves_the_umask_of_the_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads write with it meanwhile"))
    write_text(tmp_path / "a", "new")
    write_tensors({"new": torch.ones(3)}, tmp_path / "b")


def test_every_file_of_the_package_is_written_through_whole():
    """A call that writes takes a path that `whole` gave."""
    writes = {"write_text", "write_bytes", "savefig", "save_file", "to_parquet", "to_csv"}
    given = re.compile(r"\btemporary\b")
    for file in [*(ROOT / "sae_train").rglob("*.py"), *(ROOT / "evals").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            own = isinstance(node.func, ast.Name) and name in ("write_text", "write_bytes")
            to_memory = name == "savefig" and "format" in ast.unparse(node) and "(out," in ast.unparse(node)
            to_memory = to_memory or (name == "to_csv" and not node.args)
            if name in writes and not own and not to_memory:
                assert given.search(ast.unparse(node)), f"{file.name}: {ast.unparse(node)}"


def test_rows_that_a_kill_cut_off_are_left_out_and_counted(tmp_path):
    assert read_metrics(tmp_path) == []
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 1, "text": "a\u2028b"}, {"step": 2, "value": float("nan")}])
    with path.open("ab") as file:
        file.write(b'[1]\n\n{"step": 3, "te\xc3')
    rows = [{"step": 1, "text": "a\u2028b"}, {"step": 2, "value": None}]
    assert read_metrics(tmp_path) == rows and read_lines(path) == (rows, 2)


def test_json_that_is_absent_or_none_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(tmp_path / "run.json")


def test_errors_are_explained_by_kind_and_a_users_mistake_passes():
    explained = explaining(lambda error: f"it failed: {first_line(error)}", ValueError)
    with pytest.raises(UserError, match=r"^it failed: two lines$") as caught, explained:
        raise ValueError("two lines\nof them")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(KeyError), explaining(str, ValueError):
        raise KeyError
    with pytest.raises(UserError, match="as it is"), explaining(lambda _: "another"):
        raise UserError("as it is")
    assert first_line(StopIteration()) == "StopIteration"
