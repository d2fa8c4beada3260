"""What `zo-offload plan` shows: blocks, lifts, memory by term, traffic. Reads no weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .activations import measure_activations
from .auto import Rates, choose_storage, compare, rates
from .blocks import BLOCK_NUMEL
from .checkpoint import Checkpoint
from .config import DTYPES, EngineConfig, parse_bytes, show_bytes
from .data import max_positions
from .errors import ConfigError
from .formats import FORMATS
from .layout import Layout, make_layout
from .memory import MemoryPlan, plan_memory, step_bytes
from .plan import Plan, make_plan
from .shapes import OPT_SHAPES, opt_config
from .storage import choose_fold_every, decide_formats
from .trace import ForwardCall

CONTEXT_BYTES = 500_000_000
"""Device memory of a CUDA context and the matrix libraries' workspaces, where there is no GPU to ask."""


def plan_report(
    model: str,
    *,
    storage: str | None = None,
    keep: Any = None,
    fold_every: int | None = None,
    link_gb_per_s: float | None = None,
    device: str = "cpu",
    compute: str | None = None,
    offload: str | None = None,
    device_memory: str | None = None,
    tokens: int | None = None,
    batch_size: int = 1,
    trainable: str | None = None,
    model_class: str | None = None,
    block_numel: int = BLOCK_NUMEL,
) -> Iterator[str]:
    """Lines of the report for a checkpoint directory, a config.json, or a size such as opt-175b.

    tokens: a row; default 512, or as many as the model takes. device: "cpu" or "cuda", which need not be there.
    Raises ZOError.
    """
    checkpoint = open_config(model)
    kind = EngineConfig(device=device).device.partition(":")[0]
    module = checkpoint.build_model(_compute_dtype(compute, kind, checkpoint, storage), model_class)
    limit = max_positions(module.config)
    if tokens is not None and limit is not None and tokens > limit:
        raise ConfigError(f"tokens={tokens}: {model} takes at most {limit}")
    tokens = tokens if tokens is not None else min(512, limit or 512)
    batch = example_batch(module, batch_size, tokens)
    call: ForwardCall = lambda m, b: m(**b)  # noqa: E731 - the type is the point
    plan = make_plan(module, batch, trainable=trainable, call=call, block_numel=block_numel)
    full, note = plan, ""
    if storage == "auto":
        config = EngineConfig(offload="disk" if offload in (None, "auto") else offload, run_dir="-", keep=keep)  # type: ignore[arg-type]
        storage, note = choose_storage(plan, lambda name: checkpoint.dtype, config)
    stored = decide_formats(plan, storage, lambda name: checkpoint.dtype, keep)
    plan, layout = stored.plan, make_layout(stored.plan, stored.format_of)
    activations = measure_activations(module, plan, batch, call, device=kind)
    context = CONTEXT_BYTES if kind == "cuda" else 0
    memory = plan_memory(
        plan, layout, offload=offload if offload not in (None, "auto") else "disk", perturbations=2,
        rows=batch_size * tokens, activations=activations,
        budget=None if device_memory is None else parse_bytes(device_memory, "device_memory") - context,
    )  # fmt: skip
    yield f"{type(module).__name__}: {_number(plan.numel)} parameters, {_number(plan.trainable_numel)} trainable"
    yield f"stored as {_formats(layout)}: {show_bytes(layout.total_bytes)} in {len(plan.blocks)} blocks"
    yield from _blocks(plan, layout)
    yield from _lifts(plan)
    yield from _memory(memory, batch_size, tokens, activations.peak > 0, context)
    every_given, fold_every = fold_every, choose_fold_every(fold_every, plan, layout, offload or "disk", "gaussian")
    yield from _traffic(plan, layout, memory, fold_every)
    if note:
        yield f"auto takes {storage}: {note}"
    yield from _compared(full, checkpoint, keep, every_given, rates(EngineConfig(device=device).device, link_gb_per_s))


def _compute_dtype(compute: str | None, kind: str, checkpoint: Checkpoint, storage: str | None) -> torch.dtype:
    """As an engine would choose it: fp32 on the CPU, the checkpoint's own on a GPU (of a bare size, the storage's)."""
    if compute is not None or kind == "cpu":
        return DTYPES[compute or "fp32"]
    if checkpoint.path is None and storage in FORMATS:
        return FORMATS[storage].torch_dtype
    return checkpoint.dtype


def _formats(layout: Layout) -> str:
    """The formats in use, the one with the most bytes first."""
    nbytes: Counter[str] = Counter()
    for place in layout.places.values():
        nbytes[place.fmt.name] += place.nbytes + place.residual_nbytes
    return ", ".join(name for name, _ in nbytes.most_common())


def open_config(model: str) -> Checkpoint:
    """A checkpoint without weights, from a directory, a config.json or a known size."""
    if model.lower() in OPT_SHAPES and not os.path.exists(model):
        return Checkpoint.open(opt_config(model))
    path = Path(model)
    return Checkpoint.open(path.parent if path.name == "config.json" else model, weights=False)


def example_batch(module: Any, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Token ids and labels of that size; the model's own dummy inputs where it takes no token ids."""
    if getattr(module, "main_input_name", "input_ids") != "input_ids":
        return dict(module.dummy_inputs)
    ids = torch.ones(batch_size, tokens, dtype=torch.int64)
    batch = {"input_ids": ids}
    if type(module).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        batch["labels"] = ids
    return batch


def _number(value: int) -> str:
    """A count for people: "174.604 G"."""
    scale, unit = next(((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= s), (1, ""))
    return f"{value / scale:.3f}{unit}" if unit else str(value)


def _blocks(plan: Plan, layout: Layout) -> Iterator[str]:
    rows = plan.describe()
    table: list[tuple[str, int, int]] = []  # name, index of the first row, how many: equal neighbours share a line
    index = 0
    while index < len(rows):
        end = index
        while end + 1 < len(rows) and _alike(rows[end + 1], rows[index]):
            end += 1
        table.append((_span(rows[index].name, rows[end].name), index, end - index + 1))
        index = end + 1
    width = max(len(name) for name, _, _ in table) + 1
    yield f"{'layer':<{width}}{'parameters':>16}{'blocks':>8}{'MB':>12}{'visits':>8}"
    for name, index, many in table:
        row, times = rows[index], f"   x {many}" if many > 1 else ""
        nbytes = sum(layout.block_bytes[row.block : row.block + row.num_blocks])
        yield f"{name:<{width}}{row.numel:>16,}{row.num_blocks:>8}{nbytes / 1e6:>12.2f}{row.visits:>8}{times}"


def _span(first: str, last: str, most: int = 72) -> str:
    """ "layers.0 .. 95" of layers.0 and layers.95; a name too long for the table loses its middle."""
    if first != last:
        pairs = enumerate(zip(first.split("."), last.split("."), strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), 0)
        first += f" .. {'.'.join(last.split('.')[shared:])}"
    return first if len(first) <= most else f"{first[: most // 2 - 3]} ... {first[-most // 2 + 2 :]}"


def _alike(a: Any, b: Any) -> bool:
    return (a.numel, a.num_blocks, a.num_params, a.visits) == (b.numel, b.num_blocks, b.num_params, b.visits)


def _lifts(plan: Plan) -> Iterator[str]:
    lifted = plan.lifted()
    ties = [spec for spec in plan.params.values() if spec.aliases]
    for spec in ties[:5]:
        yield f"tied, stored and perturbed once: {spec.name} = {', '.join(spec.aliases)}"
    if lifted:
        name, owners = next(iter(lifted.items()))
        yield (
            f"{len(lifted)} parameters are used outside their module and served further up, such as {name} in "
            f"{owners[0]}"
        )
    for note in plan.notes:
        yield f"note: {note}"


def _memory(memory: MemoryPlan, batch_size: int, tokens: int, known: bool, context: int) -> Iterator[str]:
    yield f"memory, {batch_size} x {tokens} tokens, two lanes in {memory.order} order:"
    for name, nbytes in memory.rows():
        detail = ""
        if name == "window":
            detail = f"   {memory.window.num_slots} slots, {memory.window.ahead} fetched ahead"
        if name == "pinned":
            detail = f"   {len(memory.window.pinned)} blocks"
        yield f"  {name:<14}{show_bytes(nbytes):>12}{detail}"
    if context:
        yield f"  {'context':<14}{show_bytes(context):>12}   of CUDA and its libraries, about"
    total = memory.device_bytes + context
    yield f"  {'device':<14}{show_bytes(total):>12}" + ("" if known else "   (activations unknown)")


def _traffic(plan: Plan, layout: Layout, memory: MemoryPlan, fold_every: int) -> Iterator[str]:
    fetched, flushed = step_bytes(plan, layout, memory.window.pinned, fold_every)
    yield (
        f"a step fetches {show_bytes(fetched)} and flushes {show_bytes(flushed)} (updates folded every {fold_every} "
        f"step{'s' * (fold_every > 1)})"
    )


def _compared(plan: Plan, checkpoint: Checkpoint, keep: Any, fold_every: int | None, rate: Rates) -> Iterator[str]:
    yield f"all parameters streamed {rate.note}, two lanes:"
    yield f"  {'format':<12}{'fold every':>11}{'fetch':>12}{'flush':>12}{'held':>12}{'a step, at least':>18}"
    choices = compare(
        plan, lambda name: checkpoint.dtype, keep=keep, fold_every=fold_every, link_seconds=rate.link_seconds,
        seconds_per_element=rate.pass_seconds,
    )  # fmt: skip
    for choice in choices:
        trains = "" if choice.layout.target == "values" else "   trains scales only"
        yield (
            f"  {choice.name:<12}{choice.fold_every:>11}{show_bytes(choice.fetch_bytes):>12}"
            f"{show_bytes(choice.flush_bytes):>12}{show_bytes(choice.layout.total_bytes):>12}"
            f"{choice.seconds:>16.2f} s{trains}"
        )
