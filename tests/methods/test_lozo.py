"""LOZO: its directions have low rank and are a function of seed and element, and its steps are a plain loop's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.compare import assert_same
from support.fake_cuda import FakeBackend, FakeCudaDevice
from support.native_variants import VARIANTS, using
from support.training import batches, placed, stored_weights, train
from support.zoo.small import tiny_llama, tiny_opt
from zo_offload import LOZO, ConfigError, Engine
from zo_offload.cli import main
from zo_offload.kernels.distributions import DISTRIBUTIONS
from zo_offload.kernels.float32 import fma
from zo_offload.kernels.philox import words
from zo_offload.methods.missing import answer
from zo_offload.numerics.noise import NoiseSpec, noise, step_seed
from zo_offload.plan.plan import make_plan
from zo_offload.replay import replayed

STEPS = 5


def gaussians(seed, param_id, tag, rows, columns):
    """The first numbers of a stream of Gaussians of layout 2."""
    found = DISTRIBUTIONS["gaussian"].values(words(seed, param_id, tag, 10, 0, -(-rows * columns // 8)))
    return torch.from_numpy(found[: rows * columns].reshape(rows, columns))


def direction(run_seed, step, method, param_id, shape):
    """z of a parameter, as the paper writes it: U V^T of a matrix, in float32, one column of the factors after
    another."""
    kept, fresh = step_seed(run_seed, step // method.interval, 1 << 24), step_seed(run_seed, step)
    upper = (kept & 0xFFFFFFFF) << 32
    seed, r = upper | fresh & 0xFFFFFFFF, method.rank
    m, n = (shape[:-1].numel(), shape[-1]) if len(shape) > 1 else (1, shape.numel())
    if min(m, n) <= r:
        return gaussians(seed, param_id, 4, 1, m * n).view(shape)
    u, v = gaussians(seed, param_id, 4, m, r), gaussians(upper, param_id, 6, r, n)
    z = torch.outer(u[:, 0], v[0])
    for k in range(1, r):
        z = torch.from_numpy(fma(u[:, k : k + 1].numpy(), v[k].numpy(), z.numpy()))
    return z.view(shape)


def plus(w, scale, z):
    return torch.from_numpy(fma(np.float32(scale), z.numpy(), w.numpy()))


def plain(model, steps, method):
    """The paper's loop, in memory: the lanes' weights, then w <- w - lr c z / r."""
    ids = {name: spec.param_id for name, spec in make_plan(model, batches()[0]).params.items()}
    told, eps = [], np.float32(method.eps)
    for step in range(steps):
        w = {name: p.detach().clone() for name, p in model.named_parameters()}
        z = {name: direction(0, step, method, ids[name], p.shape) for name, p in w.items()}
        pair = []
        for scale in (eps, -eps):
            for name, p in model.named_parameters():
                p.data = plus(w[name], scale, z[name])
            with torch.no_grad():
                pair.append(float(model(**batches()[step]).loss))
        coeff = np.float32(method.lr * ((pair[0] - pair[1]) / (2 * float(eps))))
        for name, p in model.named_parameters():
            matrix = p.ndim > 1 and min(p.shape[:-1].numel(), p.shape[-1]) > method.rank
            own = coeff * np.float32(1 / method.rank) if matrix else coeff
            decayed = w[name] * torch.tensor(1 - method.lr * method.weight_decay) if p.ndim > 1 else w[name]
            p.data = plus(decayed, -own, z[name])
        told.append((pair[0] + pair[1]) / 2)
    return told, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant, rank", [(VARIANTS[0], 3), (VARIANTS[-1], 1)])
def test_steps_are_the_plain_loops_wherever_blocks_live(variant, rank, tmp_path):
    """V changes after two steps; the third step has another V, and pending updates of both."""
    method = LOZO(lr=1e-2, eps=1e-2, rank=rank, interval=2, weight_decay=0.1, batch_size=4)
    want = plain(tiny_opt(), STEPS, method)
    assert len(set(want[0])) == STEPS
    ways = [dict(offload="none"), dict(offload="host", num_slots=2, fold_every=3, block_numel=700),
            dict(offload="disk", fold_every=4, run_dir=tmp_path / "run")]  # fmt: skip
    for settings in ways:
        with using(variant), Engine(tiny_opt(), method=method, **settings) as engine:
            losses = engine.fit(batches()[:STEPS], steps=STEPS, batch_size=4).losses
            assert_same(want, (losses, stored_weights(engine)), str(settings))


@pytest.mark.parametrize("storage", ["bf16", "bf16+16", "int8+8"])
def test_a_run_is_the_same_in_every_tier_after_a_resume_and_in_a_replay(storage, tmp_path):
    """Rows of embeddings, pieces, rounding; over a change of V."""
    fixed = dict(storage=storage, method=LOZO(lr=1e-3, eps=1e-2, interval=3, batch_size=4), fold_every=2)
    never = train(tiny_llama(2), 7, **fixed)
    way = dict(offload="disk", order="lane")
    train(tiny_llama(2), 5, **fixed, **placed(way, tmp_path / "way"))
    run_dir = tmp_path / "way" / "run"
    with Engine.resume(run_dir, tiny_llama(2)) as engine:
        engine.fit(batches(), steps=7)
        assert_same(never[1], stored_weights(engine))
    with replayed(tiny_llama(2), run_dir) as engine:
        assert_same(never[1], stored_weights(engine))


def test_a_direction_has_its_rank_and_v_is_kept_for_an_interval():
    method, spec = LOZO(rank=2, interval=3), LOZO(rank=2, interval=3).noise.of((40, 30))
    seeds = [method.perturbations(7, step)[0].seed for step in range(6)]
    z = [noise(spec, seed, 5, 1200).view(40, 30).double() for seed in seeds]
    assert [int(torch.linalg.matrix_rank(x, rtol=1e-5)) for x in z] == [2] * 6
    assert int(torch.linalg.matrix_rank(torch.cat(z[:3]), rtol=1e-5)) == 2, "one V"
    assert int(torch.linalg.matrix_rank(torch.cat(z[2:4]), rtol=1e-5)) == 4, "another V"
    assert int(torch.linalg.matrix_rank(torch.cat(z[:2], dim=1), rtol=1e-5)) == 4, "another U"
    many = torch.stack([noise(spec, seed << 32 | seed, 5, 1200) for seed in range(2000)])
    assert abs(float(many.square().mean()) - 2) < 0.02 and float(many.abs().max()) <= spec.largest
    assert abs(float(many.mean())) < 0.01


def test_which_parameters_have_a_low_rank():
    """Stacked experts are one tall matrix; what is not larger than the rank on both sides has MeZO's noise."""
    spec = NoiseSpec(rank=2)
    assert (spec.of((8, 5)).columns, spec.of((4, 6, 5)).columns) == (5, 5)
    assert {spec.of(shape) for shape in ((7,), (), (2, 99), (99, 2), (1, 1, 768))} == {NoiseSpec()}
    assert LOZO(rank=4).gain("w", torch.Size((8, 5))).update == 0.25 and LOZO(rank=4).gain("b", (8,)).update == 1.0


def test_what_has_no_low_rank_is_refused_by_name():
    for wrong in (dict(rank=0), dict(rank=17), dict(interval=0), dict(rank=1.5), dict(distribution="rademacher"),
                  dict(noise_layout=1)):  # fmt: skip
        with pytest.raises(ConfigError, match="rank="):
            LOZO(**wrong)
    assert answer("lozo") is None and "lozo" in str(answer("LOZO-M"))


def test_a_gpu_is_refused_before_anything_is_read(use):
    use(FakeCudaDevice(FakeBackend()))
    with pytest.raises(ConfigError, match="'lozo' is not on a GPU yet"):
        Engine(tiny_opt(), method=LOZO(), device="cuda").fit(batches(), steps=1)


def test_a_plan_for_a_gpu_is_refused_too(capsys):
    assert main(["plan", "opt-125m", "--gpu", "rtx-4090", "--method", "lozo"]) == 2
    assert "'lozo' is not on a GPU yet" in capsys.readouterr().err
