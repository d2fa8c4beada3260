"""The objects of a run of lanes: owners, their scratch weights, and the lanes that hold them.

While an owner does not run, its parameters hold placeholders (`hollow.py`). A `Frame` is one call of an owner in one
lane, with the lane's weights for it; a lane has a stack of frames, outermost first. An `Emission` is the scratch of all
lanes that were served together; it is released to its source when the last of them has left the owner.

An owner is served in `Portion`s: one with everything, or one for each piece of a linear layer's weight or run of
stacked experts. Its call then consists of as many frames, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import greenlet
from torch import Tensor, nn

from ..kernels.records import Perturbation
from ..modules.modes import LaneModes
from ..modules.parameters import laid_out
from ..modules.recorder import ForwardCall, Recorder
from ..modules.tree import gathers_rows
from ..modules.watch import Origin
from ..plan.blocks import Piece
from ..plan.plan import Owner

Made = TypeVar("Made")


@dataclass(frozen=True)
class Lane:
    """One perturbed forward: its perturbation and its micro-batch."""

    perturbation: Perturbation
    batch: Any
    call: ForwardCall | None = None
    """This lane's own call, in place of that of all lanes: it records a gradient (`recording.py`)."""


class Source(Protocol):
    """The source of scratch weights. Called under the modes of `Hub.run`'s caller and no_grad."""

    def emit(
        self,
        owner: Owner,
        perturbations: Sequence[Perturbation],
        rows: Tensor | None = None,
        pieces: Sequence[Piece] | None = None,
        *,
        fresh: bool = False,
    ) -> list[list[Tensor]]:
        """[perturbation][parameter of owner.params], in the parameters' shapes, dtypes and device.

        A frozen parameter may be one tensor for all perturbations: lanes that run together do not change their weights
        in place.

        rows: int64 [U], only for owners with `rows`: the result is [U, D], row i is that of id rows[i]. pieces: one of
        the owner's portions (`Plan.portions`): only parameters with pieces in it, and only these rows of dim 0,
        `Plan.shapes`. Portions are requested in order. fresh: the run is watched and must distinguish one module's
        scratch from the next one's: use new memory if possible.
        """

    def release(self, scratch: list[list[Tensor]]) -> None:
        """Every lane that used `scratch` (the object `emit` returned) has left. May be called in a lane's modes."""


@dataclass(frozen=True)
class Portion:
    """The part of an owner that is served at once: everything, or some pieces of its cut parameters."""

    pieces: tuple[Piece, ...] | None
    """None: all."""
    block: int
    """The first of its blocks."""
    spans: bool
    """Whether it is in several blocks: each is visited once, so all lanes are served together."""
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    shapes: tuple[tuple[int, ...], ...]
    resting: tuple[Tensor, ...]
    """The parameters' placeholders while the owner does not run."""
    strides: tuple[tuple[int, ...] | None, ...]
    """The strides of each parameter; None: row-major."""
    is_laid_out: bool
    """Whether any parameter is not row-major."""


class Served:
    """The hub's view of an owner: its module, and its parameters in their portions."""

    __slots__ = ("index", "module", "overlaps", "owner", "portions", "resting", "rows")

    def __init__(self, index: int, owner: Owner, module: nn.Module, portions: list[Portion]):
        self.index, self.owner, self.module, self.portions = index, owner, module, portions
        self.overlaps = False  # another owner has one of its parameters too
        self.resting: list[tuple[str, nn.Parameter, int]] = []  # its parameters, and where the placeholder of each lies
        self.rows = owner.rows and gathers_rows(module)


class Emission:
    """Scratch of one emit, until the last of its lanes has left the owner. params: the parameters that hold it."""

    __slots__ = ("lanes_inside", "release", "scratch", "writes")

    def __init__(
        self,
        scratch: list[list[Tensor]],
        lanes_inside: int,
        release: Callable[[Any], None] | None,
        params: Sequence[nn.Parameter],
    ) -> None:
        self.scratch, self.lanes_inside, self.release = scratch, lanes_inside, release
        self.writes = _writes(params) if lanes_inside > 1 else -1
        """How often the parameters had been changed in place before; -1: there is one lane, which may change them."""

    def leave(self) -> None:
        self.lanes_inside -= 1
        if self.lanes_inside == 0:
            scratch, self.scratch = self.scratch, []
            if self.release is not None:
                self.release(scratch)


def laid_out_as(strides: Sequence[tuple[int, ...] | None], scratch: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copies of scratch weights with the strides of the model's own; one copy per tensor."""

    def copy(i: int, w: Tensor) -> Tensor:
        wanted = strides[i]
        return w.clone() if wanted is None else laid_out(w, wanted)

    return each_once(scratch, copy)


def each_once(scratch: Sequence[Sequence[Tensor]], make: Callable[[int, Tensor], Made]) -> list[list[Made]]:
    """`make(parameter's index, tensor)` for scratch, called once for a tensor that several lanes share."""
    made: dict[int, Made] = {}
    for weights in scratch:
        for i, w in enumerate(weights):
            if id(w) not in made:
                made[id(w)] = make(i, w)
    return [[made[id(w)] for w in weights] for weights in scratch]


class Frame:
    """An owner that is running in a lane, with the lane's weights for it, or for this portion of it."""

    __slots__ = ("emission", "origins", "portion", "served", "weights")

    def __init__(self, served: Served, portion: Portion, weights: list[Tensor], emission: Emission) -> None:
        self.served, self.portion, self.weights, self.emission = served, portion, weights, emission
        self.origins: list[Origin] = []  # of the weights, in a watched run

    def held(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters, and the lane's tensor for each."""
        return zip(self.portion.params, self.weights, strict=True)

    def replaced(self) -> list[str]:
        """Parameters whose data is not the lane's tensor."""
        names = zip(self.portion.names, self.held(), strict=True)
        return [name for name, (p, w) in names if p.data_ptr() != w.data_ptr()]

    def is_changed(self) -> bool:
        """Whether a parameter holds other data than the lane was given, or a weight shared with other lanes was changed
        in place since. Changes of values through `.data` are not seen."""
        for p, w in zip(self.portion.params, self.weights, strict=True):
            if p.data_ptr() != w.data_ptr():
                return True
        return self.emission.writes >= 0 and self.emission.writes != _writes(self.portion.params)


def _writes(params: Sequence[nn.Parameter]) -> int:
    """How often parameters were changed in place, by torch's counter; replacing their data does not count."""
    count = 0
    for p in params:
        if not p.is_inference():
            count += p._version
    return count


class PlainState:
    """Numbers, flags and texts in the attributes of a module and its submodules.

    A forward that changes a weight in place may record that in an attribute (RWKV: `layers_are_rescaled`). The change
    ends with the call, like the weight, so the attribute must be restored too: every call begins with the former state
    of both.
    """

    def __init__(self, module: nn.Module) -> None:
        self._of = [(m, self._plain(m)) for m in module.modules()]

    @staticmethod
    def _plain(module: nn.Module) -> dict[str, Any]:
        kinds = (bool, int, float, str, type(None))
        return {k: v for k, v in vars(module).items() if type(v) in kinds and k != "training"}

    def put_back(self) -> None:
        for module, values in self._of:
            for name in self._plain(module).keys() - values.keys():
                del vars(module)[name]
            vars(module).update(values)


class LaneRun:
    """One lane of the current run."""

    __slots__ = (
        "cells",
        "cursor",
        "error",
        "failed_in",
        "frames",
        "glet",
        "ids",
        "index",
        "lane",
        "last",
        "modes",
        "portion",
        "position",
        "recorder",
        "result",
        "rng",
        "want",
    )  # fmt: skip

    def __init__(self, index: int, lane: Lane) -> None:
        self.index, self.lane = index, lane
        self.glet: greenlet.greenlet | None = None
        self.frames: list[Frame] = []  # owners running in it, outermost first
        self.want = -1  # owner it waits for
        self.portion = 0  # and which portion of it
        self.ids: Tensor | None = None  # in: ids an embedding is called with; out: their places among the rows
        self.cursor = 0  # calls of the plan behind it
        self.position = 0  # call of the plan it waits for
        self.modes = LaneModes()
        self.rng: dict[str, Any] = {}
        self.cells: dict[Any, Any] = {}  # of the modules' state, as it left them when it gave way to another
        self.recorder = Recorder()
        self.result: Any = None
        self.error: BaseException | None = None
        self.last = self.failed_in = ""

    def __str__(self) -> str:
        return f"lane {self.index} ({self.lane.perturbation})"


def code_of(call: Any) -> Any:
    """The properties of a call that may affect the path through the model: its code, and that of bound functions."""
    if isinstance(call, partial):
        return tuple(code_of(part) for part in (call.func, *call.args) if callable(part))
    return getattr(call, "__code__", type(call))


def kind_of(batch: Any) -> Any:
    """The properties of a batch that may affect the path through the model."""
    if isinstance(batch, Mapping):
        return tuple((k, kind_of(v)) for k, v in sorted(batch.items(), key=lambda item: str(item[0])))
    if isinstance(batch, Tensor):
        return batch.ndim, batch.dtype
    if isinstance(batch, (list, tuple)):
        return tuple(kind_of(v) for v in batch)
    return batch if batch is None or isinstance(batch, (bool, str)) else type(batch)
