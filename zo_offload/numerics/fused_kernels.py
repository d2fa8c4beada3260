"""Who runs a fused pass: the native library, the CUDA kernels, or the reference; one call, `run_pass`, the same bits.

`fused.py` has checked a `PassCall` before it comes here. What runs it follows from where the stored bytes are and from
what the kernels there make of the format and the noise; a further device has its kernels in `kernels_for`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..formats import Format, format_of, get_format
from ..formats.codec import planes
from ..kernels import native
from ..kernels.device_updates import DeviceUpdates, UpdateTable
from ..kernels.records import LANE, Mask, Perturbation, Update
from . import cuda_kernels, reference
from .noise import NoiseSpec


@dataclass
class Mark:
    """What is known of a pass that writes, whenever it is broken off: not begun, done, or neither."""

    codes: list[int] = field(default_factory=list)
    """[0]: the one call that writes was made and is done; []: it was not made."""
    in_parts: bool = False
    """It is more than one call: begun, and nothing else is known of it."""

    @property
    def is_done(self) -> bool | None:
        """None: not known."""
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
    """None where this pass does not use it."""
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
    """Outputs are of both parts of a split format; no update folds."""
    rows: Tensor | None = None
    """int64 [U], at least one: indices in the whole parameter. None: all elements, in order."""
    row_numel: int = 0
    total_rows: int = 0
    """Of the whole parameter."""
    mask: Mask | None = None

    @property
    def computed(self) -> int:
        """Elements that each output has of one row, or of the whole pass."""
        return self.numel if self.rows is None else self.row_numel

    def host_updates(self) -> Sequence[Update]:
        """The updates as the host knows them. Waits for the device if they are there."""
        return self.updates.read() if isinstance(self.updates, DeviceUpdates) else self.updates

    def lanes(self) -> list[tuple[int, int, float, int]]:
        """zo_lane of each output: seed, address, scale, format code."""
        return [
            (p.seed, out.data_ptr(), p.scale, format_of(out.dtype).code)
            for p, out in zip(self.perturbations, self.outs, strict=True)
        ]

    def check_rows(self) -> None:
        """ConfigError on a row outside of the parameter. Looks at the rows: on a GPU that would be to wait for them."""
        if self.rows is None:
            return
        low, high = (int(x) for x in torch.aminmax(self.rows))
        if low < 0 or high >= self.total_rows:
            raise ConfigError(f"rows {low}..{high} asked of a parameter with {self.total_rows} rows")


class Kernels(Protocol):
    """What runs fused passes on one device."""

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        """Run it. mark: says afterwards, whatever was raised on the way, whether the stored bytes were changed."""


class Reference:
    """numpy and torch on the CPU: any format, any distribution, slowly."""

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        call.check_rows()
        mark.in_parts = True
        if call.master and call.residual is not None:
            values = call.fmt.join(call.stored, call.residual, call.numel)
            call = replace(call, stored=values.view(torch.uint8), fmt=get_format("fp32"), residual=None, master=False)
        updates, target = call.host_updates(), "scales" if call.target_scales else "values"
        if call.rows is None:
            reference.fused_pass(
                call.stored, call.fmt, param_id=call.param_id, numel=call.numel, offset=call.offset, updates=updates,
                write_back=call.write_back, stochastic=call.stochastic, noise=call.noise,
                perturbations=call.perturbations, outs=call.outs, residual=call.residual, target=target,
                mask=call.mask,
            )  # fmt: skip
            return
        reference.fused_rows(
            call.stored, call.fmt, param_id=call.param_id, numel=call.numel, row_numel=call.row_numel, rows=call.rows,
            first_row=call.offset // call.row_numel, updates=updates, stochastic=call.stochastic, noise=call.noise,
            perturbations=call.perturbations, residual=call.residual, target=target, mask=call.mask,
            outs=[out.view(call.rows.numel(), call.row_numel) for out in call.outs],
        )  # fmt: skip


class OnCpu:
    """The native library."""

    def __init__(self, library: native.Library) -> None:
        self._library = library

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        call.check_rows()
        updates, rows = call.host_updates(), call.rows
        tail = b"".join([update.packed for update in updates] + [LANE.pack(*lane) for lane in call.lanes()])
        self._library.run_pass(
            mark.codes, **planes(call.stored, call.residual, call.fmt, call.numel),
            rows=0 if rows is None else rows.data_ptr(), num_rows=0 if rows is None else rows.numel(),
            numel=call.computed, offset=call.offset, total=call.numel, num_updates=len(updates),
            num_lanes=len(call.outs), param_id=call.param_id, distribution=call.noise.kind.name,
            rounds=call.noise.rounds, write_back=call.write_back, stochastic=call.stochastic,
            target_scales=call.target_scales, master=call.master, mask=call.mask, tail=tail,
            threads=torch.get_num_threads() if call.threads is None else call.threads,
        )  # fmt: skip


class OnGpu:
    """The CUDA kernels: launched on torch's current stream, and back at once. A row outside comes out as NaN."""

    def __init__(self, kernels: cuda_kernels.CudaKernels) -> None:
        self._kernels = kernels

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        mark.in_parts = True
        rows = call.rows
        self._kernels.run_pass(
            **planes(call.stored, call.residual, call.fmt, call.numel), updates=_records(call), lanes=call.lanes(),
            rows=0 if rows is None else rows.data_ptr(), num_rows=0 if rows is None else rows.numel(),
            total_rows=call.total_rows, numel=call.computed, offset=call.offset, total=call.numel,
            param_id=call.param_id, noise=call.noise, write_back=call.write_back, stochastic=call.stochastic,
            target_scales=call.target_scales, master=call.master, mask=call.mask, stream=self._kernels.stream(),
        )  # fmt: skip


def _records(call: PassCall) -> DeviceUpdates | None:
    """The updates in device memory: they are there in a run; others are brought there, for this pass."""
    if isinstance(call.updates, DeviceUpdates):
        return call.updates
    if not call.updates:
        return None
    table = UpdateTable(call.stored.device)
    table.append(call.updates)
    return table.since(0, True)


_REFERENCE = Reference()


def kernels_for(stored: Tensor, fmt: Format, noise: NoiseSpec) -> Kernels:
    """What runs passes over bytes that are there: the fastest that knows the format and the noise."""
    if stored.is_cuda:
        return OnGpu(cuda_kernels.kernels(stored.device.index))
    if stored.device.type != "cpu":
        raise ConfigError(f"stored is on {stored.device}: this pass runs on the CPU and on CUDA devices")
    library = native.library()
    if library is None or fmt.code not in library.formats or noise.kind.code is None:
        return _REFERENCE
    return OnCpu(library)
