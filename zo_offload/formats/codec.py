"""Encodes and decodes values of a storage format, all or a range of groups: by the native library if it is built, else
by the reference. The same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..kernels import native
from ..kernels.records import LANE
from .base import Format
from .grouped import paste
from .kept import not_encoded
from .table import PLAIN


def planes(stored: Tensor, residual: Tensor | None, fmt: Format, numel: int, start: int = 0) -> dict[str, int]:
    """Addresses of a parameter's planes from element `start` on, and their format, as `native.pack_pass` takes them.
    start: a multiple of the group."""
    at = stored.data_ptr()
    fields = {"stored": at + fmt.values_nbytes(start), "format": fmt.code, "group": fmt.kernel_group}
    if fmt.across:
        fields["across"] = fmt.across
    if fmt.scale_bytes:
        fields["scales"] = at + fmt.scales_span(numel)[0] + fmt.scales_nbytes(start)
    if fmt.minimum_bytes:
        fields["minima"] = at + fmt.minima_span(numel)[0] + fmt.minima_nbytes(start)
        fields["centred"] = fmt.centred
    if residual is not None:
        fields["residual"] = residual.data_ptr() + start * fmt.residual_bytes
    return fields


def encode_values(
    values: Tensor, fmt: Format, *, what: str = "the weights", threads: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """float32, bfloat16 or float16 values -> (streamed part, residual part or None), rounded to nearest.

    Memory besides the result: at most one parameter in float32. Raises CheckpointError, naming `what`, on NaN or
    infinity and on values larger than the format can hold.
    """
    flat = values.detach().reshape(-1).contiguous()
    stored = torch.zeros(fmt.nbytes(flat.numel()), dtype=torch.uint8, device="cpu")
    residual = (
        torch.zeros(fmt.residual_nbytes(flat.numel()), dtype=torch.uint8, device="cpu") if fmt.residual_bytes else None
    )
    encoder = PlaneEncoder(stored, residual, fmt, flat.numel(), what, threads)
    encoder.put(0, flat)
    encoder.finish()
    return stored, residual


class PlaneEncoder:
    """Encodes `numel` values into the planes `stored` and `residual`, a range at a time; `finish` checks the values.

    The planes are zero, or hold an encoding of as many values. The native library needs no further memory.
    """

    def __init__(
        self, stored: Tensor, residual: Tensor | None, fmt: Format, numel: int, what: str, threads: int | None = None
    ) -> None:
        if not fmt.encodes:
            raise ConfigError(f"{what}: {not_encoded(fmt)}")
        self._stored, self._residual, self._fmt, self._numel = stored, residual, fmt, numel
        self._what, self._threads = what, threads
        self._not_finite = self._too_large = 0
        self._largest = 0.0

    def put(self, start: int, values: Tensor) -> None:
        """Encode values [start, start + len(values)); start is a multiple of the group, values 1-D and contiguous."""
        if values.dtype not in PLAIN or values.device.type != "cpu":
            raise ConfigError(
                f"{self._what}: {values.dtype} on {values.device}; encoding takes {list(PLAIN)} on the CPU"
            )
        assert not (self._fmt.group and start % self._fmt.group), f"{self._what}: {start} is inside a group"
        before, after = self._put(start, values)
        self._not_finite += before
        self._too_large += after
        if after and not before:
            self._largest = max(self._largest, float(values.abs().max()))

    def finish(self) -> None:
        """CheckpointError on NaN or infinity, and on values larger than the format can hold."""
        if self._not_finite:
            raise CheckpointError(f"{self._what}: {self._not_finite} of {self._numel} values are NaN or infinite")
        if self._too_large:
            raise CheckpointError(
                f"{self._what}: values up to {self._largest:g}, more than {self._fmt.name} can hold; choose fp32 or "
                "bf16"
            )

    def _put(self, start: int, values: Tensor) -> tuple[int, int]:
        """How many values are not finite before and after rounding."""
        fmt, library = self._fmt, native.library()
        if library is not None and fmt.code in library.formats:
            return library.encode(
                values.data_ptr(), PLAIN[values.dtype].code,
                torch.get_num_threads() if self._threads is None else self._threads,
                numel=values.numel(), **planes(self._stored, self._residual, fmt, self._numel, start),
            )  # fmt: skip
        wide, wide_bytes = values.float(), fmt.residual_bytes
        before = int((~torch.isfinite(wide)).sum())
        if self._residual is not None:
            stored, residual = fmt.split(wide)
            self._residual[start * wide_bytes : (start + values.numel()) * wide_bytes] = residual
        else:
            stored = fmt.encode(wide)
        paste(fmt, self._stored, self._numel, start, stored, values.numel())
        return before, int((~torch.isfinite(fmt.decode(stored, values.numel()))).sum()) if fmt.trains else 0


def decode_values(
    stored: Tensor, residual: Tensor | None, fmt: Format, numel: int, *, threads: int | None = None
) -> Tensor:
    """Streamed part -> float32 [numel], as lanes see it; with the residual part of a split format, the master."""
    if stored.numel() != fmt.nbytes(numel) or (residual is not None and residual.numel() != fmt.residual_nbytes(numel)):
        raise ConfigError(
            f"{numel} {fmt.name} elements are {fmt.nbytes(numel)} bytes and {fmt.residual_nbytes(numel)} of residual, "
            f"got {stored.numel()} and {0 if residual is None else residual.numel()}"
        )
    library = native.library()
    if library is not None and fmt.code in library.formats:
        out = torch.empty(numel, device="cpu")
        library.run_pass(
            **planes(stored, residual, fmt, numel), rows=0, numel=numel, offset=0, num_rows=0, num_updates=0,
            num_lanes=1, param_id=0, distribution="gaussian", rounds=10, write_back=False, stochastic=False,
            master=residual is not None and fmt.residual_bytes > 0, tail=LANE.pack(0, out.data_ptr(), 0.0, 0),
            threads=torch.get_num_threads() if threads is None else threads,
        )  # fmt: skip
        return out
    if residual is None or not fmt.residual_bytes:
        return fmt.decode(stored, numel)
    return fmt.join(stored, residual, numel)
