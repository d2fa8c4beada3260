"""Models with torch.compile'd parts: while an engine runs a model, all of it runs eagerly.

Compilation would trace our hooks, which pass control to another lane, and would compile again for each lane's weights.
So torch's own switch, `torch.compiler.set_stance("force_eager")`, is on around every forward. It covers compiled
modules, functions that only a closure, a global or the objective holds, and those compiled in the forward itself. The
numbers are those of the eager model; the user's compiled code is unchanged afterwards.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import nn


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`; any other module itself. Parameters then have the model's own names."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def plain_name(name: str) -> str:
    """A parameter's or module's name without the wrappers that torch.compile puts around parts of a model."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """While open, nothing is compiled, and compiled code runs eagerly."""
    return cast(contextlib.AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
