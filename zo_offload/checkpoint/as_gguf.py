"""An export as one GGUF file, for llama.cpp, transformers, and this package.

Names, conversions and values are those of llama.cpp's converter (`gguf_names.py`, `gguf_config.py`,
`gguf_tokenizer.py`); the package gguf writes the header and quantizes. The header is written first and read back by
transformers; then the elements are written at their places, in the order of their blocks, a chunk at a time.

Types: "gguf" keeps each matrix's own dtype; "gguf-f16", "gguf-q8_0" and so on name one for all matrices (a matrix whose
rows are no multiple of the type's block is float16; embeddings and the output layer have 8 bits at least). Vectors and
routers are float32. A weight that was read from a GGUF file and is kept in its own codes leaves as the bytes that came,
whatever type is named: it is never rounded twice.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..quantized.gguf_blocks import BLOCKS, PLAIN
from ..quantized.gguf_file import GGUFFile
from ..system import diskio
from . import gguf_config, gguf_tokenizer
from .gguf import FACTORS, GGUFWeights, read_gguf_config
from .gguf_names import Naming
from .publish import OWN, PRODUCER
from .recipe import Cut, Reader, Recipe, Source, Turn
from .weights import CHUNK, chunks

NAME = "model.gguf"
_KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
SCHEMES = ("gguf", *(f"gguf-{kind}" for kind in _KINDS))
_NUMBERS = {"F32": 0, "F16": 1, "BF16": 30, **{kind.name: number for number, kind in BLOCKS.items()}}
_FLOATS = {dtype: number for number, dtype in PLAIN.items()}
_WIDE = re.compile(r"^(token_embd|output)\.weight$")
_EXACT = re.compile(r"norm|ffn_gate_inp")
"""Tensors in float32 whatever is asked for."""


class Entries(Protocol):
    """A model's state dict entries, as an export reads them."""

    def metas(self) -> dict[str, Tensor]: ...

    def place_of(self, name: str, element: int) -> int: ...

    def read_into(self, name: str, start: int, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Output:
    """A tensor of the file. recipe None: the bytes of the same tensor in the model's own GGUF file."""

    name: str
    shape: tuple[int, ...]
    number: int
    """Its type, as files number them."""
    recipe: Recipe | None
    plus_one: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        kind = BLOCKS.get(self.number)
        return self.numel * PLAIN[self.number].itemsize if kind is None else self.numel // kind.numel * kind.nbytes


@dataclass(eq=False)
class Made(Recipe):
    """A tensor that is not of the model's state."""

    value: Tensor

    def __post_init__(self) -> None:
        self.numel, self.dtype = self.value.numel(), self.value.dtype

    def fill(self, reader: Reader, start: int, out: Tensor) -> None:
        out.copy_(self.value[start : start + len(out)])

    def origin(self, element: int = 0) -> tuple[str, int]:
        return "", 0


def check(model: nn.Module) -> None:
    """Raise ConfigError if a model, or this installation, cannot be exported as GGUF at all."""
    gguf_config.arch_of(getattr(model, "config", None))
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("an export as gguf needs the package gguf (pip install gguf)") from error


def write(
    folder: Path, model: nn.Module, config: Any, entries: Entries, scheme: str, *, name: str, tokenizer: Any,
    source: GGUFWeights | None, as_read: Collection[str],
) -> None:  # fmt: skip
    """Write `folder`/model.gguf; the export's small files are in there already.

    tokenizer: one of transformers, the GGUF file to copy it from, or None. source: the model's own GGUF file, and
    as_read: names of parameters whose values are exactly those in there. Raises ConfigError, CheckpointError: a model,
    setting or tokenizer that has no place in GGUF; values that the type cannot hold.
    """
    import gguf

    path = folder / NAME
    arch = gguf_config.arch_of(config)
    outputs = _outputs(model, Naming.of(model, arch, config, path), config, entries, scheme, source, as_read)
    writer = gguf.GGUFWriter(path, arch)
    told = gguf_config.add_config(writer, config, name)
    if isinstance(tokenizer, Path):
        gguf_tokenizer.copy(writer, tokenizer)
    elif tokenizer is not None:
        gguf_tokenizer.add(writer, tokenizer, config.vocab_size)
    _describe(writer, outputs, folder)
    file = _with_header(writer, path, outputs)
    try:
        gguf_config.check_config(config, read_gguf_config(path), told, path)
        if tokenizer is not None and not isinstance(tokenizer, Path):
            gguf_tokenizer.check(path, tokenizer)
        with open(path, "r+b", buffering=0) as out:
            for one in _in_order(outputs, entries):
                at = file.tensors[one.name].begin
                for raw in _bytes(one, entries, source):
                    diskio.write_at(out.fileno(), raw.numpy().data, at)
                    at += len(raw)
            os.fsync(out.fileno())
    finally:
        file.close()


def _outputs(
    model: nn.Module, naming: Naming, config: Any, entries: Entries, scheme: str, source: GGUFWeights | None,
    as_read: Collection[str],
) -> list[Output]:  # fmt: skip
    """The file's tensors, in the order of the model's."""
    metas = entries.metas()
    files: dict[str, list[str]] = {}
    for name, to in naming.names.items():
        files.setdefault(to, []).append(name)
    canonical = {id(p): n for n, p in model.named_parameters()}
    same = {n for n, p in model.named_parameters(remove_duplicate=False) if canonical[id(p)] in set(as_read)}
    made = []
    for entry, meta in metas.items():
        if entry not in files:
            raise ConfigError(
                f"{type(model).__name__} has {entry!r}, which has no name in GGUF. Export it as safetensors (no --as)"
            )
        for name in files[entry]:
            recipe, shape = _recipe(name, entry, meta, naming, config)
            own = source.number_of(name) if source is not None and entry in same else None
            if own is not None and source is not None and source.shape_of(name) == shape:
                made.append(Output(name, shape, own, None))
            else:
                number = _number(name, shape, meta.dtype, scheme)
                made.append(Output(name, shape, number, recipe, naming.is_plus_one(name)))
    factors = gguf_config.rope_factors(config)
    if factors is not None:
        made.append(Output(FACTORS, tuple(factors.shape), _FLOATS[torch.float32], Made(factors)))
    return made


def _recipe(name: str, entry: str, meta: Tensor, naming: Naming, config: Any) -> tuple[Recipe, tuple[int, ...]]:
    """A tensor of the file, from its entry in the state dict; and its shape."""
    recipe: Recipe = Source(entry, meta.numel(), meta.dtype)
    shape = tuple(meta.shape)
    if part := naming.part(name):
        experts, rows, width = shape
        half = rows // 2 * width
        return Cut(experts, recipe, half * (part == "up"), half), (experts, rows // 2, width)
    if heads := naming.heads(name, config):
        recipe = Turn(heads, recipe, (2, shape[0] // (2 * heads), meta.numel() // shape[0]), (1, 0, 2))
    return recipe, shape[1:] if naming.is_one_row(name) else shape


def _number(name: str, shape: tuple[int, ...], dtype: torch.dtype, scheme: str) -> int:
    """The type that a tensor is written in. CheckpointError: a dtype that GGUF has not."""
    if len(shape) < 2 or _EXACT.search(name):
        return _FLOATS[torch.float32]
    _, _, asked = scheme.partition("-")
    if not asked:
        if dtype not in _FLOATS:
            raise CheckpointError(f"{name!r} is {dtype}, which GGUF has no type for.")
        return _FLOATS[dtype]
    if asked[0] == "q" and _WIDE.match(name):
        asked = "q8_0"
    number = _NUMBERS[asked.upper()]
    fits = number in PLAIN or shape[-1] % BLOCKS[number].numel == 0
    return number if fits else _FLOATS[torch.float16]


def _describe(writer: Any, outputs: list[Output], folder: Path) -> None:
    """What the file holds, as llama.cpp and we describe it."""
    import gguf

    wide = [one.number for one in outputs if len(one.shape) > 1]
    usual = max(set(wide), key=wide.count) if wide else 0
    name = next(name for name, number in _NUMBERS.items() if number == usual)
    label = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    writer.add_file_type(int(getattr(gguf.LlamaFileType, label, gguf.LlamaFileType.GUESSED)))
    if any(number in BLOCKS for number in wide):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    small = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    writer.add_string(f"{OWN}producer", PRODUCER)
    writer.add_string(f"{OWN}files", json.dumps(small))


def _with_header(writer: Any, path: Path, outputs: list[Output]) -> GGUFFile:
    """Write the header and give the file its size; returns it, opened."""
    import gguf
    import numpy as np

    for one in outputs:
        kind = gguf.GGMLQuantizationType(one.number)
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin, pad = path.stat().st_size, writer.data_alignment
    total = -(-begin // pad) * pad + sum(-(-one.nbytes // pad) * pad for one in outputs)
    os.truncate(path, total)
    return GGUFFile(path)


def _in_order(outputs: list[Output], entries: Entries) -> list[Output]:
    """In the order of their blocks, and in a block of their elements."""

    def place(one: Output) -> tuple[int, tuple[str, int]]:
        origin = ("", 0) if one.recipe is None else one.recipe.origin()
        return (entries.place_of(*origin) if origin[0] else -1), origin

    return sorted(outputs, key=place)


def _bytes(one: Output, entries: Entries, source: GGUFWeights | None) -> Iterator[Tensor]:
    """A tensor's bytes in the file, in order."""
    if one.recipe is None:
        assert source is not None
        for at in range(0, one.nbytes, CHUNK):
            yield source.bytes_of(one.name, at, min(CHUNK, one.nbytes - at))
        return
    reader = Reader(entries.read_into)
    for _, values in chunks(partial(one.recipe.fill, reader), one.recipe.dtype, 0, one.numel):
        yield _encoded(one, values)


def _encoded(one: Output, values: Tensor) -> Tensor:
    """Some elements of a tensor as bytes, uint8. CheckpointError: they are not finite, or become so."""
    import gguf

    kind = BLOCKS.get(one.number)
    if one.plus_one:
        values = values.float() + 1
    if kind is None:
        found = values.to(PLAIN[one.number])
        is_finite = bool(torch.isfinite(found).all())
        raw = found.view(torch.uint8)
    else:
        wide = values.float()
        is_finite = bool(torch.isfinite(wide).all()) and float(wide.abs().max()) < 65504
        raw = torch.from_numpy(gguf.quantize(wide.view(-1, kind.numel).numpy(), gguf.GGMLQuantizationType(one.number)))
    if not is_finite:
        held = next(name for name, number in _NUMBERS.items() if number == one.number)
        raise CheckpointError(
            f"{one.name!r} has values that are NaN, infinite, or too large for {held}. A wider type for the last: "
            "gguf-f32, gguf-bf16."
        )
    return raw.reshape(-1)
