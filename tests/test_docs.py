"""The pages for those who change this: every link leads somewhere, every benchmark is listed, every word said once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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
    named = re.findall(r"`(test_\w+\.py)`", text)
    assert named and all((ROOT / "tests" / name).exists() for name in named)


def test_every_word_is_defined_once():
    text = (ROOT / "docs" / "words.md").read_text()
    words = [
        word
        for line in re.findall(r"^- (\*\*.+?)(?:, z)?:", text, re.MULTILINE)
        for word in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    assert len(words) > 50 and max(Counter(words).values()) == 1
