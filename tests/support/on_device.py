"""Engines on a device of the test's, and the race checker told of what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import zo_offload.run.opening
import zo_offload.stream.emitter
import zo_offload.stream.reading
from zo_offload.devices.cuda import CudaDevice
from zo_offload.numerics.calls import Mark

from .fake_cuda import COMPUTE, FakeBackend


def put_in_place(monkeypatch: pytest.MonkeyPatch, device: Any) -> Any:
    """Every engine runs on this device, whatever it asks for."""
    monkeypatch.setattr(zo_offload.run.opening, "make_device", lambda name: device)
    if isinstance(device, CudaDevice):
        _watch_compute(monkeypatch, device.backend)
    return device


def _watch_compute(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:
    """Tell the race checker what fused passes read and write."""
    for module, name in (("emitter", "fused_pass"), ("emitter", "fused_rows"), ("reading", "fused_pass")):
        original = getattr(getattr(zo_offload.stream, module), name)

        def watched(stored, fmt, *, original=original, name=name, **options):
            write = options.get("write_back", False)
            backend.access(stored, write, COMPUTE, name)
            return original(stored, fmt, **options)

        monkeypatch.setattr(getattr(zo_offload.stream, module), name, watched)

    call = zo_offload.stream.emitter.Emitter._call

    def watched_call(share, slot, ready, told, mark):
        for part, (_, _, write, _) in zip(share.parts, told, strict=True):
            place = part.place
            backend.access(slot.memory[place.offset : place.offset + place.nbytes], write, COMPUTE, "ready passes")
        call(share, slot, ready, told, mark)

    monkeypatch.setattr(zo_offload.stream.emitter.Emitter, "_call", staticmethod(watched_call))


def around_writes(monkeypatch: pytest.MonkeyPatch, around: Callable[[Callable[[], None], Mark], None]) -> None:
    """around(the call, its mark) in place of every call of the kernels in a pass that writes to a block."""
    one, together = zo_offload.stream.emitter.fused_pass, zo_offload.stream.emitter.Emitter._call

    def alone(stored, fmt, **options):
        run = functools.partial(one, stored, fmt, **options)
        around(run, options["mark"]) if options.get("write_back") else run()

    def ready_ones(share, slot, ready, told, mark):
        run = functools.partial(together, share, slot, ready, told, mark)
        around(run, mark) if any(write for _, _, write, _ in told) else run()

    monkeypatch.setattr(zo_offload.stream.emitter, "fused_pass", alone)
    monkeypatch.setattr(zo_offload.stream.emitter.Emitter, "_call", staticmethod(ready_ones))
