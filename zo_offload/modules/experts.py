"""Stacked experts computed run by run: parameters with one row per expert, a few of which are in memory at a time.

transformers marks such modules with `use_experts_implementation`: forward(x, top_k_index, top_k_weights) is, for each
token, the sum over its experts of weight * expert(token), with `num_experts` in gate_up_proj or up_proj, down_proj and
their biases, and the same for all of its implementations. So a run of experts is like a module with fewer experts, and
the module's own forward computes it: its parameters hold the run's rows, `num_experts` is their number, and the sum of
all runs, in float32 and in the order of the experts, is the layer's output.

The tokens of a run:
    rows      those that chose one of its experts, one row per choice, each with the one expert it chose. The host reads
              the numbers of rows, once per call. Right for every implementation, and nothing is computed twice
    masked    all tokens, with the choices outside the run sent to an expert after the last one with weight 0, as
              in transformers' expert parallelism. The host reads nothing; the grouped product skips those rows

"grouped_mm", transformers' default, gets masked tokens if torch's grouped product does not wait for the host either:
bf16 on compute capability 9 and 10. Elsewhere that product copies its offsets to the host, twice per run
(`_grouped_mm_fallback` in torch's GroupedMMUtils.h), while rows are read once per call. All other cases use rows: on
the CPU reading is free, "eager" reads the routing itself and has no expert after the last one in transformers 5.17, and
"batched_mm" gathers a weight for every given row.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_MARKS = ("has_gate", "has_bias", "is_transposed")  # attributes that the decorator sets on a module
_MASKED = frozenset({"grouped_mm"})


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether a call of this module is the decorator's, and the module has just the parameters that it reads."""
    forward, held = getattr(type(module), "forward", None), vars(module)
    if (
        forward is None
        or "forward" in held
        or getattr(forward, "__globals__", {}).get("__name__") != "transformers.integrations.moe"
    ):
        return False
    num_experts = held.get("num_experts")
    if not all(isinstance(held.get(mark), bool) for mark in _MARKS) or type(num_experts) is not int:
        return False
    matrices = {"gate_up_proj" if held["has_gate"] else "up_proj": 3, "down_proj": 3}
    biases = {f"{name}_bias": 2 for name in matrices} if held["has_bias"] else {}
    found = {name: p.ndim for name, p in module.named_parameters() if p.shape[:1] == (num_experts,)}
    return (
        found == {**matrices, **biases} and len(found) == len(list(module.parameters()))
        and next(module.buffers(), None) is None
        and len(inspect.signature(forward).parameters) == 4
    )  # fmt: skip


def in_runs(
    module: nn.Module,
    runs: Sequence[slice],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hold: Callable[[int], None],
    *,
    masked: bool | None = None,
) -> Tensor:
    """The result of the module's own forward for (*args, **kwargs), computed run by run.

    runs: the experts of each run. hold(k): makes the parameters hold the rows of runs[k]; called once each, in order.
    The module's attributes are restored when this returns or raises, and during `hold`. masked: None chooses by the
    rule in this file's docstring.
    """
    forward = type(module).forward
    x, index, weights = inspect.signature(forward).bind(module, *args, **kwargs).args[1:]
    if masked is None:
        masked = _implementation(module) in _MASKED and products_run_ahead(x.device, next(module.parameters()).dtype)
    picked = None if masked else _Picked(x, index, weights, runs[-1].stop)
    out: Tensor | None = None
    dtype = x.dtype
    for k, run in enumerate(runs):
        hold(k)
        if picked is None:
            part = _masked(module, forward, run, x, index, weights)
        elif picked.count(run):
            part = picked.call(module, forward, run)
        else:
            continue
        if out is None:
            out, dtype = _zeros(x, part), part.dtype
        if picked is None:
            out += part
        else:
            picked.add(run, part, out)
        del part  # keep nothing of a run while the lane waits for the next one
    return torch.zeros_like(x) if out is None else out.to(dtype)


def products_run_ahead(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product does not wait for the host on this device and dtype."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _implementation(module: Any) -> str | None:
    return cast(str | None, getattr(module.config, "_experts_implementation", None))


def _zeros(x: Tensor, part: Tensor) -> Tensor:
    shape = (*x.shape[:-1], part.shape[-1])
    return torch.zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32), device=x.device)


class _Picked:
    """The choices of all tokens, sorted by expert; for one expert, all first choices come first, token by token.

    So the rows of an expert are in the order of the eager forward.
    """

    def __init__(self, x: Tensor, index: Tensor, weights: Tensor, num_experts: int) -> None:
        self.x, self.weights = x, weights.t().reshape(-1)
        self.experts, self.order = torch.sort(index.t().reshape(-1), stable=True)
        self.tokens = self.order % max(1, x.shape[0])
        edges = torch.arange(num_experts + 1, dtype=self.experts.dtype, device=self.experts.device)
        self.starts: list[int] = torch.searchsorted(self.experts, edges).tolist()
        """The start of each expert's rows, and the end of the last one's."""

    def count(self, run: slice) -> int:
        return int(self.starts[run.stop] - self.starts[run.start])

    def call(self, module: nn.Module, forward: Callable[..., Tensor], run: slice) -> Tensor:
        rows = slice(self.starts[run.start], self.starts[run.stop])
        index, weights = self.experts[rows] - run.start, self.weights[self.order[rows]]
        with _holding(module, run.stop - run.start):
            return forward(module, self.x[self.tokens[rows]], index[:, None], weights[:, None])

    def add(self, run: slice, part: Tensor, out: Tensor) -> None:
        """Add the rows of a run to their tokens, expert by expert: a token is in each once, so the order is fixed."""
        first = self.starts[run.start]
        for expert in range(run.start, run.stop):
            rows = slice(self.starts[expert], self.starts[expert + 1])
            if rows.start < rows.stop:
                out.index_add_(0, self.tokens[rows], part[rows.start - first : rows.stop - first].to(out.dtype))


def _masked(
    module: nn.Module, forward: Callable[..., Tensor], run: slice, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    count = run.stop - run.start
    inside = (index >= run.start) & (index < run.stop)
    # of one expert the rows are not counted (histc takes an empty range for none given): it is followed by itself
    held = max(2, count)
    index, weights = torch.where(inside, index - run.start, held), weights.masked_fill(~inside, 0)
    with _holding(module, held, masked=True, repeat=count == 1):
        return forward(module, x, index, weights)


@contextlib.contextmanager
def _holding(module: Any, count: int, *, masked: bool = False, repeat: bool = False) -> Iterator[None]:
    """The module with `count` experts. masked: tokens may choose the one after the last. repeat: it holds only one."""
    before = {name: vars(module)[name] for name in ("num_experts", "_is_expert_parallel") if name in vars(module)}
    data = [p.data for p in module.parameters()] if repeat else []
    try:
        module.num_experts = count
        if masked and "_is_expert_parallel" in before:  # transformers 5.17 has no such attribute, and masks always
            module._is_expert_parallel = True
        set_rows(module, [w.expand(count, *w.shape[1:]) for w in data])
        yield
    finally:
        set_rows(module, data)
        for name, value in before.items():
            setattr(module, name, value)


def set_rows(module: nn.Module, rows: Sequence[Tensor]) -> None:
    """Let the module's parameters hold these rows; none: leave them unchanged. Bypasses a lane's function modes."""
    with torch._C.DisableTorchFunction():
        for p, w in zip(module.parameters(), rows, strict=False):
            p.data = w
