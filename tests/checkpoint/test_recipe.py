"""Recipes: tensors made of parts of others equal what torch and transformers make of whole tensors, any run of them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from support.zoo.models import ZOO
from zo_offload.checkpoint import recipe
from zo_offload.checkpoint.conversion import loading_groups, names_to_save, saving_groups
from zo_offload.checkpoint.recipe import Finder, Reader, Source, Turn, Whole

OPERATIONS = {
    "stack 0": lambda a, b: torch.stack([a, b]),
    "stack 1": lambda a, b: torch.stack([a, b], dim=1),
    "stack last": lambda a, b: torch.stack([a, b], dim=-1),
    "cat 0": lambda a, b: torch.cat([a, b, a]),
    "cat 1": lambda a, b: torch.cat([a, b], dim=1),
    "cat last": lambda a, b: torch.cat([a, b], dim=-1),
    "cat with an empty one": lambda a, b: torch.cat([a[:0], b]),
    "chunk 0": lambda a, b: torch.chunk(a, 4)[2],
    "chunk 1": lambda a, b: torch.chunk(a, 3, dim=1)[1].contiguous(),
    "short chunk": lambda a, b: torch.chunk(a, 5)[-1],
    "split": lambda a, b: torch.split(a, [1, 5, 2])[1],
    "unbind": lambda a, b: torch.unbind(a, 1)[3],
    "select": lambda a, b: a[-2],
    "select inside": lambda a, b: a[:, 4],
    "slice": lambda a, b: a[2:-1, 3:100],
    "narrow": lambda a, b: a.narrow(2, 1, 2),
    "transpose": lambda a, b: a.transpose(0, 1).contiguous(),
    "transpose inside": lambda a, b: a.transpose(1, 2).contiguous(),
    "permute": lambda a, b: a.permute(2, 0, 1).reshape(-1),
    "turned back": lambda a, b: a.transpose(0, 2).transpose(0, 2),
    "t": lambda a, b: a.reshape(12, 20).t().contiguous(),
    "shapes": lambda a, b: a.unsqueeze(1).flatten(2).squeeze(1).view(4, -1),
    "interleave": lambda a, b: a.reshape(4, 2, 6, 5).transpose(0, 1).reshape(8, 6, 5),
    "rotary halves": lambda a, b: a.view(2, 2, 2, 30).transpose(1, 2).reshape(8, 30),
    "fused experts": lambda a, b: torch.cat([torch.stack([a[i] for i in range(8)]), b], dim=1),
    "experts again": lambda a, b: torch.chunk(torch.cat([a, b], dim=1), 2, dim=1)[1][3].squeeze(0),
    "cast": lambda a, b: torch.cat([a.to(torch.float64), b.double()]),
    "clone": lambda a, b: a.clone().detach(),
}


def sources() -> dict[str, Tensor]:
    a = torch.arange(240, dtype=torch.float32).reshape(8, 6, 5)
    return {"a": a, "b": 1000 + a}


def reader_of(tensors: dict[str, Tensor], reads: list[int] | None = None) -> Reader:
    def read_into(name: str, start: int, out: Tensor) -> None:
        if reads is not None:
            reads.append(len(out))
        out.copy_(tensors[name].reshape(-1)[start : start + len(out)])

    return Reader(read_into)


def found(operation, tensors: dict[str, Tensor]):
    metas = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    with Finder() as finder:
        for name, meta in metas.items():
            finder.add(meta, Source(name, meta.numel(), meta.dtype))
        made = operation(*metas.values())
    return finder.recipe(made)


def assert_equal_in_runs(made, want: Tensor, reader: Reader, seed: int = 0) -> None:
    """All of it, and runs of every kind: single elements, ends, random ones out of order."""
    flat, draw = want.reshape(-1), random.Random(seed)
    runs = [(0, len(flat)), (0, min(1, len(flat))), (len(flat) - 1, 1)] if len(flat) else [(0, 0)]
    runs += [(start := draw.randrange(len(flat)), draw.randint(0, len(flat) - start)) for _ in range(12) if len(flat)]
    assert (made.numel, made.dtype) == (len(flat), want.dtype)
    for element, _ in runs if len(flat) else ():
        assert origin_of(made, element, reader) == flat[element]
    for start, count in runs:
        assert torch.equal(made.part(reader, start, count), flat[start : start + count]), (start, count)


def origin_of(made, element: int, reader: Reader) -> Tensor:
    """The source's element that a recipe says this one is; of a permuted row's, the one that was asked for."""
    source, place = made.origin(element)
    if any(isinstance(part, Turn) for part in parts_of(made)):
        return made.part(reader, element, 1)[0]
    out = torch.empty(1)
    reader.read_into(source, place, out)
    return out[0]


def parts_of(made) -> list:
    inner = [made.of] if hasattr(made, "of") else getattr(made, "parts", [])
    return [made, *(part for one in inner for part in parts_of(one))]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("scratch", [1, 7, 64, 1 << 20])
def test_a_recipe_gives_what_the_operation_gives(name, scratch, monkeypatch):
    monkeypatch.setattr(recipe, "SCRATCH", scratch)
    tensors = sources()
    made = found(OPERATIONS[name], tensors)
    assert made is not None
    assert_equal_in_runs(made, OPERATIONS[name](*tensors.values()), reader_of(tensors))


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a + b,
        lambda a, b: a[::2],
        lambda a, b: a.view(torch.int32),
        lambda a, b: torch.cat([a, b.double()]),
        lambda a, b: torch.cat([a, torch.zeros(8, 6, 5, device="meta")]),
        lambda a, b: a.expand(3, 8, 6, 5),
        lambda a, b: a[torch.tensor([1, 0])],
        lambda a, b: torch.stack([a, b]).add_(1),
        lambda a, b: (b.zero_(), torch.stack([a, b]))[1],
        lambda a, b: a.as_strided((3,), (2,)),
    ],
)
def test_what_is_not_a_move_of_elements_has_no_recipe(operation):
    assert found(operation, sources()) is None


def test_a_run_reads_no_more_than_it_is_made_of(monkeypatch):
    monkeypatch.setattr(recipe, "SCRATCH", 16)
    tensors, reads = sources(), []
    for name, start, count, most in [
        ("fused experts", 30, 30, 30), ("experts again", 3, 20, 20), ("chunk 1", 5, 20, 20), ("slice", 0, 30, 60),
        ("transpose inside", 0, 30, 30), ("rotary halves", 0, 120, 120),
    ]:  # fmt: skip
        reads.clear()
        made = found(OPERATIONS[name], tensors)
        made.part(reader_of(tensors, reads), start, count)
        assert 0 < sum(reads) <= most, name


def test_what_must_be_made_whole_is_made_once_and_let_go(monkeypatch):
    monkeypatch.setattr(recipe, "SCRATCH", 16)
    tensors, reads = sources(), []
    made, reader = found(OPERATIONS["transpose"], tensors), reader_of(tensors, reads)
    for start in range(0, 240, 16):
        assert (reader._held is not None) == (start > 0)
        made.part(reader, start, 16)
    assert sum(reads) == 240 and reader._held is None


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("scratch", [64, 1 << 20])
def test_conversions_of_transformers_run_by_run(name, scratch, monkeypatch, tmp_path):
    """Both ways, every group of every architecture: recipes against transformers' own operations on whole tensors."""
    monkeypatch.setattr(recipe, "SCRATCH", scratch)
    model = ZOO[name].build()
    entries = {key: tensor.detach() for key, tensor in names_to_save(model).items()}
    metas = {key: torch.empty_like(tensor, device="meta") for key, tensor in entries.items()}
    saved = convert(saving_groups(model, metas), entries, model)
    loading, _, _ = loading_groups(model, {key: torch.empty_like(t, device="meta") for key, t in saved.items()})
    loaded = convert(loading, saved, model)
    assert loaded.keys() == entries.keys()
    assert all(torch.equal(loaded[key], entries[key]) for key in entries)


def convert(groups, given: dict[str, Tensor], model) -> dict[str, Tensor]:
    """All outputs, by transformers; each compared with its recipe."""
    made = {}
    for group in groups:
        if group._transform is None:
            whole = {group._first: given[group.sources[0]]}
        else:
            raw = group._convert([given[source] for source in group.sources], model)
            whole = dict(zip(group.outputs, raw.values(), strict=True))
        for name, tensor in whole.items():
            assert not isinstance(group.recipes[name], Whole), f"{name}: nothing here computes"
            assert_equal_in_runs(group.recipes[name], tensor, reader_of(given))
        made.update(whole)
    return made


def test_a_conversion_that_computes_runs_on_whole_tensors_once_for_all_its_outputs():
    calls = []

    def run(reader: Reader) -> dict[str, Tensor]:
        calls.append(1)
        values = Source("a", 240, torch.float32).part(reader, 0, 240)
        return {"one": values * 2, "two": values.view(8, 30) + 1}

    tensors = sources()
    reader = reader_of(tensors)
    one, two = (Whole(name, run, 2, "a", 240, torch.float32) for name in ("one", "two"))
    for start in range(0, 240, 48):
        assert torch.equal(one.part(reader, start, 48), tensors["a"].reshape(-1)[start : start + 48] * 2)
    for start in range(0, 240, 48):
        assert torch.equal(two.part(reader, start, 48), tensors["a"].reshape(-1)[start : start + 48] + 1)
    assert len(calls) == 1 and reader._held is None
