"""A checkpoint's own codes as blocks of a storage format: nothing is decoded and nothing is rounded.

A weight of the model may be a tensor of the files, or be merged, cut or stacked from several (`recipe.py`). Its codes,
and each element's scale and minimum, are then combined in the same way as its values would be; if the parts meet at
multiples of the format's group, there is still one scale per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import get_format
from ..formats.base import Format
from ..formats.four_bits import FourBits
from ..formats.grouped import pack
from ..quantized.base import Codes, Decoded, Kept, Settings
from ..quantized.files import Files
from ..quantized.sizes import kept_format
from .dequantized import TensorFile
from .recipe import Cut, Join, Reader, Recipe, Source, Turn


@runtime_checkable
class Coded(Protocol):
    """Tensors of which some are quantized."""

    @property
    def weights(self) -> Mapping[str, Decoded]: ...

    @property
    def files(self) -> Files: ...


class KeepsCodes:
    """A checkpoint's interface to its codes (`weights.Keeping`)."""

    _file_of: dict[str, TensorFile]
    settings: Settings

    def kept_formats(self, name: str) -> tuple[Format, ...]:
        """The storage formats that have a quantized weight's own codes, the smallest first. May read its scales."""
        known: dict[str, tuple[Format, ...]] = self.__dict__.setdefault("_kept_formats", {})
        if name not in known:
            recipe, coded, found = self._recipe_of(name), self.coded(), tuple[Format, ...]()
            if recipe is not None and coded is not None:
                found = kept_formats(recipe, coded.weights, coded.files)
            elif not self._file_of and (guess := kept_format(self.settings, name, tuple(self.shape_of(name)))):
                found = (get_format(guess),)  # planned from a config alone
            known[name] = found
        return known[name]

    def kept_part(self, name: str, fmt: Format, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of such a weight in one of them, from a multiple of its group on."""
        recipe, coded = self._recipe_of(name), self.coded()
        assert recipe is not None and coded is not None
        return kept_part(recipe, fmt, coded.weights, coded.files, start, count, f"parameter {name!r} of the base")

    def shape_of(self, name: str) -> torch.Size:
        raise NotImplementedError

    def _recipe_of(self, name: str) -> Recipe | None:
        raise NotImplementedError

    def coded(self) -> Coded | None:
        """Its quantized tensors, if there are any."""
        return next((file for file in self._file_of.values() if isinstance(file, Coded)), None)


def kept_formats(recipe: Recipe, weights: Mapping[str, Decoded], files: Files) -> tuple[Format, ...]:
    """The formats that hold a weight's codes; reads scales where it depends on them."""
    return tuple(get_format(kept.format) for kept in made_of(recipe, weights) if kept.fits(files))


def made_of(recipe: Recipe, weights: Mapping[str, Decoded]) -> tuple[Kept, ...]:
    """How what is made of weights is kept: in formats that all of them are in, if their groups stay whole."""
    made = [weights.get(name) for name in dict.fromkeys(sources(recipe))]
    if any(weight is None or not weight.kept for weight in made):
        return ()
    found = [{kept.format: kept for kept in weight.kept} for weight in made if weight is not None]
    formats = [get_format(name) for name in found[0] if all(name in kept for kept in found)]
    return tuple(
        Kept(
            fmt.name,
            partial(kept_codes, recipe, fmt, weights),
            partial(_all_fit, tuple(kept[fmt.name] for kept in found)),
        )
        for fmt in formats
        if _is_whole(recipe, fmt.group)
    )


def _all_fit(kept: tuple[Kept, ...], files: Files) -> bool:
    return all(one.fits(files) for one in kept)


def kept_part(
    recipe: Recipe, fmt: Format, weights: Mapping[str, Decoded], files: Files, start: int, count: int, what: str
) -> Tensor:
    """The streamed part of elements [start, start + count), from a multiple of the group on. CheckpointError: NaN."""
    codes, scales, minima = kept_codes(recipe, fmt, weights, files, start, count)
    scales = fmt.scales_of(scales).contiguous()
    least = None if minima is None else fmt.minima_of(minima).contiguous()
    fp8 = codes if fmt.kernel.startswith("fp8") else scales if fmt.kernel == "nvfp4_two" else None
    is_finite = all(bool(torch.isfinite(plane).all()) for plane in (scales, least) if plane is not None)
    if not is_finite or (fp8 is not None and bool(((fp8 & 0x7F) == 0x7F).any())):
        raise CheckpointError(f"{what}: its codes or scales hold NaN or infinity")
    if isinstance(fmt, FourBits):
        codes = fmt.pack_codes(codes)
    low = None
    if least is not None:
        low = (least.bfloat16() if fmt.minimum_bytes == 2 else least).view(torch.uint8)
    return pack(fmt, count, codes, scales.view(torch.uint8), low)


def kept_codes(
    recipe: Recipe, fmt: Format, weights: Mapping[str, Decoded], files: Files, start: int, count: int
) -> Codes:
    """Of each of these elements its code, scale and minimum."""

    def plane(which: int, dtype: torch.dtype) -> Tensor:
        def read(name: str, at: int, out: Tensor) -> None:
            values = kept_of(weights[name], fmt).run(files, at, len(out))[which]
            assert values is not None
            out.copy_(values)

        return _retyped(recipe, dtype).part(Reader(read), start, count)

    if isinstance(recipe, Source):
        return kept_of(weights[recipe.name], fmt).run(files, start, count)
    scales = plane(1, torch.uint8 if fmt.scale_bytes == 1 else torch.float32)
    return plane(0, torch.uint8), scales, plane(2, torch.float32) if fmt.minimum_bytes else None


def kept_of(weight: Decoded, fmt: Format) -> Kept:
    return next(kept for kept in weight.kept if kept.format == fmt.name)


def sources(recipe: Recipe) -> Iterator[str]:
    """Names of the tensors that something is made of; "" for what is made of none."""
    if isinstance(recipe, Join):
        for part in recipe.parts:
            yield from sources(part)
    elif isinstance(recipe, (Cut, Turn)):
        yield from sources(recipe.of)
    else:
        yield recipe.name if isinstance(recipe, Source) else ""


def _is_whole(recipe: Recipe, group: int) -> bool:
    """Whether the parts of a weight meet only at multiples of `group`."""
    if isinstance(recipe, Source):
        return True
    if isinstance(recipe, Join):
        widths = [part.numel // max(1, recipe.rows) for part in recipe.parts]
        return all(width % group == 0 for width in widths) and all(_is_whole(part, group) for part in recipe.parts)
    if isinstance(recipe, Cut):
        row = recipe.of.numel // max(1, recipe.rows)
        return row % group == recipe.begin % group == recipe.width % group == 0 and _is_whole(recipe.of, group)
    if isinstance(recipe, Turn) and recipe.dims[-1] == len(recipe.dims) - 1:  # rows in another order
        return recipe.shape[-1] % group == 0 and _is_whole(recipe.of, group)
    return False


def _retyped(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """The same recipe for elements of another dtype."""
    if isinstance(recipe, Join):
        return Join(recipe.rows, [_retyped(part, dtype) for part in recipe.parts])
    if isinstance(recipe, Cut):
        return Cut(recipe.rows, _retyped(recipe.of, dtype), recipe.begin, recipe.width)
    if isinstance(recipe, Turn):
        return Turn(recipe.rows, _retyped(recipe.of, dtype), recipe.shape, recipe.dims)
    assert isinstance(recipe, Source)
    return Source(recipe.name, recipe.numel, dtype)
