"""Models with torch.compile'd parts: while an engine runs them they run eagerly.

A compiled part would have our hooks traced into it, which hand control to another lane, and be compiled anew for the
weights of each. So torch's own switch for that, `torch.compiler.set_stance("force_eager")`, is on around every forward
of such a model, and of no other. Numbers are those of the eager model; the user's compiled code is as it was after.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import nn

_MARK = "_torchdynamo_orig_callable"  # on every function that torch.compile returns


def is_compiled(model: nn.Module) -> bool:
    """Whether a module of the model, its forward, a method or a function that it holds is torch.compile's."""
    modules = list(model.modules())
    if any(_holds_compiled(module) for module in modules):
        return True
    classes = {cls for kind in {type(module) for module in modules} for cls in kind.__mro__}
    return any(
        hasattr(value, _MARK)
        for cls in classes
        if not cls.__module__.startswith("torch.")
        for value in list(vars(cls).values())
    )


def _holds_compiled(module: nn.Module) -> bool:
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(hasattr(value, _MARK) for name, value in vars(module).items() if not name.startswith("_"))


def without_wrapper(model: nn.Module) -> nn.Module:
    """What `torch.compile(model)` was given; any other module itself. Names of parameters are then the model's own."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def eagerly(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """While open, no part of this model is compiled or runs compiled."""
    if not is_compiled(model):
        return contextlib.nullcontext()
    return cast(contextlib.AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
