"""Test files stand alone: what several need is in tests/support or conftest.py, once."""

from __future__ import annotations

import ast
from pathlib import Path

import support

TESTS = Path(__file__).resolve().parents[1]
SUPPORT = TESTS / "support"


def imported(file: Path) -> set[str]:
    """First names of the modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def functions(file: Path) -> set[str]:
    """Functions and classes at a file's first level."""
    return {node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")}


def test_no_test_file_is_imported_by_another():
    names = {file.stem for file in TESTS.rglob("test_*.py")} | {"conftest"}
    assert {file.name: found for file in TESTS.rglob("*.py") if (found := imported(file) & names)} == {}


def test_names_of_test_files_are_unique():
    names = [file.name for file in TESTS.rglob("test_*.py")]
    assert len(set(names)) == len(names)


def test_what_support_has_is_written_nowhere_else():
    shared = set().union(*(functions(SUPPORT / f"{name}.py") for name in ("compare", "training", "zoo/small")))
    own = {"batches", "train", "resident"}  # of models, shapes or devices of a file's own
    again = {file.name: both for file in TESTS.rglob("test_*.py") if (both := functions(file) & shared - own)}
    assert again == {}


def test_support_says_what_is_in_it():
    modules = {path.stem for path in SUPPORT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    listed = {line.split()[0] for line in (support.__doc__ or "").splitlines() if "   " in line}
    assert modules - {"__init__", "ptx_to_c"} == listed - {"*.c"}
