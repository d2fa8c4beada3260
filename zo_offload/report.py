"""What `zo-offload plan` shows: blocks, lifts, memory by term, traffic. Reads no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .activations import measure_activations
from .checkpoint import Checkpoint
from .config import DTYPES, parse_bytes
from .formats import format_of, get_format
from .layout import Layout, make_layout
from .memory import MemoryPlan, plan_memory
from .plan import Plan, make_plan
from .shapes import OPT_SHAPES, opt_config
from .trace import ForwardCall


def plan_report(
    model: str,
    *,
    storage: str | None = None,
    compute: str | None = None,
    offload: str | None = None,
    device_memory: str | None = None,
    tokens: int = 512,
    batch_size: int = 1,
    trainable: str | None = None,
    model_class: str | None = None,
) -> Iterator[str]:
    """Lines of the report for a checkpoint directory, a config.json, or a size such as opt-175b."""
    checkpoint = open_config(model)
    module = checkpoint.build_model(DTYPES[compute or "fp32"], model_class)
    batch = example_batch(module, batch_size, tokens)
    call: ForwardCall = lambda m, b: m(**b)  # noqa: E731 - the type is the point
    plan = make_plan(module, batch, trainable=trainable, call=call)
    fmt = get_format(storage) if storage else format_of(checkpoint.dtype)
    layout = make_layout(plan, lambda spec: fmt)
    activations = measure_activations(module, plan, batch, call)
    memory = plan_memory(
        plan, layout, offload=offload if offload not in (None, "auto") else "disk", perturbations=2,
        rows=batch_size * tokens, activations=activations,
        budget=None if device_memory is None else parse_bytes(device_memory, "device_memory"),
    )  # fmt: skip
    yield f"{type(module).__name__}: {plan.numel / 1e9:.3f} G parameters, {plan.trainable_numel / 1e9:.3f} G trainable"
    yield f"stored as {fmt.name}: {layout.total_bytes / 1e9:.2f} GB in {len(plan.blocks)} blocks"
    yield from _blocks(plan, layout)
    yield from _lifts(plan)
    yield from _memory(memory, batch_size, tokens, activations.peak > 0)
    yield from _traffic(plan, layout, memory)


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


def _blocks(plan: Plan, layout: Layout) -> Iterator[str]:
    yield f"{'block':<48}{'parameters':>16}{'MB':>12}{'visits':>8}"
    rows = plan.describe()
    index = 0
    while index < len(rows):  # equal blocks one after another in one line
        end = index
        while end + 1 < len(rows) and _alike(rows[end + 1], rows[index]):
            end += 1
        row, many = rows[index], end - index + 1
        name = row.name if many == 1 else f"{row.name} .. {rows[end].name}"
        yield f"{name[:47]:<48}{row.numel:>16,}{layout.block_bytes[index] / 1e6:>12.2f}{row.visits:>8}" + (
            f"   x {many}" if many > 1 else ""
        )
        index = end + 1


def _alike(a: Any, b: Any) -> bool:
    return (a.numel, a.num_params, a.visits) == (b.numel, b.num_params, b.visits)


def _lifts(plan: Plan) -> Iterator[str]:
    lifted = plan.lifted()
    ties = [spec for spec in plan.params.values() if spec.aliases]
    for spec in ties[:5]:
        yield f"tied, stored and perturbed once: {spec.name} = {', '.join(spec.aliases)}"
    if lifted:
        name, owners = next(iter(lifted.items()))
        yield f"{len(lifted)} parameters are used outside their module and served further up, such as {name} in {owners[0]}"
    for note in plan.notes:
        yield f"note: {note}"


def _memory(memory: MemoryPlan, batch_size: int, tokens: int, known: bool) -> Iterator[str]:
    yield f"memory, {batch_size} x {tokens} tokens, two lanes in {memory.order} order:"
    for name, nbytes in memory.rows():
        detail = ""
        if name == "window":
            detail = f"   {memory.window.num_slots} slots, {memory.window.ahead} fetched ahead"
        if name == "pinned":
            detail = f"   {len(memory.window.pinned)} blocks"
        yield f"  {name:<14}{nbytes / 1e9:>10.3f} GB{detail}"
    yield f"  {'device':<14}{memory.device_bytes / 1e9:>10.3f} GB" + ("" if known else "   (activations unknown)")


def _traffic(plan: Plan, layout: Layout, memory: MemoryPlan) -> Iterator[str]:
    streamed = [block for block in plan.visits if block not in memory.window.pinned]
    fetched = sum(layout.block_bytes[block] for block in streamed)
    flushed = sum(nbytes for block in set(streamed) for _, nbytes in layout.spans[block])
    yield f"a step fetches {fetched / 1e9:.2f} GB and flushes {flushed / 1e9:.2f} GB"
