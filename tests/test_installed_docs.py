"""Documentation strings of installed packages: parsed and never run, each once, in one order, resumable anywhere."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer

from sae_train.data import documents
from sae_train.data.documents import Documents, find_documents
from sae_train.data.installed_docs import LEAST_CHARACTERS, InstalledDocs, required_by
from sae_train.data.tokens import Packer, TokenStream
from sae_train.errors import UserError

PACKAGES = {"made-up": "1.0"}


def words(start: int, n: int = 60) -> str:
    return " ".join(f"w{(start + i) % 60}" for i in range(n))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Ten files of a module's, a class's and a method's string, and some that have none."""
    for i in range(10):
        source = (
            f'"""{words(i)}"""\nclass A:\n    """{words(i, 80)}"""\n    async def f(self):\n        """{words(7)}"""\n'
        )
        (tmp_path / f"{i}.py").write_text(f"{source}raise SystemExit('a file is parsed, not run')\n")
    (tmp_path / "3.py").write_text('def broken(:\n    """' + words(3) + '"""')
    (tmp_path / "4.py").write_text('"""Too short."""\n' + f'x = """{words(4)}"""')
    (tmp_path / "5.py").write_bytes(b'"""\xff' + words(5).encode() + b'"""')
    (tmp_path / "6.py").write_text(f'"""\\ud800{words(6, 90)} \\d"""')
    return [tmp_path / f"{i}.py" for i in [*range(10), 99]]


def read(docs: InstalledDocs, state: dict | None = None) -> list[str]:
    return [text for part in Documents("docs", docs.open, "text").reads(state) for _, text in part]


def test_each_long_string_comes_once_in_the_order_of_the_files(files: list[Path]) -> None:
    expected = [words(0), words(0, 80), words(7), words(1), words(1, 80), words(2), words(2, 80), words(6, 90) + " \\d",
                words(7, 80), words(8), words(8, 80), words(9), words(9, 80)]  # fmt: skip
    docs = InstalledDocs(files, PACKAGES)
    assert read(docs) == read(docs) == read(InstalledDocs(files, PACKAGES)) == expected


def test_reading_goes_on_at_every_position(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "DOCUMENTS_AT_A_TIME", 2)
    (whole,) = Documents("docs", InstalledDocs(files, PACKAGES).open, "text").reads()
    assert len(whole) == 13
    for i, (place, _) in enumerate(whole):
        (again,) = Documents("docs", InstalledDocs(files, PACKAGES).open, "text").reads(place)
        assert again == whole[i:]


def test_tokens_resume_bit_equally(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "DOCUMENTS_AT_A_TIME", 3)
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 1_000)

    def stream() -> TokenStream:
        docs = Documents("docs", InstalledDocs(files, PACKAGES).open, "text", PACKAGES)
        return TokenStream(docs, Packer(tiny_tokenizer(), 16, 0), 2, torch.zeros(0, 16, dtype=torch.long), 0)

    one = stream()
    states, batches = zip(*((one.state_dict(), next(one)) for _ in range(90)), strict=True)
    assert one.epoch >= 2 and one.packages == PACKAGES
    for i in range(0, 87, 7):
        resumed = stream()
        resumed.load_state_dict(states[i])
        assert all(torch.equal(next(resumed), batch) for batch in batches[i : i + 3])


def test_files_are_read_as_far_as_strings_are_asked_for(files: list[Path]) -> None:
    docs = InstalledDocs(files, PACKAGES)
    next(docs.open().iter(3))
    assert len(docs._texts) == 1


def test_other_versions_of_the_packages_are_refused_on_resume(files: list[Path]) -> None:
    state = {"reader": InstalledDocs(files, PACKAGES).open().state_dict(), "skip": 0}
    with pytest.raises(UserError, match="text_packages"):
        read(InstalledDocs(files, {"made-up": "1.1"}), state)


def test_the_environments_own_packages_are_found_in_the_same_order_twice() -> None:
    firsts = []
    for _ in range(2):
        docs, apart = find_documents("installed-docs")
        assert apart is None and docs.packages["torch"].startswith("2.")
        assert not docs.packages.keys() & {"sae-train", "plotly"}
        firsts.append([text for _, text in next(docs.reads(characters=50_000))])
    assert firsts[0] == firsts[1] and len(set(firsts[0])) == len(firsts[0]) > 50
    assert min(map(len, firsts[0])) >= LEAST_CHARACTERS


def test_requirements_are_followed_without_extras() -> None:
    found = required_by("sae-train")
    assert {"torch", "transformers", "tqdm"} <= found.keys()  # the last by way of others
    assert "pytest" not in found
    with pytest.raises(UserError, match="install it with pip"):
        required_by("a-package-that-is-not-installed")
