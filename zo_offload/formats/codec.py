"""Whole parameters in and out of a storage format; native where it is built, else the reference. The same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.formats.base import Format

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode_values(
    values: Tensor, fmt: Format, *, what: str = "the weights", threads: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """float32, bfloat16 or float16 values -> (streamed part, residual part or None), rounded to nearest.

    Memory beside the result: one parameter in float32 at most. Raises CheckpointError, naming `what`, on NaN or
    infinity and on values larger than the format can hold.
    """
    if values.dtype not in _DTYPES or values.device.type != "cpu":
        raise ConfigError(f"{what}: {values.dtype} on {values.device}; encoding takes {list(_DTYPES)} on the CPU")
    flat = values.detach().reshape(-1).contiguous()
    bad = int((~torch.isfinite(flat)).sum())
    if bad:
        raise CheckpointError(f"{what}: {bad} of {flat.numel()} values are NaN or infinite")
    wide = flat.float()
    stored, residual = fmt.split(wide) if fmt.residual_bytes else (fmt.encode(wide), None)
    if not bool(torch.isfinite(decode_values(stored, None, fmt, flat.numel())).all()):
        largest = float(flat.abs().max())
        raise CheckpointError(f"{what}: values up to {largest:g}, more than {fmt.name} can hold; choose bf16 or fp32")
    return stored, residual


def decode_values(
    stored: Tensor, residual: Tensor | None, fmt: Format, numel: int, *, threads: int | None = None
) -> Tensor:
    """Streamed part -> float32 [numel], as lanes see it; with the residual part of a split format, the master."""
    if stored.numel() != fmt.nbytes(numel) or (residual is not None and residual.numel() != fmt.residual_nbytes(numel)):
        raise ConfigError(
            f"{numel} {fmt.name} elements are {fmt.nbytes(numel)} bytes and {fmt.residual_nbytes(numel)} of residual, "
            f"got {stored.numel()} and {0 if residual is None else residual.numel()}"
        )
    if residual is None or not fmt.residual_bytes:
        return fmt.decode(stored, numel)
    return fmt.join(stored, residual, numel)
