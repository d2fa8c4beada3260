"""A checkpoint's own codes as blocks of a storage format: nothing is decoded, and nothing rounded.

A weight of the model may be one of the files, or be merged, cut or stacked of several (`recipe.py`). Its codes, and
each element's scale and minimum, are then put together as its values would be; where the parts meet at multiples of the
format's group, a scale is still one a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import get_format
from ..formats.base import Format
from ..formats.four_bits import FourBits
from ..formats.grouped import pack
from ..quantized.base import Decoded
from ..quantized.files import Files
from .dequantized import Dequantized, TensorFile
from .recipe import Cut, Join, Reader, Recipe, Source, Turn


class KeepsCodes:
    """What a checkpoint says of its codes (`weights.Keeping`)."""

    _file_of: dict[str, TensorFile]

    def kept_format(self, name: str) -> Format | None:
        """The storage format that has a quantized weight's own codes; None if none does. May read its scales."""
        recipe, decoded = self._recipe_of(name), self._decoded()
        return None if recipe is None or decoded is None else kept_format(recipe, decoded.weights, decoded.files)

    def kept_part(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of such a weight in that format, from a multiple of its group on."""
        recipe, decoded = self._recipe_of(name), self._decoded()
        assert recipe is not None and decoded is not None
        return kept_part(recipe, decoded.weights, decoded.files, start, count, f"parameter {name!r} of the base")

    def _recipe_of(self, name: str) -> Recipe | None:
        raise NotImplementedError

    def _decoded(self) -> Dequantized | None:
        return next((file for file in self._file_of.values() if isinstance(file, Dequantized)), None)


def kept_format(recipe: Recipe, weights: Mapping[str, Decoded], files: Files) -> Format | None:
    """The format that holds a weight's codes, if one does; reads scales where it depends on them."""
    sources = [weights.get(name) for name in dict.fromkeys(_sources(recipe))]
    kept = [None if weight is None else weight.kept for weight in sources]
    names = {None if one is None else one.format for one in kept}
    name = names.pop() if len(names) == 1 else None
    if name is None or not _is_whole(recipe, get_format(name).group):
        return None
    return get_format(name) if all(one is not None and one.fits(files) for one in kept) else None


def kept_part(
    recipe: Recipe, weights: Mapping[str, Decoded], files: Files, start: int, count: int, what: str
) -> Tensor:
    """The streamed part of elements [start, start + count), from a multiple of the group on. CheckpointError: NaN."""
    fmt = kept_format_of_source(recipe, weights)
    if isinstance(recipe, Source):
        kept = weights[recipe.name].kept
        assert kept is not None
        codes, scales, minima = kept.run(files, start, count)
    else:
        dtype = torch.uint8 if fmt.scale_bytes == 1 else torch.float32
        codes = _plane(recipe, weights, files, 0, torch.uint8, start, count)
        scales = _plane(recipe, weights, files, 1, dtype, start, count)
        minima = _plane(recipe, weights, files, 2, torch.float32, start, count) if fmt.minimum_bytes else None
    scales = scales[:: fmt.group].contiguous()
    if not bool(torch.isfinite(scales).all()) or (fmt.scale_bytes == 1 and bool(((codes & 0x7F) == 0x7F).any())):
        raise CheckpointError(f"{what}: its codes or scales hold NaN or infinity")
    if isinstance(fmt, FourBits):
        codes = fmt.pack_codes(codes)
    low = None if minima is None else minima[:: fmt.group].bfloat16().view(torch.uint8)
    return pack(fmt, count, codes, scales.view(torch.uint8), low)


def kept_format_of_source(recipe: Recipe, weights: Mapping[str, Decoded]) -> Format:
    kept = weights[next(_sources(recipe))].kept
    assert kept is not None
    return get_format(kept.format)


def _plane(
    recipe: Recipe, weights: Mapping[str, Decoded], files: Files, which: int, dtype: torch.dtype, start: int, count: int
) -> Tensor:
    def read(name: str, at: int, out: Tensor) -> None:
        kept = weights[name].kept
        assert kept is not None
        plane = kept.run(files, at, len(out))[which]
        assert plane is not None
        out.copy_(plane)

    return _retyped(recipe, dtype).part(Reader(read), start, count)


def _sources(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe, Join):
        for part in recipe.parts:
            yield from _sources(part)
    elif isinstance(recipe, (Cut, Turn)):
        yield from _sources(recipe.of)
    else:
        yield recipe.name if isinstance(recipe, Source) else ""


def _is_whole(recipe: Recipe, group: int) -> bool:
    """Whether the parts of a weight meet at multiples of `group` only."""
    if isinstance(recipe, Source):
        return True
    if isinstance(recipe, Join):
        widths = [part.numel // max(1, recipe.rows) for part in recipe.parts]
        return all(width % group == 0 for width in widths) and all(_is_whole(part, group) for part in recipe.parts)
    if isinstance(recipe, Cut):
        row = recipe.of.numel // max(1, recipe.rows)
        return row % group == recipe.begin % group == recipe.width % group == 0 and _is_whole(recipe.of, group)
    return False


def _retyped(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """The same of elements of another dtype."""
    if isinstance(recipe, Join):
        return Join(recipe.rows, [_retyped(part, dtype) for part in recipe.parts])
    if isinstance(recipe, Cut):
        return Cut(recipe.rows, _retyped(recipe.of, dtype), recipe.begin, recipe.width)
    assert isinstance(recipe, Source)
    return Source(recipe.name, recipe.numel, dtype)
