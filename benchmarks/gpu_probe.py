"""What only a GPU can answer, asked in its first seconds: python -m benchmarks.gpu_probe [--dry].

Each check is an assumption that the design rests on and no machine without a GPU can settle. One JSON line each: what
was asked, a verdict, and in words what was found. A check that fails or breaks does not stop the others.

    ok       as assumed            told     nothing to be right or wrong about, but worth knowing
    NOT ok   not as assumed: what rests on it is named        broke    the check itself failed: its error

--dry runs the checks' code on the CPU, where all is trivially as assumed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import about, emit
from zo_offload.devices.cpu import CpuDevice
from zo_offload.devices.cuda import CudaDevice, CudaStream, cuda_device
from zo_offload.devices.link import measure_link
from zo_offload.devices.nvml import DriverMemory
from zo_offload.devices.staging import HostSlabs
from zo_offload.formats import FORMATS
from zo_offload.kernels.driver import driver
from zo_offload.kernels.records import Perturbation, Update
from zo_offload.numerics import cuda_kernels
from zo_offload.numerics.calls import Mark
from zo_offload.numerics.fused import fused_pass, ready_pass, ready_passes
from zo_offload.numerics.noise import NoiseSpec
from zo_offload.system.host_memory import available_bytes
from zo_offload.tiers import HostTier

Found = tuple[bool | None, str, dict[str, Any]]
"""(as assumed, or None where there is nothing to be wrong about; in words; numbers)"""


class AtOnce:
    """`Backend` on the CPU, everything done when it is asked for: for dry runs."""

    device = torch.device("cpu")

    def make_stream(self) -> Any:
        return object()

    def make_event(self) -> Any:
        return object()

    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def synchronize(self, event: Any) -> None: ...
    def drain(self, stream: Any) -> None: ...
    def lock(self, memory: Tensor) -> None: ...
    def unlock(self, address: int) -> None: ...
    def trim(self) -> None: ...

    def done(self, event: Any) -> bool:
        return True

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def is_device(self, tensor: Tensor) -> bool:
        return True

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    staging = empty

    def has_bf16(self) -> bool:
        return True

    def memory(self) -> tuple[int, int]:
        return 8 << 30, 8 << 30


class Probe:
    """The checks, and what they share. Names of methods that begin with `check_` are the checks, in order."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.memory = DriverMemory(0)
        self.before = self.memory.device_used()  # this process has no context yet
        self.size = 1 << 20 if dry else 256 << 20
        self._device: CudaDevice | None = None

    @property
    def device(self) -> CudaDevice:
        if self._device is None:
            self._device = CudaDevice(AtOnce()) if self.dry else cuda_device("cuda:0")
        return self._device

    @property
    def where(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def backend(self) -> Any:
        return self.device.backend

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        self.sync()
        start = time.perf_counter()
        work()
        self.sync()
        return max(1e-9, time.perf_counter() - start)

    def busy(self, milliseconds: float) -> None:
        """Keep the current stream busy for about so long."""
        if not self.dry:
            torch.cuda._sleep(int(milliseconds * 1.5e6))  # cycles

    # ---- who is here

    def check_machine(self) -> Found:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        numbers = self.memory.describe() | {
            "cpus": os.cpu_count(), "host_bytes": pages, "host_available_bytes": available_bytes(),
            "memlock": "unlimited" if limit == resource.RLIM_INFINITY else limit,
            "huge_pages": huge.read_text().strip() if huge.exists() else "unknown", "torch_cuda": torch.version.cuda,
            "greenlet": bool(_version("greenlet")),
        }  # fmt: skip
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            numbers |= {
                "driver": driver().version(), "gpu": properties.name, "gpu_bytes": properties.total_memory,
                "sms": properties.multi_processor_count, "capability": (properties.major, properties.minor),
            }  # fmt: skip
        mig = {None: "MIG unknown", True: "MIG on", False: "MIG off"}[numbers["mig"]]
        return None, f"{numbers.get('gpu', 'no GPU')}, driver {numbers.get('driver')}, {mig}", numbers

    def check_kernels(self) -> Found:
        """The image loads, tells its interface and reproduces the CPU's bits."""
        if self.dry:
            return None, "no GPU", {}
        return True, cuda_kernels.kernels(self.device.torch_device.index).source, {}

    def check_driver_count(self) -> Found:
        """What the driver says that this process uses, and by which of its counts."""
        context = self.device.context_bytes
        own, used = self.memory.process_used(), self.memory.device_used()
        if own is not None:
            says = f"NVML tells processes apart: this one has {own >> 20} MiB"
        elif used is not None:
            why = self.memory.reason or "it has other process ids"
            says = f"NVML does not tell processes apart ({why}): the whole device, less what it had before, is counted"
        else:
            says = f"NVML says nothing ({self.memory.reason}): peaks come from cudaMemGetInfo"
        numbers = {
            "context_bytes": context,
            "process_used": own,
            "device_used": used,
            "device_used_before": self.before,
        }
        return None, f"{says}; the context takes {context >> 20} MiB", numbers

    # ---- copies

    def _copy_rates(self, host: Tensor) -> dict[str, float]:
        """GB/s each way on a side stream, and the share of the copy's time that enqueueing it took."""
        stream, there, backend = self.backend.make_stream(), self.backend.empty(host.numel()), self.backend
        found: dict[str, float] = {}
        for way, (to, source) in {"fetch": (there, host), "flush": (host, there)}.items():
            for _ in range(2):  # the first warms up
                self.sync()
                start = time.perf_counter()
                with backend.on(stream):
                    backend.copy(to, source)
                enqueued = time.perf_counter() - start
                backend.drain(stream)
                total = max(1e-9, time.perf_counter() - start)
            found |= {
                f"{way}_gbs": round(host.numel() / total / 1e9, 2),
                f"{way}_enqueue_share": round(enqueued / total, 3),
            }
        return found

    def check_copies_of_registered_memory(self) -> Found:
        """Rests on it: every fetch and flush of offload="host"."""
        torchs = self._copy_rates(self.backend.staging(self.size).fill_(1))
        host = CpuDevice().alloc(self.size).fill_(1)
        pageable = self._copy_rates(host)
        self.backend.lock(host)
        try:
            ours = self._copy_rates(host)
        finally:
            self.backend.unlock(host.data_ptr())
        again = self._copy_rates(host)  # it is ordinary memory again
        alone = ours["fetch_enqueue_share"] < 0.25 and ours["flush_enqueue_share"] < 0.25
        fast = all(ours[k] > 0.9 * torchs[k] for k in ("fetch_gbs", "flush_gbs"))
        both_ways = [f"{rates['fetch_gbs']} / {rates['flush_gbs']}" for rates in (ours, torchs, pageable)]
        shares = f"{ours['fetch_enqueue_share']:.0%} / {ours['flush_enqueue_share']:.0%}"
        says = (
            f"registered {both_ways[0]} GB/s, enqueued in {shares} of the time; torch's pinned {both_ways[1]}; "
            f"pageable {both_ways[2]}"
        )
        return self.dry or (alone and fast), says, {"ours": ours, "torch": torchs, "pageable": pageable, "after": again}

    def check_locking(self) -> Found:
        """How fast memory is locked, and how long launches of the main thread stall meanwhile."""
        count = 4
        slabs = [CpuDevice().alloc(self.size).fill_(1) for _ in range(count)]
        times: list[float] = []

        def lock() -> None:
            for slab in slabs:
                start = time.perf_counter()
                self.backend.lock(slab)
                times.append(time.perf_counter() - start)

        x, stalls = torch.ones(1, device=self.where), [0.0]
        thread = threading.Thread(target=lock)
        thread.start()
        while thread.is_alive():
            start = time.perf_counter()
            x.add_(1)
            stalls.append(time.perf_counter() - start)
        thread.join()
        if len(times) < count:
            return False, "memory cannot be locked: a run goes through the ring of pinned chunks", {}
        numbers = {
            "lock_gbs": round(count * self.size / sum(times) / 1e9, 2),
            "longest_stall_ms": round(1e3 * max(stalls), 2),
        }
        start = time.perf_counter()
        for slab in slabs:
            self.backend.unlock(slab.data_ptr())
        numbers["unlock_gbs"] = round(count * self.size / (time.perf_counter() - start) / 1e9, 2)
        return (
            None,
            f"locked at {numbers['lock_gbs']} GB/s; launches stalled {numbers['longest_stall_ms']} ms at most",
            numbers,
        )

    def check_staged_copies(self) -> Found:
        """The way of a host that locks nothing."""
        tier = HostTier([self.size], CpuDevice().alloc)
        tier.slabs[0].fill_(3)
        slabs, out = HostSlabs(tier, self.backend, "staged", [0]), self.backend.empty(self.size)
        slabs.fetch(0, out)
        fetch = self.seconds(lambda: slabs.fetch(0, out))
        flush = self.seconds(lambda: slabs.flush(0, out, ((0, self.size),), 1))
        right = bool((out == 3).all()) and bool((tier.slabs[0] == 3).all())
        slabs.close()
        numbers = {"fetch_gbs": round(self.size / fetch / 1e9, 2), "flush_gbs": round(self.size / flush / 1e9, 2)}
        return right, f"{numbers['fetch_gbs']} / {numbers['flush_gbs']} GB/s through the ring", numbers

    def check_both_directions(self) -> Found:
        link = measure_link(self.where, nbytes=self.size // 4)
        both, alone = link.both_fetch_gbs + link.both_flush_gbs, link.fetch_gbs + link.flush_gbs
        says = f"fetch {link.fetch_gbs:.1f}, flush {link.flush_gbs:.1f} GB/s, both at once"
        says += f" {link.both_fetch_gbs:.1f} + {link.both_flush_gbs:.1f}: {both / alone:.0%} of full duplex"
        return None, says, link.as_row()

    # ---- order

    def check_copies_run_beside_compute(self) -> Found:
        """Rests on it: prefetch. Compute is on the default stream, which waits for streams made to block it."""
        stream, there, host = self.backend.make_stream(), self.backend.empty(self.size), self.backend.staging(self.size)
        side = 64 if self.dry else 8192
        x = torch.randn(side, side, device=self.where).to(torch.bfloat16)
        times = 1

        def compute() -> None:
            for _ in range(times):
                x @ x

        def copy() -> None:
            with self.backend.on(stream):
                self.backend.copy(there, host)

        compute(), copy()
        copying, once = self.seconds(copy), self.seconds(compute)
        times = max(1, min(50, round(copying / once)))
        computing = self.seconds(compute)
        both = self.seconds(lambda: (compute(), copy()))
        share = both / max(copying, computing)
        numbers = {"compute_s": computing, "copy_s": copying, "both_s": both}
        return self.dry or share < 1.3, f"both at once take {share:.2f} of the longer one", numbers

    def _late_copy(self, wait: bool) -> int:
        """Of 20 tries, how many copies to the host saw what the compute stream wrote late, just before."""
        stream, right = CudaStream("probe", 1, self.backend), 0
        there, host = self.backend.empty(1 << 20), self.backend.staging(1 << 20)
        for turn in range(1, 21):
            self.busy(2)
            there.fill_(turn)
            after = (self.device.mark(),) if wait else ()
            stream.submit(lambda: self.backend.copy(host, there), after)
            stream.drain()
            right += bool((host == turn).all())
        stream.close()
        return right

    def check_a_copy_waits_for_compute(self) -> Found:
        """Rests on it: flushes, and fetches into slots that were used."""
        right, unordered = self._late_copy(True), self._late_copy(False)
        return right == 20, f"{right} of 20 right with an event, {unordered} without", {}

    def check_compute_waits_for_a_copy(self) -> Found:
        """Rests on it: every visit."""
        stream, right = CudaStream("probe", 1, self.backend), 0
        there = self.backend.empty(self.size)
        hosts = [CpuDevice().alloc(self.size) for _ in range(2)]
        for host in hosts:
            self.backend.lock(host)
        for turn in range(1, 21):
            host = hosts[turn % 2].fill_(turn)
            event = stream.submit(lambda host=host: self.backend.copy(there, host))
            event.wait()
            right += int(there[-4096:].sum(dtype=torch.int64)) == 4096 * turn
        stream.close()
        for host in hosts:
            self.backend.unlock(host.data_ptr())
        return right == 20, f"{right} of 20 right", {}

    # ---- arithmetic

    def check_equal_products(self) -> Found:
        """Rests on it: equal losses wherever blocks live. Weights lie at multiples of 256 bytes in every tier."""
        rows, wide = (8, 64) if self.dry else (2048, 4096)
        found: dict[str, Any] = {}
        same = True
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
            x = torch.randn(rows, wide, device=self.where).to(dtype)
            w = torch.randn(4 * wide * wide + 4096, device=self.where).to(dtype)

            def weight(at: int, w: Tensor = w) -> Tensor:  # `at` bytes into memory that is aligned to 512
                start = at // w.element_size()
                moved = torch.empty_like(w)
                moved[start : start + 4 * wide * wide] = w[: 4 * wide * wide]
                return moved[start : start + 4 * wide * wide].view(4 * wide, wide)

            first = torch.nn.functional.linear(x, weight(0))
            equal = {
                at: bool(torch.equal(first, torch.nn.functional.linear(x, weight(at)))) for at in (0, 256, 1280, 64, 16)
            }
            half = torch.cat([torch.nn.functional.linear(x, part) for part in weight(0).split(2 * wide)], dim=1)
            found[name] = {"same_at_byte": equal, "in_two_tiles": bool(torch.equal(first, half))}
            same &= equal[0] and equal[256] and equal[1280]
        tiles = ", ".join(name for name in found if found[name]["in_two_tiles"]) or "none"
        small = ", ".join(name for name in found if found[name]["same_at_byte"][64]) or "none"
        return (
            same,
            f"same at multiples of 256 bytes: {same}; at 64 bytes: {small}; in two tiles of rows: {tiles}",
            found,
        )

    def check_cost_of_a_launch(self) -> Found:
        """Host time of an owner's weight and bias of 4096 elements, in one launch and in two, and of an empty torch
        kernel beside it."""
        from zo_offload.kernels.device_updates import UpdateTable

        fmt, n, times = FORMATS["bf16"], 4096, 20 if self.dry else 2000
        lanes = [Perturbation(1, 2.0**-10), Perturbation(1, -(2.0**-10))]
        table = UpdateTable(self.where)
        table.append([Update(3, 2.0**-12)])
        calls = []
        for i in range(2):
            stored = torch.zeros(fmt.nbytes(n), dtype=torch.uint8, device=self.where)
            outs = [torch.zeros(n, dtype=torch.bfloat16, device=self.where) for _ in range(2)]
            calls.append(
                ready_pass(
                    stored, fmt, param_id=i, numel=n, offset=0, rounding="nearest", noise=NoiseSpec(), outs=outs,
                    residual=None, target="values", mask=None, threads=None,
                )
            )  # fmt: skip
        ready = ready_passes(calls)
        assert ready is not None
        told = [(table.since(0, True), lanes, True, False)] * 2

        def together() -> None:
            for _ in range(times):
                ready.run(told, Mark())

        def alone() -> None:
            for _ in range(times):
                for call in calls:
                    fused_pass(call.stored, fmt, param_id=call.param_id, numel=n, updates=told[0][0],
                               noise=NoiseSpec(), perturbations=lanes, outs=call.outs)  # fmt: skip

        def plain() -> None:
            for _ in range(times):
                stored.add_(0)

        found = {}
        for name, work in (("together_us", together), ("alone_us", alone), ("torch_us", plain)):
            work()
            found[name] = self.seconds(work) / times * 1e6
        says = "{together_us:.1f} us in one launch, {alone_us:.1f} in two, {torch_us:.1f} a torch kernel"
        return None, says.format(**found), found

    def check_nothing_waits_in_a_step(self) -> Found:
        """Who asks the GPU for a value in a step: torch's sync debug mode, by file and line."""
        if self.dry or not _version("greenlet"):
            return None, "no GPU" if self.dry else "not asked: a step needs greenlet", {}
        from transformers import OPTConfig, OPTForCausalLM

        import zo_offload
        from zo_offload import Engine, MeZO

        config = OPTConfig(vocab_size=512, hidden_size=256, num_hidden_layers=4, ffn_dim=1024, num_attention_heads=4,
                           max_position_embeddings=512, word_embed_proj_dim=256)  # fmt: skip
        ids = torch.randint(5, 512, (1, 256))
        batch = {"input_ids": ids, "labels": ids}
        model = OPTForCausalLM(config).bfloat16().eval()
        with Engine(model, method=MeZO(lr=1e-6), device="cuda:0", offload="host", num_slots=2) as engine:
            for _ in range(3):
                engine.step(batch)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    engine.active.launch(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = collections.Counter(f"{w.filename}:{w.lineno}" for w in caught)
        package = str(Path(zo_offload.__file__).parent)
        ours = [place for place in places if place.startswith(package)]
        says = f"{sum(places.values())} waits, {len(ours)} of them ours"
        return not ours, says + "".join(f"; {'/'.join(place.split('/')[-3:])}" for place in places), dict(places)

    def check_allocator(self) -> Found:
        """How much more than asked the allocator takes for a slot."""
        if self.dry:
            return None, "no GPU", {}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        slot = self.backend.empty((128 << 20) + 4096)
        more = torch.cuda.memory_reserved() - before
        return None, f"{slot.numel() >> 20} MiB asked, {more >> 20} MiB taken", {"asked": slot.numel(), "taken": more}

    def run(self) -> Iterator[dict[str, Any]]:
        for name in [name for name in vars(type(self)) if name.startswith("check_")]:
            start = time.perf_counter()
            row: dict[str, Any] = {"part": "probe", "check": name.removeprefix("check_").replace("_", " ")}
            try:
                right, says, numbers = getattr(self, name)()
                row |= {"verdict": {None: "told", True: "ok", False: "NOT ok"}[right], "says": says, "numbers": numbers}
            except Exception as error:  # what breaks is what is asked for here; the other checks go on
                row |= {"verdict": "broke", "says": f"{type(error).__name__}: {str(error)[:500]}", "numbers": {}}
            yield row | {"seconds": round(time.perf_counter() - start, 2)}


def _version(name: str) -> str:
    import importlib.util

    return name if importlib.util.find_spec(name) else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, where all is as assumed")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU: nothing can be asked (--dry tries the checks on the CPU)")
    probe, bad = Probe(options.dry), 0
    common = about("gpu") | {
        "device": "cpu, dry run: not a measurement" if options.dry else torch.cuda.get_device_name(0),
        "measured": not options.dry,
    }
    for row in probe.run():
        bad += row["verdict"] in ("NOT ok", "broke")
        emit(row, common)
        print(f"{row['verdict']:<7} {row['check']}: {row['says']}", file=sys.stderr, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
