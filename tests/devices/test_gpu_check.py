"""`make gpu-check` without a GPU: a dry run goes through, a part that fails does not stop the others, ZO2's lines are
read as its own script reads them."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_predicted, gpu_probe, host_memory
from benchmarks.gpu_check import Part
from benchmarks.gpu_page import report
from zo_offload.cli.costs import COPIED
from zo_offload.cli.hardware import find_gpu
from zo_offload.system.host_memory import available_bytes

ROOT = Path(__file__).resolve().parents[2]


def check(tmp_path, *options):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_a_dry_run_measures_nothing_and_says_so(tmp_path):
    done = check(tmp_path, "--only", "opt-1.3b")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {row["way"] for row in rows} == {"ours host", "ours none", "naive MeZO, resident"}
    assert all(row["measured"] is False for row in rows)
    page = (tmp_path / "gpu_check.md").read_text()
    assert "no number here is a measurement" in page and "ours host" in page
    assert "no date" not in page and "Versions: {'torch'" in page
    beside = (tmp_path / "gpu_check_predicted.md").read_text()
    assert "no number here is a measurement" in beside and "opt-tiny, 32 tokens, host: step" in beside
    assert shlex.join(["--body-file", str(tmp_path / "gpu_check_report.md")]) in done.stdout.splitlines()[-1]
    report = (tmp_path / "gpu_check_report.md").read_text()
    assert beside in report and page in report and "naive MeZO" in report.splitlines()[-2]


def test_a_part_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    say = 'print(\'{"part": "link", "fetch_gbs": 1.0}\')'
    made = [
        Part("bad", [sys.executable, "-c", "raise SystemExit(3)"], 20),
        Part("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1),
        Part("missing", [str(tmp_path / "no-such-program")], 5),
        Part("good", [sys.executable, "-c", say], 20),
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda options: made)
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "bad (exit status 3)" in said and "slow (stopped after 1 s)" in said and "missing (could not start" in said
    assert json.loads((tmp_path / "gpu_check.jsonl").read_text())["fetch_gbs"] == 1.0


def test_what_zo2_prints_is_read():
    part = Part("zo2", [], 1, label={"model": "opt-1.3b", "tokens": 2048}, status="ok")
    text = "".join(f"Time cost after iteration {i}: 100.00 ms, {r:.2f} tok/s\n" for i, r in enumerate((1, 1, 30, 50)))
    (row,) = gpu_check.read_speed(text, part)
    assert row["tokens_per_s"] == 40.0 and row["model"] == "opt-1.3b"
    text = "Peak GPU Memory after iteration 1: 100.00 MB\nPeak CPU Memory after iteration 1: 7.00 MB\n"
    (row,) = gpu_check.read_memory(text + text.replace("100", "300"), part)
    assert row["peak_driver_bytes"] == 300 << 20
    list(gpu_check.read_speed("nothing", part))
    assert part.status == "printed no throughput"


def test_figures_stand_beside_their_predictions():
    rows = [
        {"part": "link", "device": "NVIDIA GeForce RTX 4090", "measured": True, "fetch_gbs": 12.0, "flush_gbs": 24.0,
         "both_fetch_gbs": 8.0, "both_flush_gbs": 8.0},
        {"part": "kernels", "case": "copy"},
        {"part": "kernels", "case": "bf16, gaussian, K=1, 2 bf16 lanes", "gelem_per_s": 100.0},
    ]  # fmt: skip
    told = "\n".join(gpu_predicted.page(rows))
    assert "| fetch (pcie4-x16) | 12 GB/s | 24 GB/s | 0.5 |" in told
    assert "| both at once, fetch (pcie4-x16) | 8 GB/s | 16 GB/s | 0.5 |" in told
    gpu = find_gpu("rtx-4090")
    moved = (2 + 4) * 1e9 / (COPIED * gpu.memory_gb_per_s * 1e9)  # memory binds: bytes read and two lanes written
    assert f"| bf16, gaussian, K=1, 2 bf16 lanes | 100 Gelem/s | {1 / moved:.4g} Gelem/s |" in told
    rows[0]["device"] = "Voodoo 2"
    assert "Voodoo 2 has no row in" in "\n".join(gpu_predicted.page(rows))


def test_a_report_fits_into_an_issue(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"part": "x", "n": i}) + "\n" for i in range(5000)))
    (tmp_path / "page.md").write_text("# A page\n")
    text = report([tmp_path / "page.md", tmp_path / "none.md"], tmp_path / "rows.jsonl")
    assert text.startswith("# A page\n") and len(text) < 65_536
    kept = text.count('"part"')
    assert f"... {5000 - kept} more in rows.jsonl" in text


def test_zo2_runs_from_its_own_directory_unmodified(tmp_path):
    (tmp_path / gpu_check.ZO2_TEST).mkdir(parents=True)
    (tmp_path / gpu_check.ZO2_TEST / "test_speed.py").touch()
    options = type("Options", (), {"zo2": tmp_path, "zo2_packages": None, "dtype": "fp16", "dry": False})()
    made = list(gpu_check.zo2_parts(options, "opt-6.7b"))
    assert [p.name for p in made] == ["zo2 speed opt-6.7b", "zo2 memory opt-6.7b"]
    assert all(p.folder == tmp_path and p.environment["PYTHONPATH"] == str(tmp_path) for p in made)
    # the arguments that its own get_args declares
    given = dict(zip(made[0].command[3::2], made[0].command[4::2], strict=True))
    assert given["--model_name"] == "opt_6_7b" and given["--model_dtype"] == "fp16"
    assert given.keys() <= {
        "--zo_method",
        "--task",
        "--model_name",
        "--model_dtype",
        "--max_steps",
        "--sequence_length",
    }
    options.zo2 = tmp_path / "elsewhere"
    with pytest.raises(SystemExit, match="root of a ZO2 checkout"):
        list(gpu_check.zo2_parts(options, "opt-6.7b"))


def test_zo2s_script_finds_its_neighbour_and_quick_weights(tmp_path):
    """`zo2_run.py` with a script like ZO2's: its arguments, the module beside it, large tensors of a repeated tile."""
    (tmp_path / "utils.py").write_text("NAME = 'beside'\n")
    (tmp_path / "script.py").write_text(
        "import sys, torch\nfrom utils import NAME\n"
        "w = torch.nn.Linear(2048, 1024).half().weight\n"
        "w.data.normal_(mean=0.0, std=0.02)\n"
        "small = torch.empty(10).normal_()\n"
        "halves = w.view(2, -1)\n"
        "print(NAME, sys.argv[1:], torch.equal(*halves), abs(float(w.std()) - 0.02) < 1e-4)\n"
    )
    command = [sys.executable, str(ROOT / "benchmarks" / "zo2_run.py"), str(tmp_path / "script.py"), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "beside ['--steps', '3'] True True"


def test_every_part_is_reached_in_time(tmp_path):
    """The most telling first, and their limits leave room for them: what is cut by time is at the end."""
    options = type("Options", (), {"zo2": None, "dtype": "fp16", "dry": False, "zo2_packages": None})()
    made = gpu_check.parts(options)
    names = [part.name for part in made]
    first = [
        "host memory",
        "build",
        "probe",
        "kernels bit-equal",
        "tests of the engine",
        "link",
        "step opt-1.3b 2048",
        "step opt-6.7b 2048",
    ]
    assert names[: len(first)] == first and len(set(names)) == len(names)
    options.zo2 = tmp_path
    (tmp_path / gpu_check.ZO2_TEST).mkdir(parents=True)
    (tmp_path / gpu_check.ZO2_TEST / "test_speed.py").touch()
    names = [part.name for part in gpu_check.parts(options)]
    assert names.index("zo2 memory opt-6.7b") < names.index("step opt-13b 2048") < names.index("kernels bit-equal")


def test_every_file_of_gpu_tests_is_run():
    options = type("Options", (), {"zo2": None, "dtype": "fp16", "dry": False, "zo2_packages": None})()
    told = {word for part in gpu_check.parts(options) for word in part.command}
    files = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files and files <= told


def test_the_page_tells_how_many_tests_passed(tmp_path):
    """Beside the host's memory, whose row comes first and tells no versions."""
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    options = type("Options", (), {"zo2": None, "dtype": "fp16", "dry": False, "zo2_packages": None})()
    part = next(part for part in gpu_check.parts(options) if part.name == "test of the budget")
    at = next(i for i, word in enumerate(part.command) if word.endswith(".py"))
    part.command = [*part.command[:at], str(tmp_path / "test_two.py"), "-c", str(ROOT / "pyproject.toml")]
    gpu_check.run(part, 60, tmp_path / "log")
    memory = Part("host memory", [], 1, status="ok")
    memory.rows = [{"part": "host memory", "available_before_bytes": 9e9, "reached_bytes": 72e9}]
    page = gpu_check.page([memory, part], options, 1.0)
    assert "| 2 passed in" in page and "9.0 GB available at first, 72.0 GB taken" in page


def test_memory_that_appears_when_it_is_used_is_taken_and_given_back():
    """A machine that shows 3 MB free until a gigabyte of it is held; one that shows no more after 2 steps."""
    shown = [3 << 20]

    def grows():
        shown[0] += 1 << 18
        return shown[0]

    assert host_memory.grow(8 << 20, 1 << 20, 5 << 20, grows, 5.0) == 8 << 20
    answers = iter([9, 9, 9, 9, 1, 1, 1])
    assert host_memory.grow(8 << 20, 1 << 20, 5 << 20, lambda: next(answers) << 20, 0.0) == 2 << 20


def test_the_parts_count_on_memory_that_was_there(monkeypatch):
    monkeypatch.setenv("ZO_HOST_MEMORY", "")  # noted, so that what `count_on` sets is gone after the test
    monkeypatch.delenv("ZO_HOST_MEMORY")
    row = {"part": "host memory", "available_before_bytes": 5, "reached_bytes": 70 << 40, "available_after_bytes": 9}
    gpu_check.count_on([{"part": "link"}, row | {"reached_bytes": 0}])
    assert "ZO_HOST_MEMORY" not in os.environ
    gpu_check.count_on([row])
    assert available_bytes() == 70 << 40
    monkeypatch.delenv("ZO_HOST_MEMORY")
    assert available_bytes() < 70 << 40


def test_wheels_are_put_on_the_path(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some_thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_thing.py", "x = 1")
    into = gpu_check.unpack(tmp_path / "wheels", tmp_path / "into")
    assert into is not None and (into / "some_thing.py").read_text() == "x = 1"
    with zipfile.ZipFile(tmp_path / "wheels" / "other-1-cp27-cp27m-manylinux_2_28_x86_64.whl", "w") as wheel:
        wheel.writestr("other.py", "x = 1")
    with pytest.raises(SystemExit, match=r"other-1-cp27.*is for cp27, .*bring the wheel of cp3"):
        gpu_check.unpack(tmp_path / "wheels", tmp_path / "into")
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="no wheels"):
        gpu_check.unpack(tmp_path / "none", tmp_path)


def test_the_probe_reports_what_breaks_and_goes_on(monkeypatch):
    probe = gpu_probe.Probe(dry=True)

    def breaks():
        raise RuntimeError("a driver of its own mind")

    monkeypatch.setattr(probe, "check_kernels", breaks)
    monkeypatch.setattr(probe, "check_locking", lambda: (False, "cannot", {}))
    rows = {row["check"]: row for row in probe.run()}
    assert rows["kernels"]["verdict"] == "broke" and "a driver of its own mind" in rows["kernels"]["says"]
    assert rows["locking"]["verdict"] == "NOT ok"
    rest = {row["verdict"] for name, row in rows.items() if name not in ("kernels", "locking")}
    assert rest == {"ok", "told"} and len(rows) > 10


def test_without_greenlet_the_parts_that_need_no_lanes_still_run(tmp_path, monkeypatch, capsys):
    ran = [sys.executable, "-c", "pass"]
    made = [Part("link", ran, 20), Part("step opt-1.3b 2048", ran, 20)]
    monkeypatch.setattr(gpu_check, "parts", lambda options: made)
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "greenlet"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "greenlet" else find(name))
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    assert [part.status for part in made] == ["ok", "not run: needs greenlet"]
    assert "lacks greenlet" in capsys.readouterr().out
