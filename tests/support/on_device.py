"""Engines on a device of the test's, and the race checker told of what they compute."""

from __future__ import annotations

from typing import Any

import pytest

import zo_offload.run.opening
import zo_offload.stream.reading
import zo_offload.stream.streamer
from zo_offload.devices.cuda import CudaDevice

from .fake_cuda import COMPUTE, FakeBackend


def put_in_place(monkeypatch: pytest.MonkeyPatch, device: Any) -> Any:
    """Every engine runs on this device, whatever it asks for."""
    monkeypatch.setattr(zo_offload.run.opening, "make_device", lambda name: device)
    if isinstance(device, CudaDevice):
        _watch_compute(monkeypatch, device.backend)
    return device


def _watch_compute(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:
    """Tell the race checker what fused passes read and write."""
    for module, name in (("streamer", "fused_pass"), ("streamer", "fused_rows"), ("reading", "fused_pass")):
        original = getattr(getattr(zo_offload.stream, module), name)

        def watched(stored, fmt, *, original=original, name=name, **options):
            write = options.get("write_back", False)
            backend.access(stored, write, COMPUTE, name)
            return original(stored, fmt, **options)

        monkeypatch.setattr(getattr(zo_offload.stream, module), name, watched)
