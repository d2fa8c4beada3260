"""Finds the loss and the logits in a model's output, in every form that it may have.

transformers' models return an object with `.loss` and `.logits`, or with `return_dict=False` a tuple; a user's own
modules return a dict, a tuple, or the loss alone, as `Trainer` accepts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor


def loss_of(output: Any) -> Any:
    """The loss in a model's output; None if none can be recognised."""
    loss = _named(output, "loss")
    if loss is None and isinstance(output, (tuple, list)) and output:
        loss = output[0]
    elif loss is None:
        loss = output
    return loss if _is_number(loss) else None


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output, if they are named or follow a loss."""
    logits = _named(output, "logits")
    if logits is None and isinstance(output, (tuple, list)) and len(output) > 1 and _is_number(output[0]):
        logits = output[1]
    return logits if isinstance(logits, Tensor) else None


def spans_of(output: Any) -> tuple[Tensor, Tensor] | None:
    """Logits of where an answer begins and ends, if a model names them, or has a pair of a row each behind a loss."""
    start, end = _named(output, "start_logits"), _named(output, "end_logits")
    if start is None and isinstance(output, (tuple, list)) and len(output) > 2 and _is_number(output[0]):
        start, end = output[1], output[2]
    if isinstance(start, Tensor) and isinstance(end, Tensor) and start.dim() == 2 and start.shape == end.shape:
        return start, end
    return None


def describe(value: Any) -> str:
    """A description of a value, for messages: its type, and its shapes and names if it has any."""
    if isinstance(value, Tensor):
        kind = "a complex tensor" if value.is_complex() else "a tensor"
        return f"{kind} of shape {list(value.shape)}{' on meta' if value.is_meta else ''}"
    name = type(value).__name__
    if isinstance(value, Mapping):
        held = [f"{k} ({describe(v)})" if k == "loss" else str(k) for k, v in value.items()]
        return f"{name} with {', '.join(held) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"{name} of {', '.join(describe(item) for item in value[:3]) or 'nothing'}"
    if value is None:
        return "None"
    return f"{name} {value!r}" if isinstance(value, (str, complex)) else name


def _named(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)
