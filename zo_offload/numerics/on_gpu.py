"""Fused passes on a GPU: one launch for all parameters of an owner that have one format.

What a launch is told lies in its own argument, which the driver copies (`cuda_args.py`). It is packed when the owner's
scratch and slot are first seen; a visit rewrites the addresses of its updates and the seeds and scales of its lanes,
and the rest when what folds changes. Nothing is allocated, uploaded or waited for. `OnGpu.run_pass` launches one
parameter: for gathered rows, for more lanes than a launch takes, and as the reference of the other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats.codec import planes
from ..kernels import native
from ..kernels.device_updates import DeviceUpdates, UpdateTable
from ..kernels.driver import Params
from ..kernels.records import LANE, UPDATE, Perturbation, Terms, Update, lane_of, places_of
from .calls import Mark, PassCall, Ready, ReadyPart, Told
from .cuda_args import LANES, LANES_AT, PART_BYTES, PARTS, blocks_of, pack_args, pack_part, pass_kernel, tiles
from .cuda_kernels import CudaKernels

_TWO = struct.Struct("<2Q")
_NO_UPDATES = DeviceUpdates(torch.empty(0, dtype=torch.uint8, device="cpu"), 0, ())


class OnGpu:
    """The CUDA kernels: launched on torch's current stream, without waiting. A row outside becomes NaN."""

    def __init__(self, kernels: CudaKernels) -> None:
        self._kernels = kernels

    def run_pass(self, call: PassCall, mark: Mark) -> None:
        mark.in_parts = True
        rows, (terms, places) = call.rows, _terms(call.perturbations, call.stored.device)
        updates = call.updates
        if not isinstance(updates, DeviceUpdates):
            updates = _on_device(updates, call.stored.device)
        self._kernels.run_pass(
            **planes(call.stored, call.residual, call.fmt, call.numel), updates=updates,
            lanes=call.lanes(places), terms=terms,
            rows=0 if rows is None else rows.data_ptr(), num_rows=0 if rows is None else rows.numel(),
            total_rows=call.total_rows, numel=call.computed, offset=call.offset, total=call.numel,
            param_id=call.param_id, noise=call.noise, write_back=call.write_back, stochastic=call.stochastic,
            target_scales=call.target_scales, master=call.master, mask=call.mask, stream=self._kernels.stream(),
        )  # fmt: skip

    def ready(self, calls: Sequence[PassCall]) -> Ready | None:
        return _ReadyOnGpu(self._kernels, calls) if all(len(call.outs) <= LANES for call in calls) else None


class _ReadyOnGpu:
    """One launch for all calls of a kernel: of a format, that is, so one or two for an owner."""

    def __init__(self, kernels: CudaKernels, calls: Sequence[PassCall]) -> None:
        self._kernels, self._device = kernels, calls[0].stored.device
        groups: dict[str, list[list[int]]] = {}
        for i, call in enumerate(calls):
            name = pass_kernel(call.fmt.code, call.noise.kind.name, call.target_scales)
            together = groups.setdefault(name, [[]])
            if len(together[-1]) == PARTS or sum(len(calls[j].outs) for j in [*together[-1], i]) > LANES:
                together.append([])
            together[-1].append(i)
        self._launches = [
            _JoinedLaunch(name, {i: calls[i] for i in indices}, kernels.most_blocks)
            for name, together in groups.items()
            for indices in together
        ]

    def run(self, told: Sequence[Told], mark: Mark) -> None:
        mark.in_parts = True
        stream = self._kernels.stream()
        for launch in self._launches:
            # what was uploaded for it may be freed once it is enqueued: memory is used again in the stream's order
            uploaded = launch.tell(told, self._device)
            self._kernels.launch(launch.name, launch.params, launch.blocks, stream)
            del uploaded


class _JoinedLaunch:
    """A launch's struct, packed once; each visit rewrites what changes."""

    def __init__(self, name: str, calls: Mapping[int, PassCall], most_blocks: int) -> None:
        """calls: by their index among all that are run together."""
        self.name = name
        ends = blocks_of([tiles(c.noise.kind.name, c.numel, c.offset) for c in calls.values()], most_blocks)
        self.blocks = ends[-1]
        self.params = Params(pack_args([], []))
        self._parts, lane, begin = list[_JoinedPart](), 0, 0
        for n, ((i, call), end) in enumerate(zip(calls.items(), ends, strict=True)):
            where = dict(first_lane=lane, first_block=begin, end_block=end)
            self._parts.append(_JoinedPart(ReadyPart(call), i, n * PART_BYTES, where))
            lane, begin = lane + len(call.outs), end

    def tell(self, told: Sequence[Told], device: torch.device) -> list[Any]:
        """Rewrite the struct; returns what must live until the launch is enqueued."""
        args, before, uploaded = self.params.args, None, list[Any]()
        terms: Tensor | None = None
        places: Mapping[Terms, int] = {}
        for part in self._parts:
            updates, lanes, write_back, residual = told[part.index]
            if not isinstance(updates, DeviceUpdates):
                updates = _on_device(updates, device)
                uploaded.append(updates)
            if lanes is not before:  # most often the same as for the previous part
                before, (terms, places) = lanes, _terms(lanes, device)
                uploaded.append(terms)
            num_terms = 0 if terms is None else len(terms)
            part.tell(args, updates, write_back, residual, num_terms)
            address = updates.address if updates.folds else 0
            _TWO.pack_into(args, part.addresses_at, address, 0 if terms is None else terms.data_ptr())
            at = part.lanes_at
            for (address, code), lane in zip(part.part.outs, lanes, strict=True):
                LANE.pack_into(args, at, *lane_of(lane, address, code, places))
                at += LANE.size
        return uploaded


class _JoinedPart:
    """One parameter's place in a `_JoinedLaunch`. index: among all that are run together; at: in the struct;
    where: its first lane, and its blocks."""

    __slots__ = ("_at", "_heads", "_kind", "_where", "addresses_at", "index", "lanes_at", "part")

    def __init__(self, part: ReadyPart, index: int, at: int, where: dict[str, int]) -> None:
        self.part, self.index = part, index
        self.addresses_at, self.lanes_at = at + native.UPDATES_AT, LANES_AT + LANE.size * where["first_lane"]
        self._at, self._where = at, where
        self._kind: tuple[int, int, bool, bool, int] | None = None
        self._heads: dict[tuple[int, int, bool, bool, int], bytes] = {}

    def tell(self, args: bytearray, updates: DeviceUpdates, write_back: bool, residual: bool, num_terms: int) -> None:
        """Rewrite everything but the addresses of updates and terms, if it changed: with a fold it does."""
        kind = len(updates.folds), updates.last_fold, write_back, residual, num_terms
        if kind == self._kind:
            return
        head = self._heads.get(kind)
        if head is None:
            head = self._heads[kind] = pack_part(
                **self.part.checked(updates.last_fold >= 0, write_back, residual), num_updates=len(updates.folds),
                num_terms=num_terms, last_fold=updates.last_fold, total_rows=0, **self._where,
            )  # fmt: skip
        args[self._at : self._at + PART_BYTES] = head
        self._kind = kind


def _on_device(updates: Sequence[Update], device: torch.device) -> DeviceUpdates:
    """Updates that the host has, copied for one pass: in a run they are in device memory."""
    if not updates:
        return _NO_UPDATES
    table = UpdateTable(device)
    table.append(updates)
    return table.since(0, True)


def _terms(lanes: Sequence[Perturbation], device: torch.device) -> tuple[Tensor | None, Mapping[Terms, int]]:
    """struct zo_update of the terms of all sums in device memory, and the index of each sum's first. In a run they are
    already there, in one tensor."""
    places = places_of(lanes)
    if not places:
        return None, places
    records = next((terms.records for terms in places), None)
    if records is not None and all(terms.records is records for terms in places):
        return records, {terms: terms.first for terms in places}
    found = bytearray(b"".join([terms.read() for terms in places]))
    return torch.frombuffer(found, dtype=torch.uint8).view(-1, UPDATE.size).to(device), places
