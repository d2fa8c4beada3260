"""The watch over a real run of lanes: exact for that run.

It sees everything that `watch.UseWatch` sees, and also weights used while they are away, weights changed in place,
lanes that read each other's tensors, and the memory that all lanes hold at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import PlanError
from .recorder import Recorder, Running, WeightAway
from .watch import BATCH_NORMS, Inputs, Origin, UseWatch, storage_key, watched_storage, weak_storage

_NORMS = frozenset({"embedding_renorm_"})  # scales the input's rows, each by its own norm


class KeptMemory(Protocol):
    """Memory that is restored after a run (`state.ModuleState`)."""

    def holds(self, key: int) -> bool: ...

    def before_write(self, key: int) -> None: ...


@dataclass(eq=False)
class _Made:
    """A tensor's memory: which lane made it, and whether weights or inputs went into it."""

    ref: weakref.ref[Any]
    """Removes the entry when the memory is freed."""
    by: Recorder
    of: str | None
    """The source: None: neither weights nor inputs; a parameter's name: that parameter alone; MANY: others."""
    nbytes: int


MANY = "*"


class RunWatch(UseWatch):  # type: ignore[no-untyped-call]
    """Watches a real run of lanes: finds uses of weights that are away, and lanes that share state."""

    def __init__(self, params: Mapping[str, nn.Parameter], state: KeptMemory | None = None) -> None:
        super().__init__(params)
        self._state = state
        self._writers: dict[int, set[Recorder]] = {}  # for memory that existed before the run
        self.writes_batch = False
        self.faults: list[str] = []
        self.crossings: list[str] = []
        self.notes: dict[str, None] = {}
        self.peak_bytes = 0
        """The most bytes of tensors made by lanes that all lanes held at once."""
        self._live_bytes = 0
        self._made: dict[int, _Made] = {}
        self._batch: dict[int, StorageWeakRef] = {}

    def taint(self, tensors: Iterable[Tensor]) -> None:
        """Mark inputs of lanes: results computed from them belong to a lane."""
        for t in tensors:
            key = storage_key(t)
            if key is not None and key not in self._batch:
                self._batch[key] = weak_storage(t)

    def read(self, recorder: Recorder, tensor: Tensor, origin: Origin) -> tuple[Running, ...]:
        path = super().read(recorder, tensor, origin)
        if recorder not in origin.held:
            how = "after its module returned" if recorder in origin.retired else "while it is away"
            self.faults.append(f"{origin.name!r} is used in {recorder.where()} {how}")
        return path

    def before(self, recorder: Recorder, func: Any, inputs: Inputs, written: list[Tensor]) -> None:
        for t in written:
            key = storage_key(t)
            if key in self.origins:
                self._check_write(recorder, func, inputs, t, self.origins[key])
            elif key is not None and key not in self._made:
                self._before_shared_write(recorder, key)
        updates = func.overloadpacket.__name__ in BATCH_NORMS or torch.Tag.inplace in func.tags
        for t, key in inputs:
            made = self._made.get(key) if key is not None else None
            if made is not None and made.by is not recorder and made.of is not None:
                self.crossings.append(recorder.where())
            writers = self._writers.get(key) if key is not None else None
            if writers and writers != {recorder} and not (updates and any(t is w for w in written)):
                self.crossings.append(recorder.where())  # an update alone (`count.add_(1)`) is no crossing

    def _before_shared_write(self, recorder: Recorder, key: int) -> None:
        """Called before an op writes into memory that existed before the run."""
        self._writers.setdefault(key, set()).add(recorder)
        self.writes_batch |= key in self._batch
        if self._state is not None and self._state.holds(key):
            self._state.before_write(key)
        else:
            self.notes[f"{recorder.where()} changes a tensor made before the forward; all lanes share it"] = None

    def after(self, recorder: Recorder, inputs: Inputs, outputs: list[Tensor]) -> None:
        """Record the owner of results of weights or inputs. Other tensors do not matter: a lane may fill tables."""
        known = {key for _, key in inputs if key is not None}
        of = self._made_of(known)
        for t in outputs:
            key = storage_key(t)
            if key is None or key in self.origins:
                continue
            if key in self._made:
                made = self._made[key]
                made.of = of if made.of in (None, of) else made.of if of is None else MANY
            elif key not in known:
                gone, nbytes = partial(self._forget, key), t.untyped_storage().nbytes()
                self._made[key] = _Made(watched_storage(t, gone), recorder, of, nbytes)
                self._live_bytes += nbytes
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def _made_of(self, keys: Iterable[int]) -> str | None:
        """The source of memory, as `_Made.of`."""
        found: set[str] = set()
        for key in keys:
            if key in self.origins:
                found.add(self.origins[key].name)
            elif key in self._batch:
                found.add(MANY)
            elif key in self._made and self._made[key].of is not None:
                found.add(self._made[key].of)  # type: ignore[arg-type]
        return None if not found else found.pop() if len(found) == 1 else MANY

    def _check_write(self, recorder: Recorder, func: Any, inputs: Inputs, weight: Tensor, origin: Origin) -> None:
        """A lane may change its own copy of a weight by values computed from that weight (a scale, a clamp, a norm):
        each call of the module starts with the stored weight. Raises PlanError if the change would carry other
        information."""
        away = recorder not in origin.held
        others = {key for t, key in inputs if t is not weight and key is not None and key not in self.origins}
        others |= {k for _, k in inputs if k in self.origins and self.origins[k].name != origin.name}
        if func.overloadpacket.__name__ not in _NORMS and self._made_of(others) not in (None, origin.name):
            raise PlanError(
                f"parameter {origin.name!r} is changed in place ({func}) in the forward of {recorder.where()}, by "
                "what comes of inputs or of other weights. Weights are away between calls, so the change would be "
                "lost: make it outside of the forward, or keep the value in a buffer."
            )
        if away:
            recorder.writes.add(origin.name)
            self.read(recorder, weight, origin)
            raise WeightAway(f"{origin.name!r} is changed in place while it is away")

    def _forget(self, key: int, _: Any) -> None:
        made = self._made.pop(key, None)
        if made is not None:
            self._live_bytes -= made.nbytes
