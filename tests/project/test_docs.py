"""The pages for those who change this: every link leads somewhere, every benchmark is listed, every word said once."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from zo_offload import Engine
from zo_offload.cli import command
from zo_offload.cli.parser import parse
from zo_offload.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "tests/README.md", "benchmarks/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    text = (ROOT / page).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_every_page_is_linked_from_the_first_two():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "architecture.md").read_text()
    assert all(Path(page).name in text or page in text for page in PAGES if page != "README.md")


def test_every_benchmark_and_every_record_is_listed():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    assert {file.stem for file in (ROOT / "benchmarks").glob("*.py")} - {"__init__"} <= named
    listed = set(re.findall(r"`(\w\S*)\.jsonl`", text))
    records = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.jsonl")}
    assert {record for record in records if not record.endswith("_long")} <= listed


def test_every_test_that_is_named_is_there():
    text = (ROOT / "tests" / "README.md").read_text()
    named = re.findall(r"`([\w/]*test_\w+\.py)`", text)
    assert named and all((ROOT / "tests" / name).exists() for name in named)


def test_every_test_that_the_findings_name_is_there():
    text = (ROOT / "docs" / "gpu.md").read_text().partition("third reading found")[2]
    named = re.findall(r"`(test_\w+)`(?:: ([^;`|]*))?", text)
    for file, phrases in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        tests = re.findall(r"def (test_\w+)", path.read_text())
        for phrase in filter(None, (re.sub(r"\W+", "_", p.strip().lower()) for p in phrases.split(","))):
            assert any(phrase.strip("_") in test for test in tests), (file, phrase)
    assert len(named) > 15


def test_every_word_is_defined_once():
    text = (ROOT / "docs" / "words.md").read_text()
    words = [
        word
        for line in re.findall(r"^- (\*\*.+?)(?:, z)?:", text, re.MULTILINE)
        for word in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    assert len(words) > 50 and max(Counter(words).values()) == 1


def command_lines():
    """(page, arguments) of each `zo-offload` line in a code block, and of each in backticks with an option in it."""
    found = set()
    for page in PAGES:
        text = (ROOT / page).read_text()
        lines = re.findall(r"^(?:    )?zo-offload (.+)$", text, re.MULTILINE) + re.findall(
            r"`zo-offload ([^`]+ --[^`]+)`", text
        )
        found |= {(page, re.sub(r"\s{2,}[(#].*", "", line)) for line in lines if "..." not in line}
    return sorted(found)


@pytest.mark.parametrize(("page", "line"), command_lines(), ids=lambda value: value.split(" --")[0].replace(" ", "_"))
def test_every_command_line_is_one(page, line, monkeypatch):
    monkeypatch.chdir(ROOT / "examples")  # a method of one's own is read from its file
    arguments = shlex.split(line)
    parse(arguments, dict.fromkeys(command.RUN, len))  # an option that is not there ends it


def test_every_setting_in_a_python_block_is_one():
    settings = {field.name for field in fields(EngineConfig)} | set(inspect.signature(Engine.__init__).parameters)
    blocks = [
        block for page in PAGES for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Engine":
                assert {keyword.arg for keyword in node.keywords} <= settings, block


def test_the_page_of_methods_has_the_table_that_is_printed(capsys):
    assert command.main(["methods"]) == 0
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "methods.md").read_text()
    assert printed.partition("\n\n")[0] in page, "zo-offload methods prints another table by now"
    others = printed.partition("or not here:\n")[2].splitlines()
    assert others and all(f"\n- {line.strip()}\n" in page for line in others), "and other names"


def test_the_api_page_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    made = make_api.page()
    assert made == make_api.PAGE.read_text(), "python docs/make_api.py --write"
    assert all(f"### {name}" in made for name in ("Engine", "MeZO", "FZOO", "FitResult"))
