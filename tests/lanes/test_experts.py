"""Stacked experts that are cut are computed a run at a time, the same however and wherever they are served."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from support.compare import assert_same
from support.lanes import (
    MINUS,
    OTHER,
    PLUS,
    DictSource,
    assert_lanes_give,
    experts_in_runs,
    has_forward,
    tiled_model,
    whole_model,
)
from support.training import squares
from support.zoo import archs
from support.zoo.archs import Arch
from zo_offload import Engine, MeZO
from zo_offload.lanes.hub import Hub, Lane
from zo_offload.modules import experts as experts_module
from zo_offload.modules.experts import in_runs, is_stack_of_experts, set_rows
from zo_offload.plan.activations import measure_activations
from zo_offload.plan.blocks import ParamSpec, cut_runs
from zo_offload.plan.plan import Plan, make_plan

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


# ---- one module ------------------------------------------------------------------------------------------------------

E, H, F = 6, 16, 24  # experts, hidden, intermediate
CUTS = {
    "pairs": [slice(0, 2), slice(2, 4), slice(4, 6)],
    "one each": [slice(i, i + 1) for i in range(E)],
    "uneven": [slice(0, 5), slice(5, 6)],
}


def experts(cls: Any, implementation: str = "eager") -> Any:
    config = SimpleNamespace(
        num_local_experts=E, n_routed_experts=E, moe_num_experts=E, hidden_size=H, intermediate_size=F,
        moe_intermediate_size=F, moe_latent_size=None, hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.7,
        swiglu_limit=7.0, _experts_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    module = cls(config)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def routed(tokens: int = 11, choices: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :choices]
    return torch.randn(tokens, H, generator=generator), index, torch.rand(tokens, choices, generator=generator)


def run(module: Any, cuts: list[slice], *given: Tensor, masked: bool | None = None) -> Tensor:
    """`in_runs` with rows that are gone when the next ones are there."""
    whole = [p.data for p in module.parameters()]
    memory = [torch.empty_like(w) for w in whole]

    def hold(k: int) -> None:
        assert vars(module)["num_experts"] == E, "while it waits the module is as it was"
        rows = {p.shape[0] for p in module.parameters()}
        assert rows == {cuts[k - 1].stop - cuts[k - 1].start if k else E}, "and holds what it was given"
        for m in memory:
            m.fill_(float("nan"))
        held = cuts[k].stop - cuts[k].start
        set_rows(module, [m[:held].copy_(w[cuts[k]]) for m, w in zip(memory, whole, strict=True)])

    with torch.no_grad():
        try:
            return in_runs(module, cuts, given[:1], dict(zip(names_of(module), given[1:], strict=True)), hold,
                           masked=masked)  # fmt: skip
        finally:
            set_rows(module, whole)


def names_of(module: Any) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[2:]


CLASSES = [MixtralExperts, GptOssExperts, NemotronHExperts, DeepseekV4Experts]


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("cls", CLASSES)
def test_runs_of_eager_experts_equal_the_whole_bit_for_bit(cls: Any, cuts: list[slice]) -> None:
    module, given = experts(cls), routed()
    assert is_stack_of_experts(module)
    with torch.no_grad():
        assert torch.equal(run(module, cuts, *given), module(*given))


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("implementation, masked", [("grouped_mm", False), ("grouped_mm", True), ("batched_mm", False)])
def test_runs_of_any_implementation_equal_the_whole(
    cls: Any, cuts: list[slice], implementation: str, masked: bool
) -> None:
    module, given = experts(cls, implementation), routed()
    before = dict(vars(module))
    with torch.no_grad():
        torch.testing.assert_close(run(module, cuts, *given, masked=masked), module(*given), rtol=1e-5, atol=1e-5)
    assert vars(module) == before


def test_rows_that_nobody_chose_are_not_computed_and_overflow_stays_with_its_expert() -> None:
    """An expert of infinite output that no token chose must not reach any: 0 * inf is not a number."""
    module, (x, _, weights) = experts(GptOssExperts, "grouped_mm"), routed(choices=2)
    index = torch.tensor([[1, 3]]).expand(11, 2)
    with torch.no_grad():
        want = module(x, index, weights)
        for expert in (0, 2, 4, 5):
            module.down_proj[expert].fill_(float("inf"))
    for cuts in CUTS.values():
        for masked in (False, True):
            torch.testing.assert_close(run(module, cuts, x, index, weights, masked=masked), want)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_choice_is_computed_once(cuts: list[slice], masked: bool, monkeypatch: Any) -> None:
    computed: list[int] = []
    product = nn.functional.grouped_mm

    def counted(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        computed.append(int(offs[-1]))
        return product(x, w, offs=offs)

    monkeypatch.setattr(nn.functional, "grouped_mm", counted)
    run(experts(MixtralExperts, "grouped_mm"), cuts, *routed(tokens=11, choices=3), masked=masked)
    assert sum(computed) == 2 * 11 * 3, "two products for each"


@pytest.mark.parametrize("ahead", [True, False])
def test_rows_are_read_where_torchs_product_waits_for_the_host(ahead: bool, monkeypatch: Any) -> None:
    """There a run gets the rows that chose its experts; where the product runs ahead, all rows, and none is read."""
    given: list[int] = []
    product = nn.functional.grouped_mm

    def noted(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        given.append(len(x))
        return product(x, w, offs=offs)

    monkeypatch.setattr(nn.functional, "grouped_mm", noted)
    monkeypatch.setattr(experts_module, "products_run_ahead", lambda device, dtype: ahead)
    run(experts(MixtralExperts, "grouped_mm"), CUTS["pairs"], *routed(tokens=11, choices=3))
    assert set(given) == {33} if ahead else sum(given) == 2 * 33


def test_no_tokens_and_one_choice() -> None:
    for implementation in IMPLEMENTATIONS:
        module = experts(MixtralExperts, implementation)
        assert run(module, CUTS["pairs"], *routed(tokens=0)).shape == (0, H)
        with torch.no_grad():
            given = routed(choices=1)
            torch.testing.assert_close(run(module, CUTS["uneven"], *given), module(*given))


@pytest.mark.parametrize(
    "implementation, dtype",
    [(way, dtype) for way in IMPLEMENTATIONS for dtype in (torch.bfloat16, torch.float16)] + [("eager", torch.float64)],
)
def test_sums_are_at_least_as_good_as_those_of_the_whole(dtype: torch.dtype, implementation: str) -> None:
    exact, given = experts(MixtralExperts).double(), routed(tokens=64, choices=6)
    wide = (given[0].to(dtype).double(), given[1], given[2].double())
    module = experts(MixtralExperts, implementation).to(dtype)
    error = []
    for p, q in zip(exact.parameters(), module.parameters(), strict=True):
        p.data = q.data.double()
    with torch.no_grad():
        want, narrow = exact(*wide), (given[0].to(dtype), given[1], given[2].to(dtype))
        for y in (module(*narrow), run(module, CUTS["pairs"], *narrow)):
            assert y.dtype == dtype
            error.append((y.double() - want).square().mean().sqrt())
    # the eager forward rounds after each expert, the others once
    assert error[1] <= (0.95 if implementation == "eager" else 1.05) * error[0] + 1e-14


class NoLook(TorchFunctionMode):
    """Refuses what would make a GPU's host wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = ("tolist", "item", "nonzero", "where", "__bool__", "__int__", "__index__", "cpu", "masked_select")
        assert func.__name__ not in looks or len(args) == 3, func  # where(condition, a, b) does not look
        return func(*args, **(kwargs or {}))


def test_masked_runs_look_at_no_value() -> None:
    module, given = experts(GptOssExperts, "grouped_mm"), routed()
    with NoLook():
        got = run(module, CUTS["one each"], *given, masked=True)
        with pytest.raises(AssertionError, match="tolist"):
            run(module, CUTS["one each"], *given, masked=False)
    with torch.no_grad():
        torch.testing.assert_close(got, module(*given), rtol=1e-5, atol=1e-5)


class Own(MixtralExperts):  # type: ignore[misc]
    def forward(self, *args: Any) -> Any:
        return 2 * super().forward(*args)


class More(MixtralExperts):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(E))


def test_what_does_not_fit_the_pattern_stays_whole() -> None:
    replaced = experts(MixtralExperts)
    replaced.forward = lambda *args: None
    buffered = experts(MixtralExperts)
    buffered.register_buffer("bias", torch.zeros(E))
    dense = Llama4TextExperts(
        SimpleNamespace(num_local_experts=E, intermediate_size=F, hidden_size=H, hidden_act="silu")
    )
    for module in (replaced, buffered, dense, experts(Own), experts(More), nn.Linear(4, 4), nn.Module()):
        assert not is_stack_of_experts(module), type(module)


# ---- where they are cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes, most",
    [
        ([(128, 2880, 5760), (128, 5760), (128, 2880, 2880), (128, 2880)], 64 << 20),  # gpt-oss-120b
        ([(256, 4096, 7168), (256, 7168, 2048)], 64 << 20),  # DeepSeek-V3
        ([(8, 28672, 4096), (8, 4096, 14336)], 64 << 20),  # Mixtral: an expert is larger than a block
        ([(6, 24, 16), (6, 16, 12)], 700),
        ([(6, 24, 16), (6, 24), (6, 16, 12), (6, 16)], 10_000),
        ([(5, 7, 3), (5, 3)], 40),  # experts off the grid: all of them are one run
    ],
)
def test_runs_are_whole_experts_on_the_grid_and_share_blocks(shapes: Any, most: int) -> None:
    specs = [ParamSpec(f"p{i}", (), i, torch.Size(shape), torch.float32, True) for i, shape in enumerate(shapes)]
    runs = cut_runs(specs, most)
    each = sum(spec.row_numel for spec in specs)
    first = 0
    for pieces in runs:
        held = {spec.name: sum(p.numel for p in pieces if p.name == spec.name) for spec in specs}
        (count,) = {held[spec.name] // spec.row_numel for spec in specs}
        for spec in specs:
            mine = [p for p in pieces if p.name == spec.name]
            assert held[spec.name] == count * spec.row_numel and mine[0].start == first * spec.row_numel
            assert [p.start for p in mine[1:]] == [p.stop for p in mine[:-1]]
            assert all(p.start % 128 == 0 for p in mine)
            assert all(p.numel <= most for p in mine) or spec.row_numel // spec.shape[1] * 128 > most
        least = -(-each // most) if count * each > most else 1
        assert (count * each <= most) or len(pieces) >= least
        first += count
    assert first == shapes[0][0]
    for i in range(len(specs)):
        mine = [p for pieces in runs for p in pieces if p.name == f"p{i}"]
        assert [p.index for p in mine] == list(range(len(mine)))
    if shapes[0][0] in (128, 256, 8):
        assert len(runs) == {128: 64, 256: 256, 8: 8}[shapes[0][0]]


# ---- in lanes --------------------------------------------------------------------------------------------------------

_MORE: dict[str, Any] = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
ARCHS = {
    "mixtral": archs.lm("MixtralConfig", **archs.GQA, num_local_experts=6, num_experts_per_tok=3),
    "qwen2_moe": archs.lm("Qwen2MoeConfig", **archs.GQA, **_MORE, shared_expert_intermediate_size=24),
    "qwen3_moe": archs.lm("Qwen3MoeConfig", **archs.HEAD, **_MORE),
    "olmoe": archs.lm("OlmoeConfig", **archs.GQA, num_experts=6, num_experts_per_tok=3),
    "gpt_oss": archs.lm("GptOssConfig", **dict(
        archs.HEAD, num_local_experts=20, num_experts_per_tok=3, sliding_window=6, layer_types=archs.LAYER_TYPES
    )),
    "deepseek_v3": archs.lm("DeepseekV3Config", **archs.DEEPSEEK),
}  # fmt: skip
LIMITS = {"gpt_oss": 20_000}  # of 8 experts the biases' rows end on the grid: runs of two blocks
LIMIT = 5_000  # an expert or two


def arch_of(name: str) -> Arch:
    return Arch(name, ARCHS[name], archs.lm_batch)


def planned(name: str, implementation: str = "grouped_mm", limit: int | None = None) -> tuple[Arch, Any, Plan]:
    arch = arch_of(name)
    model = archs.build(arch)
    model.set_experts_implementation(implementation)
    plan = make_plan(model, arch.batch(0), block_numel=limit or LIMITS.get(name, LIMIT))
    return arch, model, plan


def runs_of(plan: Plan) -> list[int]:
    """How many portions the owners of stacked experts have."""
    return [len(plan.portions(owner)) for owner in plan.owners if owner.name in plan.tree.stacks]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ARCHS)
def test_lanes_equal_the_whole_model_in_runs(name: str, implementation: str) -> None:
    arch, model, plan = planned(name, implementation)
    assert min(runs_of(plan)) > 2
    source = DictSource(model, "arena")
    lanes = [Lane(p, arch.batch(b)) for p in (PLUS, MINUS, OTHER) for b in (0, 1)]
    with tiled_model(model, plan) as patched:
        assert patched
        want = [whole_model(model, source, lane) for lane in lanes]
    for lane, y in zip(lanes, want, strict=True):
        torch.testing.assert_close(y.logits, whole_model(model, source, lane).logits, rtol=1e-4, atol=1e-5)
    assert_lanes_give(model, plan, source, lanes, want, name)


def test_eager_runs_change_no_bit_of_the_plain_model() -> None:
    """Only experts are cut here, and eager computes expert by expert anyway."""
    arch, model, plan = planned("mixtral", "eager", limit=12_000)
    assert min(runs_of(plan)) == 2 and all(len(plan.pieces_of(n)) == 1 for n in plan.params if "experts" not in n)
    source, lanes = DictSource(model), [Lane(p, arch.batch(0)) for p in (PLUS, MINUS)]
    with Hub(model, plan, source) as hub:
        results = hub.run(lanes)
    for got, lane in zip(results, lanes, strict=True):
        assert_same(got, whole_model(model, source, lane))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_masked_runs_are_the_same_in_every_order_and_near_the_plain_model(name: str, monkeypatch: Any) -> None:
    """What a GPU computes."""
    monkeypatch.setattr("zo_offload.lanes.attachment.in_runs", partial(in_runs, masked=True))
    arch, model, plan = planned(name)
    source, lanes = DictSource(model), [Lane(p, arch.batch(b)) for p in (PLUS, MINUS) for b in (0, 1)]
    results = []
    for order in ("module", "block", "lane"):
        with Hub(model, plan, source, order=order) as hub:  # type: ignore[arg-type]
            results += [hub.run(lanes), hub.run(lanes)]
    for got in results[1:]:
        assert_same(got, results[0])
    for got, lane in zip(results[0], lanes, strict=True):
        torch.testing.assert_close(got.logits, whole_model(model, source, lane).logits, rtol=1e-4, atol=1e-5)


class Sized(DictSource):
    """Keeps the most elements of experts that were out at once, and what was asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.asked: list[tuple[str, int, bool]] = []

    def emit(self, owner: Any, perturbations: Any, rows: Any = None, pieces: Any = None, **how: Any) -> Any:
        scratch = super().emit(owner, perturbations, rows, pieces)
        if owner.name.endswith("experts"):
            self.asked.append((owner.name, sum(t.numel() for t in scratch[0]), pieces is None))
        return scratch


def test_an_owner_holds_one_run_and_somebody_who_looks_on_gets_all() -> None:
    arch, model, plan = planned("qwen3_moe")
    source, lanes = Sized(model), [Lane(p, arch.batch(0)) for p in (PLUS, MINUS)]
    with Hub(model, plan, source) as hub:
        want = hub.run(lanes)
    each = 3 * 24 * 32
    assert len(source.asked) == 3 * 3 and {numel for _, numel, _ in source.asked} == {2 * each}
    source.asked.clear()
    looked = []
    module = model.model.layers[1].mlp.experts
    look = module.register_forward_hook(lambda m, args, out: looked.append(m.gate_up_proj.shape))
    with look, Hub(model, plan, source) as hub:
        for got, wanted in zip(hub.run(lanes, watch=False), want, strict=True):
            assert_same(got, wanted)
    assert looked == [(6, 48, 32)] * 2
    assert [numel for name, numel, whole in source.asked if whole] == [6 * each]
    lifted = make_plan(model, arch.batch(0), call=lambda m, b: 1 / 0, block_numel=LIMIT)
    assert not runs_of(lifted)
    for modes in (torch.no_grad(), torch.inference_mode()):
        with Hub(model, lifted, source) as hub, modes:
            for got, wanted in zip(hub.run(lanes), want, strict=True):
                assert_same(got, wanted)
    assert has_forward(model) == [] and module.num_experts == 6


@pytest.mark.parametrize("watch", [True, False])
def test_autocast_and_inference_mode_are_kept_between_runs(watch: bool) -> None:
    arch, model, plan = planned("qwen3_moe", "eager")
    source, lanes = DictSource(model, "arena"), [Lane(p, arch.batch(0)) for p in (PLUS, MINUS)]

    def call(m: nn.Module, batch: Any) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return m(**batch).logits.clone()

    with tiled_model(model, plan):
        want = [whole_model(model, source, lane, call, functional=False) for lane in lanes]
    with Hub(model, plan, source) as hub:
        for got, wanted in zip(hub.run(lanes, call, watch=watch), want, strict=True):
            assert_same(got, wanted)


@pytest.mark.parametrize("order", ["module", "block", "lane"])
@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_failure_in_mid_run_leaves_all_clean(order: Any, watch: bool, implementation: str) -> None:
    arch, model, plan = planned("qwen3_moe", implementation)
    source, lanes = DictSource(model), [Lane(p, arch.batch(0)) for p in (PLUS, MINUS)]
    module = model.model.layers[1].mlp.experts
    before, act = dict(vars(module)), module.act_fn
    emit, served = source.emit, []

    def broken(owner: Any, perturbations: Any, rows: Any = None, pieces: Any = None, **how: Any) -> Any:
        if owner.name == "model.layers.1.mlp.experts":
            served.append(pieces)
            if len(served) > 1 and perturbations[-1] is MINUS:
                raise OSError("disk on fire")
        return emit(owner, perturbations, rows, pieces)

    def explode(x: Tensor) -> Tensor:
        if module.num_experts != 6:
            raise ValueError("bad activation")
        return act(x)

    with Hub(model, plan, source, order=order) as hub:
        want = hub.run(lanes)
        source.emit = broken  # type: ignore[method-assign]
        with pytest.raises(OSError, match="on fire"):
            hub.run(lanes, watch=watch)
        source.emit = emit  # type: ignore[method-assign]
        vars(module)["_modules"]["act_fn"] = Called(explode)
        with pytest.raises(ValueError, match="bad activation") as failed:
            hub.run(lanes, watch=watch)
        assert failed.value.__notes__[-1].endswith("in module 'model.layers.1.mlp.experts'")
        module.act_fn = act
        assert source.out == 0 and all(p.isnan().all() for p in module.parameters())
        for got, wanted in zip(hub.run(lanes, watch=watch), want, strict=True):
            assert_same(got, wanted)
    assert vars(module) == before and has_forward(model) == []


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# ---- in the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_tier_and_order_gives_the_same_and_scratch_is_a_run(name: str, tmp_path: Path) -> None:
    arch = arch_of(name)
    data = [arch.batch(0), arch.batch(1)]
    limit = LIMITS.get(name, LIMIT)

    def train(block_numel: int = limit, **settings: Any) -> tuple[list[float], float, int, int]:
        with Engine(archs.build(arch), method=MeZO(lr=1e-3), objective=squares, example=data[0], storage="int8+8",
                    block_numel=block_numel, fold_every=2, threads=1, **settings) as engine:  # fmt: skip
            losses = [engine.step(batch).loss for batch in [*data, *data]]
            value = engine.evaluate(data)["loss"]
            running = engine.active.streamer
            return losses, value, running.scratch_bytes, engine.memory.terms["scratch"]

    want = train(offload="none")
    assert len(set(want[0])) == 4 and want[2] <= want[3]
    whole = train(block_numel=1 << 30, offload="none")
    # a loss that differs in its last bit is a thousandth of a gradient: later steps differ more
    assert want[0][0] == pytest.approx(whole[0][0], rel=1e-5) and want[0] == pytest.approx(whole[0], rel=1e-2)
    assert want[3] < whole[3] / 2
    ways = [dict(offload="host", order="block"), dict(offload="disk", order="lane"), dict(offload="disk")]
    for i, way in enumerate(ways):
        folder = {"run_dir": tmp_path / str(i)} if way["offload"] == "disk" else {}
        again = train(**way, **folder)
        assert again[:2] == want[:2], way
        assert again[2] <= again[3] <= want[3], way


def test_where_experts_are_cut_changes_no_stored_byte() -> None:
    """Noise and groups lie in a run as they lie in the parameter: the weights after steps of given losses are equal."""
    arch = arch_of("gpt_oss")

    def weights(block_numel: int) -> dict[str, Tensor]:
        with Engine(archs.build(arch), method=MeZO(lr=1e-3), objective=lambda m, b: m(**b).loss * 0 + next(losses),
                    example=arch.batch(0), storage="int8+8", block_numel=block_numel) as engine:  # fmt: skip
            losses = iter(torch.linspace(1, 2, 10))
            for _ in range(3):
                engine.step(arch.batch(0))
            return dict(engine.weights())

    want = weights(1 << 30)
    for block_numel in (LIMITS["gpt_oss"], 1_000):
        got = weights(block_numel)
        assert all(torch.equal(value, want[name]) for name, value in got.items()), block_numel


def test_micro_batches_share_each_run() -> None:
    arch = arch_of("olmoe")
    rows = {k: torch.cat([arch.batch(0)[k], arch.batch(1)[k]]) for k in ("input_ids", "attention_mask", "labels")}

    def train(micro_batches: int, **settings: Any) -> list[float]:
        with Engine(archs.build(arch), method=MeZO(lr=1e-3, batch_size=4), block_numel=LIMIT, **settings) as engine:
            return engine.fit([rows] * 3, steps=3, micro_batches=micro_batches).losses

    parts = train(2, offload="host", order="module")
    assert parts == train(2, offload="host", order="block") == train(2, order="lane")
    assert len(set(parts)) == 3


def test_the_activation_term_counts_the_wait_for_every_run() -> None:
    arch, model, plan = planned("qwen3_moe")
    large = make_plan(model, arch.batch(0), block_numel=1 << 30)
    call = lambda m, b: m(**b).loss  # noqa: E731
    cut, whole = (measure_activations(model, p, arch.batch(0), call) for p in (plan, large))
    tokens = archs.B * archs.T
    assert len(cut.segments) > len(whole.segments) and whole.peak <= cut.peak <= whole.peak + 4 * tokens * 32 * 4
    up = tokens * 3 * 48 * 4  # gate and up of all choices
    large_cut, large_whole = (sum(s.peak - s.held >= up for s in each.segments) for each in (cut, whole))
    assert large_cut - large_whole == 3 * (3 - 1), "two more runs in each of three layers"
    assert cut.together("module", 2) >= whole.together("module", 2)
    assert has_forward(model) == []
    assert experts_in_runs(model, large) == []
