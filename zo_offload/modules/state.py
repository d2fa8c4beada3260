"""The state of modules that a forward changes: each lane has its own, and it is restored after every pass.

The rule: every lane starts with the modules' state before the pass, and after a pass that state is restored. So a
lane's result is a function of weights, batch and random numbers, for any order of lanes, and a run does not change if
it is resumed, replayed, or evaluated in between.

Two things can be changed:

    cells     attributes of modules (a number, a flag, a tensor kept for the next call), and what they lead to: entries
              of a dict, items of a list, attributes of plain objects (`places.py`). A lane that yields to another keeps
              the values of its cells, so lanes with state of their own run in lockstep like others.
    memory    of a tensor that existed before the pass, changed in place (running statistics, `count.add_(1)`). It is
              copied before the first write, and restored. Lanes write into the same memory: the watch
              (`run_watch.RunWatch`) detects a lane that reads another's writes; such lanes run one after another.

Watched passes find the cells and the memory that a model changes; later passes exchange and copy only these. The others
are checked once, at the end of the pass: cells by identity, tensors by version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from .generators import Generators, lane_seed, own_random_numbers
from .glance import Glance
from .modes import module_modes
from .places import GONE, LEAVES, Place, Reach
from .watch import storage_key

Cell = tuple[int, Any]
"""(id of a place's target, key)"""


class ModuleState:
    """The state of one model's modules during the passes of a hub. Between passes the caller may change it freely."""

    def __init__(self, model: nn.Module, generators: Generators) -> None:
        self._model, self._generators = model, generators
        self._reach: Reach | None = None
        self._glance: Glance | None = None  # of the places in reach
        self._cells: dict[Cell, Place] = {}  # known to be changed by lanes
        self._memory: dict[int, Tensor] = {}  # known to be changed: bytes of a storage, by its key
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # the bytes written in this pass, with their former values
        self._storages: dict[int, Tensor] = {}  # reachable tensors, by storage key
        self._passing: dict[int, Tensor] = {}  # the batches of this pass, in the same way
        self._versions: list[int] = []
        self._watching = self._noted = False  # noted: there is something to restore

    def note(self, watching: bool) -> bool:
        """Before a pass: note the present state. False if there are new objects: then watch the pass.

        watching: search for objects again, as before a watched pass.
        """
        known = self._note(watching)
        assert self._reach is not None
        self._copies = {key: (flat, flat.clone()) for key, flat in self._memory.items()}
        self._versions = [_version(t) for t in self._reach.tensors]
        self._watching, self._noted, self._passing = False, True, {}
        return known

    def watch(self, batches: Iterable[Tensor] = ()) -> None:
        """Make the pass a watched one. batches: tensors whose memory is restored too."""
        self._watching = True
        self._passing = {key: t for t in batches if (key := storage_key(t)) is not None}

    def _note(self, watching: bool) -> bool:
        reach = self._reach
        if reach is not None and not watching:
            assert self._glance is not None
            others = self._glance.changed()
            plain = (*LEAVES, type(GONE))
            if all(isinstance(v, plain) for place, key in others for v in (place.get(key), place.noted(key))):
                if others:  # for example, the caller has set a number
                    self._glance.note([place for place, _ in others])
                return True
        reach = self._reach = Reach(self._model)
        self._glance = Glance(reach.places)
        for generator in reach.generators:
            self._generators.meet(generator)
        self._storages = {key: t for t in reach.tensors if (key := storage_key(t)) is not None}
        places = {id(place.target): place for place in reach.places}
        self._cells = {cell: places[cell[0]] for cell in self._cells if cell[0] in places}
        self._memory = {key: flat for key, flat in self._memory.items() if key in self._storages}
        return False

    # ---- while lanes run ---------------------------------------------------------------------------------------------

    def holds(self, key: int) -> bool:
        """Whether a tensor in the storage of that key was reachable from the modules before the pass."""
        return key in self._storages or key in self._passing

    def before_write(self, key: int) -> None:
        """In a watched pass, called before an op writes into memory that is reachable from the modules."""
        if key in self._copies:
            return
        flat = _bytes_of(self._storages[key] if key in self._storages else self._passing[key])
        self._copies[key] = flat, flat.clone()
        if key in self._storages:
            self._memory[key] = flat

    def take(self) -> dict[Cell, Any]:
        """The values of the cells of a lane that yields to another."""
        if self._watching:
            self._learn()
        return {cell: place.get(cell[1]) for cell, place in self._cells.items()}

    def give(self, own: dict[Cell, Any]) -> None:
        """Set the cells to the values of the lane that continues, or to those before the pass if it has none."""
        for cell, place in self._cells.items():
            place.put(cell[1], own[cell] if cell in own else place.noted(cell[1]))

    def _learn(self) -> list[Cell]:
        """Changed cells that were not known to change."""
        assert self._glance is not None
        new: list[Cell] = []
        for place, key in self._glance.changed():
            cell = id(place.target), key
            if cell not in self._cells:
                self._cells[cell] = place
                new.append(cell)
        return new

    # ---- the end of a lane or of a pass ------------------------------------------------------------------------------

    def end(self) -> list[Cell]:
        """End the pass: `put_back` once; a second call does nothing."""
        if not self._noted:
            return []
        new = self.put_back()
        self._noted = False  # last: until then an interrupted call is repeated
        return new

    def put_back(self) -> list[Cell]:
        """Restore the state before the pass. Returns changed cells that were not known to change.

        Raises PlanError for such memory: its former contents are lost.
        """
        if self._reach is None:
            return []
        new = self._learn()
        changed = {id(self._cells[cell]): self._cells[cell] for cell in self._cells}
        for place in changed.values():
            place.put_back()
        for flat, copy in self._copies.values():
            flat.copy_(copy)
        self._check_memory()
        return new

    def _check_memory(self) -> None:
        assert self._reach is not None
        versions = [_version(t) for t in self._reach.tensors]
        if versions == self._versions:
            return
        pairs = zip(self._reach.tensors, versions, self._versions, strict=True)
        lost = [t for t, now, then in pairs if now != then and storage_key(t) not in self._copies]
        self._versions = versions
        if lost:
            names = {id(b): f"buffer {name!r}" for name, b in self._model.named_buffers()}
            which = names.get(id(lost[0]), "a tensor that the modules keep")
            self._reach = None  # the next pass is watched
            raise PlanError(
                f"{which} was changed in place by a forward, and was not when forwards like it were watched: its "
                "values from before are lost. Weights and journal are as after the last step: resume the run, or make "
                "the engine again"
            )


@contextmanager
def undisturbed(model: nn.Module, mode: str, seed: int) -> Iterator[None]:
    """While open, for forwards of copies of the model: its modules are in the run's mode, and random numbers are those
    of `seed`. Afterwards modules, their classes and the process's generators are restored."""
    state = ModuleState(model, Generators())
    state.note(watching=True)
    try:
        with module_modes(list(model.modules()), mode), own_random_numbers(lane_seed(seed, "trace", 0)):
            yield
    finally:
        state.end()


def _bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
