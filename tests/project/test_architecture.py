"""docs/architecture.md lists every package and module once; all imports, wherever they are, go up that list."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "zo_offload"

LAZY = ("__init__", "__main__", "cli")
"""These load others when they are first asked for, so that a command starts at once."""

LONG = {
    "engine": "the facade: every call of a user with what it promises, most of it docstrings",
}
"""Modules over 400 lines, and why."""


def modules() -> dict[str, Path]:
    """Dotted name -> file; a package by its own name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


def packages() -> dict[str, list[str]]:
    """Package, or module at the first level -> its modules, in the page's order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    part = text.split("## Packages")[1].split("\n## ")[0].replace("\\_", "_")
    rows = re.findall(r"^- \*\*(\w+)\*\* \([^)]*\)(?::((?:.|\n  )*))?$", part, re.MULTILINE)
    return {name: re.findall(r"\w+", names) for name, names in rows}


def imports(everywhere: bool = True) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports; everywhere: in functions and for type checkers too."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, file in known.items():
        inside = file.name == "__init__.py" and name != "__init__"
        parts = name.split(".") if inside else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())) if everywhere else ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            path = node.module.split(".") if node.module else []
            if node.level:
                base = parts[: len(parts) - node.level + 1] + path
            elif path[:1] == ["zo_offload"]:
                base = path[1:]
            else:
                continue
            for alias in node.names:
                full = ".".join([*base, alias.name])
                found[name].add(full if full in known else ".".join(base) or "__init__")
        found[name].discard(name)
    return found


def test_the_page_lists_every_package_and_module_once():
    found = {name for name in modules() if "." not in name and name != "__init__"}
    assert set(packages()) == found
    for name, listed in packages().items():
        assert sorted(listed) == sorted(m.split(".")[1] for m in modules() if m.startswith(f"{name}.")), name


def test_a_newcomer_can_read_the_first_level():
    assert len(packages()) <= 24
    assert max(name.count(".") for name in modules()) == 1, "two levels, never three"


def test_imports_go_up_the_list_only():
    place = {name: i for i, name in enumerate(packages())}
    wrong = [
        f"{a} -> {b}"
        for a, found in imports().items()
        for b in found
        if "__init__" not in (a, b) and place[b.split(".")[0]] > place[a.split(".")[0]]
    ]
    assert not wrong


def test_no_two_modules_need_each_other():
    TopologicalSorter({name: found for name, found in imports().items() if name != "__init__"}).prepare()


def test_no_import_hides_in_a_function_or_behind_a_type_check():
    seen = imports(everywhere=False)
    hidden = {f"{a} -> {b}" for a, found in imports().items() for b in found - seen[a] if not a.startswith(LAZY)}
    assert not hidden


def test_modules_are_of_a_size_to_be_read():
    long = {name for name, file in modules().items() if len(file.read_text().splitlines()) > 400}
    assert long == set(LONG)


def test_one_module_imports_transformers():
    """Most of what a new release of it breaks is then in one list."""
    found = set()
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name for imported in names if imported.split(".")[0] == "transformers"}
    assert found == {"hf"}
