"""Plans: blocks, owners, lifts, ties, filters; from the module tree and a trace without weights."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from support.lanes import owners_of, plan_of
from support.zoo import archs
from support.zoo.archs import ARCH
from zo_offload.errors import PlanError
from zo_offload.modules.recorder import Trace
from zo_offload.plan.blocks import BLOCK_NUMEL
from zo_offload.plan.plan import Plan, make_plan, plan_digest, relift
from zo_offload.plan.trace import trace_on_meta


def block_names(plan: Plan) -> list[str]:
    return [block.name for block in plan.blocks]


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_layers_and_what_lies_around_them() -> None:
    plan = plan_of("llama")
    assert block_names(plan) == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm+lm_head",
    ]  # fmt: skip
    assert plan.visits == (0, 1, 2, 3, 4)
    assert plan.blocks[1].params[:3] == (  # as executed, not as defined
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    )


@pytest.mark.parametrize("arch", archs.ALL, ids=lambda a: a.name)
def test_every_parameter_is_in_one_block_and_has_an_owner(arch: archs.Arch) -> None:
    model = archs.build(arch)
    plan = make_plan(model, arch.batch(0))
    names = [name for name, _ in model.named_parameters()]
    assert list(plan.params) == names
    assert sorted(n for block in plan.blocks for n in block.params) == sorted(names)
    assert {n for owner in plan.owners for n in owner.params} == set(names)
    for i, block in enumerate(plan.blocks):
        assert block.index == i and all(plan.block_of(n) == i for n in block.params)
    for owner in plan.owners:
        assert owner.block == plan.block_of(owner.params[0])
    assert sum(row.numel for row in plan.describe()) == plan.numel == sum(p.numel() for p in model.parameters())
    aliases = {a for spec in plan.params.values() for a in spec.aliases}
    everywhere = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert aliases == everywhere - set(names)


def test_a_tied_parameter_is_stored_once_and_visited_twice() -> None:
    plan = plan_of("llama-tied")
    assert plan.params["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in plan.params
    first, last = (next(o for o in plan.owners if o.name == name) for name in ("model.embed_tokens", "lm_head"))
    assert first.params == last.params == ("model.embed_tokens.weight",)
    assert first.rows and not last.rows, "the head reads the whole matrix"
    assert plan.visits == (0, 1, 2, 3, 4, 0)


def test_a_shared_layer_is_one_block_called_again_and_again() -> None:
    plan = plan_of("albert")
    calls = [plan.owners[call].name for call in plan.calls]
    ffn = next(n for n in calls if n.endswith("albert_layers.0.ffn"))
    assert calls.count(ffn) == 3


def test_encoder_and_decoder_layers_are_blocks_in_execution_order() -> None:
    plan = plan_of("t5")
    assert block_names(plan) == [
        "shared", "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm", "decoder.block.0",
        "decoder.block.1", "decoder.final_layer_norm",
    ]  # fmt: skip
    assert plan.visits == (0, 1, 2, 3, 0, 4, 5, 6, 0), "the embedding serves encoder, decoder and head"


def test_without_a_stack_the_top_level_children_are_blocks_below_a_mere_wrapper() -> None:
    assert block_names(plan_of("Lstm")) == ["rnn", "head"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = archs.Lstm()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    assert block_names(make_plan(Wrapper(), archs.vector_batch(0))) == ["inner.rnn", "inner.head"]


def test_the_rest_is_grouped_up_to_the_size_of_a_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big = nn.Linear(16, 64)
            self.a, self.b, self.c = nn.Linear(64, 4), nn.Linear(4, 16), nn.Linear(16, 16)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.tail = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(self.b(self.a(self.big(x))))
            for layer in self.layers:
                x = layer(x)
            return self.tail(x)

    plan = make_plan(Model(), archs.vector_batch(0))
    # a layer has 272 elements: big (1088) alone, a (260) has no room for b (80), b none for c (272)
    assert block_names(plan) == ["big", "a", "b", "c", "layers.0", "layers.1", "tail"]


def test_paper_sizes_are_planned_in_seconds_without_weights() -> None:
    config = tf.OPTConfig(
        hidden_size=12288, word_embed_proj_dim=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152,
        vocab_size=50272, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    ids = torch.zeros(16, 2048, dtype=torch.int64)
    start = time.process_time()
    plan = make_plan(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    seconds = time.process_time() - start
    layers = plan.describe()
    assert plan.traced and len(layers) == 98 and plan.numel == 174_604_468_224
    assert {(row.numel, row.num_blocks) for row in layers[1:97]} == {(1_812_099_072, 32)}
    assert max(block.numel for block in plan.blocks) <= BLOCK_NUMEL
    assert seconds < 20  # about 1


# ---- owners and lifts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lifts"),
    [
        ("Attention", {"layers.0.out_proj.weight": "layers.0", "layers.1.out_proj.bias": "layers.1"}),
        ("ReadsChild", {"layers.0.inner.weight": "layers.0", "layers.2.inner.bias": "layers.2"}),
        ("ReturnsParameter", {"layers.0.bias": "", "layers.1.bias": ""}),
        ("ViewEscapes", {"maker.weight": ""}),
        ("ViewOutlivesCall", {"cell.weight": ""}),
        ("Lists", {"ws.0": "", "extra.shift": ""}),
        ("DirectForward", {"layers.0.inner.weight": "", "layers.1.inner.bias": "", "head.weight": ""}),
        ("mamba", {"backbone.layers.1.mixer.conv1d.weight": "backbone.layers.1.mixer"}),
        ("gpt_neox_japanese", {"gpt_neox_japanese.layers.2.attention.dense_bias": "gpt_neox_japanese.layers.2"}),
    ],
)
def test_what_is_used_elsewhere_is_lifted_to_the_nearest_running_module(name: str, lifts: dict[str, str]) -> None:
    plan = plan_of(name)
    assert plan.traced
    found = plan.lifted()
    for param, owner in lifts.items():
        assert found[param] == (owner,)


def test_most_models_need_no_lift() -> None:
    for name in ("opt", "llama", "gpt2", "bloom", "mixtral", "gpt_oss", "bert", "t5", "bart", "whisper", "vit"):
        plan = plan_of(name)
        assert plan.traced and not plan.lifted(), name


def test_a_trace_that_stops_lifts_layers_whole_and_keeps_the_order_seen() -> None:
    arch = ARCH["llama"]
    model = archs.build(arch)

    def call(m: Any, batch: Any) -> None:
        m.model(batch["input_ids"])
        raise ArithmeticError("no such value\non meta")

    plan = make_plan(model, arch.batch(0), call=call)
    assert not plan.traced
    assert plan.notes == (
        "the trace without weights stopped at or after module 'model.norm' (ArithmeticError: no such value)",
    )
    assert owners_of(plan)["model.layers.1"] == set(plan.blocks[2].params)
    assert [owner.name for owner in plan.owners] == [
        "model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head",
    ]  # fmt: skip
    assert plan.blocks[1].params[0] == "model.layers.0.input_layernorm.weight"


def test_one_fault_lifts_the_same_parameter_of_every_sibling() -> None:
    """What one expert or layer does on this data another may do on the next."""
    plan = plan_of("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    path = ("", "model", "model.layers.1", "model.layers.1.self_attn")
    lifted = relift(plan, Trace({name: frozenset([path])}, plan.trace.order, complete=True))
    assert lifted.lifted() == {
        f"model.layers.{i}.self_attn.k_proj.weight": (f"model.layers.{i}.self_attn",) for i in range(3)
    }
    assert lifted.blocks == plan.blocks and lifted.visits == plan.visits
    assert plan_digest(lifted) == plan_digest(plan)
    again = relift(lifted, lifted.trace)
    assert again.owners == lifted.owners and again.calls == lifted.calls


def test_a_module_inside_another_owner_of_the_parameter_is_not_served_again() -> None:
    plan = plan_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    uses = {name: frozenset([("", "model", "model.layers.0", "model.layers.0.mlp")])}
    owners = owners_of(relift(plan, Trace(uses, plan.trace.order, complete=True)))
    assert name in owners["model.layers.0.mlp"] and "model.layers.0.mlp.up_proj" not in owners


def test_a_parameter_used_outside_of_every_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match="'1.weight' is used outside of any module's call"):
        make_plan(model, {"x": torch.ones(1, 4)}, call=lambda m, b: m[0](b["x"]) @ m[1].weight)


def test_modules_may_be_called_without_the_model_around_them() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    plan = make_plan(model, {"x": torch.ones(1, 4)}, call=lambda m, b: m["b"](m["a"](b["x"])))
    assert plan.traced and owners_of(plan) == {"a": {"a.weight", "a.bias"}, "b": {"b.weight", "b.bias"}}


def test_planning_changes_nothing_in_the_model() -> None:
    arch = ARCH["resnet"]
    model = archs.build(arch).train()  # batch norm would update its buffers
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make_plan(model, arch.batch(0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_shape_only_reads_do_not_lift() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) + torch.zeros_like(self.proj.weight)[0] + self.proj.weight.new_ones(16)

    assert not make_plan(Model(), archs.vector_batch(0)).lifted()


def test_made_up_values_carry_a_trace_past_data_dependence() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if torch.isnan(y).any():
                raise ValueError("nan")
            y = y[y > 0][: int(y.abs().max().item()) + 1]
            y = y.new_zeros(y.nonzero().shape[0], 16) + y.sum()
            return self.b(y)

    plan = make_plan(Model(), archs.vector_batch(0))
    assert plan.traced, plan.notes
    assert [plan.owners[call].name for call in plan.calls] == ["a", "b"]


# ---- digest ----------------------------------------------------------------------------------------------------------


def test_the_digest_covers_what_is_stored_and_nothing_else() -> None:
    assert plan_digest(plan_of("llama")) == plan_digest(plan_of("llama"))
    digests = {
        plan_digest(plan_of("llama")), plan_digest(plan_of("llama-tied")), plan_digest(plan_of("qwen2")),
        plan_digest(plan_of("llama", trainable="self_attn")),
        plan_digest(make_plan(archs.build(ARCH["llama"]).bfloat16(), ARCH["llama"].batch(0))),
    }  # fmt: skip
    assert len(digests) == 5


# ---- the filter ------------------------------------------------------------------------------------------------------


def trained(plan: Plan) -> set[str]:
    return {name for name, spec in plan.params.items() if spec.trainable}


def name_of(value: Any) -> str:
    """A test's id: the same in every process, so that tests can be dealt out to several."""
    return "predicate" if callable(value) else str(value)


@pytest.mark.parametrize(
    ("trainable", "selected"),
    [
        ("*", lambda n: True),
        ("layers.*.self_attn", lambda n: ".self_attn." in n),
        ("layers.1", lambda n: "layers.1." in n),
        ("bias", lambda n: n.endswith(".bias")),
        ("model.layers.*.mlp.*_proj", lambda n: ".mlp." in n),
        ("layers.[02].*norm", lambda n: ("layers.0." in n or "layers.2." in n) and "layernorm" in n),
        (["lm_head", "norm.weight"], lambda n: n in ("lm_head.weight", "model.norm.weight")),
        (lambda name, p: p.ndim == 1, lambda n: "norm" in n or n.endswith(".bias")),
    ],
    ids=name_of,
)
def test_trainable_selects(trainable: Any, selected: Any) -> None:
    plan = plan_of("qwen2", trainable=trainable)
    want = {name for name in plan.params if selected(name)}
    assert trained(plan) == want and want
    assert plan.trainable_numel == sum(plan.params[n].numel for n in want)


def test_a_glob_meets_a_tied_parameter_under_any_of_its_names() -> None:
    assert trained(plan_of("llama-tied", trainable="lm_head")) == {"model.embed_tokens.weight"}


def test_requires_grad_is_respected_unless_nothing_has_it() -> None:
    arch = ARCH["llama"]
    model: Any = archs.build(arch)
    model.requires_grad_(False)
    assert trained(make_plan(model, arch.batch(0))) == set(dict(model.named_parameters()))
    with pytest.raises(PlanError, match=r"requires_grad selects none of \d+ floating parameters"):
        make_plan(model, arch.batch(0), trainable="requires_grad")
    model.lm_head.requires_grad_(True)
    for trainable in (None, "requires_grad"):
        plan = make_plan(model, arch.batch(0), trainable=trainable)
        assert trained(plan) == {"lm_head.weight"}
    assert "stay frozen" in make_plan(model, arch.batch(0)).notes[0]


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("self_attention", r"trainable='self_attention' selects none of \d+ floating parameters \(such as \["),
        (["self_attn", "layer.0"], "trainable='layer.0' selects none"),
        ("layers.*", None),
        ([], "nothing to train"),
        (lambda name, p: False, "the predicate selects none"),
    ],
    ids=name_of,
)
def test_a_filter_that_selects_nothing_is_an_error(trainable: Any, message: str | None) -> None:
    if message is None:
        assert trained(plan_of("llama", trainable=trainable))
    else:
        with pytest.raises(PlanError, match=message):
            plan_of("llama", trainable=trainable)


def test_integer_parameters_stay_in_the_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].codes = nn.Parameter(torch.arange(4), requires_grad=False)
    plan = make_plan(model, {"x": torch.ones(1, 4)}, call=lambda m, b: m(b["x"]), trainable="*")
    assert trained(plan) == {"0.weight", "0.bias"}
    assert "0.codes" not in plan.params and "0.codes" in plan.tree.kept


def test_a_model_that_cannot_be_planned_says_why() -> None:
    with pytest.raises(PlanError, match="ReLU has no parameters"):
        make_plan(nn.ReLU())
    with pytest.raises(PlanError, match=r"without a shape yet: \['0.weight', '0.bias'\]"):
        make_plan(nn.Sequential(nn.LazyLinear(4)))


class _Counts(nn.Module):
    """Counts ids in integers, which torch has for a GPU but not for a CPU (DeepSeek-V4's hashed experts)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, input_ids):
        counts = torch.histc(input_ids.int(), bins=8, min=0, max=7)
        assert counts.tolist() == [0, 2, 1, 0, 0, 0, 0, 0] and counts.dtype is torch.int32
        return self.table(input_ids).sum()


def test_a_trace_counts_integers_as_a_gpu_does():
    ids = torch.tensor([[1, 2, 1]])
    trace = trace_on_meta(_Counts(), {"input_ids": ids}, lambda model, batch: model(**batch))
    assert trace.complete, trace.notes
