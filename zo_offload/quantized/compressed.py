"""compressed-tensors (llm-compressor): integers of 1 to 8 bits packed along the inputs, and its other layouts.

    weight_packed      int32 [out, words]     each row a little-endian stream of code + 2 ** (bits - 1)
    weight_scale       [out, in / group] or [out, 1]
    weight_zero_point  int32 [words of out, in / group]: packed along the outputs, + 2 ** (bits - 1); or int8, plain
    weight_shape       [2]: out, in           weight_g_idx  int32 [in], the group of each input

    weight[n, k] = RN((code - zero) * scale), in the dtype of the scales

Up to version 0.17 codes of 3, 5, 6 and 7 bits leave the upper bits of words unused; the number of words tells.
`weight` in int8 or fp8 with `weight_scale` is in scaled.py, 4-bit floats are in packed_float.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import FLOATS, Codes, Decoded, Kept, Wanted, by_rows, is_exact, kept_as, kept_rows, need, run_length
from .bits import padded_words, stream
from .files import Files, Spec
from .packed_float import packed_float
from .scaled import scaled

_REFUSED = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "mxfp6-pack-quantized")


class CompressedTensors:
    name: ClassVar[str] = "compressed-tensors"
    methods: ClassVar[tuple[str, ...]] = ("compressed-tensors", "compressed_tensors", "auto-round", "intel/auto-round")

    def find(self, files: Files, wanted: Wanted) -> Iterator[Decoded]:
        groups = _weights_of_groups(wanted.settings)
        for layout in (wanted.settings.get("format"), *(group.get("format") for group in groups)):
            if str(layout) in _REFUSED:
                raise CheckpointError(f"compressed-tensors' format {layout!r} is not supported.")
        _check_transforms(wanted.settings.get("transform_config"))
        for name, spec in files.specs.items():
            stem, scale = name.removesuffix("_packed"), f"{name.removesuffix('_packed')}_scale"
            if name.endswith("weight_packed") and spec.dtype == torch.int32:
                yield _packed(files, stem, groups)
            elif name.endswith("weight_packed") and spec.dtype == torch.uint8:
                whole = f"{stem}_global_scale"
                yield packed_float(files, name, stem, whole if whole in files else None)
            elif name.endswith("weight") and (
                (spec.dtype == torch.int8 and scale in files) or (spec.dtype == torch.float8_e4m3fn and groups)
            ):
                yield _plain(files, name, groups)


def _weights_of_groups(settings: Any) -> list[dict[str, Any]]:
    given = settings.get("config_groups")
    found = []
    for group in given.values() if isinstance(given, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            found.append({**weights, "format": group.get("format")})
    return found


def _check_transforms(given: Any) -> None:
    """Raise CheckpointError for transforms that a forward must apply to activations; those in weights are done."""
    if not given:
        return
    try:
        places = {str(use["location"]) for group in given["config_groups"].values() for use in group["apply"]}
    except (KeyError, TypeError, AttributeError):
        places = {"an unknown place"}
    if wrong := sorted(places - {"weight_input", "weight_output"}):
        raise CheckpointError(
            f"quantization_config: transform_config has transforms at {', '.join(wrong)}: forwards would have to apply "
            "them, which is not supported. Those of weights alone are."
        )


def _check_settings(name: str, spec: Spec, scale: str, grid: Spec, groups: list[dict[str, Any]]) -> None:
    """Raise CheckpointError if none of the settings' groups can have written an 8-bit weight and its scales."""
    kinds, strategies = ({str(g[key]) for g in groups if g.get(key)} for key in ("type", "strategy"))
    kind = "int" if spec.dtype == torch.int8 else "float"
    if kinds and kind not in kinds:
        raise CheckpointError(f"{name!r} is {spec}; the settings say codes of the type {', '.join(sorted(kinds))}.")
    if strategies and "tensor" not in strategies and grid.numel == 1 and spec.numel != spec.shape[-1]:
        said = ", ".join(sorted(strategies))
        raise CheckpointError(f"{scale!r} is {grid}: one scale for all of {name!r} ({spec}); the settings say {said}.")


def _plain(files: Files, name: str, groups: list[dict[str, Any]]) -> Decoded:
    scale = f"{name}_scale"
    spec = need(files, scale, name)
    _check_settings(name, files.specs[name], scale, spec, groups)
    zero = f"{name}_zero_point"
    blocks = [g["block_structure"] for g in groups if isinstance(g.get("block_structure"), (list, str))]
    given = blocks[0].split("x") if blocks and isinstance(blocks[0], str) else blocks[0] if blocks else (128, 128)
    try:
        block = int(given[0]), int(given[1])
        assert min(block) > 0
    except (ValueError, TypeError, IndexError, AssertionError):
        raise CheckpointError(
            f"quantization_config: block_structure={blocks[0]!r:.60}; expected [rows, columns]."
        ) from None
    dtype = spec.dtype if spec.dtype in FLOATS else torch.bfloat16
    return scaled(files, name, scale, dtype, block, zero=zero if zero in files else None)


def _packed(files: Files, name: str, groups: list[dict[str, Any]]) -> Decoded:
    codes, scale, zero, index = (f"{name}_{part}" for part in ("packed", "scale", "zero_point", "g_idx"))
    spec = files.specs[codes]
    if len(spec.shape) != 2:
        raise CheckpointError(f"{codes!r} is {spec}; a matrix of int32 is expected.")
    need(files, f"{name}_shape", codes, (2,), torch.int64, torch.int32)
    outputs, inputs = (int(n) for n in files.small(f"{name}_shape"))
    if outputs != spec.shape[0] or not 0 < inputs <= 32 * spec.shape[1]:
        raise CheckpointError(f"'{name}_shape' says {[outputs, inputs]}, and {codes!r} is {spec}.")
    bits, dense = _bits(codes, spec.shape[1], inputs, groups)
    scales = need(files, scale, codes, None, *FLOATS)
    many = scales.shape[-1] if len(scales.shape) == 2 and scales.shape[0] == outputs else 0
    if not many or inputs % many:
        raise CheckpointError(f"{scale!r} is {scales}, which does not fit {[outputs, inputs]} of {codes!r}.")
    sizes = {g["group_size"] for g in groups if isinstance(g.get("group_size"), int) and g["group_size"] > 0}
    if sizes and all(g.get("strategy") == "group" for g in groups) and inputs // many not in {*sizes, inputs}:
        said = " or ".join(map(str, sorted(sizes)))
        raise CheckpointError(f"{scale!r} is {scales}: groups of {inputs // many} inputs; the settings say {said}.")
    place = _places(files, index, codes, inputs, many)
    middle = 1 << bits - 1

    def zeros(files: Files, first: int, last: int) -> Tensor:
        """[last - first, many]"""
        if files.specs[zero].dtype == torch.int8:
            return files.rows(zero, first, last).to(torch.int16)
        each = 32 if dense else 32 // bits  # outputs in `bits` words, in a word
        words = bits if dense else 1
        low, high = first // each * words, min(-(-last // each) * words, files.specs[zero].shape[0])
        packed = files.rows(zero, low, high).T
        unpacked = stream(packed, bits) if dense else padded_words(packed, bits)
        begin = first % each
        return unpacked[:, begin : begin + last - first].T - middle

    def parts(files: Files, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """codes from 0 up [n, inputs], what codes of 0 are, zero points included, and scales [n, many]"""
        packed = files.rows(codes, first, last)
        unpacked = (stream(packed, bits) if dense else padded_words(packed, bits))[:, :inputs]
        factor = files.rows(scale, first, last).float()
        least = zeros(files, first, last) if zero in files else torch.zeros_like(factor, dtype=torch.int16)
        return unpacked, least + middle, factor

    def rows(files: Files, first: int, last: int) -> Tensor:
        unpacked, least, factor = parts(files, first, last)
        return factor[:, place].mul_(unpacked - least[:, place]).to(scales.dtype)

    def above(files: Files, first: int, last: int) -> Codes:
        unpacked, least, factor = parts(files, first, last)
        factor, least = factor[:, place[::group]], least[:, place[::group]]
        return unpacked.to(torch.uint8), factor, -(factor * least)

    def signed(files: Files, first: int, last: int) -> Codes:
        unpacked, least, factor = parts(files, first, last)
        return (unpacked - least[:, place]).to(torch.int8).view(torch.uint8), factor[:, place[::group]], None

    keeps: tuple[Kept, ...] = ()
    group = run_length(place)
    if bits == 4 and zero not in files and scales.dtype == torch.bfloat16:  # its minima are bf16, too
        keeps += kept_as("int4", group, kept_rows(inputs, above))
    if bits <= 4 and is_exact(scales):
        keeps += kept_as("int4f", group, kept_rows(inputs, above))
    if bits < 8 or zero not in files:
        keeps += kept_as("int8", group, kept_rows(inputs, signed))
    if bits > 4 and is_exact(scales):
        keeps += kept_as("int8f", group, kept_rows(inputs, above))
    if zero in files:
        given = files.specs[zero]
        words = -(-outputs * bits // 32) if dense else -(-outputs // (32 // bits))
        need(files, zero, codes, (words if given.dtype == torch.int32 else outputs, many), torch.int32, torch.int8)
    uses = tuple(part for part in (codes, scale, zero, index, f"{name}_shape") if part in files)
    return Decoded(name, (outputs, inputs), scales.dtype, uses, by_rows(inputs, rows), keeps)


def _bits(codes: str, words: int, inputs: int, groups: list[dict[str, Any]]) -> tuple[int, bool]:
    """(bits, whether the stream is dense), among those in the settings. CheckpointError: none fits, or several do."""
    named = {g["num_bits"] for g in groups if isinstance(g.get("num_bits"), int) and 1 <= g["num_bits"] <= 8}
    fits = set()
    for bits in named or {4, 8}:
        fits |= {(bits, True)} if words == -(-inputs * bits // 32) else set()
        if 32 % bits and words == -(-inputs // (32 // bits)):
            fits.add((bits, False))
    if len(fits) != 1:
        what = "fit both ways of packing" if fits else "fit none"
        raise CheckpointError(f"{codes!r}: {words} words for {inputs} codes of {sorted(named or {4, 8})} bits {what}.")
    return fits.pop()


def _places(files: Files, index: str, codes: str, inputs: int, many: int) -> Tensor:
    """The group of each input."""
    if index not in files:
        return torch.arange(inputs, device="cpu") // (inputs // many)
    need(files, index, codes, (inputs,), torch.int32, torch.int64)
    found = files.small(index).long()
    if bool((found == -1).all()):
        return torch.arange(inputs, device="cpu") // (inputs // many)
    if bool((found < 0).any()) or bool((found >= many).any()):
        raise CheckpointError(f"{index!r} names groups {int(found.min())} .. {int(found.max())}; there are {many}.")
    return found
