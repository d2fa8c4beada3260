"""Speed of the fused pass on this CPU, beside the memory it runs on and beside the same work in plain torch.

    python -m benchmarks.kernels [--quick] [--match TEXT] [--isa scalar|avx2|avx512|neon] [--threads 1 2 ...]

One JSON line a result. `gelem_per_s` is the median over repeats (p20, p80, n beside it) of wall time; `per_core` is
that over the threads used. `gb_per_s` counts what the pass must read and write once: weight, weight back, lanes (of a
split format that folds, its residual too);
`share_of_memcpy` sets it beside the best torch copy on the same number of threads, measured before and after each
case. `times_torch` is the ratio to torch doing the same: seeded normal_ (or randint signs), add, cast, one lane after
the other; its numbers differ from ours, the work does not.

A "visit" is what every step does between folds: decode, one pending update in registers, two lanes. `of_bf16` is its
speed beside the same pass over bf16, the two run in turns; a "step" writes the update back as well.
--layouts: Gaussian cases run in turns with layout 1 of the noise; `of_layout_1` is how many times faster they are, by
medians, and `of_layout_1_undisturbed` by each one's fastest tenth: on a machine that others use, the median is theirs.

Directions of low rank run in turns with noise of other kinds and with a copy by torch: `of_gaussian`, `of_signs` are
how many times less CPU time they take, `of_a_copy` their share of that of a copy of as many bytes (below 1: lanes that
are written in the cache are no traffic).

The size is chosen so that weights and lanes lie in memory, not in a cache (32 Mi elements; with --quick 8 Mi, which a
large cache holds). "owners" is a step over the layers of a model: 128 Mi weights in calls of 768 x 768, each of which
writes its lanes where the one before wrote them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.common import about, quantile
from zo_offload.formats import FORMATS, encode_values, get_format
from zo_offload.kernels import native
from zo_offload.kernels.records import Perturbation, Update, Updates
from zo_offload.numerics.calls import Mark
from zo_offload.numerics.fused import fused_pass, ready_pass, ready_passes
from zo_offload.numerics.noise import NoiseSpec


@dataclass(frozen=True)
class Case:
    name: str
    distribution: str
    store: str
    updates: int
    lanes: int
    out: torch.dtype = torch.float32
    rounds: int = 10
    rounding: str = "nearest"
    torch_too: bool = False
    quick: bool = False
    fold: bool = True
    layout: int = 2
    call: int = 0
    """Elements a call, one call after another over `MODEL` weights; 0: one call for everything."""
    rank: int = 0
    """Of the directions; 0: each element has noise of its own."""

    def bytes_per_element(self) -> float:
        fmt = get_format(self.store)
        size = fmt.nbytes(1 << 20) / (1 << 20)
        folded = 2 * fmt.residual_bytes + size if self.updates and self.fold else 0
        return size + folded + self.lanes * self.out.itemsize


BF16, FP32 = torch.bfloat16, torch.float32
SIDE = 768
OWNER = SIDE * SIDE
MODEL = 227 * OWNER  # about 128 Mi
CASES = [
    Case("owners", "gaussian", "fp32", 1, 2, FP32, quick=True, call=OWNER),
    Case("owners", "rademacher", "fp32", 1, 2, FP32, quick=True, call=OWNER),
    Case("owners", "gaussian", "bf16", 1, 2, BF16, call=OWNER),
    Case("owners", "gaussian", "fp32", 1, 2, FP32, quick=True, call=OWNER, rank=1),
    Case("owners", "gaussian", "fp32", 1, 2, FP32, quick=True, call=OWNER, rank=2),
    Case("owners", "gaussian", "bf16", 1, 2, BF16, call=OWNER, rank=2),
    Case("owners, 4 pending", "gaussian", "fp32", 4, 2, FP32, call=OWNER, rank=2),
    Case("step", "gaussian", "bf16", 1, 2, BF16, torch_too=True, quick=True),
    Case("step", "gaussian", "bf16", 1, 2, FP32, torch_too=True, quick=True),
    Case("step", "gaussian", "fp32", 1, 2, FP32, torch_too=True, quick=True),
    Case("step", "gaussian", "fp16", 1, 2, torch.float16, torch_too=True),
    Case("step, 7 rounds", "gaussian", "bf16", 1, 2, BF16, rounds=7),
    Case("step, stochastic", "gaussian", "bf16", 1, 2, BF16, rounding="stochastic"),
    Case("update", "gaussian", "bf16", 1, 0, torch_too=True, quick=True),
    Case("update", "gaussian", "fp32", 1, 0, torch_too=True),
    Case("replay of 8", "gaussian", "bf16", 8, 0),
    Case("lane", "gaussian", "bf16", 0, 1, BF16),
    Case("step", "rademacher", "bf16", 1, 2, BF16, torch_too=True, quick=True),
    Case("step", "rademacher", "bf16", 1, 2, FP32),
    Case("step", "rademacher", "fp32", 1, 2, FP32, torch_too=True),
    Case("step, stochastic", "rademacher", "bf16", 1, 2, BF16, rounding="stochastic"),
    Case("update", "rademacher", "bf16", 1, 0, torch_too=True, quick=True),
    Case("replay of 8", "rademacher", "bf16", 8, 0),
    Case("evaluation (decode)", "gaussian", "bf16", 0, 1, FP32),
]
OTHERS = [name for name, fmt in FORMATS.items() if fmt.group or fmt.residual_bytes]
CASES += [
    Case("visit", kind, name, 1, 2, BF16, fold=False, quick=name in ("fp8_e4m3", "int8") and kind == "gaussian")
    for kind in ("gaussian", "rademacher")
    for name in ("fp32", "fp16", *OTHERS)
]
CASES += [Case("step", "gaussian", name, 1, 2, BF16) for name in OTHERS if get_format(name).trains]
CASES += [
    Case("step, stochastic", "gaussian", name, 1, 2, BF16, rounding="stochastic")
    for name in ("fp8_e4m3", "int8", "bf16+8", "int8+8")
]


def repeat(work: Callable[[], None], seconds: float, least: int = 3) -> list[float]:
    """Seconds of each repeat, after one to warm up; every repeat is kept."""
    return in_turns([work], seconds, least)[0]


def in_turns(
    works: list[Callable[[], None]], seconds: float, least: int = 3, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """The same for several, one repeat of each after the other: what the machine does meanwhile hits all alike."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    end = time.perf_counter() + seconds * len(works)
    while len(times[0]) < least or time.perf_counter() < end:
        for work, found in zip(works, times, strict=True):
            start = clock()
            work()
            found.append(clock() - start)
    return times


class Bench:
    """Buffers shared by all cases, so that none of them pays for fresh pages."""

    def __init__(self, numel: int, seconds: float) -> None:
        self.numel, self.seconds = numel, seconds
        self.values = torch.randn(numel) * 0.02
        self.outs = [torch.zeros(numel), torch.zeros(numel)]
        self.source, self.target = torch.zeros(4 * numel, dtype=torch.uint8), torch.zeros(4 * numel, dtype=torch.uint8)

    def numel_of(self, case: Case) -> int:
        """Elements of a pass."""
        return MODEL if case.call else self.numel

    def lanes(self, case: Case) -> list[Tensor]:
        return [out.view(case.out)[: case.call or self.numel] for out in self.outs[: case.lanes]]

    def memcpy_gb_per_s(self, threads: int) -> float:
        """Read and written bytes of a plain copy, both counted."""
        torch.set_num_threads(threads)
        times = repeat(lambda: self._ignore(self.target.copy_(self.source)), self.seconds / 3)
        return 2 * self.source.numel() / min(times) / 1e9  # a floor: the best it can do

    @staticmethod
    def _ignore(_: object) -> None:
        return None

    def ours(self, case: Case, threads: int) -> Callable[[], None]:
        fmt = get_format(case.store)
        numel = self.numel_of(case)
        values = self.values if numel <= self.numel else self.values.repeat(-(-numel // self.numel))[:numel]
        stored, residual = encode_values(values, fmt, threads=threads)
        spec = NoiseSpec(case.distribution, case.rounds, case.layout, case.rank)  # type: ignore[arg-type]
        spec = spec.of((numel // SIDE, SIDE))
        updates = [Update(k, 2.0**-20, fold=case.fold) for k in range(case.updates)]
        scale = 0.0 if case.name.startswith("evaluation") else 2.0**-10
        lanes = [Perturbation(99, sign * scale) for sign in (1, -1)[: case.lanes]]
        if case.call:  # prepared once, as a run does
            size = fmt.nbytes(case.call)
            calls = [
                ready_passes([ready_pass(
                    stored[at * size : (at + 1) * size], fmt, param_id=1, numel=case.call, offset=at * case.call,
                    rounding="nearest", noise=spec, outs=self.lanes(case), residual=None, target="values", mask=None,
                    threads=threads,
                )])
                for at in range(numel // case.call)
            ]  # fmt: skip
            told = [(Updates(updates), lanes, True, False)]

            def owners(_kept: Tensor = stored) -> None:  # prepared calls have its address alone
                for ready in calls:
                    assert ready is not None
                    ready.run(told, Mark())

            return owners
        return lambda: fused_pass(
            stored, fmt, param_id=1, numel=numel, updates=updates, rounding=case.rounding,  # type: ignore[arg-type]
            noise=spec, perturbations=lanes, outs=self.lanes(case), residual=residual if case.fold else None,
            threads=threads,
        )  # fmt: skip

    def plain_torch(self, case: Case, threads: int) -> list[float]:
        """MeZO as usually written: seed, draw, add, in the weight's dtype; noise drawn once for both lanes."""
        torch.set_num_threads(threads)
        dtype = get_format(case.store).torch_dtype
        weight, z = self.values.to(dtype), torch.empty(self.numel, dtype=dtype)

        def draw(seed: int) -> None:
            torch.manual_seed(seed)
            if case.distribution == "gaussian":
                z.normal_()
            else:
                z.copy_(torch.randint(0, 2, z.shape, dtype=torch.int8)).mul_(2).sub_(1)

        def work() -> None:
            for k in range(case.updates):
                draw(k)
                weight.add_(z, alpha=-(2.0**-20))
            if case.lanes:
                draw(99)
                for sign, out in zip((1, -1), self.lanes(case), strict=False):
                    out.copy_(torch.add(weight, z, alpha=sign * 2.0**-10))

        return repeat(work, 0.0, least=2)


def results(
    bench: Bench, cases: list[Case], thread_counts: list[int], with_torch: bool, layouts: bool
) -> Iterator[dict[str, object]]:
    common = about("kernels") | {"load_average": os.getloadavg()[0]}  # a busy machine measures its neighbours
    for threads in thread_counts:
        for case in cases:
            copy_before = bench.memcpy_gb_per_s(threads)
            works = [bench.ours(case, threads)]
            if not case.fold:
                works.append(bench.ours(replace(case, store="bf16"), threads))
            former = layouts and case.distribution == "gaussian" and not case.rank
            if former:
                works.append(bench.ours(replace(case, layout=1), threads))
            times, *beside = in_turns(works, bench.seconds)
            copy = max(copy_before, bench.memcpy_gb_per_s(threads))
            numel = bench.numel_of(case)
            speed = [numel / quantile(times, q) / 1e9 for q in (0.5, 0.8, 0.2)]
            moved = speed[0] * case.bytes_per_element()
            result: dict[str, object] = {
                "case": case.name, "distribution": case.distribution, "rounds": case.rounds, "store": case.store,
                "updates": case.updates, "lanes": case.lanes,
                "out": str(case.out).removeprefix("torch.") if case.lanes else None,
                "rounding": case.rounding, "threads": threads, "numel": numel, "n": len(times),
                "gelem_per_s": round(speed[0], 4), "p20": round(speed[1], 4), "p80": round(speed[2], 4),
                "per_core": round(speed[0] / threads, 4), "gb_per_s": round(moved, 2),
                "memcpy_gb_per_s": round(copy, 2), "share_of_memcpy": round(moved / copy, 3),
            }  # fmt: skip
            if case.rank:
                result |= {"rank": case.rank} | of_others(bench, case, threads)
            if former:
                was = beside.pop()
                result["of_layout_1"] = round(quantile(was, 0.5) / quantile(times, 0.5), 3)
                result["of_layout_1_undisturbed"] = round(quantile(was, 0.1) / quantile(times, 0.1), 3)
            if beside:
                result["of_bf16"] = round(quantile(beside[0], 0.5) / quantile(times, 0.5), 3)
            if case.torch_too and with_torch:
                plain = bench.numel / quantile(bench.plain_torch(case, threads), 0.5) / 1e9
                result |= {"torch_gelem_per_s": round(plain, 4), "times_torch": round(speed[0] / plain, 1)}
            yield common | result
    yield common | call_overhead()


def of_others(bench: Bench, case: Case, threads: int) -> dict[str, float]:
    """How many times less CPU time the pass takes than with noise of its own for each element, and how much it takes
    of what a copy of as many bytes by torch takes; medians, in turns."""
    moved = round(case.bytes_per_element() * bench.numel_of(case)) // 2
    few = [min(moved, bench.source.numel())] * (moved // bench.source.numel()) + [moved % bench.source.numel()]

    def copy() -> None:
        for size in few:
            bench.target[:size].copy_(bench.source[:size])

    others = [replace(case, rank=0), replace(case, rank=0, distribution="rademacher")]
    works = [bench.ours(one, threads) for one in (case, *others)] + [copy]
    times, gaussian, signs, copied = in_turns(works, bench.seconds, least=5, clock=time.process_time)
    found = {"of_gaussian": (gaussian, times), "of_signs": (signs, times), "of_a_copy": (times, copied)}
    return {name: round(quantile(a, 0.5) / quantile(b, 0.5), 3) for name, (a, b) in found.items()}


def call_overhead() -> dict[str, object]:
    """A call for a parameter too small to matter: what a model with many of them pays, Python included."""
    n, fmt = 768, get_format("bf16")
    stored, outs = torch.zeros(2 * n, dtype=torch.uint8), [torch.zeros(n), torch.zeros(n)]
    updates, lanes = [Update(1, 0.5)], [Perturbation(2, 0.5), Perturbation(2, -0.5)]

    def work() -> None:
        for _ in range(100):
            fused_pass(stored, fmt, param_id=1, numel=n, updates=updates, noise=NoiseSpec(), perturbations=lanes,
                       outs=outs)  # fmt: skip

    times = [t / 100 * 1e6 for t in repeat(work, 0.3)]
    p50, p20, p80 = (round(quantile(times, q), 2) for q in (0.5, 0.2, 0.8))
    return {"case": "small call", "numel": n, "us_per_call": p50, "p20": p20, "p80": p80, "n": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="main cases only, about ten seconds")
    parser.add_argument("--match", default="", help="only cases whose 'name distribution store' contains this")
    parser.add_argument("--isa", choices=native.ISAS, help="instead of the best this CPU has")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1, and 2 where there are two")
    parser.add_argument("--layouts", action="store_true", help="beside layout 1 of the noise, in turns")
    parser.add_argument("--no-torch", action="store_true", help="leave out plain torch")
    options = parser.parse_args()
    if options.isa:
        chosen = native.Library(native.LIBRARY, options.isa)
        native.library = lambda: chosen
    threads = options.threads or sorted({1, min(2, torch.get_num_threads())})
    numel, seconds = (1 << 23, 0.15) if options.quick else (1 << 25, 0.6)
    if native.library() is None:
        numel, seconds = 1 << 20, 0.0
    cases = [case for case in CASES if case.quick or not options.quick]
    cases = [case for case in cases if options.match in f"{case.name} {case.distribution} {case.store}"]
    for result in results(Bench(numel, seconds), cases, threads, not options.no_torch, options.layouts):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
