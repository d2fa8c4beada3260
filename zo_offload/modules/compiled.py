"""Models with torch.compile'd parts: while an engine runs a model, all of it runs eagerly.

A compiled part would have our hooks traced into it, which hand control to another lane, and be compiled anew for the
weights of each. So torch's own switch for that, `torch.compiler.set_stance("force_eager")`, is on around every forward:
what is compiled may be a module, or a function that only a closure, a global or the objective holds, or be made in the
forward itself. Numbers are those of the eager model; the user's compiled code is as it was after.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import nn


def without_wrapper(model: nn.Module) -> nn.Module:
    """What `torch.compile(model)` was given; any other module itself. Names of parameters are then the model's own."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """While open, nothing is compiled or runs compiled."""
    return cast(contextlib.AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
