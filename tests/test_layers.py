"""Data flows one way: a module imports only from rows above its own, and heavy packages enter through known doors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sae_train"

ROWS = [
    {"errors", "units", "ranks", "allocator"},
    {"config"},
    {"kernels"},
    {"forms"},
    {"sae", "losses", "l0", "metrics"},
    {"architectures"},
    {"schedule", "recording"},
    {"learner"},
    {"hub", "hub_repo", "hooks", "tensor_files"},
    {"documents", "tokens", "activations"},
    {"buffer", "toy"},
    {"evals"},
    {"readers", "curves"},
    {"checkpoint", "run_log", "wandb_mirror"},
    {"activation_cache", "passes"},
    {"trainer"},
    {"callbacks"},
    {"display", "plan", "session", "summary", "card", "report"},
    {"finisher"},
    {"runner", "reproduce", "publish_card"},
    {"run", "publish"},
    {"cli"},
    {"__main__"},
    {"speller", "bench", "settings_page"},
]
DOORS = {
    "triton": {"kernels"},
    "transformer_lens": {"hooks"},
    "datasets": {"documents", "tokens"},
    "accelerate": {"trainer"},
    "wandb": {"wandb_mirror"},
    "safetensors": {"checkpoint", "evals", "speller", "tensor_files"},
    "huggingface_hub": {"hub", "hub_repo"},
    "matplotlib": {"curves", "report", "speller"},
    "plotly": {"report"},
}


def modules() -> dict[Path, str]:
    """Source files with the name of their row: a module's own name, or its package's.

    The kernels' benchmark is a program beside the kernels that times the learner above them: a row of its own.
    """
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("report/*.py"), *PACKAGE.glob("architectures/*.py")]
    files += [*PACKAGE.glob("speller/*.py")]
    files += [*(ROOT / "evals").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    named = {}
    for file in files:
        parts = file.relative_to(PACKAGE if PACKAGE in file.parents else ROOT).parts
        is_bench = parts[0] == "kernels" and file.name.startswith("bench")
        named[file] = "bench" if is_bench else parts[0].removesuffix(".py")
    return {file: name for file, name in named.items() if name != "__init__"}


def imports(file: Path) -> set[str]:
    """Dotted names imported at run time anywhere in a file (imports for type checking only are left out)."""
    found = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= set(node.body)
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def row_of(name: str) -> int:
    return next(i for i, row in enumerate(ROWS) if name in row)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_from_rows_above_its_own(file):
    own = modules()[file]
    for name in imports(file):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if rest.startswith("kernels.bench"):
            other = "bench"
        is_module = other == "bench" or (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()
        if package == "sae_train" and rest and other != own and is_module:
            assert row_of(other) <= row_of(own), f"{own} imports {other}"


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_package_enters_through_its_door(package):
    users = {name for file, name in modules().items() if any(i.split(".")[0] == package for i in imports(file))}
    assert users <= DOORS[package]


@pytest.mark.parametrize("folder", ["kernels", "evals"])
def test_root_folders_are_no_packages(folder):
    """An __init__.py in a root `kernels/` shadows the hub's `kernels` package and breaks `import transformers`."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert (PACKAGE / folder).is_symlink()
    assert not (PACKAGE / folder).readlink().is_absolute()
