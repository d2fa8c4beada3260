"""Every lane finds the modules as they were before the step, and no pass leaves anything in them.

Each model here keeps something between its parts or its calls. What its lanes give must be what a plain loop over
copies of the model gives, in every order of service, watched and not; and the model must be as before afterwards.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
import random
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from zo_offload import Engine, MeZO
from zo_offload.errors import PlanError
from zo_offload.modules.generators import Generators, lane_seed
from zo_offload.modules.glance import Glance
from zo_offload.modules.places import Reach
from zo_offload.numerics.noise import NoiseSpec, assign_param_ids, noise, step_seed

EPS = float(torch.tensor(1e-2))
D = 8
GLOBAL = torch.Generator()


class Stack(nn.Module):
    """Four layers; what is done before, after each of them and at the end is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.head = nn.Linear(D, D)

    def begin(self, x: Tensor) -> Tensor:
        return x

    def between(self, x: Tensor, i: int) -> Tensor:
        return x

    def end(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for i, layer in enumerate(self.layers):
            x = self.between(torch.tanh(layer(x)), i)
        return self.end(self.head(x))


class Counter(Stack):
    n = 0

    def begin(self, x: Tensor) -> Tensor:
        self.n = 0
        return x

    def between(self, x: Tensor, i: int) -> Tensor:
        self.n += 1
        return x * 0.9**self.n


class CounterOfCalls(Stack):
    calls = 0

    def begin(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Floats(Stack):
    def begin(self, x: Tensor) -> Tensor:
        self.aux = 0.0
        return x

    def between(self, x: Tensor, i: int) -> Tensor:
        self.aux += float(x.square().mean())
        return x

    def end(self, x: Tensor) -> Tensor:
        return x * (1 + self.aux)


class KeepsHidden(Stack):
    """As a recurrent layer that goes on where it was."""

    hidden: Tensor | None = None

    def between(self, x: Tensor, i: int) -> Tensor:
        if i == 1:
            x = x + self.hidden if self.hidden is not None else x
        if i == 3:
            self.hidden = x.detach().mean(0)
        return x if self.hidden is None else x * self.hidden.mean()


class Appends(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = [0.5]

    def between(self, x: Tensor, i: int) -> Tensor:
        self.seen.append(x.detach().mean())
        return x + sum(self.seen)


class Queue(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.last = collections.deque([0.1, 0.2], maxlen=3)

    def between(self, x: Tensor, i: int) -> Tensor:
        self.last.append(float(x.mean()))
        return x * (1 + sum(self.last))


@dataclasses.dataclass
class Kept:
    count: int = 0
    total: Any = 0.0
    names: dict[str, Any] = dataclasses.field(default_factory=dict)


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Objects(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.kept, self.slotted, self.array, self.odd = Kept(), Slotted(), np.zeros(3), {1}

    def between(self, x: Tensor, i: int) -> Tensor:
        self.kept.count += 1
        self.kept.total = self.kept.total + x.detach().mean()
        self.kept.names[f"layer {i}"] = x.detach().std()
        self.slotted.n += 2
        self.array += float(x.mean())
        self.odd.add(i + 10)
        return x * self.kept.count + self.kept.total + sum(self.kept.names.values()) + self.slotted.n + self.array.sum()


class OfTheClass(Stack):
    count = 0
    table: ClassVar[dict[str, float]] = {"sum": 0.0}

    def between(self, x: Tensor, i: int) -> Tensor:
        OfTheClass.count += 1
        self.table["sum"] += float(x.mean())
        return x * self.count + self.table["sum"]


class Toggles(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def begin(self, x: Tensor) -> Tensor:
        self.drop.train()
        return x

    def between(self, x: Tensor, i: int) -> Tensor:
        x = self.drop(x)
        if i == 2:
            self.drop.eval()
        return x


class Swaps(Stack):
    """A submodule is replaced in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.ReLU()

    def between(self, x: Tensor, i: int) -> Tensor:
        x = self.act(x)
        if i == 1:
            self.act = nn.Tanh()
        return x


class Average(Stack):
    """A buffer that is changed in place, and read."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((D,), 0.25))

    def between(self, x: Tensor, i: int) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class Counts(Stack):
    """A buffer that is only counted up."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(5))

    def between(self, x: Tensor, i: int) -> Tensor:
        self.count += 1
        return x


class TensorsInLists(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.cache = [{"k": torch.zeros(D)} for _ in range(4)]

    def between(self, x: Tensor, i: int) -> Tensor:
        self.cache[i]["k"].add_(x.detach().mean(0))
        return x + self.cache[i]["k"]


class Product(Stack):
    """A table made of weights in the first call, outside of their modules: the first plan is wrong."""

    table: Tensor | None = None

    def end(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.layers[0].weight.detach() @ self.head.weight.detach()  # type: ignore[operator]
        return x @ self.table


class Table(Stack):
    table: Tensor | None = None

    def between(self, x: Tensor, i: int) -> Tensor:
        if self.table is None:
            self.table = torch.arange(float(D))
        return x + self.table


class Longest(Stack):
    """What it keeps depends on the longest batch it has seen."""

    longest = 0

    def begin(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, int((x[:, 0] > 0).sum()))
        return x * (1 + self.longest)


class OwnGenerators(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.python, self.numpy, self.torch = random.Random(5), np.random.default_rng(5), torch.Generator()

    def between(self, x: Tensor, i: int) -> Tensor:
        return x * self.python.random() + self.numpy.random() + torch.randn(D, generator=self.torch)


class DrawsFrom(Stack):
    """Every global generator, and one that no module holds."""

    def between(self, x: Tensor, i: int) -> Tensor:
        x = nn.functional.dropout(x, 0.5, training=True) * random.random() + float(np.random.randn())
        return x + torch.randn(D, generator=GLOBAL)


class ChangesItsBatch(Stack):
    def begin(self, x: Tensor) -> Tensor:
        return x.mul_(1.5)


MODELS: list[type[Stack]] = [
    Counter, CounterOfCalls, Floats, KeepsHidden, Appends, Queue, Objects, OfTheClass, Toggles, Swaps, Average, Counts,
    TensorsInLists, Product, Table, Longest, OwnGenerators, DrawsFrom, ChangesItsBatch,
]  # fmt: skip
ONE_AFTER_ANOTHER = (Average, TensorsInLists)  # they read memory that lanes write


def batch(rows: int = 6) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, D, generator=torch.Generator().manual_seed(7))}


def mean_square(model: nn.Module, batch: Any) -> Any:
    return model(**batch).square().mean()


def held(value: Any) -> Any:
    """A value as something to compare."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {k: held(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [held(v) for v in value]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Kept):
        return held(vars(value))
    return value.n if isinstance(value, Slotted) else value


def state(model: nn.Module) -> Any:
    """All that is in the modules but weights, hooks and what guards a model in use, with the buffers' identity."""
    skip = {name for name in vars(nn.Module()) if "hook" in name} | {"_parameters"}
    return [
        (
            {k: held(v) for k, v in vars(m).items() if k not in skip and not isinstance(v, FunctionType)},
            {k: id(b) for k, b in m._buffers.items()},
        )
        for m in model.modules()
    ] + [OfTheClass.count, dict(OfTheClass.table), GLOBAL.get_state().tolist()]


def global_generators() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    ]


def with_random_numbers(model: nn.Module, seed: int, work: Callable[[], Any]) -> Any:
    """Work under generators seeded as a lane's are; they, and the class's attributes, are as before afterwards."""
    generators = Generators()
    for generator in (
        *(v for v in vars(model).values() if isinstance(v, (random.Random, np.random.Generator))),
        GLOBAL,
    ):
        generators.meet(generator)
    for value in vars(model).values():
        if isinstance(value, torch.Generator):
            generators.meet(value)
    before, of_class = generators.state(), (OfTheClass.count, dict(OfTheClass.table))
    generators.seed(frozenset(before), seed)
    try:
        return work()
    finally:
        generators.set(before)
        OfTheClass.count = of_class[0]
        OfTheClass.table.update(of_class[1])


def plain(model: nn.Module, step: int, parts: list[Any]) -> list[float]:
    """Losses of a step's lanes, each on a copy of the model as it is before the step."""
    ids = assign_param_ids([name for name, _ in model.named_parameters()])
    losses = []
    for scale in (EPS, -EPS):
        for part in parts:
            lane = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name, p in lane.named_parameters():
                    z = noise(NoiseSpec(), step_seed(0, step), ids[name], p.numel()).view(p.shape)
                    p.copy_((p.double() + scale * z.double()).float())
                seed = lane_seed(0, "step", step)
                work = lambda lane=lane, part=part: float(mean_square(lane, copy.deepcopy(part)))  # noqa: E731
                losses.append(with_random_numbers(lane, seed, work))
    return losses


def trained(model: nn.Module, steps: int, micro_batches: int = 1, **settings: Any) -> list[list[float]]:
    """Losses of each step's lanes as the objective gave them in the step's last attempt."""
    seen: list[float] = []

    def objective(model: nn.Module, batch: Any) -> Any:
        loss = mean_square(model, batch)
        seen.append(float(loss))
        return loss

    steps_seen = []
    method = MeZO(lr=1e-30, eps=EPS)
    with Engine(model, method=method, objective=objective, offload="host", **settings) as engine:
        for _ in range(steps):
            given = batch()
            engine.step(given, micro_batches=micro_batches)
            steps_seen.append(seen[-2 * micro_batches :])
            assert torch.equal(given["x"], batch()["x"]), "the caller's batch was changed"
        engine.restore()
    return steps_seen


@pytest.mark.parametrize("order", ["auto", "module", "block", "lane"])
@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
def test_lanes_give_what_a_plain_loop_gives_and_leave_nothing(model_class: type[Stack], order: str) -> None:
    model = model_class()
    before, generators = state(model), global_generators()
    want = [plain(model, step, [batch()]) for step in range(3)]
    assert len({loss for step in want for loss in step}) == 6, "the lanes must differ, or nothing is compared"
    if model_class in ONE_AFTER_ANOTHER and order in ("module", "block"):
        with pytest.raises(PlanError, match="order='lane'"):
            trained(model, 1, order=order)
        return
    got = trained(model, 3, order=order)
    assert got == want
    assert state(model) == before
    assert global_generators() == generators


@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
def test_and_so_do_micro_batches(model_class: type[Stack]) -> None:
    model = model_class()
    before = state(model)
    parts = [{"x": batch()["x"][:3]}, {"x": batch()["x"][3:]}]
    want = [plain(model, step, parts) for step in range(2)]
    assert trained(model, 2, micro_batches=2) == want
    assert state(model) == before


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_one_of_two_lanes_leaves_nothing(watched: bool, error: type[BaseException]) -> None:
    ends = [0]

    def objective(model: nn.Module, batch: Any) -> Any:
        loss = mean_square(model, batch)
        ends[0] += 1
        if ends[0] == (2 if watched else 4):
            raise error("on purpose")
        return loss

    class Keeps(Appends):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def between(self, x: Tensor, i: int) -> Tensor:
            self.count += 1  # type: ignore[operator, assignment]
            self.last = x
            return super().between(x, i)

    model = Keeps()
    before, generators = state(model), global_generators()
    want = [plain(model, step, [batch()]) for step in range(2)]
    with Engine(model, method=MeZO(lr=1e-30, eps=EPS), objective=objective, offload="host") as engine:
        if not watched:
            engine.step(batch())
        with pytest.raises(error, match="on purpose"):
            engine.step(batch())
        assert state(model) == before and global_generators() == generators
        step = 0 if watched else 1
        record = engine.step(batch())
        assert record.step == step
        assert record.loss == sum(want[step]) / 2
        model = engine.restore()
    assert state(model) == before
    gc.collect()


class Sometimes(Stack):
    """Changes a number, or a buffer in place, only once it has been told to."""

    n, told = 0, ""
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def between(self, x: Tensor, i: int) -> Tensor:
        if self.told == "number":
            self.n += 1
        elif self.told == "buffer":
            self.count += 1
        return x * (1 + self.n)


def test_a_change_that_was_not_seen_when_forwards_were_watched_is_found_and_the_pass_run_again() -> None:
    model = Sometimes()
    with Engine(model, method=MeZO(lr=1e-30, eps=EPS), objective=mean_square, offload="host") as engine:
        for _ in range(2):  # watched, and watched again under the plan that the first showed
            engine.step(batch())
        model.told = "number"
        record = engine.step(batch())
        assert model.n == 0
        model = engine.restore()  # type: ignore[assignment]
    assert record.loss == sum(plain(model, 2, [batch()])) / 2


def test_memory_that_was_not_seen_to_change_is_an_error_that_names_it_and_the_next_pass_is_right() -> None:
    model = Sometimes()
    with Engine(model, method=MeZO(lr=1e-30, eps=EPS), objective=mean_square, offload="host") as engine:
        for _ in range(2):  # watched, and watched again under the plan that the first showed
            engine.step(batch())
        model.told = "buffer"
        with pytest.raises(PlanError, match="buffer 'count' was changed in place by a forward"):
            engine.step(batch())
        count = float(model.count)
        assert engine.step(batch()).step == 2 and float(model.count) == count


def test_hooks_that_a_model_puts_on_itself_are_put_back_with_their_flag():
    """transformers gives hidden states by hooks that the first forward puts on, and a flag that says so."""
    from support.zoo.models import ZOO

    ids = torch.arange(3, 27).reshape(2, 12)
    seen = []

    def objective(model, batch):
        out = model(**batch, output_hidden_states=True)
        seen.append(len(out.hidden_states))
        return out.loss + 0 * out.hidden_states[1].mean()

    model = ZOO["llama"].build()
    with Engine(model, method=MeZO(lr=1e-4), objective=objective) as engine:
        for _ in range(3):
            engine.step({"input_ids": ids, "labels": ids})
    assert set(seen) == {3}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("order", ["module", "block", "lane"])
@pytest.mark.parametrize("kind", ["put on", "put on first, with options", "taken off"])
def test_a_forward_that_changes_its_hooks_leaves_them(kind, order):
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.handle = (
                self.layers[1].register_forward_hook(lambda m, a, out: out * 2) if kind == "taken off" else None
            )

        def forward(self, x, labels):
            if kind == "put on":
                self.layers[0].register_forward_hook(lambda m, a, out: out + 1)
            elif kind != "taken off":
                self.layers[0].register_forward_pre_hook(
                    lambda m, a, k: ((a[0] * 3,), k), prepend=True, with_kwargs=True
                )
            for layer in self.layers:
                x = layer(x)
            if kind == "taken off":
                self.handle.remove()
            return ((x - labels) ** 2).mean()

    batch = {"x": torch.ones(2, 4), "labels": torch.zeros(2, 4)}
    losses = []
    with Engine(Hooked(), method=MeZO(lr=1e-12), order=order, objective=lambda m, b: m(**b)) as engine:
        losses = [engine.step(batch).loss for _ in range(3)]
        assert engine.run(batch, lambda m, b: float(m(**b))) == float(Hooked()(**batch).detach())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 40, "num_key_value_heads": 2, "attn_implementation": "eager"}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}


def _llava():
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_seq_length=4, vision_feature_layer=-2
    )
    return transformers.LlavaForConditionalGeneration(config)


def _hidden_and_attentions(model, batch):
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    return out.loss + sum(t.float().square().mean() for t in (*out.hidden_states, *out.attentions))


def _every_layer(model, batch):
    out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    return sum(t.float().square().mean() for t in out.hidden_states)


CAPTURED = {
    "hidden states of one layer of a tower": (_llava, None),
    "all hidden states and attentions": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
        _hidden_and_attentions,
    ),
    "hidden states of a vision tower": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        _every_layer,
    ),
    "router logits": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**TEXT, num_local_experts=4, output_router_logits=True)
        ),
        None,
    ),
}


@pytest.mark.parametrize("captured", CAPTURED)
def test_outputs_that_transformers_captures_are_each_lanes_own_at_every_step(captured, tmp_path):
    build, objective = CAPTURED[captured]
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[1, 3, 3, 3, 3, 5, 6], [1, 3, 3, 3, 3, 8, 9]])
    batch = {"input_ids": ids, "labels": ids}
    if captured.startswith("hidden states"):
        batch = {**batch, "pixel_values": pixels} if objective is None else {"pixel_values": pixels}

    def losses(order, offload):
        torch.manual_seed(0)
        model = build().eval()
        run_dir = tmp_path / order if offload == "disk" else None
        with Engine(
            model, method=MeZO(lr=1e-3), objective=objective, order=order, offload=offload, run_dir=run_dir
        ) as e:
            first = e.evaluate([batch])["loss"]
            return [first, *(e.step(batch).loss for _ in range(3)), e.evaluate([batch])["loss"]]

    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        plain = float(objective(model, batch) if objective else model(**batch).loss)
    found = [losses("module", "none"), losses("block", "disk"), losses("lane", "none")]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == pytest.approx(plain, rel=1e-6)


# ---- one look for all places -----------------------------------------------------------------------------------------


def test_one_look_finds_what_asking_each_place_finds():
    """Attributes, what they lead to, buffers and hooks changed by chance, put back and noted again."""
    chance = random.Random(8)
    for _ in range(12):
        model = WithMore()
        reach = Reach(model)
        glance = Glance(reach.places)
        modules = list(model.modules())
        for turn in range(40):
            module = chance.choice(modules)
            kind = chance.randrange(9)
            if kind == 0:
                module.n = chance.choice([1, 2, turn])
            elif kind == 1:
                model.table[chance.choice("ab")] = chance.choice([1, None, turn])
            elif kind == 2:
                model.seen.append(turn)
            elif kind == 3:
                module.register_buffer(f"b{turn % 3}", chance.choice([None, torch.zeros(1)]))
            elif kind == 4:
                module.register_forward_pre_hook(lambda m, args: None, with_kwargs=False, prepend=turn % 2 == 0)
            elif kind == 5:
                module._forward_hooks = collections.OrderedDict()
            elif kind == 6 and "n" in vars(module):
                del module.n
            elif kind == 7:
                for place in reach.places:
                    place.put_back()
            want = {(id(place.target), str(key)) for place in reach.places for key in place.changed()}
            assert {(id(place.target), str(key)) for place, key in glance.changed()} == want, (turn, kind)
            if turn % 5 == 4:
                glance.note([place for place in reach.places if place.changed()])
                assert glance.changed() == [], "all noted"


class WithMore(Stack):
    """With attributes that lead to more."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.seen = {"a": 1}, [0]
