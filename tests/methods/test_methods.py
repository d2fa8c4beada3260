"""Methods: the formulas written out, one class a method, and a run of any of them like any other."""

from __future__ import annotations

import ast
import copy
import functools
import json
import math
import random
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import zo_offload
from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice, FakeBackend, FakeCudaDevice
from support.fake_gpu import FakeGpu, Gpu, HostKernels, reason
from support.planning import plan_report
from support.training import batches, stored_weights
from support.zoo.small import tiny_opt
from zo_offload import (
    FZOO,
    MEAZO,
    NSPSA,
    QZO,
    SPSA15,
    ConfigError,
    ConMeZO,
    Conservative,
    DivergenceError,
    Engine,
    FZOOLeaveOneOut,
    FZOOReuse,
    JournalError,
    LeZO,
    Method,
    MeZO,
    Momentum,
    RandomMask,
    RankSGD,
    SeedPool,
    SignSGD,
    SparseMeZO,
)
from zo_offload.cli import main
from zo_offload.cli.method_options import find_class
from zo_offload.journal import run_directory
from zo_offload.journal.identity import check_identity
from zo_offload.kernels import scalars
from zo_offload.kernels.float32 import fma
from zo_offload.kernels.philox import half_words
from zo_offload.kernels.records import STILL, Gain, Perturbation, Smallest, Terms
from zo_offload.methods import METHODS, method_from
from zo_offload.methods.base import COEFF_LIMIT
from zo_offload.modules import tiles
from zo_offload.numerics import cuda_kernels
from zo_offload.numerics.noise import noise, step_seed
from zo_offload.plan.plan import make_plan
from zo_offload.replay import replayed
from zo_offload.run import opening

STEPS = 4
DRAWS = 1000


# ---- the arithmetic, in floats ---------------------------------------------------------------------------------------


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def mezo(losses, lr, eps, method):
    grad = (losses[0] - losses[1]) / (2 * f32(eps))
    return [lr * grad], (losses[0] + losses[1]) / 2, grad


def qzo(losses, lr, eps, method):
    grad = max(-method.clip, min(method.clip, (losses[0] - losses[1]) / (2 * f32(eps))))
    return [lr * grad], (losses[0] + losses[1]) / 2, grad


def sign(losses, lr, eps, method):
    grad = (losses[0] - losses[1]) / (2 * f32(eps))
    return [lr * ((grad > 0) - (grad < 0))], (losses[0] + losses[1]) / 2, grad


def in_order(values):
    total = 0.0
    for value in values:
        total += value
    return total


def fzoo(losses, lr, eps, method):
    first, others, n = losses[0], losses[1:], method.directions
    mean = in_order(others) / n
    spread = math.sqrt(in_order((x - mean) * (x - mean) for x in others) / (n - 1))
    found = [0.0] * n if spread == 0 else [(lr * (x - first)) / (n * spread) for x in others]
    return found, first, spread / f32(eps)


def nspsa(losses, lr, eps, method):
    n = method.directions
    slopes = [(plus - minus) / (2 * f32(eps)) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
    length = math.sqrt(in_order(slope * slope for slope in slopes) / n)
    return [(lr * slope) / n for slope in slopes], in_order(losses) / (2 * n), length


class Meazo:
    """Of one run: v, beta^t."""

    def __init__(self):
        self.v, self.power = 0.0, 1.0

    def __call__(self, losses, lr, eps, method):
        slopes = [(plus - minus) / (2 * f32(eps)) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        mean = in_order(slopes) / len(slopes)
        self.v, self.power = method.beta * self.v + (1 - method.beta) * (mean * mean), method.beta * self.power
        rate = lr / (math.sqrt(self.v / (1 - self.power)) + method.floor)
        return [rate * slope / len(slopes) for slope in slopes], in_order(losses) / len(losses), mean


class Slopes:
    """Of one run with momentum: the last slopes."""

    def __init__(self):
        self.last = []

    def __call__(self, losses, lr, eps, method):
        self.last = [(losses[0] - losses[1]) / (2 * f32(eps)), *self.last][: method.window]
        found, share = [], 1.0
        for slope in self.last:
            found.append(lr * (share * slope))
            share *= method.beta
        return found, (losses[0] + losses[1]) / 2, self.last[0]


class Cone:
    """Of one run: the momentum's coefficients, the last noise's first."""

    def __init__(self):
        self.m = []

    def along(self, method):
        length = math.sqrt(in_order(a * a for a in self.m))
        if length == 0:
            return [1.0] + [0.0] * len(self.m)
        return [f32(math.sin(method.theta)), *(f32(math.cos(method.theta)) * (a / length) for a in self.m)]

    def __call__(self, losses, lr, eps, method):
        slope, direction = (losses[0] - losses[1]) / (2 * f32(eps)), self.along(method)
        old = [0.0, *(method.beta * a for a in self.m)]
        self.m = [a + (1 - method.beta) * (slope * c) for a, c in zip(old, direction, strict=True)][: method.window - 1]
        return [lr * (slope * c) for c in direction], (losses[0] + losses[1]) / 2, slope


class LeastOfThree:
    def more(self, losses, lr, eps, method):
        length = lr * ((losses[0] - losses[1]) / (2 * f32(eps)))
        return [(0, 0.0), (0, -length), (0, length)]

    def __call__(self, losses, lr, eps, method):
        (_, _), (_, step), (_, opposite) = self.more(losses, lr, eps, method)
        least = min(range(3), key=lambda i: losses[2 + i])
        return [[0.0, -step, -opposite][least]], (losses[0] + losses[1]) / 2, 0.0


def fzoo_loo(losses, lr, eps, method):
    n, mean = method.directions, in_order(losses) / len(losses)
    spread = math.sqrt(in_order((x - mean) * (x - mean) for x in losses) / (n - 1))
    found = [0.0] * n if spread == 0 else [lr * (x - mean) / (n - 1) / spread for x in losses]
    return found, mean, spread / f32(eps)


def tenth_root(x):
    y = math.sqrt(math.sqrt(math.sqrt(x)))
    for _ in range(32):
        y = (9.0 * y + x / (y * y * (y * y) * (y * y * (y * y)) * y)) / 10.0
    assert abs(y / x**0.1 - 1) < 1e-14
    return y


def spsa15(losses, lr, eps, method):
    still, n, eps = losses[0], method.directions, f32(eps)
    pairs = list(zip(losses[1::2], losses[2::2], strict=True))
    slopes = [(plus - minus) / (2 * eps) for plus, minus in pairs]
    curved = [abs((plus - still) + (minus - still)) / eps / eps for plus, minus in pairs]
    held = [tenth_root(min(max(x, 1.0), 1e30)) for x in curved]
    found = [lr * (slope / hold) / n for slope, hold in zip(slopes, held, strict=True)]
    return found, still, math.sqrt(in_order(slope * slope for slope in slopes) / n)


def rank(losses, lr, eps, method):
    n, k = len(losses), method.top or len(losses)
    order = sorted(range(n), key=losses.__getitem__)
    edges = [(i, j) for i in order for j in order if losses[i] < losses[j] and sum(x < losses[i] for x in losses) < k]
    found = [float(sum(j == i for _, j in edges) - sum(j == i for j, _ in edges)) for i in range(n)]
    pairs = k * (k - 1) / 2 + k * (n - k)
    return [lr * x / pairs for x in found], in_order(losses) / n, max(losses) - min(losses)


def seed_pool(losses, lr, eps, method):
    grad = (losses[0] - losses[1]) / (2 * f32(eps))
    clipped = abs(losses[0] - losses[1]) > method.grad_clip
    return [0.0 if clipped else lr * grad], (losses[0] + losses[1]) / 2, grad


class Reused:
    """Of one run: the differences of the step before."""

    def __init__(self):
        self.old = []

    def __call__(self, losses, lr, eps, method):
        new = [x - losses[0] for x in losses[1:]]
        found, self.old = new + self.old, new
        n, mean = len(found), in_order(found) / len(found)
        spread = math.sqrt(in_order((x - mean) * (x - mean) for x in found) / (n - 1))
        return [lr * x / (n * spread) for x in found], losses[0], None


FORMULAS = {
    MeZO: mezo, QZO: qzo, SignSGD: sign, FZOO: fzoo, NSPSA: nspsa, FZOOLeaveOneOut: fzoo_loo, SPSA15: spsa15,
    RankSGD: rank, SeedPool: seed_pool,
}  # fmt: skip


def draw(rng, lanes):
    """Losses as they come: near each other, far apart, tied, of any size."""
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.uniform(0, 10) for _ in range(lanes)]
    if kind == 1:
        middle = rng.uniform(0, 10)
        return [middle + rng.gauss(0, 10 ** rng.uniform(-12, -1)) for _ in range(lanes)]
    if kind == 2:
        return [rng.choice([1.5, 1.5, 2.25]) for _ in range(lanes)]
    return [f32(rng.gauss(0, 1) * 10 ** rng.uniform(-6, 6)) for _ in range(lanes)]


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_bits_are_those_of_the_formulas(kind):
    rng = random.Random(kind.__name__)
    steps = 0
    for _ in range(DRAWS):
        lr, eps = 10 ** rng.uniform(-9, -1), 10 ** rng.uniform(-6, 0)
        more = {"directions": rng.choice([2, 3, 8, 33])} if hasattr(kind, "directions") else {}
        more |= {"top": rng.choice([0, 1, more["directions"]])} if kind is RankSGD else {}
        method = object.__new__(kind)  # without its checks, which take a hundred times as long
        for name, value in {**vars(CHECKED[kind]), "eps": eps, **more}.items():
            object.__setattr__(method, name, value)
        losses = draw(rng, len(method.perturbations(0, 0)))
        found, loss, grad = FORMULAS[kind](losses, lr, eps, method)
        if not all(abs(x) < COEFF_LIMIT for x in found):
            continue
        step = method.update(3, 5, losses, lr)
        assert [u.coeff for u in step.updates] == [f32(x) for x in found] and (step.loss, step.grad) == (loss, grad)
        steps += 1
    assert steps > 0.9 * DRAWS


CHECKED = {kind: kind() for kind in FORMULAS}


@pytest.mark.parametrize("losses", [
    [math.nan, 1.0], [1.0, math.inf], [-math.inf, math.inf], [1e308, 1e308], [1e300, -1e300], [1e40, -1e40],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [MeZO, SignSGD])
def test_what_is_not_finite_is_no_step(kind, losses):
    method = kind(lr=1e-2)
    if kind is SignSGD and losses in ([1e40, -1e40], [1e300, -1e300]):  # its steps are as long, however steep
        assert method.update(0, 3, losses, method.lr).updates[0].coeff == f32(1e-2)
        return
    with pytest.raises(DivergenceError, match=r"step 3: losses .* give an update of .*as after step 2"):
        method.update(0, 3, losses, method.lr)
    assert not method.outcome(torch.tensor(losses, dtype=torch.float64), method.lr).sound


def test_n_spsa_with_one_direction_is_mezo():
    one = NSPSA(lr=1e-3, directions=1)
    assert_same(run(method=MeZO(lr=1e-3)), run(method=one))
    assert one.perturbations(0, 7) == MeZO(lr=1e-3).perturbations(0, 7)


@pytest.mark.parametrize("values", [[0.0, 2.0, 1e-300], [5e-324, math.inf, 3.0]], ids=str)
def test_square_roots_are_rounded_once(values):
    rng = random.Random(1)
    values = values + [rng.uniform(0, 10) * 10 ** rng.uniform(-9, 9) for _ in range(DRAWS)]
    assert scalars.sqrt(torch.tensor(values, dtype=torch.float64)).tolist() == [math.sqrt(x) for x in values]
    assert float(scalars.sqrt(torch.tensor(values[-1], dtype=torch.float64))) == math.sqrt(values[-1])


# ---- whole runs against a plain loop ---------------------------------------------------------------------------------


def run(model=None, steps=STEPS, *, method, **settings):
    with Engine(model if model is not None else tiny_opt(), method=method, **settings) as engine:
        losses = engine.fit(batches()[:steps], steps=steps, batch_size=4).losses
        return losses, stored_weights(engine)


def plus(w, scale, z):
    return torch.from_numpy(fma(np.float32(scale), z.numpy(), w.numpy()))


def add(d, scale, z):
    return {name: plus(of, f32(scale), z[name]) for name, of in d.items()}


def plain(model, steps, method, scales, formula):
    """One lane, one parameter and one direction after another, in memory. scales: (direction, sign) of each lane."""
    ids = {name: spec.param_id for name, spec in make_plan(model, batches()[0]).params.items()}
    told, past = [], []
    keeps = KEEPS.get(type(method), lambda *_: lambda *_: lambda name: torch.tensor(True))(method, model, ids)
    formula = formula() if isinstance(formula, type) else formula
    for step in range(steps):
        w = {name: p.detach().clone() for name, p in model.named_parameters()}
        seeds = [step_seed(0, step, i) for i in range(1 + max(i for i, _ in scales))]
        if isinstance(method, SeedPool):
            seeds = [step_seed(0, step_seed(0, step, 1 << 21) % method.pool, 1 << 20)]
        keep = keeps(step, w)
        z = [{n: noise(method.noise, s, ids[n], p.numel()).view(p.shape) for n, p in w.items()} for s in seeds]
        d = z
        if hasattr(formula, "along"):  # lanes see a sum of noises, in float32, term after term
            d, zero = z + past, {name: torch.zeros_like(p) for name, p in w.items()}
            d = [functools.reduce(lambda d, term: add(d, *term), zip(formula.along(method), d, strict=False), zero)]
        losses, lanes = [], [(direction, sign_of * method.eps) for direction, sign_of in scales]
        while lanes:
            for direction, scale in lanes:
                for name, p in model.named_parameters():
                    moved = plus(w[name], f32(scale) * method.gain(name, p.shape).lane, d[direction][name])
                    p.data = torch.where(keep(name), moved, w[name])
                with torch.no_grad():
                    losses.append(float(model(**batches()[step]).loss))
            back = hasattr(formula, "more") and len(losses) == len(scales)
            lanes = formula.more(losses, method.lr, method.eps, method) if back else []
        found, loss, _ = formula(losses, method.lr, method.eps, method)
        past = z + past  # the first is this step's first
        for name, p in model.named_parameters():
            value = w[name] * torch.tensor(1 - method.lr * method.weight_decay) if p.ndim > 1 else w[name]
            for direction, coefficient in enumerate(found):
                value = plus(value, -f32(coefficient) * method.gain(name, p.shape).update, past[direction][name])
            p.data = torch.where(keep(name), value, w[name])
        told.append(loss)
    return told, {name: p.detach() for name, p in model.named_parameters()}


def small_weights(method, model, ids):
    """Those that are among the smallest of the base are; read anew at each step."""
    base = {name: p.detach().abs().flatten() for name, p in model.named_parameters()}
    limits = {name: w.kthvalue(math.ceil((1 - method.sparsity) * len(w))).values for name, w in base.items()}
    return lambda step, w: lambda name: (w[name].abs() <= limits[name]) | (limits[name] == 0)


def chosen_weights(method, model, ids):
    seed, limit = step_seed(0, method.mask_seed, 1 << 22), round((1 - method.sparsity) * 65536)

    def kept(name, p):
        drawn = half_words(10, seed, ids[name], 5, p.numel(), 0)
        return torch.from_numpy(drawn < limit).view(p.shape)

    masks = {name: kept(name, p) for name, p in model.named_parameters()}
    return lambda step, w: lambda name: masks[name]


@dataclass(frozen=True, kw_only=True)
class Half(NSPSA):
    """Of each parameter, the smaller half trains, along several directions a step under one mask."""

    sparsity: ClassVar[float] = 0.5

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Smallest:
        return Smallest(0.5)


def layers_by_chance(method, model, ids):
    """The paper's loop, layers by their numbers: of those that are left, one after another."""
    layers = sorted({name[: re.search(r"[.][0-9]+[.]", name).end() - 1] for name in ids if ".layers." in name})

    def at(step, w):
        left, chosen = list(layers), []
        for draw in range(max(1, round((1 - method.sparsity) * len(layers)))):
            chosen.append(left.pop(step_seed(0, step, (1 << 23) + draw) % len(left)))
        return lambda name: torch.tensor(".layers." not in name or any(name.startswith(c + ".") for c in chosen))

    return at


KEEPS = {LeZO: layers_by_chance, Half: small_weights, SparseMeZO: small_weights, RandomMask: chosen_weights}
"""Which elements a method changes: (method, model, ids) -> (step, weights) -> name -> a boolean a weight."""


def leave_one_out(losses, lr, eps, method):
    n = method.directions
    away = [loss - in_order(losses) / n for loss in losses]
    found = [(lr * x) / (f32(eps) * (n - 1)) for x in away]
    return found, in_order(losses) / n, max(abs(x / (f32(eps) * (n - 1))) for x in away)


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_method.py"
LeaveOneOut = find_class(f"{EXAMPLE}:LeaveOneOut")


@dataclass(frozen=True, kw_only=True)
class Layered(MeZO):
    """Matrices of attention are perturbed by twice as much, and updated by an eighth."""

    def gain(self, name: str, shape: torch.Size) -> Gain:
        return Gain(2.0, 0.125) if "self_attn" in name and len(shape) == 2 else Gain()


@dataclass(frozen=True, kw_only=True)
class Still(NSPSA):
    """Attention does not train, of the rest biases neither."""

    def gain(self, name: str, shape: torch.Size) -> Gain:
        return Gain(0.0, 0.0) if "self_attn" in name or name.endswith("bias") else Gain()


PROOFS = {
    "sign": (SignSGD(lr=1e-3, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], sign),
    "sign, rademacher": (SignSGD(lr=1e-3, distribution="rademacher", batch_size=4), [(0, 1), (0, -1)], sign),
    "nspsa": (
        NSPSA(lr=1e-2, weight_decay=0.1, directions=3, batch_size=4), [(i, s) for i in range(3) for s in (1, -1)], nspsa
    ),
    "the example": (
        LeaveOneOut(lr=1e-2, directions=3, weight_decay=0.1, batch_size=4), [(i, 1) for i in range(3)], leave_one_out
    ),
    "meazo": (MEAZO(lr=1e-4, beta=0.5, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], Meazo),
    "meazo, more": (
        MEAZO(lr=1e-4, beta=0.9, directions=2, batch_size=4), [(i, s) for i in range(2) for s in (1, -1)], Meazo
    ),
    "momentum": (Momentum(lr=1e-3, window=3, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], Slopes),
    "conmezo": (ConMeZO(lr=1e-3, window=3, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], Cone),
    "conmezo, narrow": (
        ConMeZO(lr=1e-3, beta=0.5, theta=0.3, distribution="rademacher", batch_size=4), [(0, 1), (0, -1)], Cone
    ),
    "conservative": (Conservative(lr=1e-2, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], LeastOfThree),
    "fzoo-loo": (
        FZOOLeaveOneOut(lr=1e-3, directions=3, weight_decay=0.1, batch_size=4), [(i, 1) for i in range(3)], fzoo_loo
    ),
    "fzoo-r": (FZOOReuse(lr=1e-3, directions=4, batch_size=4), [(0, 0), (0, 1), (1, 1)], Reused),
    "spsa-1.5": (
        SPSA15(lr=1e-3, eps=1e-3, directions=2, batch_size=4),
        [(0, 0), *((i, s) for i in range(2) for s in (1, -1))], spsa15,
    ),
    "rank": (RankSGD(lr=1e-2, directions=4, top=2, batch_size=4), [(i, 1) for i in range(4)], rank),
    "seed-pool": (SeedPool(lr=1e-2, pool=3, batch_size=4), [(0, 1), (0, -1)], seed_pool),
    "lezo": (LeZO(lr=1e-2, sparsity=0.6, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], mezo),
    "sparse-mezo": (SparseMeZO(lr=1e-2, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], mezo),
    "a mask of one's own": (
        Half(lr=1e-2, directions=2, batch_size=4), [(i, s) for i in range(2) for s in (1, -1)], nspsa
    ),
    "random-mask": (
        RandomMask(lr=1e-2, weight_decay=0.1, sparsity=0.4, mask_seed=3, batch_size=4), [(0, 1), (0, -1)], mezo
    ),
    "gain 0": (Still(lr=1e-2, directions=3, batch_size=4), [(i, s) for i in range(3) for s in (1, -1)], nspsa),
    "gains": (Layered(lr=1e-2, weight_decay=0.1, batch_size=4), [(0, 1), (0, -1)], mezo),
}  # fmt: skip
PLACES = {
    "none": dict(offload="none"),
    "host": dict(offload="host", num_slots=2, fold_every=3),
    "disk": dict(offload="disk", fold_every=2),
    "block order": dict(offload="host", order="block"),
    "lane order": dict(offload="host", order="lane", num_slots=2),
}
DEVICES = {"late": lambda: DelayedCpuDevice(1), "cuda": lambda: FakeCudaDevice(FakeBackend())}


@pytest.mark.parametrize("proof", PROOFS)
def test_steps_are_the_plain_loops_wherever_blocks_live_and_losses_are(proof, tmp_path, use):
    method, scales, formula = PROOFS[proof]
    model = tiny_opt()
    want = plain(copy.deepcopy(model), STEPS, method, scales, formula)
    assert len(set(want[0])) == STEPS
    turn = list(PROOFS).index(proof)  # a method's formulas know no places: each meets some, and each place some methods
    for name in {"disk", list(PLACES)[turn % len(PLACES)]}:
        more = dict(run_dir=tmp_path / name) if name == "disk" else {}
        assert_same(want, run(copy.deepcopy(model), method=method, **PLACES[name], **more))
    use(list(DEVICES.values())[turn % len(DEVICES)]())
    assert_same(want, run(copy.deepcopy(model), method=method, offload="host", num_slots=2))


@pytest.mark.parametrize("proof", PROOFS)
@pytest.mark.skipif(bool(reason()), reason=reason() or "-")
def test_on_a_gpu_coefficients_are_made_without_waiting(proof, monkeypatch):
    method, gpu = PROOFS[proof][0], Gpu()
    if method.comes_back:
        pytest.skip(f"{method.name} comes back for what the losses say: the host has to wait for them")
    kernels = HostKernels(gpu)
    monkeypatch.setattr(opening, "make_device", lambda name: FakeGpu(gpu, longest_s=2e-4))
    monkeypatch.setattr(cuda_kernels, "kernels", lambda index: kernels)
    monkeypatch.setattr(tiles, "_is_plain", lambda x: True)
    place = (dict(offload="none"), dict(offload="host", num_slots=2))[list(PROOFS).index(proof) % 2]
    with gpu, Engine(tiny_opt(), method=method, device="cuda", **place) as engine:
        losses = engine.fit(batches(1), steps=1, batch_size=4).losses
        gpu.waits.clear()
        launched = [engine.active.launch(batch) for batch in batches(3)[1:]]
        assert [wait for wait in gpu.waits if "methods/" in wait or "late.py" in wait] == []
        losses += [engine.active.finish(step).loss for step in launched]
        assert len(losses) == 3 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("proof", PROOFS)
def test_a_run_resumes_replays_and_is_shown(proof, tmp_path, capsys):
    method = PROOFS[proof][0]
    whole = run(method=method, offload="disk", run_dir=tmp_path / "a")
    run(method=method, offload="disk", run_dir=tmp_path / "b", steps=2)
    given = {} if method.own() else {"method": type(method)}
    with Engine.resume(tmp_path / "b", tiny_opt(), **given) as engine:
        assert engine.method == method
        engine.fit(batches()[:STEPS], steps=STEPS, new_data=True)
        assert_same(whole[1], stored_weights(engine))
    with replayed(tiny_opt(), tmp_path / "a", **given) as engine:
        assert_same(whole[1], stored_weights(engine))
    for action in ("check", "csv", "show"):
        assert main(["journal", action, str(tmp_path / "a")]) == 0
    assert method.name in capsys.readouterr().out
    if method.own():
        was = type(method)(lr=0.5, noise_layout=1)  # of a run from before there were others
        assert method_from({"name": method.name, "lr": 0.5}) == was


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "opt"
    tiny_opt().save_pretrained(path)
    rows = [{"input_ids": row} for batch in batches(6) for row in batch["input_ids"].tolist()]
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].own()])
def test_every_method_is_planned_by_its_name(name, checkpoint, capsys):
    kind = METHODS[name]
    storage = ["--storage", "int4"] if kind.target != "values" else []
    few = ["--tail", "layers.3.final_layer_norm"] if kind.tail_alone else []
    few += ["--directions", "4" if name == "fzoo-r" else "3"] if hasattr(kind, "directions") else []
    assert main(["plan", str(checkpoint), "--method", name, "--tokens", "8", *storage, *few]) == 0
    lanes = {
        "fzoo": 4,
        "fzoo-r": 3,
        "nspsa": 6,
        "meazo": 6,
        "conservative": 3,
        "fzoo-loo": 3,
        "rank": 3,
        "spsa-1.5": 7,
        "tail-alone": 1,
    }.get(name, 2)
    assert f", {lanes} lanes in " in capsys.readouterr().out


def test_the_page_shows_the_example():
    """docs/extending.md has the class as it is in examples/own_method.py."""
    text = EXAMPLE.read_text()
    assert text[text.index("@dataclass") :] in (EXAMPLE.parent.parent / "docs" / "extending.md").read_text()


@dataclass(frozen=True, kw_only=True)
class Astray(MeZO):
    """Its lanes are along sums of two noises, and it gives as many coefficients as it is told to."""

    given: int = 2

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        terms = Terms((step_seed(run_seed, step), step_seed(run_seed, step, 1)))
        return Perturbation.along(terms, self.eps32), Perturbation.along(terms, -self.eps32)

    def term_coefficients(self, memory: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 1e300, 0.5], dtype=torch.float64)[: self.given]  # what float32 does not hold is 0

    def coefficients(self, losses: torch.Tensor, lr: float) -> torch.Tensor:
        return torch.cat([lr * self.projected(losses), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("wrong", [lambda: Terms(()), lambda: Terms((1,), (0.5, 0.5)), lambda: Terms((1,), (0.1,)),
                                   lambda: Terms((-1,), (1.0,))])  # fmt: skip
def test_sums_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="term|sum of"):
        wrong()


def test_a_method_gives_the_coefficients_that_its_lanes_need():
    for given in (1, 3):
        with pytest.raises(ConfigError, match=r"'Astray'.*step 0.*sums of 2 noises.*shape \(. ,\)".replace(" ,", ",")):
            run(steps=1, method=Astray(lr=1e-3, given=given, batch_size=4))
    assert_same(run(steps=2, method=Astray(lr=1e-3, batch_size=4)), run(steps=2, method=MeZO(lr=1e-3, batch_size=4)))
    assert Astray(lr=1e-3).noises == Astray(lr=1e-3).lane_noises == 2


@pytest.mark.parametrize("gain", [Gain(0.0, 1.0), Gain(1.0, 0.0)], ids=str)
def test_a_gain_of_nothing_is_refused(gain):
    @dataclass(frozen=True, kw_only=True)
    class Without(MeZO):
        def gain(self, name: str, shape: torch.Size) -> Gain:
            return gain

    with pytest.raises(ConfigError, match=r"method 'Without' gives .* a gain of .* both must be positive"):
        Engine(tiny_opt(), method=Without())


def test_a_gain_of_0_is_a_parameter_that_does_not_train(tmp_path):
    def still(name: str) -> bool:
        return "self_attn" in name or name.endswith("bias")

    names = [n for n, _ in tiny_opt().named_parameters() if not still(n)]
    with Engine(tiny_opt(), method=Still(), run_dir=tmp_path / "run", offload="disk") as engine:
        losses = engine.fit(batches()[:2], steps=2, batch_size=4).losses
        assert {n for n, spec in engine.plan.params.items() if spec.trainable} == set(names) and not engine.gains
        layout = engine.layout
    with Engine(tiny_opt(), method=NSPSA(**vars(Still())), trainable=names) as engine:
        assert engine.fit(batches()[:2], steps=2, batch_size=4).losses == losses
        assert engine.layout.spans == layout.spans, "nothing of it is flushed"
    with Engine.resume(tmp_path / "run", tiny_opt(), method=Still()) as engine:
        assert len(engine.fit(batches()[:2], steps=3, batch_size=4).losses) == 1

    class Nothing(MeZO):
        def gain(self, name: str, shape: torch.Size) -> Gain:
            return Gain(0.0, 0.0)

    with pytest.raises(ConfigError, match="gives every trainable parameter a gain of 0"):
        Engine(tiny_opt(), method=Nothing())


# ---- one class a method ----------------------------------------------------------------------------------------------


def test_nothing_outside_the_methods_names_one():
    """But for text that gives an example, and the doctor's step."""
    classes = {kind.__name__ for kind in METHODS.values() if kind.own()}
    package = Path(zo_offload.__file__).parent
    for file in package.rglob("*.py"):
        if file.parent.name == "methods" or file.name == "doctor.py":
            continue
        named = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not named & classes, file.name
        if file.name in (
            "arguments.py",
            "command.py",
            "train_commands.py",
            "method_options.py",
            "plan_details.py",
            "auto.py",
        ):
            text = file.read_text()
            assert not [name for name in (*classes, "'mezo'", '"mezo"', "fzoo", "qzo") if name in text], file.name


def test_a_class_goes_by_its_own_name_and_takes_no_other():
    @dataclass(frozen=True, kw_only=True)
    class Halved(MeZO):
        pass

    assert Halved.name == "Halved" and METHODS["Halved"] is Halved and not Halved.own() and MeZO.own()
    assert not hasattr(zo_offload, "Halved") and zo_offload.SignSGD is SignSGD
    assert {"MeZO", "NSPSA", "Method", "PRESETS", "Engine"} <= set(zo_offload.__all__)
    with pytest.raises(ConfigError, match="a method named 'mezo' exists already"):

        class Other(Method, name="mezo"):
            pass

    assert METHODS["mezo"] is MeZO
    with pytest.raises(TypeError, match="Late.update: the way from losses to updates is written once"):

        class Late(MeZO):
            def update(self, *args):
                raise AssertionError


def test_a_field_that_a_run_could_not_record_is_refused():
    class Forgotten(MeZO):
        beta: float = 0.5

    with pytest.raises(ConfigError, match=r"Forgotten: beta is not a field. Decorate the class with @dataclass"):
        Forgotten()

    @dataclass(frozen=True, kw_only=True)
    class Called(MeZO):
        some: ClassVar[int] = 3
        weigh: object = field(default=print)

    with pytest.raises(ConfigError, match="its fields must be numbers, strings or lists"):
        Called()


OWN_FILE = '''
from dataclasses import dataclass
from zo_offload.kernels.records import Perturbation
from zo_offload.methods import Method
from zo_offload.kernels.scalars import divide
from zo_offload.numerics.noise import step_seed


@dataclass(frozen=True, kw_only=True)
class Damped(Method):
    """MeZO whose slopes are drawn in beyond `knee`."""

    lr: float = 1e-3
    knee: float = 5.0
    """Where damping sets in."""
    weights: tuple[float, ...] = (1.0, 0.5)

    def perturbations(self, run_seed, step):
        seed = step_seed(run_seed, step, 1)
        return Perturbation(seed, self.eps32), Perturbation(seed, -self.eps32)

    def slope(self, losses):
        grad = divide(losses[:1] - losses[1:], 2 * self.eps32)
        return grad * self.weights[0] / (1 + grad.abs() / self.knee)

    def coefficients(self, losses, lr):
        return lr * self.slope(losses)

    def summary(self, losses):
        return losses[0], self.slope(losses)[0]
'''


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "damped_method.py"
    path.write_text(OWN_FILE)
    return path


def call(*args):
    return main([str(arg) for arg in args])


def losses_in(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_class_of_one_s_own_file_is_a_method_on_the_command_line(own_file, checkpoint, tmp_path, capsys):
    own, data = ("--method", f"{own_file}:Damped"), checkpoint.parent / "rows.jsonl"
    fit = ("fit", checkpoint, "--data", data, "--batch-size", 4, "--quiet", *own, "--knee", 2.5)
    assert call(*fit, "--steps", 4, "--run-dir", tmp_path / "whole", "--out", tmp_path / "tuned") == 0
    assert call(*fit, "--steps", 2, "--run-dir", tmp_path / "run") == 0
    record = json.loads((tmp_path / "run/config.json").read_text())["method"]
    assert (record["name"], record["class"], record["knee"]) == ("Damped", "damped_method:Damped", 2.5)
    again = ("fit", tmp_path / "run", "--resume", "--steps", 4, "--quiet")
    capsys.readouterr()
    assert call(*again) == 2
    assert "a method of your own, 'damped_method:Damped'" in (err := capsys.readouterr().err)
    assert "--method file.py:Damped" in err
    assert call(*again, *own, "--knee", 3) == 2 and "leave out --knee" in capsys.readouterr().err
    assert call(*again, "--method", "fzoo") == 2 and "leave out --method fzoo" in capsys.readouterr().err
    assert call(*again, *own) == 0
    assert losses_in(tmp_path / "run") == losses_in(tmp_path / "whole") and len(losses_in(tmp_path / "run")) == 4
    assert call("replay", checkpoint, tmp_path / "run", "--out", tmp_path / "replayed", *own) == 0
    assert call("export", tmp_path / "run", "--out", tmp_path / "exported", *own) == 0
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("tuned", "replayed", "exported")]
    assert written[0] == written[1] == written[2]
    assert call("eval", tmp_path / "run", "--data", data, *own) == 0
    capsys.readouterr()
    assert call("replay", checkpoint, tmp_path / "run", "--out", tmp_path / "no") == 2
    assert "a method of your own" in capsys.readouterr().err
    assert call("plan", checkpoint, "--tokens", 8, *own, "--knee", 1) == 0
    assert ", 2 lanes in " in capsys.readouterr().out
    for journal in ("check", "show", "csv"):
        assert call("journal", journal, tmp_path / "run") == 0


@pytest.mark.parametrize("text, message", [
    ("{}:Nobody", "has no class 'Nobody' that is a Method"), ("{}", "is not known: there are"),
    ("{}/no.py:Damped", "does not exist"), ("json:loads", "has no class 'loads'"),
    ("nowhere.to_be:Found", "cannot be loaded: ModuleNotFoundError"), ("hizoo", "streamed bytes would double"),
    ("ZO_SignSGD", "zo-signsgd is method 'sign' here"), ("Deep-Zero", "Deep-Zero is not here: a forward"),
], ids=str)  # fmt: skip
def test_a_class_that_is_none_is_told_in_a_line(own_file, checkpoint, text, message, capsys):
    assert call("plan", checkpoint, "--method", text.format(own_file)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_own_options_are_described_and_may_not_hide_another(own_file, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("plan", "--method", f"{own_file}:Damped", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--knee KNEE Where damping sets in (Damped 5.0)" in text
    assert "--clip CLIP Largest projected gradient (qzo 37.0, qzo-shift 100.0)" in text and "--batch-size" in text
    hides = tmp_path / "hides.py"
    hides.write_text(OWN_FILE.replace("knee", "tokens"))
    assert call("plan", checkpoint, "--method", f"{hides}:Damped") == 2
    assert "its field 'tokens' has the name of another option" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class OneSided(Method, name="one-sided"):
    """Two directions from the weights themselves, and fields of every kind that a record holds."""

    lr: float = 1e-3
    shares: tuple[float, ...] = (0.75, 0.25)
    eager: bool = True

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        return STILL, *(Perturbation(step_seed(run_seed, step, i), self.eps32) for i in range(len(self.shares)))

    def coefficients(self, losses: torch.Tensor, lr: float) -> torch.Tensor:
        slopes = (losses[1:] - losses[0]) * (1 / self.eps32)
        return lr * slopes * torch.tensor(self.shares, dtype=torch.float64, device=losses.device)

    def summary(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return losses[0], losses[1] - losses[0]


@pytest.mark.parametrize("device", [None, *DEVICES])
def test_an_own_class_resumes_with_itself_or_its_fields_and_no_other(tmp_path, use, device):
    method = OneSided(batch_size=4, shares=(0.5, 0.5))
    whole = run(method=method, offload="disk", run_dir=tmp_path / "a")
    run(method=method, offload="disk", run_dir=tmp_path / "b", steps=2)
    if device is not None:
        use(DEVICES[device]())
    with pytest.raises(JournalError, match=r"a method of your own, '.*:OneSided': pass it again"):
        Engine.resume(tmp_path / "b", tiny_opt())
    for other, message in (
        (OneSided(batch_size=4), r"method\.shares: the journal has \[0.5, 0.5\], this engine \[0.75, 0.25\]"),
        (MeZO(lr=1e-3), r"method\.class: the journal has '.*OneSided', this engine None"),
    ):
        with (
            Engine.resume(tmp_path / "b", tiny_opt(), method=other) as engine,
            pytest.raises(JournalError, match=message),
        ):
            engine.step(batches()[0])
    for way, given in (("b", method), ("a", OneSided)):
        with Engine.resume(tmp_path / way, tiny_opt(), method=given) as engine:
            engine.fit(batches()[:STEPS], steps=STEPS, new_data=True)
            assert_same(whole[1], stored_weights(engine))
            assert [len(record.updates) for record in engine.journal.steps] == [2] * STEPS
    for given in (method, OneSided):
        with replayed(tiny_opt(), tmp_path / "b", method=given) as engine:
            assert_same(whole[1], stored_weights(engine))


def test_records_of_an_own_class_from_before_classes_had_names():
    """It went by "mezo" then, with its class beside."""
    now = {"method": run_directory.method_of(OneSided())}
    check_identity({**now, "mode": "eval"}, {"model": "x", "method": {**now["method"], "name": "mezo"}})
    with pytest.raises(JournalError, match=r"method\.name: the journal has 'others', this engine 'one-sided'"):
        check_identity({**now, "mode": "eval"}, {"model": "x", "method": {**now["method"], "name": "others"}})


def test_a_plan_has_the_lanes_of_an_own_class(checkpoint):
    lines = plan_report(str(checkpoint), method=OneSided(shares=(0.2, 0.3, 0.5)), tokens=8)
    assert any(", 4 lanes in " in line for line in lines)
    assert Counter(OneSided().seeds(0, 3)) == Counter(step_seed(0, 3, i) for i in range(2))
