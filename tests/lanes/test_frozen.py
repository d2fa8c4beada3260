"""Parameters that do not train are decoded once for all lanes: the same numbers, less work, less scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice, FakeBackend, FakeCudaDevice
from support.training import batches, stored_weights
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import FZOO, Engine, MeZO
from zo_offload.errors import PlanError
from zo_offload.journal.journal import read_journal
from zo_offload.kernels.records import Update
from zo_offload.methods import Method
from zo_offload.numerics.updates import UpdateLog
from zo_offload.stream import emitter
from zo_offload.stream.scratch import ScratchPool
from zo_offload.stream.streamer import Streamer

Way = dict[str, Any]
STEPS = 3
METHODS: dict[str, Method] = {
    "mezo": MeZO(lr=1e-2, batch_size=4),
    "fzoo": FZOO(lr=1e-2, directions=8, batch_size=4),
}


def lora(bias: str = "none") -> nn.Module:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], bias=bias, init_lora_weights=False)
    return peft.get_peft_model(tiny_opt(2), config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Way]] = {
    "lora": (lora, dict(trainable="requires_grad")),
    "lora and biases": (lambda: lora("all"), dict(trainable="requires_grad")),
    "last layer": (lambda: tiny_llama(2), dict(trainable="model.layers.1")),
    "biases": (lambda: tiny_opt(2), dict(trainable="bias")),
    "biases, cut": (lambda: tiny_opt(2), dict(trainable="bias", block_numel=1 << 9)),
}
ORDERS = ("module", "block", "lane")
WAYS: dict[str, Way] = {
    "none": dict(offload="none"),
    "host": dict(offload="host", num_slots=2, order="block"),
    "disk": dict(offload="disk", num_slots=2, fold_every=1),
    "lane": dict(offload="host", num_slots=2, order="lane"),
}


@contextmanager
def a_copy_a_lane() -> Iterator[None]:
    """As if everything trained: every lane has its own copy of every weight."""
    recipe = Streamer._recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Streamer, "_recipe", lambda *parts: replace(found := recipe(*parts), once=(False,) * len(found.shapes))
        )
        yield


def run(name: str, method: str, *, micro_batches: int = 1, **way: Any) -> Any:
    make, settings = MODELS[name]
    with Engine(make(), method=METHODS[method], fold_every=way.pop("fold_every", 1), **settings, **way) as engine:
        losses = [engine.step(batch, micro_batches=micro_batches).loss for batch in batches(STEPS)]
        values = [engine.evaluate(batches(1)[0:1])["loss"]]
        return losses + values, stored_weights(engine)


CASES = [
    ("lora", None), ("lora", "int4"), ("lora and biases", "bf16"), ("last layer", "int8"), ("last layer", "int8+8"),
    ("biases", "bf16"), ("biases", "int4"), ("biases, cut", "int8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_the_numbers_are_those_of_a_copy_a_lane(name, storage, tmp_path):
    with a_copy_a_lane():
        want = run(name, "fzoo", storage=storage, offload="host", run_dir=tmp_path / "own")
    assert len(set(want[0])) == STEPS + 1
    turn = CASES.index((name, storage))  # what trains and where blocks live are apart: each case takes its turn
    for way in {"disk", *(list(WAYS) * 2)[turn % len(WAYS) :][:2]}:
        more = dict(run_dir=tmp_path / way) if way == "disk" else {}
        assert_same(want, run(name, "fzoo", storage=storage, **WAYS[way], **more))
    own, shared = (read_journal((tmp_path / which / "journal.zoj").read_bytes()).steps for which in ("own", "disk"))
    assert len(own) == STEPS and own == shared
    with a_copy_a_lane():
        want = run(name, "mezo", storage=storage, offload="host", micro_batches=2)
    assert_same(want, run(name, "mezo", storage=storage, offload="host", micro_batches=2))


DEVICES = {"late": lambda: DelayedCpuDevice(1), "cuda": lambda: FakeCudaDevice(FakeBackend())}


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
@pytest.mark.parametrize("name", ["lora", "biases, cut"])
def test_a_late_device_gives_the_same_numbers(name, device, use):
    want = run(name, "fzoo", offload="host")
    use(device())
    for order in ORDERS:
        assert_same(want, run(name, "fzoo", offload="host", num_slots=2, order=order))


def copies_made(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Counter[str]:
    """Copies of each parameter that one step makes for its lanes."""
    names = {spec.param_id: name for name, spec in engine.plan.params.items()}
    found = Counter[str]()
    for kind in ("fused_pass", "fused_rows"):
        make = getattr(emitter, kind)

        def counted(*args: Any, make: Any = make, **kwargs: Any) -> None:
            found[names[kwargs["param_id"]]] += len(kwargs["outs"])
            make(*args, **kwargs)

        monkeypatch.setattr(emitter, kind, counted)
    call = emitter.Emitter._call

    def together(share: Any, slot: Any, ready: Any, told: Any, mark: Any) -> None:
        for part, (_, lanes, _, _) in zip(share.parts, told, strict=True):
            found[part.piece.name] += len(lanes)
        call(share, slot, ready, told, mark)

    monkeypatch.setattr(emitter.Emitter, "_call", staticmethod(together))
    return found


@pytest.mark.parametrize("name", ["lora", "lora and biases", "biases"])
def test_what_does_not_train_is_decoded_once_a_step(name, monkeypatch):
    make, settings = MODELS[name]
    with Engine(make(), method=METHODS["fzoo"], storage="int4", offload="host", **settings) as engine:
        engine.step(batches(1)[0])  # watched
        made = copies_made(monkeypatch, engine)
        engine.step(batches(1)[0])
        lanes, params = len(METHODS["fzoo"].perturbations(0, 0)), engine.plan.params
    assert lanes == 9
    assert {made[n] for n in params if params[n].trainable} == {lanes}
    frozen = {made[n] for n in params if not params[n].trainable}
    assert frozen <= {1, 2}, "twice only what the model uses twice, as a tied head"


@pytest.mark.parametrize("name", MODELS)
def test_scratch_is_planned_as_it_is_taken(name):
    make, settings = MODELS[name]
    order = [*ORDERS][[*MODELS].index(name) % len(ORDERS)]

    def scratch() -> tuple[int, int]:
        way = dict(offload="host", order=order, example=batches(1)[0])
        with Engine(make(), method=METHODS["fzoo"], storage="int8", **way, **settings) as engine:
            planned = engine.memory.terms["scratch"]
            for batch in batches(2):
                engine.step(batch)
            return planned, engine.active.streamer.scratch_bytes

    planned, taken = scratch()
    with a_copy_a_lane():
        _, alone = scratch()
    assert taken <= planned
    assert taken < alone / 3 if order == "module" else taken <= alone


def test_scratch_has_one_tensor_for_all():
    pool = ScratchPool(lambda n: torch.empty(n, dtype=torch.uint8))
    for fresh in (False, True):
        scratch = pool.take([(100,), (7,)], [torch.float32] * 2, 9, once=[True, False], fresh=fresh)
        assert len({id(row[0]) for row in scratch.tensors}) == 1 and len({id(row[1]) for row in scratch.tensors}) == 9
        different = {id(t): t for row in scratch.tensors for t in row}.values()
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in different)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert pool.nbytes == 512 + 9 * 256


# ---- a forward that changes its weights ------------------------------------------------------------------------------


class Halved(nn.Linear):
    """Halves its weight first, from some call on."""

    now = False

    def forward(self, x: Tensor) -> Tensor:
        if self.now:
            self.weight.mul_(0.5)
        return super().forward(x)


def halved(now: bool) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(Halved(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    model[0].now = now
    return model


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean()


DATA = {"x": torch.linspace(-1, 1, 32).view(4, 8)}
HALVED = dict(objective=mean_square, trainable="requires_grad", method=METHODS["fzoo"], example=DATA)


@pytest.mark.parametrize("order", ["auto", "lane"])
def test_a_weight_that_is_changed_in_place_from_some_step_on_is_each_lanes_own(order):
    with Engine(halved(True), order=order, **HALVED) as engine:
        want = engine.step(DATA, lr=1e-12).loss
    model = halved(False)
    with Engine(model, order=order, **HALVED) as engine:
        other = engine.step(DATA, lr=1e-12).loss
        model[0].now = True
        got = [engine.step(DATA, lr=1e-12).loss for _ in range(2)]
    assert abs(got[0] - want) < 1e-4 < abs(other - want)
    assert abs(got[1] - want) < 1e-4


def test_a_weight_that_is_changed_in_place_where_lanes_may_not_take_turns_is_named():
    model = halved(False)
    with Engine(model, order="module", **HALVED) as engine:
        engine.step(DATA)
        model[0].now = True
        with pytest.raises(PlanError, match="changes weights in place .*0.weight.*order='lane'"):
            engine.step(DATA)


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_steps_are_taken_back_from_a_log():
    log = UpdateLog(2)
    for step in range(4):
        log.append([Update(step, 1.0, 1.0, fold=step == 1)])
    before = log.since(2, True)
    log.cut(5)
    assert (log.version, log.folded, log.since(2, True)) == (5, 4, before[:3])
    log.cut(3)
    assert (log.version, log.folded) == (3, 2)
    log.cut(0)
    assert (log.version, log.since(2, True)) == (2, ())
