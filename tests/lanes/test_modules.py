"""Modules as people have them: what is in a module beside plain weights stays as it was, or is refused by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from zo_offload import Engine, MeZO
from zo_offload.errors import JournalError, PlanError
from zo_offload.numerics.noise import NoiseSpec, assign_param_ids, noise, step_seed
from zo_offload.replay import replay

EPS = float(torch.tensor(1e-3))
D = 16


def objective(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).square().mean()


def engine_of(model: nn.Module, **options: Any) -> Engine:
    options = {"offload": "host", "num_slots": 3, "objective": objective, **options}
    return Engine(model, method=MeZO(eps=EPS, lr=1e-4), **options)


def batch(rows: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 8, D, generator=torch.Generator().manual_seed(rows))}


def plain_step(model: nn.Module, given: Any) -> tuple[float, float]:
    """(loss, gradient) of the first step: the whole module perturbed in memory, from a fresh copy in each lane."""
    ids = assign_param_ids([name for name, _ in model.named_parameters()])
    losses = []
    for scale in (EPS, -EPS):
        lane = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in lane.named_parameters():
                if p.requires_grad:
                    z = noise(NoiseSpec(), step_seed(0, 0), ids[name], p.numel()).view(p.shape)
                    p.copy_((p.double() + scale * z.double()).float())  # one rounding
            losses.append(float(objective(lane, given)))
    return (losses[0] + losses[1]) / 2, (losses[0] - losses[1]) / (2 * EPS)


def assert_steps_as_plain(model: nn.Module, given: Any, **options: Any) -> Engine:
    want = plain_step(model, given)
    engine = engine_of(model, **options)
    record = engine.step(given)
    assert (record.loss, record.grad) == want
    return engine


# ---- parameters that do not stream -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Trained weights beside frozen parameters of every kind that cannot train."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.gain = nn.Parameter(torch.tensor(1.5))
        frozen = dict(
            index=torch.randperm(D),
            mask=torch.rand(D) > 0.3,
            table=torch.randn(D, dtype=torch.float64),
            spectrum=torch.randn(D // 2 + 1, dtype=torch.complex64),
            codes=torch.randint(0, 255, (D, D), dtype=torch.uint8),
            eight=torch.randn(D, D).to(torch.float8_e4m3fn),
            count=torch.tensor(3),
        )
        for name, value in frozen.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.wide = nn.Linear(D, D).double().requires_grad_(False)
        self.rows = nn.Embedding(4, D).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)[..., self.index] * self.mask + self.table.float()
        x = torch.fft.irfft(torch.fft.rfft(x) * self.spectrum, n=D) @ (self.codes.float() / 255 - 0.5)
        x = self.wide((x @ self.eight.float()).double()).float() + self.rows(torch.arange(4)).float()[0]
        return self.b(x) * self.gain + self.count


def odd(seed: int = 0) -> Odd:
    torch.manual_seed(seed)
    return Odd()


def bytes_of(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().view(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_frozen_parameters_of_other_dtypes_pass_through(tmp_path: Path, offload: str) -> None:
    model = odd()
    frozen = {name: bytes_of(p) for name, p in model.named_parameters() if not p.requires_grad}
    engine = assert_steps_as_plain(model, batch(), offload=offload, run_dir=tmp_path / "run")
    assert any("'index' (torch.int64)" in note for note in engine.plan.notes)
    engine.save_pretrained(tmp_path / "out")
    engine.close()
    engine = Engine.resume(tmp_path / "run", odd(), objective=objective)
    engine.step(batch())
    restored = engine.restore()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == odd().state_dict().keys()
    for name, value in frozen.items():
        assert bytes_of(restored.get_parameter(name)) == value == bytes_of(written[name]), name
    replay(odd(), tmp_path / "run", tmp_path / "again", to=1, objective=objective)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(bytes_of(again[name]) == bytes_of(written[name]) for name in written)


def test_what_stays_in_the_module_is_part_of_the_base(tmp_path: Path) -> None:
    with engine_of(odd(), run_dir=tmp_path / "run") as engine:
        engine.step(batch())
    other = odd()
    other.index.data = other.index.flip(0)
    with pytest.raises(JournalError, match="base"):
        Engine.resume(tmp_path / "run", other, objective=objective).step(batch())


@pytest.mark.parametrize(
    "trainable", [None, "*", ["wide"], lambda name, p: name == "spectrum"], ids=["grad", "all", "glob", "predicate"]
)
def test_what_cannot_train_is_named(trainable: Any) -> None:
    model = odd()
    model.wide.requires_grad_(trainable is None)
    with pytest.raises(PlanError, match=r"'(wide.weight|table|spectrum)' is to train .* torch\.(float64|complex64)"):
        engine_of(model, trainable=trainable)


def test_expanded_memory_is_named_or_stays() -> None:
    model = nn.Sequential(nn.Linear(D, D))
    model.shared = nn.Parameter(torch.randn(1, D).expand(4, D))
    with pytest.raises(PlanError, match="'shared' is to train .* expanded"):
        engine_of(model)
    model.shared.requires_grad_(False)
    engine = engine_of(model, objective=lambda m, b: m(b["x"]).square().mean())
    engine.step(batch())
    assert engine.restore().shared.stride() == (0, 1)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, 2, 8, 8).to(memory_format=torch.channels_last))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.linear.weight = nn.Parameter(torch.randn(D, D).t())
        self.part = nn.Parameter(torch.randn(D, 2 * D)[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.part


@pytest.mark.parametrize("made", [Conv, Transposed])
@pytest.mark.parametrize("rows", [2, 5, 11])
def test_weights_lie_in_lanes_and_come_back_as_they_lay(made: type[nn.Module], rows: int) -> None:
    torch.manual_seed(rows)
    model = made()
    strides = [p.stride() for p in model.parameters()]
    engine = assert_steps_as_plain(model, batch(rows))
    engine.step(batch(rows))
    assert [p.stride() for p in engine.restore().parameters()] == strides


class Pair(nn.Module):
    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        with torch.no_grad():
            change(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def _same_memory(m: Any) -> None:
    m.b.weight.data = m.a.weight.data


def _halves(m: Any) -> None:
    whole = torch.randn(D, 2 * D)
    m.a.weight.data, m.b.weight.data = whole[:, :D], whole[:, D:]


def test_parameters_over_one_memory_stay_tied() -> None:
    model = Pair(_same_memory)
    model.b.weight.requires_grad_(False)
    before = list(model.parameters())
    engine = engine_of(model, run_dir=None)
    engine.step(batch())
    engine.step(batch())
    engine.restore()
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert torch.equal(model.a.weight, model.b.weight)


def test_parameters_side_by_side_in_one_storage_are_noted() -> None:
    engine = assert_steps_as_plain(Pair(_halves), batch())
    assert any("'a.weight' and 'b.weight' lie in one storage" in note for note in engine.plan.notes)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda m: setattr(m.b.weight, "data", m.a.weight.data.t()), "'a.weight' and 'b.weight'"),
        (lambda m: setattr(m.b.bias, "data", m.a.weight.data[3]), "'a.weight' and 'b.bias'"),
        (lambda m: setattr(m, "chunk", m.a.weight[:4]), "'chunk' is a view .* 'a.weight'"),
        (lambda m: m.b.register_buffer("flat", m.a.weight.data.view(-1)), "'b.flat' is a view .* 'a.weight'"),
        (lambda m: setattr(m, "kept", {"parts": [m.b.bias.detach()]}), "'kept' is a view .* 'b.bias'"),
    ],
    ids=["transposed", "row", "attribute", "buffer", "nested"],
)
def test_other_views_of_a_trained_weight_are_refused_by_name(change: Callable[[Any], None], named: str) -> None:
    with pytest.raises(PlanError, match=named):
        engine_of(Pair(change))
    frozen = Pair(change).requires_grad_(False)
    frozen.head = nn.Linear(D, D)
    engine_of(frozen)


# ---- a module whose weights are away ---------------------------------------------------------------------------------

USES: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda m: m.state_dict(),
    "state_dict of a child": lambda m: m.a.state_dict(keep_vars=True),
    "deepcopy": copy.deepcopy,
    "deepcopy of a child": lambda m: copy.deepcopy(m.a),
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
    "to": lambda m: m.to(torch.float64),
    "half of a child": lambda m: m.b.half(),
    "load_state_dict": lambda m: m.load_state_dict(Pair(lambda _: None).state_dict()),
    "call": lambda m: m(**batch()),
    "another engine": engine_of,
}


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_model_in_use_or_closed_is_not_used_as_nan(use: Callable[[nn.Module], Any]) -> None:
    model = Pair(lambda _: None)
    engine = engine_of(model)
    engine.step(batch())
    with pytest.raises(PlanError):
        use(model)
    engine.step(batch())
    engine.close()
    with pytest.raises(PlanError, match="closed.*restore"):
        use(model)


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_restored_model_is_free_again(use: Callable[[nn.Module], Any]) -> None:
    model = Pair(lambda _: None)
    engine = engine_of(model)
    engine.step(batch())
    use(engine.restore())
    assert not any(
        {"_apply", "__reduce_ex__"} & vars(m).keys() or m._state_dict_pre_hooks or m._forward_pre_hooks
        for m in model.modules()
    )


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'0.weight' of Sequential is on the meta device"):
        engine_of(nn.Sequential(nn.Linear(D, D, device="meta")))


# ---- compiled, scripted, transformed ---------------------------------------------------------------------------------


class Around(nn.Module):
    """A layer, something done with an inner module, a layer."""

    def __init__(self, inner: nn.Module, use: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(D, D), inner, nn.Linear(D, D)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self.inner, torch.tanh(self.first(x))))


def inner() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.GELU())


def _compiled_forward() -> nn.Module:
    module = inner()
    module.compile(backend="eager")
    return module


COMPILED: dict[str, Callable[[], nn.Module]] = {
    "a module": lambda: Around(torch.compile(inner(), backend="eager")),
    "in place": lambda: Around(_compiled_forward()),
    "the whole": lambda: torch.compile(Around(inner()), backend="eager"),
    "a function": lambda: Around(inner(), torch.compile(lambda m, x: m(x) + x, backend="eager")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("made", COMPILED.values(), ids=list(COMPILED))
def test_compiled_parts_run_eagerly(made: Callable[[], nn.Module]) -> None:
    model = made()
    own = getattr(model, "_orig_mod", model)
    with torch.compiler.set_stance("force_eager"):
        want = plain_step(own, batch())
    torch._dynamo.utils.counters.clear()
    engine = engine_of(model)
    record = engine.step(batch())
    engine.step(batch())
    assert (record.loss, record.grad) == want
    assert not torch._dynamo.utils.counters["frames"]
    assert not any(name.startswith("_orig_mod") for name in engine.plan.params)
    assert engine.restore() is model


@pytest.mark.parametrize(
    "inside", [lambda: torch.jit.script(inner()), lambda: torch.jit.trace(nn.Linear(D, D), torch.randn(2, D))],
    ids=["script", "trace"],
)  # fmt: skip
def test_torchscript_parts_are_held_by_the_module_around_them(inside: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Around(inside())
    engine = assert_steps_as_plain(model, batch())
    engine.step(batch())
    restored = engine.restore()
    assert torch.isfinite(restored(**batch())).all()
    with pytest.raises(PlanError, match="scripted model"):
        engine_of(torch.jit.script(inner()))


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda m, x: torch.vmap(m)(x),
    "nested vmap": lambda m, x: torch.vmap(torch.vmap(m))(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones_like(x))[0],
    "jacrev": lambda m, x: x @ torch.func.jacrev(m)(x[0, 0]),
    "jacfwd": lambda m, x: x @ torch.func.jacfwd(m)(x[0, 0]),
    "hessian": lambda m, x: x @ torch.func.hessian(lambda v: m(v).sum())(x[0, 0]),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).square().sum())(x),
    "beside a plain call": lambda m, x: m(x) + torch.vmap(m)(x),
}


@pytest.mark.parametrize("traced", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("use", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_function_transforms_over_modules(use: Callable[[nn.Module, Tensor], Tensor], traced: bool) -> None:
    model = Around(inner(), use)
    engine = assert_steps_as_plain(model, batch(), example=batch() if traced else None)
    assert "" in engine.plan.lifted()["inner.0.weight"]


# ---- weights that a forward changes ----------------------------------------------------------------------------------


class Changing(nn.Module):
    """A forward that changes a weight and then computes with it, in the module that has it or beside."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.change, self.done = change, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            self.change(self)
        return self.last(torch.tanh(x))


def _once(m: Any) -> None:
    if not m.done:
        m.last.weight.div_(4).add_(0.5)
        m.done = True


CHANGES: dict[str, Callable[[Any], Any]] = {
    "once": _once,
    "clamp": lambda m: m.last.weight.clamp_(-0.1, 0.1),
    "clamp of data": lambda m: m.last.weight.data.clamp_(-0.1, 0.1),
    "renorm": lambda m: m.last.weight.copy_(m.last.weight.renorm(2, 0, 0.5)),
    "norm": lambda m: m.last.weight.div_(m.last.weight.norm(dim=1, keepdim=True)),
    "a row": lambda m: m.last.weight[3].zero_(),
    "of the layer before": lambda m: m.first.bias.mul_(2),
}


@pytest.mark.parametrize("traced", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_weight_changed_in_place_is_changed_in_every_forward(change: Callable[[Any], Any], traced: bool) -> None:
    engine = assert_steps_as_plain(Changing(change), batch(), example=batch() if traced else None)
    assert engine.step(batch(), lr=1e-9).loss == pytest.approx(engine.step(batch(), lr=1e-9).loss, rel=1e-4)
    micro = engine_of(Changing(change)).step(batch(), micro_batches=2)
    assert micro.loss == pytest.approx(plain_step(Changing(change), batch())[0], rel=1e-4)
    before = Changing(change).state_dict()
    restored = engine.restore()
    assert restored.done is False
    assert all(torch.allclose(p, before[name], atol=1e-2) for name, p in restored.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.last.weight.mul_(0.9).add_(m.first.weight, alpha=0.1),
        lambda m: m.last.weight.copy_(m.first.weight),
    ],
    ids=["average", "copy"],
)
def test_a_weight_that_learns_in_the_forward_is_refused_by_name(change: Callable[[Any], Any]) -> None:
    with pytest.raises(PlanError, match=r"'last.weight' is changed in place .* of other weights"):
        engine_of(Changing(change)).step(batch())


def test_an_embedding_with_a_largest_norm() -> None:
    model = nn.Sequential(nn.Embedding(9, D, max_norm=1.0), nn.Linear(D, 3))

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    assert_steps_as_plain(Tokens(), {"x": torch.tensor([[1, 2, 3], [3, 4, 8]])}).step({"x": torch.tensor([[1, 5, 3]])})


def test_rwkv_that_rescales_its_weights_in_eval_mode() -> None:
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, context_length=16)
    config = transformers.RwkvConfig(**sizes, rescale_every=1)
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    ids = {"input_ids": torch.arange(5, 15).reshape(2, 5)}
    plain = copy.deepcopy(model)
    engine = Engine(model, method=MeZO(lr=1e-30), offload="host", num_slots=3)
    engine.step({**ids, "labels": ids["input_ids"]})
    loss = engine.evaluate([{**ids, "labels": ids["input_ids"]}])["loss"]
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    found = engine.generate(ids, **options)
    assert torch.equal(found, plain.generate(**ids, **options))
    restored = engine.restore()
    assert restored.rwkv.layers_are_rescaled is False
    with torch.no_grad():
        want = copy.deepcopy(restored)(**ids, labels=ids["input_ids"]).loss
    assert loss == float(want)
    assert torch.equal(restored.generate(**ids, **options), found)


class Router(nn.Module):
    """Has its layer in the dtype that it computes in, as routers of experts do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.dtype = nn.Linear(D, D), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.head = self.head.to(self.dtype)
        return self.head(x.to(self.dtype))


def test_a_forward_may_ask_for_the_dtype_that_its_weights_have() -> None:
    with Engine(Router(torch.float32), objective=lambda m, batch: m(**batch).square().mean()) as engine:
        assert engine.step({"x": torch.ones(2, D)}).loss > 0
        with pytest.raises(PlanError, match="cannot be moved or converted"):
            engine.model.to(torch.float64)
