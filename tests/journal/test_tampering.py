"""Runs gone on with after something of theirs was changed (benchmarks/tampering.py): one trial a kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tampering


@pytest.mark.filterwarnings("ignore:.*the column is left out")
def test_nothing_that_was_changed_is_gone_on_with_in_silence(tmp_path: Path) -> None:
    found = {
        result["kind"]: result
        for result in tampering.results(tmp_path, 1, 3, ["data", "config", "blocks", "journal"], 400)
    }
    assert {kind: result["silent"] for kind, result in found.items()} == dict.fromkeys(found, 0)
    equal = {
        f"{kind}: {name}"
        for kind, result in found.items()
        for name, outcomes in result["outcomes"].items()
        if "equal" in outcomes
    }
    assert equal == {
        "data: written otherwise", "config: written elsewhere", "blocks: of earlier", "blocks: of a twin",
        "blocks: removed", "journal: of a twin",
    }  # fmt: skip
