"""Dispatches a fused pass to the native library, the CUDA kernels or the reference: one call, the same bits.

`fused.py` has checked every `PassCall`. The kernels are chosen by the device of the stored bytes, and by whether they
implement the format and the noise; add the kernels of another device in `kernels_for`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..formats import Format, get_format
from ..kernels import native
from ..kernels.device_updates import DeviceUpdates
from ..kernels.records import LANE, UPDATE, Terms, Updates, lane_of, places_of
from . import cuda_kernels, reference
from .calls import Kernels, Mark, PassCall, Ready, ReadyPart, Told, fields_of
from .noise import NoiseSpec
from .on_gpu import OnGpu


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
            mark.codes, **fields_of(call, call.residual), num_updates=len(updates), write_back=call.write_back,
            num_terms=len(terms) // UPDATE.size, tail=b"".join(tail),
            threads=torch.get_num_threads() if call.threads is None else call.threads,
        )  # fmt: skip

    def ready(self, calls: Sequence[PassCall]) -> Ready | None:
        return _ReadyOnCpu(self._library, calls)


class _ReadyOnCpu:
    """Packs the arguments of `OnCpu.run_pass` once, except updates and lanes."""

    def __init__(self, library: native.Library, calls: Sequence[PassCall]) -> None:
        self._library, self._threads = library, calls[0].threads
        self._parts = [ReadyPart(call) for call in calls]
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


_REFERENCE = Reference()


def kernels_for(stored: Tensor, fmt: Format, noise: NoiseSpec) -> Kernels:
    """The fastest kernels on the bytes' device that implement the format and the noise."""
    if stored.is_cuda and noise.rank:
        raise ConfigError(f"directions of rank {noise.rank} are not on a GPU yet: train on the CPU")
    if stored.is_cuda:
        return OnGpu(cuda_kernels.kernels(stored.device.index))
    if stored.device.type != "cpu":
        raise ConfigError(f"stored is on {stored.device}: this pass runs on the CPU and on CUDA devices")
    library = native.library()
    if library is None or fmt.code not in library.formats or noise.kind.code is None:
        return _REFERENCE
    return OnCpu(library)
