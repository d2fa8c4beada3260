"""Answers questions before a run: where the weights live, how long it takes, how much it wears the disk, and whether
another tool is better. Uses public rates of named hardware, or given numbers; `plan_details.py` has the details."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.weights import kept_of
from ..config import DTYPES
from ..errors import BudgetError
from ..formats import FORMATS
from ..methods import Method
from ..run.auto import STREAMED, Rates
from ..system.units import parse_bytes, show_bytes
from ..tiers.disk import shapes_of
from . import named_models as models
from .costs import HOST_LANE, HOST_VISIT, LONG, SHORT, Step, Work, step_seconds, work_of
from .hardware import (
    CONTEXT_BYTES,
    AbsentGpu,
    Drive,
    Gpu,
    Link,
    backprop_gb,
    drive_names,
    find_drive,
    find_gpu,
    gpu_names,
)
from .plan_details import Planned, plan_step

HOST_SHARE, HOST_KEPT = 0.92, 6e9  # host memory: share that blocks may take; bytes for the system and the process
LOCKED_GB_PER_S = 1.5  # page-locking; others measured 1 to 2
READ_GB_PER_S = 1.0  # reading a checkpoint at ingest, if no drive is named


@dataclass(frozen=True)
class Machine:
    """The named hardware. host_bytes, drive: None if not given."""

    gpu: Gpu
    link: Link
    host_bytes: int | None = None
    host_gb_per_s: float | None = None
    drive: Drive | None = None
    drive_tb: float = 2.0

    @property
    def room(self) -> float:
        """Bytes that blocks may take in host memory; unlimited if it was not given."""
        return float("inf") if self.host_bytes is None else HOST_SHARE * self.host_bytes - HOST_KEPT


@dataclass(frozen=True)
class Answer:
    """One plan on one machine."""

    machine: Machine
    planned: Planned
    work: Work
    step: Step
    why: str
    """Why this tier and this storage."""


def answer(model: str, machine: Machine, *, method: Method, made: Planned | None = None, **options: Any) -> Answer:
    """Tier and storage, chosen if they are not given, and the seconds of a step. options: those of `plan_step`. made: a
    plan of the same model and options for another machine.

    Raises BudgetError if the batch does not fit that GPU.
    """
    gpu = machine.gpu
    device = AbsentGpu(int(gpu.memory_gb * 1e9), automatic=True)
    asked = options.get("device_memory")
    if asked is not None and (over := parse_bytes(asked, "device_memory")) > gpu.memory_gb * 1e9:
        raise BudgetError(f"device_memory={show_bytes(over)}: {gpu.name} has {gpu.memory_gb:g} GB")
    if made is None:
        made = plan_step(model, method=method, on=device, blind=True, **options)
    made = replace(made, prepared=replace(made.prepared, device=device))
    storage, offload = options.get("storage"), options.get("offload")
    dtype_of, kept = made.base.dtype_of, kept_of(made.base)

    def stored(name: str | None, tier: str | None) -> tuple[Planned, Work, Step, str]:
        base = made.prepared.stored_as(dtype_of, storage=name, offload=tier or "disk", kept_of=kept)
        tier, why = (tier, f"--offload {tier} was asked for") if tier else _tier(machine, base.layout.total_bytes, gpu)
        for memory in (None, f"{0.96 * gpu.memory_gb:g}GB"):
            ready = made.prepared.stored_as(dtype_of, storage=name, offload=tier, device_memory=memory, kept_of=kept)
            try:
                found = made.with_memory(ready)
                break
            except BudgetError:
                if memory is not None or made.prepared.config.device_memory is not None:
                    raise
        work = work_in(found)
        return found, work, seconds_on(machine, found, work), why

    tier = None if offload in (None, "auto") else offload
    chosen = stored(storage, tier)
    own = str(made.checkpoint.dtype).rpartition(".")[2]
    if storage is not None or made.checkpoint.dtype.itemsize != 2 or method.target != "values":
        return Answer(machine, *chosen[:3], chosen[3])
    why = f"{own}, as the checkpoint: nothing else is faster"
    if chosen[2].binds != "the GPU":
        other = stored(STREAMED, tier)
        if other[2].seconds < 0.95 * chosen[2].seconds:
            why = (
                f"{STREAMED} moves less than {own} ({_time(other[2].seconds)} a step, "
                f"{_time(chosen[2].seconds)} in {own}) "
                "and keeps small updates, which 16 bits round away"
            )
            chosen = other
    return Answer(machine, *chosen[:3], f"{chosen[3]}; {why}")


def _tier(machine: Machine, held: int, gpu: Gpu) -> tuple[str, str]:
    if held <= (gpu.memory_gb * 1e9 - CONTEXT_BYTES) / 2:
        return "none", f"{show_bytes(held)} fit in half of the GPU's memory, so nothing has to move"
    if machine.host_bytes is None:
        return "host", f"host memory of at least {show_bytes((held + HOST_KEPT) / HOST_SHARE)} is taken to be there"
    said = f"of {show_bytes(machine.host_bytes)} host memory {show_bytes(max(0.0, machine.room))} may hold blocks"
    return ("host" if held <= machine.room else "disk"), f"{said}, and they take {show_bytes(held)}"


def work_in(made: Planned) -> Work:
    prepared = made.prepared
    config = getattr(made.checkpoint.config, "text_config", made.checkpoint.config)
    method, layers = prepared.method, int(getattr(config, "num_hidden_layers", 0) or 0)
    return work_of(
        prepared.plan, prepared.layout, pinned=made.memory.window.pinned, offload=prepared.offload,
        fold_every=prepared.fold_every, lanes=prepared.perturbations, distribution=method.distribution,
        noises=method.noises, lane_noises=method.lane_noises, rows=made.batch_size, tokens=made.tokens,
        share=shares(made.module, config),
        attention=(layers, int(getattr(config, "hidden_size", 0) or 0)),
    )  # fmt: skip


def shares(module: Any, config: Any) -> dict[str, float]:
    """For routed experts, the share that a token computes with."""
    top = next((v for k in ("num_experts_per_tok", "moe_topk", "top_k_experts") if (v := getattr(config, k, None))), 0)
    found = {}
    for name, part in module.named_modules():
        count = getattr(part, "num_experts", None)
        if isinstance(count, int) and top and name.endswith("experts"):
            for own, p in part.named_parameters():
                if p.shape[:1] == (count,):
                    found[f"{name}.{own}"] = min(1.0, top / count)
    return found


def seconds_on(machine: Machine, made: Planned, work: Work) -> Step:
    drive = None
    if made.prepared.offload == "disk":
        drive = machine.drive or find_drive("nvme-gen4")
    return step_seconds(work, machine.gpu, machine.link, drive=drive, host_gb_per_s=machine.host_gb_per_s)


# ---- lines -----------------------------------------------------------------------------------------------------------


def lines(found: Answer, steps: int | None, usual_steps: int) -> Iterator[str]:
    """The answer, most important first."""
    made, step, machine = found.planned, found.step, found.machine
    prepared, plan, count = made.prepared, made.prepared.plan, steps or usual_steps
    gpu = machine.gpu
    yield (
        f"{made.model}, {plan.numel / 1e9:.2f} billion parameters, on {gpu.name} ({gpu.memory_gb:g} GB, "
        f"{machine.link.name} at {machine.link.gb_per_s:g} GB/s each way): public rates, nothing was measured"
    )
    yield (
        f"{count} steps of {made.batch_size} x {made.tokens} tokens: about {_time(step.seconds * count)}; "
        f"{_time(step.seconds)} a step, {step.binds} binds"
    )
    yield f"  {', '.join(f'{name} {_time(seconds)}' for name, seconds in sorted(step.parts.items(), key=_largest))}"
    yield f"  of the GPU's, forwards {_time(step.forwards)} and fused passes {_time(step.passes)}"
    yield f"--offload {prepared.offload} --storage {_storage(made)}: {found.why}"
    yield from _rows(found)
    yield from _memory(found)
    yield from _drive(found, count)
    yield from _better(found)
    yield from _warnings(found)


def _largest(item: tuple[str, float]) -> float:
    return -item[1]


def _time(seconds: float) -> str:
    """A time for people: "7.5 ms", "1.26 s", "3.4 minutes"; from milliseconds to years."""
    units = ((0.1, 1e3, ".1f", "ms"), (120, 1, ".2f", "s"), (7200, 1 / 60, ".1f", "minutes"),
             (48 * 3600, 1 / 3600, ".1f", "hours"), (1000 * 86400, 1 / 86400, ".1f", "days"))  # fmt: skip
    for below, factor, form, unit in units:
        if seconds < below:
            return f"{seconds * factor:{form}} {unit}"
    return f"{seconds / 86400 / 365:,.0f} years"


def _storage(made: Planned) -> str:
    return made.prepared.config.storage or next(
        name for name in ("bf16", "fp16", "fp32") if FORMATS[name].torch_dtype == made.checkpoint.dtype
    )


def _rows(found: Answer) -> Iterator[str]:
    step = found.step
    busy = step.forwards + step.passes
    if step.binds == "the GPU":
        yield "rows: the GPU is what binds, so twice the rows take nearly twice as long"
        return
    free = (step.seconds - step.passes) / step.forwards
    yield (
        f"rows: the GPU idles {1 - busy / step.seconds:.0%} of a step; up to {int(found.planned.batch_size * free)} "
        f"rows instead of {found.planned.batch_size} take no longer"
    )


def _memory(found: Answer) -> Iterator[str]:
    made, machine = found.planned, found.machine
    layout, offload = made.prepared.layout, made.prepared.offload
    device = made.memory.device_bytes
    yield f"GPU memory: {show_bytes(device)} and about 0.5 GB of context, of {machine.gpu.memory_gb:g} GB"
    if offload == "host":
        lock = layout.total_bytes / LOCKED_GB_PER_S / 1e9
        yield (
            f"host memory: {show_bytes(layout.total_bytes)} of blocks and about 2 GB; page-locked behind the first "
            f"steps, {_time(lock)}. Under WSL2 no more than 0.5 to 1 GB can be locked: there half the speed"
        )
    elif offload == "disk":
        largest = max(layout.block_bytes)
        yield f"host memory: about {show_bytes(3 * largest + 2e9)}, 3 buffers of a block included"
    read = found.machine.drive.read_gb_per_s if found.machine.drive is not None else READ_GB_PER_S
    source = made.source_bytes
    yield (
        f"ingest, once: {_time(source / min(read, READ_GB_PER_S) / 1e9)} for {show_bytes(source)} at "
        f"{min(read, READ_GB_PER_S):g} GB/s (reading, encoding and writing it are not measured here)"
    )


def _drive(found: Answer, count: int) -> Iterator[str]:
    made = found.planned
    layout, offload = made.prepared.layout, made.prepared.offload
    source = made.source_bytes
    shapes = shapes_of(layout.block_bytes, layout.spans, layout.stream_bytes)
    blocks = sum(shape.file_bytes for shape in shapes)
    yield (
        f"disk: {show_bytes(source + blocks)}: the checkpoint {show_bytes(source)}, and in the run directory two "
        f"generations of what trains and one of what is frozen{'' if offload == 'disk' else ', for snapshots'}"
    )
    if offload != "disk":
        yield "wear: none but snapshots; host memory does not wear" if offload == "host" else "wear: none but snapshots"
        return
    drive = found.machine.drive or find_drive("nvme-gen4")
    written = found.work.flushed * count
    life = drive.written_tb * found.machine.drive_tb * 1e12
    yield (
        f"wear: {show_bytes(found.work.flushed)} written a step, {written / 1e12:.1f} TB in {count} steps: "
        f"{written / life:.0%} of the rated life of a {found.machine.drive_tb:g} TB {drive.name} "
        f"({life / 1e12:.0f} TB written)"
    )


def _better(found: Answer) -> Iterator[str]:
    billions, memory = found.planned.prepared.plan.numel / 1e9, found.machine.gpu.memory_gb
    need = {kind: backprop_gb(kind, billions) for kind in ("lora", "qlora")}
    name = {"lora": "LoRA in 16 bits", "qlora": "QLoRA in 4 bits"}
    fits = next((kind for kind in ("lora", "qlora") if need[kind] <= 0.95 * memory), None)
    if fits is not None:
        yield (
            f"better: {name[fits]} with backprop takes about {need[fits]:.0f} GB on short rows and FITS this GPU. "
            "Where the loss has a gradient and adapters will do, it learns more in an hour: docs/alternatives.md"
        )
    else:
        yield (
            f"better: nothing with gradients fits this GPU: QLoRA with backprop takes about {need['qlora']:.0f} GB on "
            f"short rows, LoRA {need['lora']:.0f}"
        )


def _warnings(found: Answer) -> Iterator[str]:
    made, machine = found.planned, found.machine
    compute = made.prepared.config.compute
    bf16 = (DTYPES[compute] if compute else made.checkpoint.dtype) is DTYPES["bf16"]
    if bf16 and not machine.gpu.bf16:
        yield f"warning: {machine.gpu.name} has no bf16: it is emulated, many times slower. Give --compute fp16"
    if machine.link.name.endswith(("x16", "x8")):
        yield f"warning: a second slot, or a drive beside it, can leave x4: {machine.link.name} is taken to be there"
    if machine.link.gb_per_s > 40 and machine.host_gb_per_s is None and made.prepared.offload != "none":
        yield "warning: a desktop with two memory channels reads 40 to 62 GB/s, less than this link: --host-bandwidth"
    if published := models.published_as(made.model):
        yield f"warning: it is published in {published}; the 16-bit copy that is trained from has to be made first"
    if made.prepared.offload == "disk" and machine.drive is not None and machine.drive.write_gb_per_s < 0.5:
        yield f"warning: {machine.drive.name} writes {machine.drive.write_gb_per_s:g} GB/s once its cache is full"
    owners, lanes = len(made.prepared.plan.calls), made.prepared.perturbations * made.micro_batches
    host = owners * (HOST_VISIT + HOST_LANE * lanes)
    if host > found.step.seconds:
        yield (
            f"warning: the host takes about {_time(host)} to launch a step ({owners} modules, {lanes} lanes; measured "
            "on a Xeon), more than all else: so long is a step at least, and more rows are free until that"
        )
    tokens = made.batch_size * made.tokens
    yield f"assumed: {SHORT if tokens < 1024 else LONG:.0%} of the GPU's peak in forwards; costs in docs/planning.md"


def command(made: Planned, steps: int | None, options: Sequence[str], device: str = "cuda") -> str:
    """The command line of the planned `fit`. options: the method's, as they were given."""
    config, prepared = made.prepared.config, made.prepared
    where = f"checkpoints/{made.model}" if models.is_named(made.model) else made.model
    words = ["zo-offload", "fit", where, "--data", "train.jsonl", "--run-dir", "runs/1", "--device", device]
    words += ["--offload", prepared.offload, "--storage", _storage(made) if config.storage is None else config.storage]
    words += ["--batch-size", str(made.batch_size), "--max-length", str(made.tokens)]
    words += ["--steps", str(steps)] if steps else []
    words += ["--micro-batches", str(made.micro_batches)] if made.micro_batches > 1 else []
    words += ["--device-memory", str(config.device_memory)] if config.device_memory is not None else []
    return shlex.join([*words, *options])


# ---- tables ----------------------------------------------------------------------------------------------------------


def named_rates(found: Answer) -> Rates:
    """The rates of the named machine, for `report.details`."""
    machine, work = found.machine, found.work

    def link_seconds(fetched: float, flushed: float) -> float:
        moved = replace(work, fetched=fetched, flushed=flushed, forward_flops=0.0, elements=0.0, streamed_bytes=0.0)
        return seconds_on(machine, found.planned, moved).seconds

    gpu_seconds = found.step.forwards + found.step.passes
    each = gpu_seconds / max(1.0, found.work.elements)
    return Rates(link_seconds, lambda *of_a_pass: each, f"on {machine.gpu.name}, the GPU's work as above")


def compare(
    title: str, machines: Sequence[tuple[str, Machine]], steps: int, plan: Callable[[Machine], Answer]
) -> Iterator[str]:
    """One line per machine."""
    yield f"{title:<16}{'offload':>9}{'storage':>9}{'s a step':>10}{'binds':>13}{f'{steps} steps':>14}  with gradients"
    for name, machine in machines:
        try:
            found = plan(machine)
        except BudgetError:
            yield f"{name:<16}  it does not fit its memory"
            continue
        made, step = found.planned, found.step
        digits = ".2f" if step.seconds >= 1 else ".4f"
        billions = made.prepared.plan.numel / 1e9
        fits = [k for k in ("LoRA", "QLoRA") if backprop_gb(k.lower(), billions) <= 0.95 * machine.gpu.memory_gb]
        yield (
            f"{name:<16}{made.prepared.offload:>9}{_storage(made):>9}{step.seconds:>10{digits}}{step.binds:>13}"
            f"{_time(step.seconds * steps):>14}  {fits[0] if fits else '-'}"
        )


def machines(kind: str, machine: Machine) -> list[tuple[str, Machine]]:
    """The machines that --compare asks for."""
    if kind == "gpus":
        return [(name, replace(machine, gpu=(gpu := find_gpu(name)), link=gpu.link)) for name in gpu_names()]
    return [(name, replace(machine, drive=find_drive(name))) for name in drive_names()]
