"""Whole parameters in and out of a storage format; native where it is built, else the reference. The same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_offload import native
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.formats.base import Format

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of the plain formats


def planes(stored: Tensor, residual: Tensor | None, fmt: Format, numel: int) -> dict[str, int]:
    """Addresses of a parameter's planes and how to read them, as `native.pack_pass` takes them."""
    at = stored.data_ptr()
    fields = {"stored": at, "format": fmt.code, "group": fmt.group}
    if fmt.scale_bytes:
        fields["scales"] = at + fmt.scales_span(numel)[0]
    if fmt.minimum_bytes:
        fields["minima"] = at + fmt.minima_span(numel)[0]
    if residual is not None:
        fields["residual"] = residual.data_ptr()
    return fields


def encode_values(
    values: Tensor, fmt: Format, *, what: str = "the weights", threads: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """float32, bfloat16 or float16 values -> (streamed part, residual part or None), rounded to nearest.

    Memory beside the result: one parameter in float32 at most. Raises CheckpointError, naming `what`, on NaN or
    infinity and on values larger than the format can hold.
    """
    if values.dtype not in _CODES or values.device.type != "cpu":
        raise ConfigError(f"{what}: {values.dtype} on {values.device}; encoding takes {list(_CODES)} on the CPU")
    flat = values.detach().reshape(-1).contiguous()
    stored = torch.zeros(fmt.nbytes(flat.numel()), dtype=torch.uint8)
    residual = torch.zeros(fmt.residual_nbytes(flat.numel()), dtype=torch.uint8) if fmt.residual_bytes else None
    before, after = _encode_into(flat, fmt, stored, residual, threads)
    if before:
        raise CheckpointError(f"{what}: {before} of {flat.numel()} values are NaN or infinite")
    if after:
        largest = float(flat.abs().max())
        raise CheckpointError(f"{what}: values up to {largest:g}, more than {fmt.name} can hold; choose fp32 or bf16")
    return stored, residual


def _encode_into(
    flat: Tensor, fmt: Format, stored: Tensor, residual: Tensor | None, threads: int | None
) -> tuple[int, int]:
    """Fills the planes; how many values are not finite before and after."""
    library = native.library()
    if library is not None and fmt.code in library.formats:
        return library.encode(
            flat.data_ptr(), _CODES[flat.dtype], torch.get_num_threads() if threads is None else threads,
            numel=flat.numel(), **planes(stored, residual, fmt, flat.numel()),
        )  # fmt: skip
    wide = flat.float()
    before = int((~torch.isfinite(wide)).sum())
    if residual is not None:
        parts = fmt.split(wide)
        stored.copy_(parts[0])
        residual.copy_(parts[1])
    else:
        stored.copy_(fmt.encode(wide))
    return before, int((~torch.isfinite(fmt.decode(stored, flat.numel()))).sum()) if fmt.trains else 0


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
        out = torch.empty(numel)
        library.run_pass(
            **planes(stored, residual, fmt, numel), rows=0, numel=numel, offset=0, num_rows=0, num_updates=0,
            num_lanes=1, param_id=0, distribution="gaussian", rounds=10, write_back=False, stochastic=False,
            master=residual is not None and fmt.residual_bytes > 0, tail=native.PACK_LANE(0, out.data_ptr(), 0.0, 0),
            threads=torch.get_num_threads() if threads is None else threads,
        )  # fmt: skip
        return out
    if residual is None or not fmt.residual_bytes:
        return fmt.decode(stored, numel)
    return fmt.join(stored, residual, numel)
