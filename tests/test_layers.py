"""Data flows one way: a package imports only from those before it, and heavy packages enter through known doors."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sae_train"

ORDER = [
    {"errors"},
    {"files", "interrupts", "protocols"},
    {"config"},
    {"kernels"},
    {"sae"},
    {"evals"},
    {"data"},
    {"training"},
    {"report"},
    {"publishing"},
    {"runs"},
    {"cli"},
    {"__main__", "speller"},
]
DOORS = {
    "triton": {"kernels"},
    "transformer_lens": {"data/hooks.py", "runs/suite_bridge.py"},  # the bridge runs in another environment
    "datasets": {"data/documents.py", "runs/suite_bridge.py"},
    "accelerate": {"training/ranks.py"},
    "wandb": {"runs/wandb_mirror.py"},
    "safetensors": {"sae/files.py", "sae/tensor_files.py", "evals/asset_cache.py", "speller"},
    "huggingface_hub": {"data/pretrained.py", "sae/fetch.py", "publishing/hub.py"},
    "matplotlib": {"report", "speller"},
    "jinja2": {"report/render.py"},
}


def modules() -> dict[Path, str]:
    """Source files of the package with their place in it, such as runs/plan.py."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "evals").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    named = {file: file.relative_to(PACKAGE if PACKAGE in file.parents else ROOT).as_posix() for file in files}
    return {file: name for file, name in named.items() if name != "__init__.py"}


def package_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@functools.cache
def imports(file: Path) -> set[str]:
    """Dotted names imported at run time anywhere in a file (imports for type checking only are left out)."""
    names = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= set(node.body)
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place_of(package: str) -> int:
    return next(i for i, names in enumerate(ORDER) if package in names)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_package_imports_only_from_those_before_it(file):
    own = package_of(modules()[file])
    for name in imports(file):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        is_module = (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()
        if root == "sae_train" and rest and other != own and is_module:
            assert place_of(other) < place_of(own), f"{own} imports {other}"


def test_no_two_modules_import_each_other():
    """Circles within a package as well; what is imported inside a function counts."""
    dotted = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f, name in modules().items()}
    needs = {
        name: {other for i in imports(file) for other in dotted if f"{i}.".startswith(f"sae_train.{other}.")} - {name}
        for name, file in dotted.items()
    }
    packages = {name for name in dotted if any(other.startswith(f"{name}.") for other in dotted)}
    needs = {name: others - packages for name, others in needs.items() if name not in packages}
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert not needs


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_package_enters_through_its_doors(package):
    users = {name for file, name in modules().items() if any(i.split(".")[0] == package for i in imports(file))}
    assert all(name in DOORS[package] or package_of(name) in DOORS[package] for name in users), users


def test_the_kernels_are_used_through_ops_alone():
    """Outside kernels/ and benchmarks/; tests import what they like."""
    used = {name for file, at in modules().items() if package_of(at) != "kernels" for name in imports(file)}
    used = {name for name in used if f"{name}.".startswith("sae_train.kernels.")}
    assert used and all(f"{name}.".startswith("sae_train.kernels.ops.") for name in used), used


def test_the_root_holds_packages_and_few_modules():
    there = {path.name for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__"))}
    modules = {name for name in there if name.endswith(".py")}
    assert len(modules) <= 7
    assert there - modules == {
        "config", "data", "sae", "training", "runs", "publishing", "report", "speller",
        "evals", "kernels", "configs", "embedded",
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["kernels", "evals"])
def test_root_folders_are_no_packages(folder):
    """An __init__.py in a root `kernels/` shadows the hub's `kernels` package and breaks `import transformers`."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert (PACKAGE / folder).is_symlink()
    assert not (PACKAGE / folder).readlink().is_absolute()
