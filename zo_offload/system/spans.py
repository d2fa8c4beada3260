"""Names for profilers, at no cost where none runs: torch's own `record_function` takes ten microseconds either way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """A `with` whose body shows as `name` (zo_offload.module:phase) in a profile of this thread."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else _NOTHING
