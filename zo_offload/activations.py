"""How much memory one forward's activations take, found on meta tensors: no weights, no arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .memory import Activations
from .plan import Plan
from .trace import ForwardCall, MetaWatch, meta_copy
from .watch import Recorder, storage_key


class _LiveWatch(MetaWatch):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that ops made and that are still alive."""

    def __init__(self) -> None:
        super().__init__({})
        self.live = self.peak = 0
        self._seen: set[int] = set()
        self.recorder = Recorder()

    def after(self, recorder: Recorder, inputs: list[tuple[Tensor, int | None]], outputs: list[Tensor]) -> None:
        known = {key for _, key in inputs}
        for tensor in outputs:
            key = storage_key(tensor)
            if key is None or key in known or key in self._seen:
                continue
            storage = tensor.untyped_storage()
            nbytes = storage.nbytes()
            self._seen.add(key)
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        self._seen.discard(key)


def measure_activations(model: nn.Module, plan: Plan, batch: Mapping[str, Any], call: ForwardCall) -> Activations:
    """Peak bytes of one lane's forward on `batch`, and what it holds when it enters a block of a stack.

    The model may be hollow or on meta. Returns zeros if the forward cannot run without weights; the plan then says
    that activations are not in its figure.
    """
    watch = _LiveWatch()
    shadow = meta_copy(model)
    between = [0]
    blocks = {block.name for block in plan.blocks}
    for name, module in shadow.named_modules():
        if name in blocks:
            module.register_forward_pre_hook(lambda m, a: between.append(watch.live))
    inputs = {k: v.to("meta") if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        with torch.no_grad(), watch:
            call(shadow, inputs)
    except Exception:  # whatever a model's code may raise without real values: the caller says that it is unknown
        return Activations()
    return Activations(watch.peak, max(between))
