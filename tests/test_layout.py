"""Does data flow one way? Packages import from those before them only, and all of them are installed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "hf_subquad"

DATA = ("errors", "atomic_files", "logs", "config", "plan")
ORDER = (*DATA, "ops", "weights", "index", "layers", "head", "patching", "planning", "training", "cli")
BESIDE = {"theory": {"errors"}}  # what it may import; nothing imports it


def imports(path: Path, library: Path) -> Iterator[tuple[int, str]]:
    """Line and first name below the library of everything of the library's that a file imports; '' is its root."""
    package = [library.name, *path.relative_to(library).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == library.name:
                name = target[1] if len(target) > 1 else ""
                known = (library / name).is_dir() or (library / f"{name}.py").is_file()
                yield node.lineno, name if known else ""


def violations(library: Path) -> list[str]:
    """Imports against the order, and files that have no place in it."""
    found = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        own = parts[0]
        if own == "__init__":  # the public names, from everywhere
            continue
        if own not in ORDER and own not in BESIDE:
            found.append(f"{path.relative_to(library)}: {own} has no place in the order")
            continue
        for line, name in imports(path, library):
            if not may_import(own, name):
                found.append(f"{path.relative_to(library)}:{line}: {own} imports {name or 'the library itself'}")
    return found


def may_import(own: str, name: str) -> bool:
    if own == name:
        return True
    if own in BESIDE:
        return name in BESIDE[own]
    return name in ORDER and ORDER.index(name) < ORDER.index(own)


def test_packages_import_from_those_before_them() -> None:
    assert not violations(LIBRARY)


def test_every_package_of_the_order_exists_and_is_seen() -> None:
    """Else the test above would pass on nothing."""
    for name in (*ORDER, *BESIDE):
        assert (LIBRARY / name).is_dir() or (LIBRARY / f"{name}.py").is_file(), name
    seen = {name for path in LIBRARY.rglob("*.py") for _, name in imports(path, LIBRARY)}
    assert {*DATA, "ops", "weights", "index", "layers", "head", "patching", "planning", "training"} <= seen


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/mlp_products.py", "from ..layers.budget import Budget"),
        ("ops/backends/__init__.py", "from ...index import sketch"),
        ("layers/shared_state.py", "import hf_subquad.planning.make_plan"),
        ("planning/make_plan.py", "def late():\n    from ..training import sync_model"),
        ("head/patch_head.py", "from ..patching.patch import patch_model"),
        ("theory/network.py", "from .. import config"),
        ("index/sketch.py", "from .. import SubquadConfig"),
        ("helpers/lists.py", "import math"),
    ],
)
def test_an_import_against_the_order_is_found(file: str, line: str, tmp_path: Path) -> None:
    library = tmp_path / "hf_subquad"
    for name in (*ORDER, *BESIDE):
        (library / name).mkdir(parents=True)
    path = library / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from ..errors import SubquadError\n", encoding="utf-8")
    if path.parent.name != "helpers":
        assert not violations(library)
    path.write_text(f"{line}\n", encoding="utf-8")
    assert len(violations(library)) == 1


def folders() -> list[str]:
    """The library's package folders, by dotted name."""
    return [".".join(path.parent.relative_to(ROOT).parts) for path in LIBRARY.rglob("__init__.py")]


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = ast.literal_eval("[" + text.partition("packages = [")[2].partition("]")[0] + "]")
    assert sorted(listed) == sorted(folders())
    assert "hf_subquad.head" in listed
    without = {path.parent for path in LIBRARY.rglob("*.py")} - {path.parent for path in LIBRARY.rglob("__init__.py")}
    assert not without, "folders without __init__.py are not packages"


def test_contributors_find_every_package() -> None:
    """CONTRIBUTING.md lists packages in the order of the imports."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [text.find(f"`{name}/`") for name in ORDER if (LIBRARY / name).is_dir()]
    assert -1 not in places and places == sorted(places)
    assert all(f"`{name}/`" in text for name in BESIDE)
