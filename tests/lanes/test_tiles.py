"""Linear layers whose weight is cut are computed piece by piece, the same however and wherever they are served."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from support.compare import assert_same
from support.lanes import (
    MINUS,
    OTHER,
    PLUS,
    DictSource,
    assert_lanes_give,
    has_forward,
    tiled_model,
    whole_model,
)
from support.training import squares
from support.zoo import archs
from support.zoo.archs import ARCH, Arch
from zo_offload import Engine, MeZO
from zo_offload.lanes.hub import Hub, Lane, PlanFault
from zo_offload.modules.recorder import Trace
from zo_offload.modules.tiles import tiled_linear
from zo_offload.plan.activations import Activations, measure_activations
from zo_offload.plan.plan import Plan, make_plan, relift

LIMIT = 700  # elements a block: 20 rows of 32


# ---- the product -----------------------------------------------------------------------------------------------------

CUTS = [slice(0, 8), slice(8, 16), slice(16, 21)]


def in_tiles(x: Any, w: Tensor, b: Tensor | None) -> Tensor:
    """The reference: torch's own product for each piece."""
    return torch.cat([F.linear(x, w[rows], None if b is None else b[rows]) for rows in CUTS], dim=-1)


def tiles_of(x: Any, w: Tensor, b: Tensor | None) -> Tensor:
    """`tiled_linear` with pieces, and a bias, that are gone when the next one is there."""
    memory = torch.full_like(w[:8], float("nan"))
    kept = None if b is None else b.clone()

    def piece(k: int) -> Tensor:
        if k and kept is not None:
            kept.fill_(float("nan"))
        rows = w[CUTS[k]]
        memory.fill_(float("nan"))
        return memory[: rows.shape[0]].copy_(rows)

    return tiled_linear(x, CUTS, piece, kept)


INPUTS = {
    "one row": lambda x: x[0, 0],
    "matrix": lambda x: x[0],
    "batch": lambda x: x,
    "four": lambda x: x.view(2, 3, -1, 12),
    "transposed": lambda x: x[0].t().contiguous().t(),
    "swapped": lambda x: x.transpose(0, 1),
    "every second": lambda x: x[:, ::2],
    "columns": lambda x: torch.cat([x, x], -1)[..., 5:17],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "empty": lambda x: x[:0],
    "parameter": lambda x: nn.Parameter(x),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tiles_equal_torchs_products_of_the_pieces(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 6, 12).to(dtype), torch.randn(21, 12).to(dtype), torch.randn(21).to(dtype)
    with torch.no_grad():
        for name, change in INPUTS.items():
            given = change(x)
            got, want = tiles_of(given, w, b if bias else None), in_tiles(given, w, b if bias else None)
            assert got.dtype == want.dtype and got.is_contiguous(), name
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
            if given.is_contiguous():
                assert torch.equal(got, want), name


def test_no_copy_of_the_output_is_made() -> None:
    x, w, b = torch.randn(64, 12), torch.randn(21, 12), torch.randn(21)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        tiled_linear(x, CUTS, lambda k: w[CUTS[k]], b)
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages()) == 64 * 21 * 4


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_what_it_gives_to_torchs_product(bias: bool) -> None:
    torch.manual_seed(0)
    b = torch.randn(21) if bias else None
    for x in (torch.randn(2, 6, 12), torch.randn(5, 12).bfloat16()):
        w = torch.randn(21, 12)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tiles_of(x, w, b), in_tiles(x, w, b))
            assert torch.equal(tiles_of(x.bfloat16(), w, b), in_tiles(x.bfloat16(), w, b))
            assert tiles_of(x, w, b).dtype is torch.bfloat16
            with pytest.raises(RuntimeError, match="dtype"):  # autocast leaves float64 as it is
                tiles_of(x.double(), w, b)
            assert tiles_of(x.double(), w.double(), None if b is None else b.double()).dtype is torch.float64


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 11), torch.zeros(11), torch.zeros(()), torch.zeros(2, 3, 13), torch.zeros(4, 12).double(),
        torch.zeros(4, 12).bfloat16(), torch.zeros(4, 12, dtype=torch.int64), None, [1.0],
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}" if isinstance(x, Tensor) else repr(x),
)  # fmt: skip
def test_what_a_linear_layer_refuses_is_refused_in_the_same_words(x: Any) -> None:
    w, b = torch.randn(21, 12), torch.randn(21)
    with torch.no_grad():
        with pytest.raises((RuntimeError, TypeError)) as want:
            F.linear(x, w, b)
        with pytest.raises(want.type) as got:
            tiles_of(x, w, b)
    assert str(got.value) == str(want.value)


class Marked(Tensor):
    """A subclass that lives on in the results."""


def test_other_tensors_and_gradients_take_torchs_way() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 12), torch.randn(21, 12), torch.randn(21)
    with torch.no_grad():
        marked = tiles_of(x.as_subclass(Marked), w, b)
        assert type(marked) is Marked and torch.equal(marked.as_subclass(Tensor), in_tiles(x, w, b))
        assert torch.equal(tiles_of(x.to_sparse(), w, None), in_tiles(x.to_sparse(), w, None))
        mapped = torch.func.vmap(lambda row: tiled_linear(row, CUTS, lambda k: w[CUTS[k]], b))(x)
        torch.testing.assert_close(mapped, in_tiles(x, w, b))
    grad = x.clone().requires_grad_()
    tiled_linear(grad, CUTS, lambda k: w[CUTS[k]], b).sum().backward()
    assert grad.grad is not None
    torch.testing.assert_close(grad.grad, w.sum(0).expand(4, -1))


# ---- in lanes --------------------------------------------------------------------------------------------------------


def want_of(arch: Arch, model: nn.Module, plan: Plan, source: DictSource, lanes: list[Lane]) -> list[Any]:
    with tiled_model(model, plan) as patched:
        assert patched, f"{arch.name}: no linear layer is cut, so this shows nothing"
        return [whole_model(model, source, lane, functional=arch.functional) for lane in lanes]


def lanes_of(arch: Arch) -> list[Lane]:
    """Two perturbations of one noise and one of another, on two micro-batches each."""
    return [Lane(p, arch.batch(b)) for p in (PLUS, MINUS, OTHER) for b in (0, 1)]


ARCHS = [
    "opt", "opt-projected", "llama", "llama-tied", "gemma3", "gpt2", "bloom", "phi3", "mixtral", "qwen2_moe", "gpt_oss",
    "deepseek_v3", "mamba", "jamba", "rwkv", "bert", "deberta_v2", "t5", "bart", "whisper", "vit", "clip", "swin",
    "NestedTies", "Rows",
]  # fmt: skip


@pytest.mark.parametrize("name", ARCHS)
def test_lanes_in_tiles_equal_the_whole_model_in_tiles(name: str) -> None:
    arch = ARCH[name]
    model, lanes = archs.build(arch), lanes_of(arch)
    limit = 200 if name in ("NestedTies", "swin") else LIMIT
    plan = make_plan(model, arch.batch(0), block_numel=limit)
    source = DictSource(model, "arena")
    want = want_of(arch, model, plan, source, lanes)
    assert_lanes_give(model, plan, source, lanes, want, name)


class Stack(nn.Module):
    """Three layers, each cut in three; `between` is called after each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, between: Any = None) -> Tensor:
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
            if between is not None:
                between(x)
        return x


def stack(cls: type[nn.Module] = Stack) -> tuple[Any, DictSource, Tensor, Plan]:
    torch.manual_seed(3)
    model, x = cls().eval(), torch.randn(4, 32)
    return model, DictSource(model, "arena"), x, make_plan(model, {"x": x}, block_numel=480)


def want_of_stack(model: nn.Module, plan: Plan, source: DictSource, lanes: list[Lane]) -> list[Any]:
    with tiled_model(model, plan):
        return [whole_model(model, source, lane) for lane in lanes]


class Told(DictSource):
    """Keeps what it was asked for, (owner, piece, scales), and the most elements that were out at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.asked: list[tuple[str, int | None, list[float]]] = []
        self.sizes: dict[int, int] = {}
        self.most = 0

    def emit(self, owner: Any, perturbations: Any, rows: Any = None, pieces: Any = None, **how: Any) -> Any:
        self.asked.append((owner.name, None if pieces is None else pieces[-1].index, [p.scale for p in perturbations]))
        scratch = super().emit(owner, perturbations, rows, pieces)
        self.sizes[id(scratch)] = sum(t.numel() for row in scratch for t in row)
        self.most = max(self.most, sum(self.sizes.values()))
        return scratch

    def release(self, scratch: Any) -> None:
        del self.sizes[id(scratch)]
        super().release(scratch)


@pytest.mark.parametrize("order", ["module", "block", "lane"])
def test_lanes_are_in_lockstep_over_pieces_and_hold_one_each(order: Any) -> None:
    model, _, x, plan = stack()
    source = Told(model)
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    with Hub(model, plan, source, order=order) as hub:
        got = hub.run(lanes, watch=False)
    plus, minus = PLUS.scale, MINUS.scale
    pieces = [(f"layers.{layer}", k) for layer in range(3) for k in range(3)]
    if order == "module":
        assert source.asked == [(*piece, [plus, minus]) for piece in pieces]
    elif order == "lane":
        assert source.asked == [(*piece, [p]) for p in (plus, minus) for piece in pieces]
    else:  # as far as a block goes with one lane, then with the other: here no two pieces fit into one
        assert [len(block.pieces) for block in plan.blocks] == [2, 1, 1] * 3
        assert source.asked == [(*piece, [p]) for piece in pieces for p in (plus, minus)]
    assert source.most == (32 + 12 * 32) * (2 if order == "module" else 1), "a bias and the largest piece"
    for y, want in zip(got, want_of_stack(model, plan, source, lanes), strict=True):
        assert_same(y, want)


def test_a_lane_that_waits_in_mid_tile_lets_the_one_behind_catch_up() -> None:
    class Detour(Stack):
        def forward(self, x: Tensor, between: Any = None) -> Tensor:
            x = self.layers[0](x)
            if between:
                x = self.layers[1](x)
            return self.layers[2](x)

    model, _, x, plan = stack(Detour)
    plan = make_plan(model, {"x": x, "between": True}, block_numel=480)
    source = Told(model)
    lanes = [Lane(PLUS, {"x": x, "between": False}), Lane(MINUS, {"x": x, "between": True})]
    with Hub(model, plan, source) as hub:
        got = hub.run(lanes)
    together = [(name, piece) for name, piece, scales in source.asked if len(scales) == 2]
    assert together == [(f"layers.{layer}", k) for layer in (0, 2) for k in range(3)]
    for y, want in zip(got, want_of_stack(model, plan, source, lanes), strict=True):
        assert_same(y, want)


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("memory", ["fresh", "pool"])
def test_every_lane_draws_the_same_random_numbers(watch: bool, memory: str) -> None:
    model, _, x, plan = stack()
    model.dropout.train()
    source = DictSource(model, memory)
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS, OTHER)]
    with Hub(model, plan, source) as hub:
        hub.run(lanes)
        torch.manual_seed(5)
        got = hub.run(lanes, watch=watch)
        end = torch.get_rng_state()
    for lane, y in zip(lanes, got, strict=True):
        torch.manual_seed(5)
        assert_same(y, want_of_stack(model, plan, source, [lane])[0])
    assert torch.equal(end, torch.get_rng_state())


@pytest.mark.parametrize("watch", [True, False])
def test_lanes_keep_their_modes_between_pieces(watch: bool) -> None:
    class Mark(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.Tensor.data.__set__, "the hub's work is none of a lane's mode's business"
            return func(*args, **(kwargs or {}))

    model, source, x, plan = stack()
    bf16 = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    contexts: list[Any] = [torch.inference_mode(), torch.enable_grad(), bf16, Mark(), contextlib.nullcontext()]

    def call(model: nn.Module, batch: Any) -> Any:
        with contexts[batch["context"]]:
            y = model(batch["x"])
            assert y.is_inference() == (batch["context"] == 0) and y.requires_grad == (batch["context"] == 1)
            return y

    lanes = [Lane(PLUS, {"x": x, "context": i}) for i in range(len(contexts))]
    with Hub(model, plan, source) as hub:
        got = hub.run(lanes, call, watch=watch)
    assert [y.dtype for y in got] == [torch.bfloat16 if i == 2 else torch.float32 for i in range(len(contexts))]
    want = want_of_stack(model, plan, source, [Lane(PLUS, {"x": x})])[0]
    for i in (0, 1, 3, 4):
        assert_same(got[i].detach(), want, str(contexts[i]))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert_same(got[2], want_of_stack(model, plan, source, [Lane(PLUS, {"x": x})])[0])


# ---- what is not served in pieces ------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def replaced(model: Any) -> None:
    plain = model.layers[1]
    plain.forward = lambda x: nn.Linear.forward(plain, x) + 1


def subclass(model: Any) -> None:
    model.layers[1] = Doubled(32, 32)


def parametrized(model: Any) -> None:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    nn.utils.parametrize.register_parametrization(model.layers[1], "weight", Half())


def hooked(model: Any) -> None:
    model.layers[1].register_forward_hook(lambda module, args, out: out + module.weight.sum())


@pytest.mark.parametrize("change", [replaced, subclass, parametrized, hooked])
@pytest.mark.parametrize("when", ["before planning", "after"])
def test_what_may_look_at_its_weight_gets_it_whole(change: Any, when: str) -> None:
    model, _, x, plan = stack()
    if when == "before planning" or change in (subclass, parametrized):  # those two make another model
        change(model)
        plan = make_plan(model, {"x": x}, block_numel=480)
    else:
        change(model)
    source = Told(model)
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    own = has_forward(model)
    call = lambda m, b: m(**b)  # noqa: E731
    with tiled_model(model, plan):
        want = [whole_model(model, source, lane, call, functional=False) for lane in lanes]
    with Hub(model, plan, source) as hub:
        for _ in range(2):
            for y, wanted in zip(hub.run(lanes), want, strict=True):
                assert_same(y, wanted)
        assert has_forward(model) != own
    assert has_forward(model) == own
    pieces = {piece for name, piece, _ in source.asked if name.startswith("layers.1")}
    assert pieces == {None} and {piece for name, piece, _ in source.asked if name == "layers.0"} == {0, 1, 2}


class Odd(nn.Module):
    """A head whose last piece is one row: with that a product has other bits than the same column of the whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 97)), nn.Sequential(nn.Linear(97, 97))])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_results_do_not_depend_on_how_a_cut_layer_is_served() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(22, 32)
    source, lanes = Told(model), [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    plan = make_plan(model, {"x": x}, block_numel=600)
    assert plan.pieces_of("layers.0.0.weight")[-1].numel == 32

    def run(plan: Plan) -> tuple[list[Any], set[int | None]]:
        source.asked.clear()
        with Hub(model, plan, source) as hub:
            return hub.run(lanes), {piece for name, piece, _ in source.asked if name.startswith("layers.0")}

    in_pieces, pieces = run(plan)
    assert pieces == set(range(len(plan.pieces_of("layers.0.0.weight"))))
    lifted, pieces = run(make_plan(model, {"x": x}, call=lambda m, b: 1 / 0, block_numel=600))
    assert pieces == {None}
    with model.layers[0][0].register_forward_hook(lambda module, args, out: None):
        hooked, pieces = run(plan)
    assert pieces == {None}
    for a, b, c, lane in zip(in_pieces, lifted, hooked, lanes, strict=True):
        assert_same(a, b)
        assert_same(a, c)
        whole = whole_model(model, source, lane)
        assert not torch.equal(a, whole), "the bits are those of the whole product, so this shows nothing"
        torch.testing.assert_close(a, whole)


@pytest.mark.parametrize("name", ["DirectForward", "ReadsChild", "mamba"])
@pytest.mark.parametrize("order", ["module", "block"])
@pytest.mark.parametrize("memory", ["fresh", "arena", "pool"])
def test_a_wrong_plan_of_a_cut_layer_is_a_fault_and_one_relift_mends_it(name: str, order: Any, memory: str) -> None:
    arch = ARCH[name]
    model = archs.build(arch)
    source, lanes, limit = DictSource(model, memory), lanes_of(arch)[:2], LIMIT if name == "mamba" else 200
    naive = relift(make_plan(model, {}, call=lambda m, b: 1 / 0, block_numel=limit), Trace({}, (), complete=True))
    want = want_of(arch, model, naive, source, lanes)
    with Hub(model, naive, source, order=order) as hub:
        with pytest.raises(PlanFault, match="does not have there") as caught:
            hub.run(lanes)
        assert source.out == 0
        hub.adopt(relift(hub.plan, caught.value.trace))
        for got, wanted in zip(hub.run(lanes), want, strict=True):
            assert_same(got, wanted)
    assert has_forward(model) == []


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["module", "block", "lane"])
@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_source_that_fails_in_mid_tile_leaves_all_clean(order: Any, watch: bool, at: int) -> None:
    model, source, x, plan = stack()
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    emit = source.emit

    def broken(owner: Any, perturbations: Any, rows: Any = None, pieces: Any = None, **how: Any) -> Any:
        if owner.name == "layers.1" and pieces[-1].index == at and perturbations[-1] is MINUS:
            raise OSError("disk on fire")
        return emit(owner, perturbations, rows, pieces)

    with Hub(model, plan, source, order=order) as hub:
        source.emit = broken  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(OSError, match="on fire"):
                hub.run(lanes, watch=watch)
            assert source.out == 0
            assert all(p.isnan().all() and p.shape == (32, 32)[: p.ndim] for p in model.parameters())
        source.emit = emit  # type: ignore[method-assign]
        got = hub.run(lanes, watch=watch)
    for y, want in zip(got, want_of_stack(model, plan, source, lanes), strict=True):
        assert_same(y, want)
    assert has_forward(model) == []


@pytest.mark.parametrize("order", ["module", "block", "lane"])
@pytest.mark.parametrize("watch", [True, False])
def test_a_lane_that_fails_in_a_product_names_it_and_leaves_all_clean(order: Any, watch: bool) -> None:
    """Its input is refused by the layer, while the other lane is inside of it; a parent may catch that and go on."""
    model, source, x, plan = stack()
    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x[:, :5]}), Lane(OTHER, {"x": x})]
    plain = Stack().eval()
    with pytest.raises(RuntimeError) as refused:
        plain(x[:, :5])
    caught: list[str] = []

    def call(model: nn.Module, batch: Any) -> Any:
        try:
            return model(**batch)
        except RuntimeError as error:
            caught.append(str(error))
            return model(x)

    with Hub(model, plan, source, order=order) as hub:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot be multiplied") as failed:
                hub.run(lanes, watch=watch)
            assert str(failed.value) == str(refused.value)
            assert failed.value.__notes__ == [
                f"zo_offload: lane 1 (seed 1, scale {MINUS.scale:g}), in module 'layers.0'"
            ]
            assert source.out == 0 and all(p.isnan().all() for p in model.parameters())
        got = hub.run(lanes, call, watch=watch)
        assert caught == [str(refused.value)] and source.out == 0
    for y, want in zip(
        got, want_of_stack(model, plan, source, [Lane(one.perturbation, {"x": x}) for one in lanes]), strict=True
    ):
        assert_same(y, want)
    assert has_forward(model) == []


def test_a_forward_that_changes_a_cut_weight_needs_another_plan() -> None:
    model, source, x, plan = stack()

    def change(_: Tensor) -> None:
        with torch.no_grad():
            model.layers[1].weight.mul_(0.5)

    with Hub(model, plan, source) as hub, pytest.raises(PlanFault, match=r"'layers.1.weight' is used in .*away"):
        hub.run([Lane(PLUS, {"x": x, "between": change})])
    assert source.out == 0 and has_forward(model) == []


def test_the_same_layer_called_twice_and_shared_by_two_names() -> None:
    class Twice(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.layers[2] = self.layers[0]
            self.again = nn.Linear(32, 32, bias=False)
            self.again.weight = self.layers[1].weight

        def forward(self, x: Tensor, between: Any = None) -> Tensor:
            return self.again(self.layers[2](self.layers[1](self.layers[0](x))))

    model, _, x, plan = stack(Twice)
    source = Told(model)
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    call = lambda m, b: m(**b)  # noqa: E731
    with tiled_model(model, plan):
        want = [whole_model(model, source, lane, call, functional=False) for lane in lanes]
    for order in ("module", "block", "lane"):
        with Hub(model, plan, source, order=order) as hub:  # type: ignore[arg-type]
            for _ in range(2):
                for y, wanted in zip(hub.run(lanes), want, strict=True):
                    assert_same(y, wanted, order)
    assert has_forward(model) == []


# ---- in the engine ---------------------------------------------------------------------------------------------------


ENGINES = [
    "opt", "llama-tied", "gpt2", "phi3", "mixtral", "deepseek_v3", "mamba", "bert", "t5", "vit",
]  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_every_tier_and_order_gives_the_same_and_scratch_is_as_predicted(name: str, tmp_path: Path) -> None:
    arch = ARCH[name]
    data = [arch.batch(0), arch.batch(1)]

    def train(block_numel: int = LIMIT, **settings: Any) -> tuple[list[float], float, int, int]:
        made = archs.build(arch)
        with Engine(made, method=MeZO(lr=1e-3), objective=squares, example=data[0], block_numel=block_numel,
                    fold_every=2, threads=1, **settings) as engine:  # fmt: skip
            losses = [engine.step(batch).loss for batch in [*data, *data]]
            value = engine.evaluate(data)["loss"]
            scratch = engine.active.streamer.scratch_bytes
            predicted = engine.memory.terms["scratch"]
            restored = engine.restore()
        assert has_forward(made) == []
        with tiled_model(restored, engine.plan) as cut, torch.no_grad():
            assert cut or block_numel > LIMIT
            values = [float(squares(restored, batch)) for batch in data]
        assert value == sum(values) / 2, "evaluation computes in the same pieces"
        return losses, value, scratch, predicted

    losses, value, scratch, predicted = train(offload="none")
    assert len(set(losses)) == 4 and scratch <= predicted
    assert losses == pytest.approx(train(block_numel=1 << 30, offload="none")[0], rel=1e-4)
    for i, way in enumerate(
        [dict(offload="host", order="block"), dict(offload="disk", order="lane"), dict(offload="disk")]
    ):
        folder = {"run_dir": tmp_path / str(i)} if way["offload"] == "disk" else {}
        again = train(**way, **folder)
        assert again[:2] == (losses, value), way
        assert again[2] <= again[3], way
        if way.get("order"):
            assert again[3] <= predicted


def test_scratch_is_a_piece_a_lane() -> None:
    """A head far larger than everything else: its largest piece is what scratch takes, in every tier and order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 128 * 9 + 5))
    x = torch.randn(4, 32)
    for order, copies in (("module", 2), ("block", 1), ("lane", 1)):
        with Engine(copy.deepcopy(model), method=MeZO(lr=1e-3), objective=lambda m, b: m(b["x"]).square().mean(),
                    example={"x": x}, offload="host", block_numel=128 * 32 + 2000, order=order) as engine:  # fmt: skip
            for _ in range(3):
                engine.step({"x": x})
            pieces = engine.plan.pieces_of("2.weight")
            assert len(pieces) == 10 and max(piece.numel for piece in pieces) == 128 * 32
            bias = -(-(128 * 9 + 5) * 4 // 256) * 256
            assert engine.memory.terms["scratch"] == copies * (128 * 32 * 4 + bias)
            assert engine.active.streamer.scratch_bytes == engine.memory.terms["scratch"]


def test_the_activation_term_knows_that_lanes_wait_with_their_output_in_hand() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 128 * 9 + 5))
    x, out = torch.zeros(64, 32), 64 * (128 * 9 + 5) * 4

    def measured(block_numel: int) -> Activations:
        plan = make_plan(model, {"x": x}, call=lambda m, b: m(b["x"]), block_numel=block_numel)
        return measure_activations(model, plan, {"x": x}, lambda m, b: m(b["x"]).square().mean())

    cut, whole = measured(128 * 32 + 2000), measured(1 << 30)
    for order in ("module", "block"):
        two, one = cut.together(order, 2), cut.together(order, 1)  # type: ignore[arg-type]
        assert out <= two - one <= out + x.nbytes, "the other lane's output, and its input"
        assert 0 < whole.together(order, 2) - whole.together(order, 1) <= 2 * x.nbytes  # type: ignore[arg-type]
    assert cut.together("lane", 2) == whole.together("lane", 2) == cut.peak + x.nbytes
    assert has_forward(model) == []


def test_a_resumed_run_of_a_model_that_is_learnt_from_its_first_run_has_the_same_bits(tmp_path: Path) -> None:
    """Its first step serves layers whole, before their pieces are known to be enough; the bits must be those of later
    ones, which a run that was never stopped has there."""
    data = [{"x": x} for x in torch.randn(6, 22, 32, generator=torch.Generator().manual_seed(1))]
    settings: dict[str, Any] = dict(objective=lambda m, b: m(b["x"]).square().mean())

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Odd()

    method = MeZO(lr=1e-3, batch_size=22)
    with Engine(make(), method=method, offload="disk", block_numel=600, run_dir=tmp_path / "a", **settings) as engine:
        never = [engine.step(batch).loss for batch in data]
        want = dict(engine.weights())
    with Engine(make(), method=method, offload="disk", block_numel=600, run_dir=tmp_path / "b", **settings) as engine:
        losses = [engine.step(batch).loss for batch in data[:3]]
    with Engine.resume(tmp_path / "b", make(), **settings) as engine:
        losses += [engine.step(batch).loss for batch in data[3:]]
        assert losses == never
        assert all(torch.equal(value, want[name]) for name, value in engine.weights())


def test_micro_batches_share_each_piece() -> None:
    arch = ARCH["llama"]
    rows = {k: torch.cat([arch.batch(0)[k], arch.batch(1)[k]]) for k in ("input_ids", "attention_mask", "labels")}

    def train(micro_batches: int, **settings: Any) -> list[float]:
        with Engine(archs.build(arch), method=MeZO(lr=1e-3, batch_size=4), block_numel=LIMIT, **settings) as engine:
            return engine.fit([rows] * 4, steps=4, micro_batches=micro_batches).losses

    whole, parts = train(1), train(2, offload="host", order="module")
    assert parts == pytest.approx(whole, rel=1e-4)
    assert parts == train(2, offload="host", order="block") == train(2, order="lane")
