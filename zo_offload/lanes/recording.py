"""Autograd in one lane, from the first use of chosen parameters on: the gradient of a tail without a visit of its own.

Lanes run without autograd. A lane that records turns it on once an owner of one of the chosen parameters has its
weights; what comes before has no graph, so nothing of it is kept. While lanes run, only the chosen parameters require a
gradient. The gradient is computed inside the lane, right after its loss.

The graph needs tensors that the forward leaves behind. Activations are kept as they are. A lane's weights lie in
scratch that the next module overwrites, so those that the graph needs are copied: the decoded weights between the
tail's first use and the loss, of one lane. torch does not check by itself that a kept tensor is unchanged; this module
does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ConfigError, PlanError
from ..modules.watch import storage_key
from .serving import LaneRun

Kept = tuple[Tensor, int]
"""A tensor that the graph keeps, and how often it had been changed in place."""


class Recording:
    """The parameters whose gradient lanes record; with none it does nothing. `begin` and `end` enclose the time in
    which a hub is attached to the model."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self.names = tuple(names)
        self._chosen = frozenset(names)
        self._params: dict[str, nn.Parameter] = {}
        self._before: list[tuple[nn.Parameter, bool]] = []  # whether each parameter required a gradient

    def begin(self, params: Mapping[str, nn.Parameter]) -> None:
        """Let only the chosen parameters require a gradient. params: all that stream, by name."""
        if not self.names:
            return
        self._before = [(p, p.requires_grad) for p in params.values()]
        self._params = {name: params[name] for name in self.names}
        for name, p in params.items():
            if p.requires_grad is not (name in self._chosen):
                p.requires_grad_(name in self._chosen)

    def end(self) -> None:
        """Let each parameter require a gradient as before."""
        for p, required in self._before:
            p.requires_grad_(required)
        self._before, self._params = [], {}

    def entered(self, lane: LaneRun, params: Collection[str]) -> None:
        """Call in a lane once the owner of `params` has its weights."""
        if lane.lane.call is not None and not self._chosen.isdisjoint(params):
            torch.set_grad_enabled(True)

    @contextlib.contextmanager
    def keeping(self, lane_here: Any) -> Iterator[None]:
        """While open, graphs keep copies of weights. lane_here: returns the running lane."""
        if not self.names:
            yield
            return

        def keep(tensor: Tensor) -> Kept:
            lane, kept = lane_here(), tensor.detach()
            key = storage_key(kept)
            weights = () if lane is None else (w for frame in lane.frames for w in frame.weights)
            if key is not None and any(storage_key(w) == key for w in weights):
                kept = kept.clone()
            return kept, kept._version

        with saved_tensors_hooks(keep, _unchanged):
            yield

    def gradients(self, loss: Any) -> tuple[Tensor, ...]:
        """The loss's gradient by each chosen parameter, float32, in order. Call in the lane that recorded it.

        Raises ConfigError if the loss has none, PlanError if torch cannot compute it.
        """
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"tail: the objective returned {loss!r:.60}, which has no gradient, and a tail is trained by its exact "
                "gradient. Return the loss as a tensor that torch can differentiate, or leave out tail="
            )
        if loss.grad_fn is None:
            raise ConfigError(
                f"tail: the loss does not depend on the {len(self.names)} parameters of the tail "
                f"({self.names[0]!r}, ...) by anything that torch differentiates. Look at tail=, and at the objective"
            )
        try:
            found = torch.autograd.grad(loss.reshape(()), list(self._params.values()), allow_unused=True)
        except RuntimeError as error:
            raise PlanError(f"tail: torch cannot compute the gradient of the tail: {error}") from error
        unused = [name for name, grad in zip(self.names, found, strict=True) if grad is None]
        if unused:
            raise ConfigError(
                f"tail: the loss does not depend on {len(unused)} of its {len(self.names)} parameters ({unused[0]!r}, "
                "...), or uses them where torch records nothing. Leave them out of tail="
            )
        return tuple(grad.float() for grad in found)


def _unchanged(kept: Kept) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise PlanError(
            f"tail: the forward changes a tensor of shape {tuple(tensor.shape)} in place that its gradient needs. "
            "Begin the tail behind that place, or leave out tail="
        )
    return tensor
