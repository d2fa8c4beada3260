"""The details of `zo-offload plan`: blocks, lifts, memory by term, traffic. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import has_weights
from ..checkpoint.gguf import find_gguf
from ..checkpoint.weights import kept_of
from ..config import DTYPES, EngineConfig
from ..data.losses import model_loss
from ..data.micro_batches import split_micro_batches
from ..devices import PlannedDevice, make_device
from ..errors import CheckpointError, ConfigError
from ..formats import FORMATS
from ..journal import run_directory
from ..methods import DEFAULT, Method
from ..modules.kind import ModelKind, kind_of
from ..plan.activations import Activations
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..quantized.sizes import file_bytes
from ..quantized.table import method_of
from ..ranks.alone import Alone
from ..run.auto import Rates, compare
from ..run.compute import decide_compute
from ..run.memory import MemoryPlan, step_bytes
from ..run.opening import built, with_adapter
from ..run.prepare import Prepared, prepare
from ..system.units import parse_bytes, show_bytes
from . import named_models as models
from .hardware import CONTEXT_BYTES, AbsentGpu

MOST_TOKENS = 1 << 24  # of a planned batch, whose ids are made, and masks and positions from them


@dataclass(frozen=True)
class Planned:
    """A planned step, and the inputs of the plan."""

    model: str
    checkpoint: Checkpoint
    base: Any
    """The source of weights: the checkpoint, or the checkpoint and an adapter."""
    module: Any
    prepared: Prepared
    plan_of_memory: MemoryPlan | None
    """None: memory was not planned."""
    batch_size: int
    tokens: int
    micro_batches: int
    batch: Mapping[str, torch.Tensor]
    objective: Callable[[nn.Module, Any], Any]
    activations: Activations

    @property
    def memory(self) -> MemoryPlan:
        assert self.plan_of_memory is not None
        return self.plan_of_memory

    @property
    def quantized_bytes(self) -> int | None:
        """Bytes of the checkpoint's files if its settings say that they are quantized, about."""
        checkpoint = self.checkpoint
        return file_bytes(checkpoint.settings, ((name, tuple(checkpoint.shape_of(name))) for name in checkpoint.names))

    @property
    def source_bytes(self) -> int:
        """Bytes of the checkpoint's files, about."""
        if (found := self.quantized_bytes) is not None:
            return found
        return sum(map(self.checkpoint.numel, self.checkpoint.names)) * self.checkpoint.dtype.itemsize

    def with_memory(self, prepared: Prepared) -> Planned:
        """The same step, its model stored in another way. Raises BudgetError if that does not fit."""
        memory = prepared.plan_memory(
            self.batch, objective=self.objective, micro_batches=self.micro_batches, activations=self.activations
        )
        return replace(self, prepared=prepared, plan_of_memory=memory)


def plan_step(
    model: str,
    *,
    method: Method | None = None,
    tokens: int | None = None,
    batch_size: int = 1,
    micro_batches: int = 1,
    model_class: str | None = None,
    on: PlannedDevice | None = None,
    blind: bool = False,
    **settings: Any,
) -> Planned:
    """Plan a step of a model: a checkpoint's directory, a config.json, or a name such as opt-175b. Reads no weights.

    settings: those of `EngineConfig`, resolved as for a run with a run directory (`prepare.py`). tokens: tokens per
    row; default 512, or the model's maximum. A GPU need not be present. on: a device that replaces the one in
    `settings`. blind: plan no memory (`Planned.with_memory` does it later) and assume the disk tier, because the plan
    is for another host. Raises ZOError, as the run would.
    """
    method = method if method is not None else DEFAULT()
    config = EngineConfig(**{"run_dir": "-", **settings})
    given, config = with_adapter(model, config)
    model = str(given)
    checkpoint = open_config(model, trust_remote_code=config.trust_remote_code, overrides=config.config_overrides)
    device = _device(config) if on is None else on
    config, decided = decide_compute(config, device, checkpoint.dtype, Alone())
    if config.fold_every == "auto":
        decided += ("fold_every auto is measured when a run on a CPU's disk begins; the default is planned with",)
    dtype = _compute_dtype(config.compute, device, checkpoint, config.storage)
    model_built = built(checkpoint, dtype, model_class, config, None)
    module, base = model_built.model, model_built.base
    kind = kind_of(module)
    limit = kind.positions
    if tokens is not None and limit is not None and tokens > limit:
        raise ConfigError(f"tokens={tokens}: {model} takes at most {limit}")
    tokens = tokens if tokens is not None else min(512, limit or 512)
    if batch_size * tokens > MOST_TOKENS:
        raise ConfigError(
            f"batch_size={batch_size} x tokens={tokens}: {batch_size * tokens / 1e6:,.0f} million tokens in a step. No "
            f"device holds such a batch; give at most {MOST_TOKENS / 1e6:.0f} million"
        )
    batch = example_batch(module, kind, batch_size, tokens)
    prepared = prepare(
        module, base.dtype_of, config, method, device, example=batch, call=_forward, notes=model_built.notes,
        kept_of=kept_of(base), offload="disk" if blind else None, decided=decided,
    )  # fmt: skip
    part = split_micro_batches(batch, micro_batches, config.whole)[0]
    objective = model_loss if "labels" in batch else _forward
    activations = prepared.activations(part, objective)
    memory = (
        None
        if blind
        else prepared.plan_memory(batch, objective=objective, micro_batches=micro_batches, activations=activations)
    )
    return Planned(
        model, checkpoint, base, module, prepared, memory, batch_size, tokens, micro_batches, batch, objective,
        activations,
    )  # fmt: skip


def details(planned: Planned, rate: Callable[[], Rates]) -> Iterator[str]:
    """Lines about blocks, memory by term, traffic, and every format at these rates."""
    prepared, memory = planned.prepared, planned.memory
    plan, layout, config = prepared.plan, prepared.layout, prepared.config
    yield (
        f"{type(planned.module).__name__}: {_number(plan.numel)} parameters, {_number(plan.trainable_numel)} trainable"
    )
    if (nbytes := planned.quantized_bytes) is not None:
        scheme = method_of(planned.checkpoint.settings)
        yield f"the files are quantized ({scheme}): about {show_bytes(nbytes)} on the disk"
    yield f"stored as {', '.join(layout.format_names())}: {show_bytes(layout.total_bytes)} in {len(plan.blocks)} blocks"
    yield from prepared.decided
    lives = {"none": "the device's memory", "host": "host memory", "disk": "files"}[prepared.offload]
    yield f"offload {prepared.offload}{' (auto)' * (config.offload == 'auto')}: blocks live in {lives}"
    yield from _blocks(plan, layout)
    yield from _lifts(plan)
    yield from _memory(prepared, memory, f"{planned.batch_size} x {planned.tokens} tokens", planned.micro_batches)
    yield from _traffic(plan, layout, memory, prepared.fold_every)
    yield _noise(prepared)
    yield from _compared(prepared, planned.base.dtype_of, rate())


def _forward(module: nn.Module, batch: Mapping[str, Any]) -> Any:
    return module(**batch)


def _device(config: EngineConfig) -> PlannedDevice:
    """The device, or an AbsentGpu if it is not present."""
    if config.device == "cpu" or torch.cuda.is_available():
        return make_device(config.device)
    asked = config.device_memory
    return AbsentGpu(None if asked is None else parse_bytes(asked, "device_memory"))


def _compute_dtype(
    compute: str | None, device: PlannedDevice, checkpoint: Checkpoint, storage: str | None
) -> torch.dtype:
    """The engine's choice: fp32 on the CPU, on a GPU the checkpoint's own dtype (without one, the storage's)."""
    if compute is not None:
        return DTYPES[compute]
    named = checkpoint.path is None and storage in FORMATS
    return device.default_compute(FORMATS[storage].torch_dtype if named and storage else checkpoint.dtype)


def open_config(
    model: str, *, trust_remote_code: bool = False, overrides: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint to plan with: a directory, a GGUF file, a config's own file, a known name, or a run directory (its
    base). Headers of weight files are read, so that plan raises the same errors as `fit`; files next to a config's own
    file are ignored."""
    path = Path(model)
    if not path.exists() and models.is_named(model):
        return Checkpoint.open(models.named_config(model))
    if (path / run_directory.JOURNAL).exists():
        base = run_directory.load_config(path)["model"]
        if base is None:
            raise ConfigError(f"{path} is a run of a module in memory, whose configuration is not known")
        return open_config(base, trust_remote_code=trust_remote_code, overrides=overrides)
    if path.is_file() and path.name != "config.json" and path.suffix != ".gguf":
        return Checkpoint.open(models.config_of_file(path))
    if not path.exists() and "/" not in model:
        raise models.unknown(model)
    weights = path.name != "config.json" and (bool(find_gguf(path)) or (path.is_dir() and has_weights(path)))
    try:
        return Checkpoint.open(
            path.parent if path.name == "config.json" else model, weights=weights, trust_remote_code=trust_remote_code,
            overrides=overrides,
        )  # fmt: skip
    except CheckpointError as error:
        if path.exists() or not (near := models.like(model)):
            raise
        raise CheckpointError(f"{error} A plan needs no files: it knows {', '.join(near)}") from error


def example_batch(module: Any, kind: ModelKind, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Token ids and labels of that size; the model's own dummy inputs if it takes no token ids."""
    if getattr(module, "main_input_name", "input_ids") != "input_ids":
        return dict(module.dummy_inputs)
    ids = torch.ones(batch_size, tokens, dtype=torch.int64, device="cpu")
    batch = {"input_ids": ids}
    if kind.name in ("causal", "masked", "seq2seq"):
        batch["labels"] = ids
    return batch


def _number(value: int) -> str:
    """A count for people: "174.604 G"."""
    scale, unit = next(((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= s), (1, ""))
    return f"{value / scale:.3f}{unit}" if unit else str(value)


def _blocks(plan: Plan, layout: Layout) -> Iterator[str]:
    rows = plan.describe()
    table: list[tuple[str, int, int]] = []  # name, first row, number of rows: equal neighbours share a line
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


def _memory(prepared: Prepared, memory: MemoryPlan, batch: str, micro_batches: int) -> Iterator[str]:
    parts = f" of {micro_batches} parts" if micro_batches > 1 else ""
    yield f"memory, {batch}{parts}, {prepared.perturbations * micro_batches} lanes in {memory.order} order:"
    for name, nbytes in memory.rows():
        detail = ""
        if name == "window":
            detail = f"   {memory.window.num_slots} slots, {memory.window.ahead} fetched ahead"
        if name == "pinned":
            detail = f"   {len(memory.window.pinned)} blocks"
        if name == "activations" and memory.unknown:
            detail = "   not measured"
        yield f"  {name:<14}{show_bytes(nbytes):>12}{detail}"
    context = CONTEXT_BYTES if prepared.device.own_memory else 0
    if context:
        yield f"  {'context':<14}{show_bytes(context):>12}   of CUDA and its libraries, about"
    yield f"  {'device':<14}{show_bytes(memory.device_bytes + context):>12}"
    for note in memory.notes:
        yield f"note: {note}"


def _traffic(plan: Plan, layout: Layout, memory: MemoryPlan, fold_every: int) -> Iterator[str]:
    fetched, flushed = step_bytes(plan, layout, memory.window.pinned, fold_every)
    yield (
        f"a step fetches {show_bytes(fetched)} and flushes {show_bytes(flushed)} (updates folded every {fold_every} "
        f"step{'s' * (fold_every > 1)})"
    )


def _noise(prepared: Prepared) -> str:
    """The numbers that are drawn, and what draws them faster (ratios of whole passes: `benchmarks.kernels`)."""
    method = prepared.method
    drawn = (prepared.fold_every + 1) / 2 * method.noises + method.lane_noises
    faster = ["--rounds 7 makes the passes about a sixth faster"] * (method.rounds == 10)
    faster += ["--distribution rademacher (signs) up to twice as fast"] * (method.distribution == "gaussian")
    told = f"noise: {drawn:g} numbers a trained weight and step ({method.distribution}, {method.rounds} rounds)"
    return "; ".join([told, *faster])


def _compared(prepared: Prepared, dtype_of: Callable[[str], torch.dtype], rate: Rates) -> Iterator[str]:
    method, config = prepared.method, prepared.config
    lanes = prepared.perturbations
    yield f"all parameters streamed {rate.note}, {lanes} lanes:"
    yield f"  {'format':<12}{'fold every':>11}{'fetch':>12}{'flush':>12}{'held':>12}{'a step, at least':>18}"
    choices = compare(
        prepared.full_plan, dtype_of, keep=config.keep, fold_every=config.fold_every,
        lanes=method.perturbations(0, 0),
        usual_folds=method.noise.fold_every, noises=method.noises, link_seconds=rate.link_seconds,
        seconds_per_element=rate.pass_seconds,
    )  # fmt: skip
    for choice in choices:
        trains = "" if choice.layout.target == "values" else "   trains scales only"
        yield (
            f"  {choice.name:<12}{choice.fold_every:>11}{show_bytes(choice.fetch_bytes):>12}"
            f"{show_bytes(choice.flush_bytes):>12}{show_bytes(choice.layout.total_bytes):>12}"
            f"{choice.seconds:>16.2f} s{trains}"
        )
