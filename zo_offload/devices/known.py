"""Masks and positions of a batch on a device, which answer questions about their values from the host's copy.

Model code decides by masks: `if mask.all()` chooses the attention without one. On a GPU such an `if` makes the host
wait until all earlier work is done, once or twice in each lane's forward. But the batch came from the host, which knows
the answer. A `Known` tensor is the device's tensor to every function of torch. The results of a few (slices, sums,
comparisons with numbers) are `Known` again, and `bool`, `int` and `item` of these compute the same from the host's
copy. Integers and booleans alone: their results are equal on every device. Values that were written to after the copy
was made are noticed by torch's own count of writes, and read from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_KNOWN = frozenset(
    "to bool int long __getitem__ sum all any eq __eq__ ne __ne__ bitwise_not __invert__ logical_not pad diff cumsum "
    "sub __sub__ add __add__ view reshape unsqueeze squeeze expand contiguous".split()
)
"""Functions whose results are known where all their tensors are."""
_ANSWERS = frozenset("__bool__ __int__ __index__ item tolist".split())


class Known(Tensor):
    """`there`, a tensor on a device, with `host`: gives the same values in host memory; called when they are asked
    for. parents: the tensors that these were computed from."""

    _there: Tensor
    _host: Callable[[], Tensor | None]
    _writes: int

    @staticmethod
    def __new__(cls, there: Tensor, host: Callable[[], Tensor | None]) -> Known:
        made: Known = Tensor._make_wrapper_subclass(
            cls, there.shape, strides=there.stride(), dtype=there.dtype, device=there.device
        )
        made._there, made._host, made._writes = there, host, there._version
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _ANSWERS and (values := _values(args[0])) is not None:
            return func(values, *args[1:], **kwargs)
        found = func(*_there(args), **_there(kwargs))
        if name not in _KNOWN or not isinstance(found, Tensor) or found.is_floating_point():
            return found
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if "out" in kwargs or not all(isinstance(value, Known) for value in tensors):
            return found
        if found.device != tensors[0].device:
            return found

        def host() -> Tensor | None:
            known = {id(tensor): _values(tensor) for tensor in tensors}
            if any(values is None for values in known.values()):
                return None
            theirs = tree_map_only(Tensor, lambda t: known[id(t)], (args, kwargs))
            on_host: Tensor = func(*_here(theirs[0]), **_here(theirs[1]))
            return on_host

        return Known(found, host)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_there(args), **_there(kwargs or {}))


def known(there: Tensor, host: Tensor) -> Tensor:
    """The tensor `there`, whose values are those of `host`, which nobody writes to meanwhile."""
    if there.is_floating_point() or there.is_inference() or there.shape != host.shape:
        return there
    return Known(there, lambda: host)


def _values(tensor: Any) -> Tensor | None:
    """The values in host memory; None if they are not known: something wrote to the device's tensor."""
    if not isinstance(tensor, Known) or tensor._there._version != tensor._writes:
        return None
    values = tensor._host()
    tensor._host = lambda: values
    return values


def _there(values: Any) -> Any:
    return tree_map_only(Known, lambda tensor: tensor._there, values)


def _here(values: Any) -> Any:
    """Devices among arguments replaced by the host."""
    here = torch.device("cpu")
    if isinstance(values, dict):
        return {name: here if name == "device" else value for name, value in values.items()}
    return tree_map_only(torch.device, lambda _: here, values)
