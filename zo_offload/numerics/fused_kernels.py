"""Dispatches a fused pass to the native library, the CUDA kernels or the reference: one call, the same bits.

`fused.py` has checked every `PassCall`. The kernels are chosen by the device of the stored bytes, and by whether they
implement the format and the noise; add the kernels of another device in `kernels_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..formats import Format, format_of, get_format
from ..formats.codec import planes
from ..kernels import native
from ..kernels.device_updates import DeviceUpdates, UpdateTable
from ..kernels.records import LANE, UPDATE, Mask, Perturbation, Terms, Update, Updates, lane_of, places_of
from . import cuda_kernels, reference
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

    def ready(self, calls: Sequence[PassCall]) -> Ready | None:
        return None


class OnCpu:
    """The native library."""

    def __init__(self, library: native.Library) -> None:
        self._library = library

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        call.check_rows()
        updates, places = call.host_updates(), places_of(call.perturbations)
        terms = b"".join([terms.read() for terms in places])
        tail = [update.packed for update in updates] + [terms] + [LANE.pack(*lane) for lane in call.lanes(places)]
        self._library.run_pass(
            mark.codes, **_host_fields(call, call.residual), num_updates=len(updates), write_back=call.write_back,
            num_terms=len(terms) // UPDATE.size, tail=b"".join(tail),
            threads=torch.get_num_threads() if call.threads is None else call.threads,
        )  # fmt: skip

    def ready(self, calls: Sequence[PassCall]) -> Ready | None:
        return _ReadyOnCpu(self._library, calls)


def _host_fields(call: PassCall, residual: Tensor | None) -> dict[str, Any]:
    """The arguments of `native.pack_pass` for a call, except its updates and whether it writes."""
    rows = call.rows
    return dict(
        **planes(call.stored, residual, call.fmt, call.numel), rows=0 if rows is None else rows.data_ptr(),
        num_rows=0 if rows is None else rows.numel(), numel=call.computed, offset=call.offset, total=call.numel,
        num_lanes=len(call.outs), param_id=call.param_id, distribution=call.noise.kind.name, rounds=call.noise.rounds,
        stochastic=call.stochastic, target_scales=call.target_scales, master=call.master, mask=call.mask,
    )  # fmt: skip


class _ReadyPart:
    """One of the calls of a `Ready`: its fields with and without its residual part, and where its outputs are."""

    __slots__ = ("fields", "may_fold", "outs", "wide")

    def __init__(self, call: PassCall, fields: Callable[[PassCall, Tensor | None], dict[str, Any]]) -> None:
        self.fields = fields(call, None)
        self.wide = self.fields if call.residual is None else fields(call, call.residual)
        self.may_fold = call.target_scales or (
            call.fmt.trains and (call.residual is not None or not call.fmt.residual_nbytes(call.numel))
        )
        self.outs = [(out.data_ptr(), format_of(out.dtype).code) for out in call.outs]

    def checked(self, folds: bool, write_back: bool, residual: bool) -> dict[str, Any]:
        """The fields of such a pass; ConfigError if it is not possible."""
        if folds and not (self.may_fold and (residual or self.wide is self.fields)):
            raise ConfigError("an update folds into what was not made ready for it")
        return {**(self.wide if residual else self.fields), "write_back": write_back}


class _ReadyOnCpu:
    """Packs the arguments of `OnCpu.run_pass` once, except updates and lanes."""

    def __init__(self, library: native.Library, calls: Sequence[PassCall]) -> None:
        self._library, self._threads = library, calls[0].threads
        self._parts = [_ReadyPart(call, _host_fields) for call in calls]
        self._heads: list[dict[tuple[int, int, bool, bool, bool], bytes]] = [{} for _ in calls]

    def run(self, told: Sequence[Told], mark: Mark) -> None:
        packed: list[bytes] = []
        pack, before = LANE.pack, None
        places, terms = dict[Terms, int](), b""
        for part, heads, (updates, lanes, write_back, residual) in zip(self._parts, self._heads, told, strict=True):
            if isinstance(updates, DeviceUpdates):
                updates = Updates(updates.read())
            if lanes is not before:  # most often the same as for the previous part
                before, places = lanes, places_of(lanes)
                terms = b"".join([terms.read() for terms in places]) if places else b""
            kind = len(updates), len(terms), updates.folds, write_back, residual
            head = heads.get(kind)
            if head is None:
                fields = part.checked(updates.folds, write_back, residual)
                num_terms = len(terms) // UPDATE.size
                head = heads[kind] = native.pack_pass(**fields, num_updates=len(updates), num_terms=num_terms)
            packed += head, updates.packed, terms
            pairs = zip(part.outs, lanes, strict=True)
            if places:
                packed += [pack(*lane_of(lane, address, code, places)) for (address, code), lane in pairs]
            else:
                packed += [pack(lane.seed, address, lane.scale, code) for (address, code), lane in pairs]
        threads = torch.get_num_threads() if self._threads is None else self._threads
        self._library.run_passes(mark.codes, b"".join(packed), len(self._parts), threads)


class OnGpu:
    """The CUDA kernels: launched on torch's current stream, without waiting. A row outside becomes NaN."""

    def __init__(self, kernels: cuda_kernels.CudaKernels) -> None:
        self._kernels = kernels

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        mark.in_parts = True
        rows, (terms, places) = call.rows, _terms(call)
        self._kernels.run_pass(
            **planes(call.stored, call.residual, call.fmt, call.numel), updates=_records(call),
            lanes=call.lanes(places), terms=terms,
            rows=0 if rows is None else rows.data_ptr(), num_rows=0 if rows is None else rows.numel(),
            total_rows=call.total_rows, numel=call.computed, offset=call.offset, total=call.numel,
            param_id=call.param_id, noise=call.noise, write_back=call.write_back, stochastic=call.stochastic,
            target_scales=call.target_scales, master=call.master, mask=call.mask, stream=self._kernels.stream(),
        )  # fmt: skip

    def ready(self, calls: Sequence[PassCall]) -> Ready | None:
        return None


def _records(call: PassCall) -> DeviceUpdates | None:
    """The updates in device memory: in a run they are there; others are copied for this pass."""
    if isinstance(call.updates, DeviceUpdates):
        return call.updates
    if not call.updates:
        return None
    table = UpdateTable(call.stored.device)
    table.append(call.updates)
    return table.since(0, True)


def _terms(call: PassCall) -> tuple[Tensor | None, Mapping[Terms, int]]:
    """struct zo_update of the terms of all sums in device memory, and the index of each sum's first. In a run they are
    already there, in one tensor."""
    places = places_of(call.perturbations)
    records = next((terms.records for terms in places), None)
    if records is not None and all(terms.records is records for terms in places):
        return records, {terms: terms.first for terms in places}
    found = bytearray(b"".join([terms.read() for terms in places]))
    data = torch.frombuffer(found, dtype=torch.uint8).view(-1, UPDATE.size) if found else None
    return None if data is None else data.to(call.stored.device), places


_REFERENCE = Reference()


def kernels_for(stored: Tensor, fmt: Format, noise: NoiseSpec) -> Kernels:
    """The fastest kernels on the bytes' device that implement the format and the noise."""
    if stored.is_cuda:
        return OnGpu(cuda_kernels.kernels(stored.device.index))
    if stored.device.type != "cpu":
        raise ConfigError(f"stored is on {stored.device}: this pass runs on the CPU and on CUDA devices")
    library = native.library()
    if library is None or fmt.code not in library.formats or noise.kind.code is None:
        return _REFERENCE
    return OnCpu(library)
