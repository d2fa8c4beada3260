"""A fused pass as it is given to kernels, and kernels as they are asked: the same for CPU, GPU and reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..formats import Format, format_of
from ..formats.codec import planes
from ..kernels.device_updates import DeviceUpdates
from ..kernels.records import Mask, Perturbation, Terms, Update, Updates, lane_of
from .noise import NoiseSpec


@dataclass
class Mark:
    """The state of a writing pass, known after any interruption: not begun, done, or neither."""

    codes: list[int] = field(default_factory=list)
    """[0]: the one writing call is done; []: it was not made."""
    in_parts: bool = False
    """The pass has several calls: it has begun, and nothing else is known."""

    @property
    def is_done(self) -> bool | None:
        """Whether the pass is done; None: not known."""
        if self.in_parts or self.codes not in ([], [0]):
            return None
        return self.codes == [0]


@dataclass(slots=True, kw_only=True)
class PassCall:
    """One fused pass over consecutive elements, or over gathered rows, of one parameter. See `fused.py` for the fields.

    numel: elements that `stored` holds; offset: the index of the first of them in the parameter.
    """

    stored: Tensor
    residual: Tensor | None
    """None if this pass does not use it."""
    fmt: Format
    numel: int
    offset: int
    param_id: int
    updates: Sequence[Update] | DeviceUpdates
    write_back: bool
    stochastic: bool
    noise: NoiseSpec
    perturbations: Sequence[Perturbation]
    outs: Sequence[Tensor]
    target_scales: bool
    threads: int | None
    master: bool = False
    """Outputs are made from both parts of a split format; no update folds."""
    rows: Tensor | None = None
    """int64 [U], at least one: indices in the whole parameter. None: all elements, in order."""
    row_numel: int = 0
    total_rows: int = 0
    """Rows of the whole parameter."""
    mask: Mask | None = None

    @property
    def computed(self) -> int:
        """Elements of each output per row, or in the whole pass."""
        return self.numel if self.rows is None else self.row_numel

    def host_updates(self) -> Sequence[Update]:
        """The updates on the host. Waits for the device if they are there."""
        return self.updates.read() if isinstance(self.updates, DeviceUpdates) else self.updates

    def lanes(self, places: Mapping[Terms, int]) -> list[tuple[int, int, float, int]]:
        """struct zo_lane of each output. places: for each of the lanes' sums, the index of its first term."""
        return [
            lane_of(lane, out.data_ptr(), format_of(out.dtype).code, places)
            for lane, out in zip(self.perturbations, self.outs, strict=True)
        ]

    def check_rows(self) -> None:
        """ConfigError on a row outside the parameter. Reads the rows, which on a GPU would wait for it."""
        if self.rows is None:
            return
        low, high = (int(x) for x in torch.aminmax(self.rows))
        if low < 0 or high >= self.total_rows:
            raise ConfigError(f"rows {low}..{high} asked of a parameter with {self.total_rows} rows")


Told = tuple[Updates | DeviceUpdates, Sequence[Perturbation], bool, bool]
"""The arguments of one run of a ready pass: updates, one perturbation per output, whether to write back, and whether
the residual part may be used."""


class Ready(Protocol):
    """Fused passes over several parameters, prepared once and run many times, each time as one call of the kernels.
    Holds addresses, not memory: the memory must still exist at each run."""

    def run(self, told: Sequence[Told], mark: Mark) -> None:
        """Run all. told: for each, in the order of the calls. mark: see `Kernels.run_pass`; for all that write."""


class Kernels(Protocol):
    """Runs fused passes on one device."""

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        """Run it. mark: tells afterwards, even after an exception, whether the stored bytes were changed."""

    def ready(self, calls: Sequence[PassCall]) -> Ready | None:
        """The calls (without rows), prepared to run together with any updates and perturbations; None: they can
        only run one by one. A call may use its `residual`; its updates and perturbations are ignored.
        """


def fields_of(call: PassCall, residual: Tensor | None) -> dict[str, Any]:
    """The arguments of `native.pack_pass` for a call, except its updates and whether it writes."""
    rows = call.rows
    return dict(
        **planes(call.stored, residual, call.fmt, call.numel), rows=0 if rows is None else rows.data_ptr(),
        num_rows=0 if rows is None else rows.numel(), numel=call.computed, offset=call.offset, total=call.numel,
        num_lanes=len(call.outs), param_id=call.param_id, distribution=call.noise.kind.name, rounds=call.noise.rounds,
        stochastic=call.stochastic, target_scales=call.target_scales, master=call.master, mask=call.mask,
        rank=call.noise.rank, columns=call.noise.columns,
    )  # fmt: skip


class ReadyPart:
    """One of the calls of a `Ready`: its fields with and without its residual part, and where its outputs are."""

    __slots__ = ("fields", "may_fold", "outs", "wide")

    def __init__(self, call: PassCall) -> None:
        self.fields = fields_of(call, None)
        self.wide = self.fields if call.residual is None else fields_of(call, call.residual)
        self.may_fold = call.target_scales or (
            call.fmt.trains and (call.residual is not None or not call.fmt.residual_nbytes(call.numel))
        )
        self.outs = [(out.data_ptr(), format_of(out.dtype).code) for out in call.outs]

    def checked(self, folds: bool, write_back: bool, residual: bool) -> dict[str, Any]:
        """The fields of such a pass; ConfigError if it is not possible."""
        if folds and not (self.may_fold and (residual or self.wide is self.fields)):
            raise ConfigError("an update folds into what was not made ready for it")
        return {**(self.wide if residual else self.fields), "write_back": write_back}
