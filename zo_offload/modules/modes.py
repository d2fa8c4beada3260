"""Modes: torch's per-thread state, which belongs to a lane, and the training or eval mode of modules.

An interrupt can prevent the call of a context manager's exit, even a library's own: then torch's state would belong to
a `with` that is over (every later tensor on meta). `modes_kept` and `in_contexts` restore it.

Lanes share one thread, so torch's per-thread state would leak from one lane into another: a lane that entered
`inference_mode`, `autocast` or a `TorchFunctionMode` must keep it for itself. Python's context variables need nothing
here: each greenlet has its own context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

ModeState = tuple[Any, ...]
_Result = TypeVar("_Result")

_c = torch._C
_autocasts, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype


def current_modes() -> ModeState:
    """Everything below as one comparable value; about a microsecond.

    (grad, inference, (autocast cpu, cuda: enabled and dtype), default dtype, attention kernels, the two mode stacks).
    Autocast's weight cache is not here: the hub keeps it off, because it is keyed by parameter.
    """
    autocast = _autocasts("cpu"), _autocast_dtype("cpu"), _autocasts("cuda"), _autocast_dtype("cuda")
    kernels = (
        _c._get_flash_sdp_enabled(), _c._get_mem_efficient_sdp_enabled(), _c._get_math_sdp_enabled(),
        _c._get_cudnn_sdp_enabled(),
    )  # fmt: skip
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.get_default_dtype(), kernels,
        _stack(_c._len_torch_function_stack(), _c._get_function_stack_at),
        _stack(_c._len_torch_dispatch_stack(), _c._get_dispatch_stack_at),
    )  # fmt: skip


def _stack(length: int, at: Callable[[int], Any]) -> tuple[Any, ...]:
    return tuple(at(i) for i in range(length)) if length else ()


class LaneModes:
    """The modes of one lane while it waits.

    `park` is called in the lane just before it gives up control and leaves the thread as the hub had it; `resume`
    restores the lane's modes. Lanes park and resume in any order: every value is set, none is undone.
    """

    __slots__ = ("_guard", "_own")

    def __init__(self) -> None:
        self._own: ModeState | None = None
        self._guard: Any = None

    def park(self, hub: ModeState) -> None:
        now = current_modes()
        if now == hub:
            return
        self._own = now
        _set_stacks(now, hub)
        if now[1] != hub[1]:
            # the guard's exit restores this moment's state, whatever was set in between
            self._guard = _c._InferenceMode(hub[1])
            self._guard.__enter__()
        _set_plain(hub)

    def resume(self, hub: ModeState) -> None:
        own = self._own
        if own is None:
            return
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None
        _set_plain(own)
        _set_stacks(hub, own)
        self._own = None


def restore_modes(target: ModeState) -> None:
    """Set the thread to `target` after a lane ended in an unknown state (inference mode excepted)."""
    now = current_modes()
    if now != target:
        _set_stacks(now, target)
        _set_plain(target)


def modes_kept(job: Callable[[], _Result]) -> _Result:
    """Call job() and restore the thread's modes afterwards, whatever it raises."""
    return in_contexts((), job)


def in_contexts(contexts: Sequence[AbstractContextManager[Any]], job: Callable[[], _Result]) -> _Result:
    """Call job() inside context managers, entered in order. All of them are left and the thread's modes are restored,
    even if an interrupt in one exit prevents the others' exits."""
    before = current_modes()
    try:
        try:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                return job()
        finally:
            _leave(contexts, before)
    finally:
        _leave(contexts, before)  # the first try may have been interrupted


def _leave(contexts: Sequence[AbstractContextManager[Any]], before: ModeState) -> None:
    for context in reversed(contexts):
        generator = getattr(context, "gen", None)  # of contextlib; closing one that has ended does nothing
        if generator is not None:
            generator.close()
    restore_modes(before)


def _set_plain(state: ModeState) -> None:
    grad, _, (cpu, cpu_dtype, cuda, cuda_dtype), dtype, (flash, efficient, math, cudnn) = state[:5]
    _c._set_grad_enabled(grad)
    torch.set_autocast_enabled("cpu", cpu)
    torch.set_autocast_dtype("cpu", cpu_dtype)
    torch.set_autocast_enabled("cuda", cuda)
    torch.set_autocast_dtype("cuda", cuda_dtype)
    if torch.get_default_dtype() is not dtype:
        torch.set_default_dtype(dtype)
    _c._set_sdp_use_flash(flash)
    _c._set_sdp_use_mem_efficient(efficient)
    _c._set_sdp_use_math(math)
    _c._set_sdp_use_cudnn(cudnn)


def _set_stacks(now: ModeState, target: ModeState) -> None:
    _move_stack(now[5], target[5], _c._pop_torch_function_stack, _c._push_on_torch_function_stack)
    _move_stack(now[6], target[6], lambda: _c._pop_torch_dispatch_stack(None), _c._push_on_torch_dispatch_stack)


def _move_stack(
    now: tuple[Any, ...], target: tuple[Any, ...], pop: Callable[[], Any], push: Callable[[Any], Any]
) -> None:
    same = 0
    while same < len(now) and same < len(target) and now[same] is target[same]:
        same += 1
    for _ in now[same:]:
        pop()
    for mode in target[same:]:
        push(mode)


# ---- training or evaluating ------------------------------------------------------------------------------------------


@contextmanager
def module_modes(modules: Sequence[nn.Module], mode: str) -> Iterator[None]:
    """While open, all modules are in eval mode ("eval"), in training mode ("train"), or each in its own ("as_is");
    afterwards each has its former mode.

    The flags are set one by one: other effects of a model's own `train` (adapters that merge their weights) do not
    happen, since weights are away.
    """
    training = mode == "train"
    others = [] if mode == "as_is" else [module for module in modules if module.training is not training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training


def modes_of(model: nn.Module, mode: str) -> str:
    """The meaning of `mode` for this model, as part of a run's identity."""
    if mode != "as_is":
        return mode
    training = [name for name, module in model.named_modules() if module.training]
    digest = hashlib.blake2b("\n".join(training).encode(), digest_size=8).hexdigest()
    return f"as_is, {len(training)} modules in training mode" + (f" ({digest})" if training else "")
