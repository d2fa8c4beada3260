"""The report page in a real browser: all of it can be read, in a wide window and on a telephone's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from support.texts import write_text_model
from zo_offload.cli import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")

LOOK = """<script>
const wide = document.documentElement.clientWidth, seen = {text: document.body.innerText, lost: [], charts: 0};
const told = (e, why) => seen.lost.push(`${e.tagName} ${e.textContent.slice(0, 40)}: ${why}`);
for (const e of document.querySelectorAll("h1, h2, p, table, svg"))
    if (e.getBoundingClientRect().right > wide + 1 || !e.getBoundingClientRect().height) told(e, "outside of the page");
for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect(); seen.charts++;
    for (const e of svg.querySelectorAll("text")) {
        const b = e.getBoundingClientRect();
        if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
            told(e, "outside of its chart");
    }
}
const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs from disk, with long names, evaluations, and answers before and after."""
    path = tmp_path_factory.mktemp("page")
    write_text_model(path / "base")
    rows = [{"text": f"a film <b>{i}</b> & more", "label": i % 2} for i in range(12)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [path / "a run with a name of some length", path / "b"]
    for seed, run in enumerate(runs):
        assert main([
            "fit", str(path / "base"), "--data", str(path / "rows.jsonl"), "--eval-data", str(path / "rows.jsonl"),
            "--template", "{text} It was", "--verbalizers", " bad", " good", "--steps", "4", "--eval-every", "2",
            "--batch-size", "4", "--lr", "1e-3", "--seed", str(seed), "--offload", "disk", "--run-dir", str(run),
            "--quiet",
        ]) == 0  # fmt: skip
    for run, seconds in zip(runs, (0.0125, 0.00123), strict=True):  # a mark at the end, and a long one near it
        times = json.loads((run / "timeline.json").read_text())
        (run / "timeline.json").write_text(json.dumps(times | {"seconds": seconds}))
    out = path / "page.html"
    assert main(["report", *map(str, runs), "--examples", "3", "--out", str(out)]) == 0
    return out


def in_browser(page, width, tmp_path):
    """What a window of this width shows, and what the browser complained of."""
    text = page.read_text()
    assert text.count("</body>") == 1
    (tmp_path / "looked.html").write_text(text.replace("</body>", LOOK + "</body>"))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", f"file://{tmp_path}/looked.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [1100, 500])  # 500: the narrowest that headless Chromium opens
def test_nothing_is_cut_off_and_nothing_complains(page, width, tmp_path):
    seen, complaints = in_browser(page, width, tmp_path)
    assert seen["lost"] == [] and complaints == []
    assert seen["charts"] == 6, "loss and accuracy against steps and bytes, and a step of each run"
    for words in ("</b> & more", "Memory", "peak of the process, measured", "window of blocks", "fp32",
                  "rows.jsonl", "{text} It was", "weights are made"):  # fmt: skip
        assert words in seen["text"], words


def test_the_browser_sees_what_is_cut_off(page, tmp_path):
    """The test above can fail: a table that is too wide, a label that lies left of its chart."""
    text = page.read_text()
    broken = text.replace("<h2>Cost</h2>", '<h2>Cost</h2><table style="width: 3000px"><tr><td>x</td></tr></table>')
    broken = broken.replace('text-anchor="end">weights are made', 'text-anchor="end">many more words than fit here', 1)
    (tmp_path / "broken.html").write_text(broken)
    seen, _ = in_browser(tmp_path / "broken.html", 1100, tmp_path)
    assert len(seen["lost"]) == 2
