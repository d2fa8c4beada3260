"""docs/architecture.md names every module once, and modules import from their own layer or from layers above it."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "zo_offload"


def modules() -> dict[str, Path]:
    """Dotted name -> file; a package by its own name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


def layers() -> list[tuple[str, list[str]]]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    part = text.split("## Layers")[1].split("\n## ")[0].replace("\\_", "_")
    return [
        (title, re.findall(r"[\w.]+", re.sub(r"\(.*?\)", "", names)))
        for title, names in re.findall(r"\*\*(.+?)\*\*:((?:.|\n.)*)", part)
    ]


LAZY = {"__init__", "__main__", "cli"}
"""Modules that load others when they are first asked for, so that a command starts at once."""

STILL_HIDDEN = {
    "generation -> engine", "training -> engine", "methods.mezo -> methods.presets", "methods.presets -> methods.mezo",
    "methods.presets -> plan",
}  # fmt: skip


class Imports(ast.NodeVisitor):
    """Modules of the package that a file imports when it is loaded; everywhere=True: in functions and for type checkers
    too."""

    def __init__(self, name: str, file: Path, known: dict[str, Path], everywhere: bool = False) -> None:
        self.everywhere = everywhere
        parts = name.split(".")
        self.package = parts if file.name == "__init__.py" and name != "__init__" else parts[:-1]
        self.known, self.found = known, set()
        self.visit(ast.parse(file.read_text()))

    def visit_If(self, node: ast.If) -> None:
        if self.everywhere or "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self.everywhere:
            self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        path = (node.module or "").split(".") if node.module else []
        if node.level:
            base = self.package[: len(self.package) - node.level + 1] + path
        elif path[:1] == ["zo_offload"]:
            base = path[1:]
        else:
            return
        for alias in node.names:
            full = ".".join([*base, alias.name])
            self.found.add(full if full in self.known else ".".join(base) or "__init__")


def imports(everywhere: bool = False) -> dict[str, set[str]]:
    known = modules()
    return {name: Imports(name, file, known, everywhere).found - {name} for name, file in known.items()}


def test_the_list_of_modules_is_whole():
    listed = [name for _, names in layers() for name in names]
    assert len(layers()) >= 8, "the page is not read as it should be"
    assert sorted(listed) == sorted(modules())


def test_arrows_go_one_way():
    layer = {name: i for i, (_, names) in enumerate(layers()) for name in names}
    wrong = [f"{a} -> {b}" for a, found in imports().items() for b in found if layer[b] > layer[a]]
    assert not wrong


def test_no_two_modules_need_each_other():
    TopologicalSorter(imports()).prepare()


def test_no_import_hides_in_a_function_or_behind_a_type_check():
    """What the tests above would not see: two modules that know each other all the same."""
    seen, all_of_them = imports(), imports(everywhere=True)
    hidden = {f"{a} -> {b}" for a, found in all_of_them.items() if a not in LAZY for b in found - seen[a]}
    assert not hidden - STILL_HIDDEN
