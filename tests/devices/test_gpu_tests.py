"""The tests that need a GPU are themselves run here, with stand-ins where the GPU would be (tests/gpu/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# each test at least once, but for those that need sizes or tools of a GPU machine
SOME = (
    "golden or images or (noise and 5003) or (fused_pass and 4097-1) or scales_that or rows or twice or "
    "(changes_nothing and more0) or resumed or does_not_wait or not_there or locked_or_not or refused or directions or "
    "evaluation or (opt and not projected) or (experts and (4 or mixtral))"
)


def test_the_gpu_tests_run_through():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", SOME]
    environment = os.environ | {"ZO_GPU_TESTS_ON": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout or done.stdout.count(".") > 30
