"""AWQ, the GEMM layout (AutoAWQ, llm-compressor's export, AutoRound's awq packing): codes along the outputs.

qweight  int32 [in, out / 8]       output 8 c + j is nibble ORDER[j] of word c
qzeros   int32 [in / group, out / 8]    the same
scales   [in / group, out]

weight[n, k] = RN((code[k, n] - zero[g, n]) * scale[g, n]), g = k // group, in the dtype of the scales
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import FLOATS, Codes, Decoded, Kept, Wanted, by_rows, is_exact, kept_as, kept_rows, need
from .bits import stream
from .files import Files

ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device="cpu")


class AWQ:
    name: ClassVar[str] = "awq"
    methods: ClassVar[tuple[str, ...]] = ("awq", "gptq", "auto-round", "intel/auto-round")

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        for name, spec in files.specs.items():
            module, _, last = name.rpartition(".")
            if last != "qweight" or len(spec.shape) != 2:
                continue
            scales = need(files, f"{module}.scales", name, None, *FLOATS)
            if spec.dtype == torch.int32 and len(scales.shape) == 2 and scales.shape[1] == 8 * spec.shape[1]:
                yield _weight(files, module, wanted)
            elif spec.dtype != torch.int32 or len(scales.shape) != 2 or scales.shape[1] != spec.shape[1]:
                version = wanted.settings.get("version", wanted.settings.get("format", "unknown"))
                raise CheckpointError(
                    f"{name!r} is {spec} beside scales {scales}: neither GPTQ nor AWQ's GEMM layout (the settings say "
                    f"{version!r}). Other layouts are permuted for a kernel and not supported."
                )


def _weight(files: Files, module: str, wanted: Wanted) -> Decoded:
    name, bits = f"{module}.qweight", wanted.settings.get("bits", wanted.settings.get("w_bit", 4))
    if bits != 4 or wanted.settings.get("zero_point") is False:
        raise CheckpointError(f"{name!r}: AWQ with bits={bits!r} and zero_point=False is not supported; 4 bits are.")
    inputs, words = files.specs[name].shape
    groups = files.specs[f"{module}.scales"].shape[0]
    need(files, f"{module}.qzeros", name, (groups, words), torch.int32)
    if groups == 0 or inputs % groups:
        raise CheckpointError(
            f"'{module}.scales' has {groups} groups, and {inputs} inputs are not as many times anything."
        )
    _check_groups(wanted.settings, f"{module}.scales", inputs, groups)
    group, dtype = inputs // groups, files.specs[f"{module}.scales"].dtype

    def codes(files: Files, of: str, first: int, last: int) -> Tensor:
        """[outputs, rows] of the packed tensor"""
        low = first // 8 * 8  # a word has 8 outputs
        packed = stream(files.columns(of, low // 8, -(-last // 8)), 4)
        rows = packed.shape[0]
        return packed.view(rows, -1, 8)[:, :, ORDER].view(rows, -1).T[first - low : last - low]

    def parts(files: Files, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """codes [outputs, groups, group], zero points and scales [outputs, groups]"""
        packed = codes(files, name, first, last).reshape(last - first, groups, group)
        return (
            packed,
            codes(files, f"{module}.qzeros", first, last),
            files.columns(f"{module}.scales", first, last).T.float(),
        )

    def rows(files: Files, first: int, last: int) -> Tensor:
        packed, zero, scale = parts(files, first, last)
        return ((packed - zero.unsqueeze(2)) * scale.unsqueeze(2)).view(-1, inputs).to(dtype)

    def signed(files: Files, first: int, last: int) -> Codes:
        packed, zero, scale = parts(files, first, last)
        return (packed - zero.unsqueeze(2)).to(torch.int8).view(torch.uint8).view(-1, inputs), scale, None

    def above(files: Files, first: int, last: int) -> Codes:
        packed, zero, scale = parts(files, first, last)
        return packed.to(torch.uint8).view(-1, inputs), scale, -(scale * zero)

    uses = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    keeps: tuple[Kept, ...] = ()
    if is_exact(files.specs[f"{module}.scales"]):
        keeps = kept_as("int4f", group, kept_rows(inputs, above))
    keeps += kept_as("int8", group, kept_rows(inputs, signed))
    return Decoded(f"{module}.weight", (words * 8, inputs), dtype, uses, by_rows(inputs, rows), keeps)


def _check_groups(settings: Mapping[str, Any], scales: str, inputs: int, groups: int) -> None:
    """Raise CheckpointError if the settings name another size of groups. Settings of single modules, which
    AutoRound has, are not compared."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if not isinstance(size, int) or isinstance(size, bool) or size == 0 or settings.get("extra_config"):
        return
    if groups != (-(-inputs // size) if size > 0 else 1):
        raise CheckpointError(f"{scales!r} has {groups} groups; {inputs} inputs in groups of {size} are others.")
