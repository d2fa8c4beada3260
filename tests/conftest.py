"""Each test starts alike: torch's seed, and one compute thread, whatever ran before it in the same process.

The models here are tiny, and threads that wait for each other would be most of the time. Tests that are about threads
ask for them by number.
"""

import functools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from zo_offload.kernels import native

torch.set_num_threads(1)
# tests send themselves SIGINT, which a shell's background jobs ignore
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite("support")


def pytest_configure(config: pytest.Config) -> None:
    """A library built from other sources is left aside: the tests would run on the slow reference and not say so."""
    if native.LIBRARY.exists() and os.environ.get("ZO_NATIVE") != "0" and native.library() is None:
        raise pytest.UsageError(native.describe())


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Makes every engine of the test run on the device given, as device="cuda"."""
    # here, because tests of kernels alone do without what an engine needs
    from support.on_device import put_in_place

    return functools.partial(put_in_place, monkeypatch)


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and nothing said below an error."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
