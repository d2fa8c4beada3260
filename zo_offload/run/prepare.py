"""Decides everything that a run needs before any weight is read; the same code serves runs and plans.

    prepared = prepare(model, base.dtype_of, config, method, device)      # formats, blocks, tier, fold_every
    memory = prepared.plan_memory(batch, objective=..., ...)              # window, order of lanes, bytes by term

The engine begins with it, `zo-offload plan` shows it, and a replay checks it against the journal. So every run can be
planned, with the same numbers: any storage, method, number of lanes and tier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..config import EngineConfig
from ..data.losses import Objective, for_a_loss, plain_forward
from ..data.made import as_made
from ..data.micro_batches import split_micro_batches
from ..devices import PlannedDevice
from ..errors import BudgetError, ConfigError
from ..formats import NEWEST_KEPT, Format, kept_since
from ..journal.identity import storage_digest
from ..kernels.records import Gain
from ..methods import Method, check_tunes
from ..modules.recorder import ForwardCall
from ..modules.state import undisturbed
from ..modules.trees import tensor_bytes
from ..numerics.updates import Parts
from ..plan.activations import NOT_MEASURED, Activations, measure_activations
from ..plan.layout import Layout, make_layout
from ..plan.plan import Plan, make_plan
from ..plan.storage import KEPT, KeptOf, Stored, choose_fold_every, decide_formats
from ..plan.trace import meta_copy
from ..system.host_memory import available_bytes
from ..system.units import parse_bytes, show_bytes
from .auto import choose_storage
from .memory import MemoryPlan, held_together, plan_memory
from .tail_plan import tail_bytes, without_tail

Batch = Mapping[str, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A model with the format of each parameter, its blocks and its tier. No weight has been read.

    config: as given, with "auto" of storage and compute replaced by what was chosen. full_plan: the plan before method
    and format limit the trained parameters.
    """

    shadow: nn.Module | str
    """The model on meta, to measure activations on; nothing is attached to it. A string: why it could not be copied."""
    full_plan: Plan
    plan: Plan
    layout: Layout
    config: EngineConfig
    method: Method
    device: PlannedDevice
    offload: str
    """Where blocks live: "none", "host" or "disk"; never "auto"."""
    fold_every: int
    decided: tuple[str, ...]
    """A line for each setting of "auto": what was chosen, and why."""
    tail: tuple[str, ...] = ()
    """The parameters that their exact gradient trains; they do not train in `plan`, which is of the lanes."""

    @property
    def in_place(self) -> bool:
        """Whether all blocks are used in place: no window, no copies.

        On a CPU this holds for host memory too, which is the device's own, unless the settings ask for a window (or for
        less memory than the model takes): then the run uses a window, to try out what a GPU would do.
        """
        return _in_place(self.config, self.offload, self.device)

    @cached_property
    def parts(self) -> Parts:
        """The parts of the trained parameters that single steps leave out."""
        return _parts(self.plan, self.config, self.method)

    @property
    def perturbations(self) -> int:
        """Number of perturbations per visit: the lanes of a step before a batch is cut into parts."""
        return self.method.most_lanes

    def plan_memory(
        self,
        batch: Batch | None,
        *,
        objective: Objective,
        micro_batches: int = 1,
        process: int = 0,
        activations: Activations | None = None,
    ) -> MemoryPlan:
        """Window and order of lanes for a step on `batch`, every term in bytes; without a batch, activations are 0.

        process: bytes that the process took before. activations: an earlier measurement on the same batch. Raises
        BudgetError, with the terms, if `device_memory` is less than the least that works.
        """
        found, rows, tail = NOT_MEASURED, 0, self.tail_bytes(None, objective)
        if batch is not None:
            part = split_micro_batches(batch, micro_batches, self.config.whole)[0]
            found = self.activations(part, objective) if activations is None else activations
            rows, tail = as_made(batch).most_ids, self.tail_bytes(part, objective)
        memory = self._within_budget(micro_batches, rows, found, process, tail)
        for note in memory.notes:
            _log.warning("%s", note)
        return memory

    def stored_as(
        self,
        dtype_of: Callable[[str], torch.dtype],
        *,
        storage: str | None,
        offload: str,
        device_memory: Any = None,
        kept_of: KeptOf = lambda name: (),
    ) -> Prepared:
        """The same model and method, stored in another format or another tier. Raises as `prepare`, but does not check
        the host's memory, since the plan may be for another host."""
        config = replace(self.config, storage=storage, device_memory=device_memory or self.config.device_memory)
        stored = decide_formats(
            self._of_lanes(), storage, dtype_of, config.keep, self.method.target,
            resident=config.adapter is not None, kept_of=kept_of,
        )  # fmt: skip
        layout = make_layout(stored.plan, stored.format_of, stored.target)
        method = self.method
        stays = _in_place(config, offload, self.device)
        every = choose_fold_every(config.fold_every, stored.plan, layout, stays, method.noise.fold_every, method.noises)
        return replace(self, plan=stored.plan, layout=layout, config=config, offload=offload, fold_every=every)

    def formats_without_keep(self, dtype_of: Callable[[str], torch.dtype], kept_of: KeptOf) -> Mapping[str, Format]:
        """The format that each parameter would have if the settings had no `keep`."""
        return decide_formats(
            self._of_lanes(), self.config.storage, dtype_of, None, self.method.target,
            resident=self.config.adapter is not None, kept_of=kept_of,
        ).formats  # fmt: skip

    def _of_lanes(self) -> Plan:
        return without_tail(_with_gain(self.full_plan, self.method), self.config, self.method.tail_alone)[0]

    def plan_blindly(self, *, process: int = 0) -> MemoryPlan:
        """As `plan_memory`, for a run that starts without a batch: reserves the rest of the budget for activations."""
        unknown = Activations(unknown="the run was started without a batch")
        return self._within_budget(1, 0, unknown, process, self.tail_bytes(None, plain_forward))

    def check_batch(self, memory: MemoryPlan, batch: Batch, *, objective: Objective, micro_batches: int) -> None:
        """Raise BudgetError if a batch takes more than the budget leaves after the window that `memory` planned."""
        part = split_micro_batches(batch, micro_batches, self.config.whole)[0]
        activations = self.activations(part, objective)
        if memory.budget is None or activations.unknown:
            return
        held = held_together(activations, memory.order, self.perturbations, micro_batches)
        need = memory.device_bytes - memory.terms["activations"] + held
        if need > memory.budget:
            raise BudgetError(
                f"device_memory={show_bytes(memory.budget)} is too small for a batch that is larger than all before: "
                f"its activations take {show_bytes(held)}, but {show_bytes(memory.terms['activations'])} was planned. "
                f"The step was not taken. Use batches of one size, micro_batches, or device_memory of at least "
                f"{show_bytes(need)}"
            )

    def _within_budget(
        self, micro_batches: int, rows: int, activations: Activations, process: int, tail: int
    ) -> MemoryPlan:
        asked = None if self.config.device_memory is None else parse_bytes(self.config.device_memory, "device_memory")
        budget = self.device.budget(asked, chosen=self.config.num_slots is not None)
        try:
            return self._fit_into(budget, micro_batches, rows, activations, process, tail)
        except BudgetError as error:
            if asked is None or budget is None or asked == budget:
                raise
            raise BudgetError(
                f"{error}; the CUDA context and libraries take {show_bytes(asked - budget)} of "
                f"device_memory={show_bytes(asked)}"
            ) from None

    def activations(self, part: Batch, objective: Objective) -> Activations:
        call: ForwardCall = objective
        if isinstance(self.shadow, str):
            return Activations(inputs=tensor_bytes([part]), unknown=self.shadow)
        with undisturbed(self.shadow, self.config.mode, self.config.seed):
            return measure_activations(
                self.shadow, self.plan, part, call, device=self.device.kind,
                losses=lambda model: for_a_loss(model, objective),
            )  # fmt: skip

    def tail_bytes(self, part: Batch | None, objective: Objective) -> int:
        """The tail's numbers, and what the lane that records its gradient keeps for it on a part of a batch."""
        if not self.tail or part is None or isinstance(self.shadow, str):
            return tail_bytes(self.plan, self.tail)
        with undisturbed(self.shadow, self.config.mode, self.config.seed):
            return tail_bytes(
                self.plan, self.tail, self.shadow, part, objective, losses=lambda model: for_a_loss(model, objective)
            )

    def _fit_into(
        self, budget: int | None, micro_batches: int, rows: int, activations: Activations, process: int, tail: int
    ) -> MemoryPlan:
        config = self.config
        return plan_memory(
            self.plan, self.layout, offload="none" if self.in_place else self.offload, budget=budget,
            num_slots=config.num_slots,
            perturbations=self.perturbations, micro_batches=micro_batches,
            order=config.order, ahead=config.prefetch, io_threads=config.io_threads if config.overlap else 0,
            rows=rows, activations=activations, process=process, tail=tail,
        )  # fmt: skip


def prepare(
    model: nn.Module,
    dtype_of: Callable[[str], torch.dtype],
    config: EngineConfig,
    method: Method,
    device: PlannedDevice,
    *,
    example: Batch | None = None,
    call: ForwardCall | None = None,
    offload: str | None = None,
    notes: tuple[str, ...] = (),
    sharers: int = 1,
    kept_of: KeptOf = lambda name: (),
    decided: tuple[str, ...] = (),
    recorded: Mapping[str, Any] | None = None,
) -> Prepared:
    """Decide how a model is cut, stored and streamed. Reads no weights.

    dtype_of(name): dtype of a parameter of the base; kept_of(name): the formats that hold the parameter's own codes.
    example: a batch to trace the forward with, and call: how to call the model on it; otherwise the model's dummy
    inputs are used. offload: a tier that is already decided; it overrides the settings. notes: the model's notes, which
    become the plan's first. sharers: number of processes that each need this much of the host's memory. decided: lines
    for settings of "auto" that were chosen before. recorded: the header of the journal that goes on: what the run's
    version chose is kept, where this version would choose otherwise. Raises ConfigError for settings that contradict
    each other, BudgetError if a memory tier cannot hold the model.
    """
    if method.noise.rank and device.kind != "cpu":
        raise ConfigError(
            f"method {method.name!r} is not on a GPU yet: its directions of low rank are made on CPUs only. Use "
            "device='cpu', or mezo"
        )
    traced = {} if call is None else {"call": call}
    with undisturbed(model, config.mode, config.seed):
        full = make_plan(
            model, example, trainable=config.trainable, block_numel=config.block_numel, notes=notes, **traced
        )
    trains, tail = without_tail(_with_gain(full, method), config, method.tail_alone)
    check_tunes(method.tunes, method.lr, method.eps, trains)
    _parts(trains, config, method)  # raises if the method finds no parts
    if config.storage == "auto":
        storage, why = choose_storage(trains, dtype_of, config, sharers)
        config, decided = replace(config, storage=storage), (*decided, f"storage auto takes {storage}: {why}")
    adapts = config.adapter is not None
    decide = partial(decide_formats, trains, config.storage, dtype_of, config.keep, method.target, resident=adapts)
    stored = decide(kept_of=kept_of)
    if config.storage == KEPT and recorded is not None:
        stored = _as_recorded(stored, decide, kept_of, recorded)
    layout = make_layout(stored.plan, stored.format_of, stored.target)
    offload = choose_offload(config, layout, device, sharers) if offload is None else offload
    stays = _in_place(config, offload, device)
    folds = config.fold_every
    if folds is None and recorded is not None and type(recorded.get("fold_every")) is int:
        folds = recorded["fold_every"]
    every = choose_fold_every(folds, stored.plan, layout, stays, method.noise.fold_every, method.noises)
    return Prepared(_shadow(model), full, stored.plan, layout, config, method, device, offload, every, decided, tail)


def _as_recorded(newest: Stored, decide: Callable[..., Stored], kept_of: KeptOf, recorded: Mapping[str, Any]) -> Stored:
    """The formats of a run that began with storage="kept", as its version chose them. `newest` if none of the earlier
    choices is the journal's: the run is then refused when its journal is compared."""
    wanted = recorded.get("storage")
    if storage_digest(newest.formats) == wanted:
        return newest
    for age in range(NEWEST_KEPT - 1, -1, -1):

        def earlier(name: str, age: int = age) -> tuple[Format, ...]:
            return tuple(fmt for fmt in kept_of(name) if kept_since(fmt) <= age)

        if not any(earlier(name) for name in newest.plan.params):
            break
        found = decide(kept_of=earlier)
        if storage_digest(found.formats) == wanted:
            return found
    return newest


def _in_place(config: EngineConfig, offload: str, device: PlannedDevice) -> bool:
    """`Prepared.in_place`."""
    windowed = (config.device_memory, config.num_slots, config.prefetch) != (None, None, None) or not config.overlap
    return offload == "none" or (offload == "host" and not device.own_memory and not windowed)


def _parts(plan: Plan, config: EngineConfig, method: Method) -> Parts:
    return method.parts(config.seed, (name for name, spec in plan.params.items() if spec.trainable))


def _with_gain(plan: Plan, method: Method) -> Plan:
    """The plan in which parameters with a gain of 0 do not train, as if `trainable` had left them out."""
    still = {
        name for name, spec in plan.params.items() if spec.trainable and method.gain(name, spec.shape) == Gain(0.0, 0.0)
    }
    params = {name: replace(spec, trainable=spec.trainable and name not in still) for name, spec in plan.params.items()}
    if still and not any(spec.trainable for spec in params.values()):
        raise ConfigError(f"method {method.name!r} gives every trainable parameter a gain of 0: nothing trains")
    return replace(plan, params=params) if still else plan


def _shadow(model: nn.Module) -> nn.Module | str:
    try:
        return meta_copy(model)
    except Exception as error:  # whatever the module's own code raises when it is copied
        return f"the module cannot be copied: {type(error).__name__}: {error}"[:200]


def choose_offload(config: EngineConfig, layout: Layout, device: PlannedDevice, sharers: int = 1) -> str:
    """`offload`, with "auto" resolved: none if the stored model takes at most half of the free memory, else disk.

    On a GPU: none if it takes at most half of the GPU's free memory, else host if the host can hold it, else disk.
    sharers: number of processes that each need this much of the host's memory.
    Raises BudgetError if a memory tier cannot hold the model.
    """
    need, free = layout.total_bytes, available_bytes() // sharers
    if device.own_memory:
        return _choose_beside_gpu(config, need, free, device.free_bytes())
    if config.offload == "auto":
        if need <= free / 2 or (config.run_dir is None and need <= 0.9 * free):
            return "none"
        if config.run_dir is None:
            raise BudgetError(
                f"the stored model takes {show_bytes(need)} and {show_bytes(free)} of memory is free: "
                "give run_dir=... so that it can stream from disk"
            )
        return "disk"
    if config.offload in ("none", "host") and need > free:
        raise BudgetError(
            f"offload={config.offload!r} keeps the whole model in memory: {show_bytes(need)}, but "
            f"{show_bytes(free)} is free. Use offload='disk', or a smaller storage format"
        )
    return config.offload


def _choose_beside_gpu(config: EngineConfig, need: int, host: int, gpu: int) -> str:
    if config.offload == "auto":
        if need <= gpu / 2:
            return "none"
        if need <= 0.9 * host:
            return "host"
        if config.run_dir is None:
            raise BudgetError(
                f"the stored model takes {show_bytes(need)}; {show_bytes(gpu)} of GPU memory and {show_bytes(host)} of "
                "host memory are free: give run_dir=... so that it can stream from disk"
            )
        return "disk"
    free = {"none": gpu, "host": host}.get(config.offload, need)
    if need > free:
        where = "GPU" if config.offload == "none" else "host"
        raise BudgetError(
            f"offload={config.offload!r} keeps the whole model in {where} memory: {show_bytes(need)}, but "
            f"{show_bytes(free)} is free. Use offload={'host' if config.offload == 'none' else 'disk'!r}, or a smaller "
            "storage format"
        )
    return config.offload
