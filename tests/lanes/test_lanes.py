"""Lanes equal whole-model perturbation bit for bit, on any architecture, and nothing is silently wrong."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.compare import assert_same
from support.lanes import MINUS, OTHER, PLUS, DictSource, owners_of, run_settled, whole_model
from support.zoo import archs
from support.zoo.archs import ARCH, Arch
from zo_offload.errors import PlanError
from zo_offload.kernels.records import Perturbation
from zo_offload.lanes.hollow import hollow
from zo_offload.lanes.hub import Hub, Lane, LanesShareState, PlanFault
from zo_offload.modules.recorder import Trace
from zo_offload.plan.plan import Plan, make_plan, relift


def two_lanes(arch: Arch) -> list[Lane]:
    return [Lane(p, arch.batch(0)) for p in (PLUS, MINUS)]


def six_lanes(arch: Arch) -> list[Lane]:
    """Three perturbations of two noises, on two micro-batches each."""
    return [Lane(p, arch.batch(b)) for p in (PLUS, MINUS, OTHER) for b in (0, 1)]


def check(arch: Arch, model: nn.Module, hub: Hub, lanes: list[Lane], wanted: dict[Any, Any]) -> None:
    source: Any = hub.source
    for i, (lane, got) in enumerate(zip(lanes, run_settled(hub, lanes), strict=True)):
        key = (lane.perturbation, repr(lane.batch))
        assert_same(got, wanted[key], f"{arch.name} order={hub.order} lane {i}")
    assert source.out == 0, "scratch was not given back"


def references(arch: Arch, model: nn.Module, source: DictSource, lanes: list[Lane]) -> dict[Any, Any]:
    return {
        (lane.perturbation, repr(lane.batch)): whole_model(model, source, lane, functional=arch.functional)
        for lane in lanes
    }


@pytest.mark.parametrize("arch", archs.ALL, ids=lambda a: a.name)
def test_lanes_equal_whole_model_perturbation(arch: Arch) -> None:
    model = archs.build(arch)
    source = DictSource(model)
    wanted = references(arch, model, source, six_lanes(arch))
    plan = make_plan(model, arch.batch(0))
    orders: tuple[Any, ...] = ("module", "block")
    for order in orders:
        with Hub(model, plan, source, order=order) as hub:
            check(arch, model, hub, two_lanes(arch), wanted)  # watched
            check(arch, model, hub, six_lanes(arch), wanted)  # not watched
            if not hub.plan.traced:  # as the engine does
                assert hub.trace is not None
                hub.adopt(relift(hub.plan, hub.trace))
                check(arch, model, hub, six_lanes(arch), wanted)
    for name, p in model.named_parameters():
        assert torch.equal(p, source.weights[name]), f"{name} is not as before"


UNTRACED = [
    "llama", "gpt_neox_japanese", "mixtral", "gpt_oss", "mamba", "bamba", "albert", "t5", "whisper", "deberta_v2",
    *(arch.name for arch in archs.PLAIN),
]  # fmt: skip


@pytest.mark.parametrize("name", UNTRACED)
@pytest.mark.parametrize("memory", ["fresh", "arena", "pool"])
def test_a_model_that_cannot_be_traced_is_learnt_from_its_first_run(name: str, memory: str) -> None:
    arch = ARCH[name]
    model = archs.build(arch)
    source = DictSource(model, memory)
    lanes = two_lanes(arch)
    wanted = references(arch, model, source, lanes)
    plan = make_plan(model, call=lambda m, b: 1 / 0, batch=arch.batch(0))
    assert not plan.traced and "division by zero" in plan.notes[0]
    with Hub(model, plan, source) as hub:
        check(arch, model, hub, lanes, wanted)
        assert hub.trace is not None
        hub.adopt(relift(hub.plan, hub.trace))
        check(arch, model, hub, lanes, wanted)  # watched again
        check(arch, model, hub, lanes, wanted)
        traced = make_plan(model_of(arch), arch.batch(0))
        if traced.traced and name not in ("EarlyExit", "Encoder"):  # those run otherwise on meta
            assert owners_of(hub.plan) == owners_of(traced)


def model_of(arch: Arch) -> nn.Module:
    return archs.build(arch)


def naive_plan(model: nn.Module) -> Plan:
    """Every parameter at the module that holds it, with nothing known of the forward."""
    plan = make_plan(model, {}, call=lambda m, b: 1 / 0)
    return relift(plan, Trace({}, (), complete=True))


@pytest.mark.parametrize(
    "name", ["Attention", "ReadsChild", "ReturnsParameter", "ViewEscapes", "ViewOutlivesCall", "DirectForward", "mamba"]
)
@pytest.mark.parametrize("order", ["module", "block"])
@pytest.mark.parametrize("memory", ["fresh", "arena", "pool"])
def test_a_wrong_plan_is_a_fault_and_one_relift_mends_it(name: str, order: Any, memory: str) -> None:
    arch = ARCH[name]
    model = archs.build(arch)
    source = DictSource(model, memory)
    lanes = two_lanes(arch)
    wanted = references(arch, model, source, lanes)
    with Hub(model, naive_plan(model), source, order=order) as hub:
        with pytest.raises(PlanFault, match="does not have there") as caught:
            hub.run(lanes)
        assert source.out == 0
        hub.adopt(relift(hub.plan, caught.value.trace))
        for lane, got in zip(lanes, hub.run(lanes), strict=True):
            assert_same(got, wanted[lane.perturbation, repr(lane.batch)])


def test_weights_that_are_away_are_nan() -> None:
    arch = ARCH["ReadsChild"]
    model = archs.build(arch)
    with Hub(model, naive_plan(model), DictSource(model)) as hub:
        assert hub.run(two_lanes(arch), watch=False)[0].isnan().any()


# ---- how lanes are served --------------------------------------------------------------------------------------------


def test_micro_batches_share_scratch_and_module_order_makes_noise_once() -> None:
    arch = ARCH["llama"]
    model = archs.build(arch)
    source = DictSource(model)
    plan = make_plan(model, arch.batch(0))
    with Hub(model, plan, source) as hub:
        hub.run(six_lanes(arch))
    assert [name for name, _, _ in source.emits] == [plan.owners[call].name for call in plan.calls]
    assert all(ps == [PLUS, MINUS, OTHER] for _, ps, _ in source.emits)


def test_block_order_takes_one_lane_at_a_time_through_a_block() -> None:
    arch = ARCH["opt"]
    model = archs.build(arch)
    source = DictSource(model)
    plan = make_plan(model, arch.batch(0))
    with Hub(model, plan, source, order="block") as hub:
        hub.run(two_lanes(arch))
    block = {owner.name: owner.block for owner in plan.owners}
    turns = [(block[name], ps[0]) for name, ps, _ in source.emits]
    turns = [turn for i, turn in enumerate(turns) if i == 0 or turn != turns[i - 1]]
    assert turns[:6] == [(0, PLUS), (0, MINUS), (1, PLUS), (1, MINUS), (2, PLUS), (2, MINUS)]


def test_lanes_that_part_are_together_again_where_their_ways_meet() -> None:
    """The earliest waiting owner is served first, so that the lane ahead waits for the one behind."""

    class Detour(Stack):
        def forward(self, x: Tensor, between: Any = None) -> Tensor:
            x = self.layers[0](x)
            if between:
                x = self.layers[1](x)
            return self.layers[2](x)

    model, x = Detour(), torch.randn(2, 16)
    source = DictSource(model)
    lanes = [Lane(PLUS, {"x": x, "between": False}), Lane(MINUS, {"x": x, "between": True})]
    with Hub(model, make_plan(model, lanes[1].batch), source) as hub:
        got = hub.run(lanes)
    assert [(name, len(ps)) for name, ps, _ in source.emits] == [("layers.0", 2), ("layers.1", 1), ("layers.2", 2)]
    for lane, y in zip(lanes, got, strict=True):
        assert_same(y, whole_model(model, source, lane))


@pytest.mark.parametrize("order", ["module", "block"])
def test_scratch_is_let_go_as_soon_as_the_last_lane_leaves(order: Any) -> None:
    """A source that keeps nothing: no scratch is alive between a module and the next, nor when more is made."""
    model, _, x = stack()
    alive: list[weakref.ref[Tensor]] = []
    seen: list[tuple[str, int]] = []

    def count(where: str) -> None:
        seen.append((where, sum(ref() is not None for ref in alive)))

    class Frugal(DictSource):
        def emit(self, owner: Any, perturbations: Any, rows: Any = None, piece: Any = None, **how: Any) -> Any:
            count("emit")
            scratch = super().emit(owner, perturbations, rows, piece)
            alive.extend(weakref.ref(t) for ts in scratch for t in ts)
            return scratch

    lanes = [Lane(p, {"x": x, "between": lambda x, i=i: count(f"lane {i}")}) for i, p in enumerate((PLUS, MINUS))]
    gc.disable()
    try:
        with Hub(model, make_plan(model, {"x": x}), Frugal(model), order=order) as hub:
            hub.run(lanes, watch=False)
    finally:
        gc.enable()
    first = 4 if order == "module" else 0  # both lanes' weight and bias, held for the second lane
    assert {n for where, n in seen if where == "lane 0"} == {first}
    assert {n for where, n in seen if where != "lane 0"} == {0}


def test_an_embedding_gets_the_rows_in_use_only() -> None:
    arch = ARCH["Rows"]
    model = archs.build(arch)
    source = DictSource(model)
    ids = torch.tensor([[3, 3, 9, 0, 1, 1, 2, 3, 4, 5, 96]])
    with Hub(model, make_plan(model, {"ids": ids}), source) as hub:
        got = hub.run([Lane(PLUS, {"ids": ids}), Lane(MINUS, {"ids": ids.flip(1)})])
        rows = next(rows for name, _, rows in source.emits if name == "tokens")
        assert rows is not None and rows.tolist() == [0, 1, 2, 3, 4, 5, 9, 96]
        few = hub.run([Lane(PLUS, {"ids": torch.tensor([[2, 2]])})])
        rows = [rows for name, _, rows in source.emits if name == "tokens"][-1]
        assert rows is not None and rows.tolist() == [2] + [0] * 7  # padding_idx 7 must be a row
        with pytest.raises(IndexError, match=r"id 97 is out of range for 'tokens', an embedding of 97 rows"):
            hub.run([Lane(PLUS, {"ids": torch.tensor([[97]])})])
    assert_same(got[1], whole_model(model, source, Lane(MINUS, {"ids": ids.flip(1)})))
    assert_same(few[0], whole_model(model, source, Lane(PLUS, {"ids": torch.tensor([[2, 2]])})))


def test_an_embedding_with_hooks_of_others_gets_all_its_rows() -> None:
    """A hook would see remapped ids."""
    arch = ARCH["Rows"]
    model: Any = archs.build(arch)
    seen: list[Tensor] = []
    plan = make_plan(model, arch.batch(0))
    model.tokens.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs["input"]), with_kwargs=True)
    source = DictSource(model)
    with Hub(model, plan, source) as hub:
        hub.run(two_lanes(arch))
    assert torch.equal(seen[0], arch.batch(0)["ids"])
    assert all(rows is None for name, _, rows in source.emits if name == "tokens")


# ---- what belongs to a lane ------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Three layers; `between` is called after each."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, between: Any = None) -> Tensor:
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
            if between is not None:
                between(x)
        return x


def stack(**options: Any) -> tuple[Any, DictSource, Tensor]:
    torch.manual_seed(3)
    model = Stack(**options)
    return model, DictSource(model), torch.randn(4, 16)


@pytest.mark.parametrize("order", ["module", "block", "lane"])
@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_thread_local_modes_belong_to_a_lane(order: Any, outer: Any) -> None:
    class Mark(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.Tensor.data.__set__, "the hub's work is none of a lane's mode's business"
            return func(*args, **(kwargs or {}))

    def modes() -> Any:
        stack = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
        return (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), torch.get_default_dtype(), stack,
        )  # fmt: skip

    model, source, x = stack()
    bf16, fp16 = (functools.partial(torch.autocast, "cpu", dtype) for dtype in (torch.bfloat16, torch.float16))
    normal = functools.partial(torch.inference_mode, False)
    contexts: list[Any] = [
        [torch.inference_mode], [torch.enable_grad], [bf16], [Mark], [], [normal, torch.no_grad],
        [Mark, torch.inference_mode, fp16],
    ]  # fmt: skip
    seen: dict[int, list[Any]] = {}

    def call(model: nn.Module, batch: Any) -> Any:
        with contextlib.ExitStack() as entered:
            for context in batch["contexts"]:
                entered.enter_context(context())
            inside = modes()
            notes = seen.setdefault(batch["lane"], [])
            return model(batch["x"], lambda x: notes.append((modes() == inside, x.is_inference())))

    lanes = [Lane(PLUS, {"x": x, "contexts": c, "lane": i}) for i, c in enumerate(contexts)]
    plan = make_plan(model, {"x": x})
    with outer():
        before = modes()
        with Hub(model, plan, source, order=order) as hub:
            for watch in (True, False):
                seen.clear()
                results = hub.run(lanes, call, watch=watch)
                assert modes() == before
                for i in range(len(lanes)):
                    assert [same for same, _ in seen[i]] == [True] * 3, f"lane {i} {contexts[i]}"
                inference = {0: True, 1: outer is torch.inference_mode, 5: False, 6: True}
                for i, want in inference.items():
                    assert all(is_inference is want for _, is_inference in seen[i]), f"lane {i}"
    assert results[2].dtype is torch.bfloat16 or results[2].dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert_same(results[2], whole_model(model, source, Lane(PLUS, {"x": x})))
    assert_same(results[4], whole_model(model, source, Lane(PLUS, {"x": x})))


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_does_not_hand_one_lanes_cast_weights_to_another(where: str) -> None:
    model, source, x = stack()
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS, OTHER)]

    def outside(m: nn.Module, b: Any) -> Any:
        return [m(**b), m(**b)]

    def inside(m: nn.Module, b: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
            return [m(**b), m(**b)]

    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        if where == "outside":
            with torch.autocast("cpu", torch.bfloat16):
                got = hub.run(lanes, outside)
        else:
            got = hub.run(lanes, inside)
    assert torch.is_autocast_cache_enabled()
    for lane, (first, second) in zip(lanes, got, strict=True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            want = whole_model(model, source, lane)
        assert_same(first, want)
        assert_same(second, want)


def test_context_variables_belong_to_a_lane() -> None:
    model, source, x = stack()
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="unset")
    seen: list[tuple[int, str]] = []

    def call(model: nn.Module, batch: Any) -> Any:
        seen.append((batch["lane"], var.get()))
        var.set(f"lane {batch['lane']}")
        return model(batch["x"], lambda x: seen.append((batch["lane"], var.get())))

    var.set("caller")
    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        hub.run([Lane(PLUS, {"x": x, "lane": 0}), Lane(MINUS, {"x": x, "lane": 1})], call)
    for i in (0, 1):
        assert [v for lane, v in seen if lane == i] == ["caller"] + [f"lane {i}"] * 3
    assert var.get() == "caller"


@pytest.mark.parametrize("order", ["module", "block", "lane"])
def test_every_lane_draws_the_same_random_numbers(order: Any) -> None:
    model, source, x = stack(dropout=0.5)
    model.train()
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS, OTHER)]
    plan = make_plan(model, {"x": x})
    with Hub(model, plan, source, order=order) as hub:
        for seed in (5, 6):  # watched, then not
            torch.manual_seed(seed)
            got = hub.run(lanes)
            end = torch.get_rng_state()
            for lane, y in zip(lanes, got, strict=True):
                torch.manual_seed(seed)
                hub.detach()
                assert_same(y, whole_model(model, source, lane))
                hub.attach()
            assert torch.equal(end, torch.get_rng_state()), "the generator must end as after one forward"


def test_drawing_random_numbers_unwatched_is_noticed() -> None:
    model, source, x = stack()
    draws = False

    def call(model: nn.Module, batch: Any) -> Any:
        return nn.functional.dropout(model(**batch), 0.5, training=draws)

    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        hub.run(lanes, call)
        draws = True
        torch.manual_seed(9)
        with pytest.raises(PlanFault, match="random numbers"):
            hub.run(lanes, call)
        got = run_settled(hub, lanes, call)
    for lane, y in zip(lanes, got, strict=True):
        torch.manual_seed(9)
        assert_same(y, whole_model(model, source, lane, call))


def test_lanes_of_a_seed_leave_the_generators_alone() -> None:
    model, source, x = stack(dropout=0.5)
    model.train()
    lanes = [Lane(p, {"x": x}) for p in (PLUS, MINUS)]
    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        seen = []
        for ambient, seed in ((1, 5), (2, 5), (3, 5), (4, 6)):  # watched, then not
            torch.manual_seed(ambient)
            before = torch.get_rng_state()
            seen.append(hub.run(lanes, seed=seed))
            assert torch.equal(torch.get_rng_state(), before)
    for got in seen[1:3]:
        assert_same(got, seen[0])
    assert not torch.equal(seen[3][0], seen[0][0])


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["module", "block", "lane"])
@pytest.mark.parametrize("watch", [True, False])
def test_an_error_in_a_lane_names_it_and_leaves_all_clean(order: Any, watch: bool) -> None:
    model, source, x = stack()
    entered: list[str] = []

    def fail_in_lane_one(module: nn.Module, args: Any) -> None:
        if args[0].shape[0] == 3:
            raise ZeroDivisionError("on purpose")

    class Guard:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *exc: Any) -> None:
            entered.append("out")

    def call(model: nn.Module, batch: Any) -> Any:
        with Guard(), torch.inference_mode():
            return model(**batch)

    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x[:3]}), Lane(OTHER, {"x": x})]
    want = whole_model(model, source, lanes[2])
    with Hub(model, make_plan(model, {"x": x}), source, order=order) as hub:
        hook = model.layers[1].register_forward_pre_hook(fail_in_lane_one)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
                hub.run(lanes, call, watch=watch)
            assert caught.value.__notes__ == [
                f"zo_offload: lane 1 (seed 1, scale {MINUS.scale:g}), in module 'layers.1'"
            ]
            assert source.out == 0 and entered.count("in") == entered.count("out")
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
            assert all(p.isnan().all() for p in model.parameters()), "a lane's weights were left in the model"
        hook.remove()
        assert_same(hub.run(lanes, call)[2], want)
    assert_same(model(x), nn.Module.__call__(copy.deepcopy(model), x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_of_the_source_leaves_all_clean() -> None:
    model, source, x = stack()
    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x})]
    emit = source.emit

    def broken(owner: Any, perturbations: Any, rows: Any = None, piece: Any = None, **how: Any) -> Any:
        if owner.name == "layers.2":
            raise OSError("disk on fire")
        return emit(owner, perturbations, rows, piece)

    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        source.emit = broken  # type: ignore[method-assign]
        with pytest.raises(OSError, match="on fire"):
            hub.run(lanes)
        assert source.out == 0
        source.emit = emit  # type: ignore[method-assign]
        hub.run(lanes)


def test_a_module_that_catches_its_childs_error_goes_on() -> None:
    class Retry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.gain = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            try:
                y = self.first(x[:, :5])
            except RuntimeError:
                y = self.second(x)
            return y * self.gain

    torch.manual_seed(0)
    model = Retry()
    source, x = DictSource(model), torch.randn(2, 16)
    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x})]
    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        got = hub.run(lanes)
        assert source.out == 0
    for lane, y in zip(lanes, got, strict=True):
        assert_same(y, whole_model(model, source, lane))


def test_a_model_is_not_called_while_its_weights_are_away() -> None:
    model, source, x = stack()
    hub = Hub(model, make_plan(model, {"x": x}), source)
    with pytest.raises(PlanError, match="not attached"):
        hub.run([Lane(PLUS, {"x": x})])
    with hub, pytest.raises(PlanError, match=r"'layers.0' was called while its weights are away"):
        model(x)
    model(x)


def test_a_module_run_in_another_thread_is_refused() -> None:
    class Threaded(Stack):
        def forward(self, x: Tensor, between: Any = None) -> Tensor:
            out: list[Any] = []

            def work() -> None:
                try:
                    out.append(self.layers[0](x))
                except PlanError as error:
                    out.append(error)

            thread = threading.Thread(target=work, name="helper")
            thread.start()
            thread.join()
            if isinstance(out[0], Exception):
                raise out[0]
            return out[0]

    model = Threaded()
    source, x = DictSource(model), torch.randn(2, 16)
    with Hub(model, make_plan(model), source) as hub:
        for watch in (True, False):
            with pytest.raises(PlanError, match=r"'layers.0' was called in thread 'helper'"):
                hub.run([Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x})], watch=watch)


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.layers[1].weight.mul_(0.5)


def through_a_view(model: Any) -> None:
    with torch.no_grad():
        model.layers[0].weight.t()[0].zero_()


def new_parameter(model: Any) -> None:
    model.layers[1].weight = nn.Parameter(torch.zeros(16, 16))


def more_parameters(model: Any) -> None:
    model.extra = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            in_place,
            r"'layers.1.weight' is used in .*away",
        ),  # a fault of the plan: another one can hold the weight there
        (through_a_view, r"'layers.0.weight' is used in .*(away|returned)"),
        (new_parameter, r"parameters were replaced or added in the forward: \['layers.1.weight'\]"),
        (more_parameters, r"parameters were replaced or added in the forward: \['extra'\]"),
    ],
)
def test_a_forward_that_changes_its_parameters_is_refused(change: Any, message: str) -> None:
    model, source, x = stack()
    plan = make_plan(model, {"x": x})
    with Hub(model, plan, source) as hub, pytest.raises(PlanError, match=message):
        hub.run([Lane(PLUS, {"x": x})], lambda m, b: m(b["x"], lambda x: change(m)))
    assert source.out == 0


def test_a_forward_that_replaces_a_parameters_data_is_refused() -> None:
    class Replaces(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clamp(-1, 1)
            return super().forward(x)

    model = nn.Sequential(Replaces(16, 16), nn.Linear(16, 16))
    x = torch.randn(2, 16)
    call = lambda m, b: m(b["x"])  # noqa: E731
    message = r"the data of parameter '0.weight' was replaced in the forward of '0'"
    hub = Hub(model, make_plan(model, {"x": x}, call=call), DictSource(model))
    with hub, pytest.raises(PlanError, match=message):
        hub.run([Lane(PLUS, {"x": x})], call)


class Remembers(nn.Module):
    """Keeps a tensor from one module to another: `what` says which."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.kept = what, torch.zeros(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.what == "activation":
            self.kept = h.mean(0)
        elif self.what == "memory":
            self.kept.copy_(h.mean(0))
        elif not self.kept.any():
            self.kept = torch.arange(16.0)
        return self.b(h) + self.kept


def test_memory_that_lanes_write_and_read_is_noticed_and_lane_order_is_right() -> None:
    model = Remembers("memory")
    source, x = DictSource(model), torch.randn(3, 16)
    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x})]
    plan = make_plan(model, {"x": x})
    for order in ("module", "block"):
        with Hub(model, plan, source, order=order) as hub, pytest.raises(LanesShareState, match="order='lane'"):
            hub.run(lanes)
    with Hub(model, plan, source, order="lane") as hub:
        got = hub.run(lanes)
    assert not model.kept.any(), "it is as before"
    for lane, y in zip(lanes, got, strict=True):
        assert_same(y, whole_model(model, source, lane))


@pytest.mark.parametrize("order", ["module", "block", "lane"])
def test_a_tensor_kept_between_calls_is_each_lanes_own(order: Any) -> None:
    model = Remembers("activation")
    source, x = DictSource(model), torch.randn(3, 16)
    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x})]
    kept, want = model.kept, [whole_model(copy.deepcopy(model), source, lane) for lane in lanes]
    with Hub(model, make_plan(model, {"x": x}), source, order=order) as hub:
        for _ in range(2):
            assert_same(hub.run(lanes), want)
            assert model.kept is kept, "it is as before"


def test_a_table_that_the_first_lane_makes_for_all_is_fine() -> None:
    model = Remembers("table")
    source, x = DictSource(model), torch.randn(3, 16)
    lanes = [Lane(PLUS, {"x": x}), Lane(MINUS, {"x": x})]
    with Hub(model, make_plan(model, {"x": x}), source) as hub:
        got = hub.run(lanes)
    assert_same(got[1], whole_model(model, source, lanes[1]))


def test_a_hub_refuses_what_it_cannot_run() -> None:
    model, source, x = stack()
    plan = make_plan(model, {"x": x})
    with pytest.raises(PlanError, match="order='blocks'"):
        Hub(model, plan, source, order="blocks")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"not the plan's: \['0.bias', .* differ\)"):
        Hub(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), plan, source).attach()
    other = Stack()
    other.layers[1] = nn.Linear(16, 16, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"'layers.1.weight' is \(16, 16\) torch.float64, planned as"):
        Hub(other, plan, source).attach()
    with torch.device("meta"):
        ghost = Stack()
    with pytest.raises(PlanError, match="on the meta device: call hollow"):
        Hub(ghost, plan, source).attach()
    with Hub(model, plan, source) as hub:
        assert hub.run([]) == []
        with pytest.raises(PlanError, match="one set of lanes at a time"):
            hub.run([Lane(PLUS, {"x": x})], lambda m, b: hub.run([Lane(PLUS, {"x": x})]))


# ---- hollow models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "Lstm", "NestedTies", "Lists", "mamba", "OldWeightNorm"])
@pytest.mark.parametrize("on_meta", [True, False])
def test_a_hollow_model_runs_like_the_full_one(name: str, on_meta: bool) -> None:
    arch = ARCH[name]
    model = archs.build(arch)
    source = DictSource(model)
    lanes = two_lanes(arch)
    wanted = references(arch, model, source, lanes)
    if on_meta:
        if name == "OldWeightNorm":
            pytest.skip("its pre-hook's weight cannot be copied to meta by deepcopy")
        buffers = {id(b): b for b in model.buffers()}
        memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
        model = copy.deepcopy(model, {**memo, **buffers})
    plan = make_plan(model, arch.batch(0))  # as an engine makes it: before the weights are away
    hollow(model)
    ties = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.named_parameters()))
    assert ties == len(list(archs.build(arch).named_parameters(remove_duplicate=False))) - len(source.weights)
    for p in model.parameters():
        assert p.device.type == "cpu" and p.isnan().all() and p.untyped_storage().nbytes() == p.element_size()
    with Hub(model, plan, source) as hub:
        check(arch, model, hub, lanes, wanted)


def test_one_lane_and_no_perturbation_is_the_model_itself() -> None:
    arch = ARCH["qwen3"]
    model = archs.build(arch)
    with torch.no_grad():
        want = model(**arch.batch(0))
    with Hub(model, make_plan(model, arch.batch(0)), DictSource(model)) as hub:
        got = hub.run([Lane(Perturbation(0, 0.0), arch.batch(0))])
    assert_same(got[0], want)
