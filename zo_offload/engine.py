"""The engine: fine-tune any transformer with forward passes only, its weights streamed through a small window.

    engine = Engine("path/to/checkpoint", method=MeZO(lr=1e-6), offload="disk", run_dir="runs/a")
    result = engine.fit("train.jsonl", steps=2000, eval_data="dev.jsonl")
    engine.save_pretrained("tuned/")

One step of MeZO, as this module runs it:

    perturbations = method.perturbations(seed, step)              # +eps z, -eps z
    losses = [loss of the model at w + perturbation, ...]         # lanes in lockstep, each block visited once
    outcome = method.update(losses, lr)                           # the projected gradient
    journal.append(outcome); log.append(outcome)                  # applied when each block is next visited

The engine wires the parts and holds no algorithm.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import runs
from .adapters import beside_adapter
from .away import Away
from .binding import Binding, bound_from, check_horizon
from .calls import FitCall
from .checkpoint import Checkpoint, save_pretrained
from .closing import Closing
from .compiled import without_wrapper
from .config import DTYPES, EngineConfig
from .data import Batches, StreamBatches, fingerprint, make_batches
from .device_updates import UpdateTable
from .devices import make_device
from .devices.link import Link
from .encode import ENCODING
from .errors import CheckpointError, ConfigError, JournalError, TornError
from .gains import decide_gains
from .generation import check_generates, generate_texts
from .hollow import hollow
from .host_memory import process_bytes
from .identity import check_objective, objective_name
from .ingest import Base, ModuleBase, load_kept
from .journal import Journal, StepRecord
from .journal_format import load_header
from .lanes import Lane
from .late import LateLog, Launched
from .layout import Layout
from .learning_watch import LearningWatch
from .losses import Batch, Objective, model_loss, plain_forward, weighing
from .measures import OptionsLoss
from .memory import MemoryPlan
from .methods import MeZO, lr_schedule
from .micro_batches import split_micro_batches
from .model_kind import ModelKind, kind_of
from .modes import modes_of
from .on_device import Homes, as_inputs, input_dtype, move_what_stays
from .parameters import Tied, tie, untie
from .passes import Passes
from .plan import Plan
from .prepare import prepare
from .records import STILL, Gains
from .session import Maker, Session
from .slots import Traffic
from .sources import as_given
from .stepper import Stepper
from .streamer import Streamer
from .tokenizers import check_saves, has_tokenizer, load_tokenizer
from .training import FitResult, Training, check_same_data
from .trees import tensor_bytes
from .units import parse_bytes
from .updates import UpdateLog
from .whole import Door, Parts, Whole, entry

_log = logging.getLogger(__name__)


def _absolute(model: str | Path) -> str:
    """A directory as an absolute path, so that a run can be resumed from elsewhere; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def _refuse_ranks() -> None:
    """A launcher of several processes would train the same thing several times, or fight for one run directory."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1:
        raise ConfigError(
            f"WORLD_SIZE={world}: several processes are not supported yet. Start one process (without torchrun or "
            "accelerate launch), or unset WORLD_SIZE if each is to train on its own"
        )


def _part_bytes(batch: Batch, micro_batches: int) -> int:
    return tensor_bytes([batch]) // micro_batches


class Engine:
    """Zeroth-order fine-tuning of a checkpoint on disk or a module in memory. See the module's docstring.

    model: a checkpoint directory, a cached hub id, or an nn.Module. A module's weights move into the engine at its
    first use; `restore` puts the trained ones back, after `close` alone its parameters hold NaN. objective: (model,
    batch) -> scalar, default `model(**batch).loss`; it may be non-differentiable. example: a batch to trace with,
    where the model has no dummy inputs of its own. base: first weights of a module on meta. settings: fields of
    `EngineConfig`. Every error a setting can cause is raised here, before weights are read or anything is written;
    what depends on the batch, at the first `fit`, before memory is taken.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        method: MeZO | None = None,
        objective: Objective | None = None,
        tokenizer: Any = None,
        model_class: Any = None,
        example: Batch | None = None,
        base: Base | None = None,
        config: EngineConfig | None = None,
        _resume: bool = False,
        _session: Callable[[Engine], Session] | None = None,
        **settings: Any,
    ) -> None:
        _refuse_ranks()
        self.config = config if config is not None else EngineConfig(**settings)
        if self.config.run_dir is not None:  # absolute once and for all: the process may change its directory
            self.config = replace(self.config, run_dir=Path(self.config.run_dir).absolute())
        self.method = method if method is not None else MeZO()
        self.objective = objective if objective is not None else model_loss
        self.tokenizer = tokenizer  # as given; `_tokenizer` falls back on the checkpoint's
        self._own_tokenizer: Any = None
        if tokenizer is not None:
            check_saves(tokenizer)
        self.run_dir = Path(self.config.run_dir) if self.config.run_dir is not None else None
        if self.run_dir is not None and not _resume:
            runs.check_fresh(self.run_dir)
        self._model_name = None if isinstance(model, nn.Module) else _absolute(model)
        self._model_class = model_class if isinstance(model_class, str) else getattr(model_class, "__name__", None)
        self.process_bytes = process_bytes()
        self.device = make_device(self.config.device)
        self.checkpoint: Checkpoint | None = None
        self.base: Base
        self._given = model if isinstance(model, nn.Module) else None
        self._away: Away | None = None
        self._ties: tuple[Tied, ...] = ()
        if isinstance(model, nn.Module):
            if self.config.config_overrides:
                raise ConfigError("config_overrides are of a checkpoint's config.json: change the module's own config")
            self.model: nn.Module = without_wrapper(model)
            self._ties = tie(self.model)
            self.base = base if base is not None else ModuleBase(self.model)
        else:
            self.checkpoint = Checkpoint.open(
                model, trust_remote_code=self.config.trust_remote_code, overrides=self.config.config_overrides
            )
            own = self.device.default_compute(self.checkpoint.dtype)
            compute = DTYPES[self.config.compute] if self.config.compute is not None else own
            self.model = self.checkpoint.build_model(compute, model_class, seed=self.config.seed)
            self.base = self.checkpoint
        self.kind: ModelKind = kind_of(self.model)
        self._make_session = _session  # a replayed engine: its blocks are made as they are fetched
        prepared = self._prepared = prepare(
            self.model, self.base.dtype_of, self.config, self.method, self.device, example=example,
            offload=None if _session is None else "disk",
            notes=() if self.checkpoint is None else self.checkpoint.notes,
        )  # fmt: skip
        self.config, self.storage_note = prepared.config, prepared.storage_note
        self.plan: Plan = prepared.plan
        self.layout: Layout = prepared.layout
        self.offload, self.fold_every = prepared.offload, prepared.fold_every
        if wrong := beside_adapter(self.model, self._trained()):
            _log.warning("%s; save_pretrained will refuse", wrong)
        self.gains: Gains | None = None
        """Of the parameters whose perturbation or update is not the method's own, once decided: see `gains.py`."""
        if not _resume and _session is None:
            self.gains = decide_gains(self.plan, self.layout, self.method, self.base)
        self.memory: MemoryPlan = self._plan_memory(example)
        self._planned_bytes = 0  # of the largest part of a batch that the memory plan has seen
        self.log = UpdateLog()
        self.journal: Journal | None = None
        self.evals: list[dict[str, float]] = []
        self._check_data = self._at_once = False
        self._resumes = _resume
        self._last_fit: dict[str, Any] | None = None  # how `fit` was called before the run was resumed
        self._horizon: int | None = None
        self._door = Door()
        self._closing = Closing()
        self._homes: Homes | None = None
        self._session: Session | None = None
        self._parts: Parts | None = None
        self._whole: Whole | None = None
        self._weights: dict[str, Tensor] | None = None  # read for `restore`, not put back yet
        self.link: Link | None = None
        """Of a GPU to the host, measured when the run was started; None where nothing streams over one."""
        self._closed = False
        weakref.finalize(self, _release_dropped, self._closing, self._door, str(self.run_dir or "no run_dir"))

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        model: str | Path | nn.Module | None = None,
        *,
        method: MeZO | None = None,
        **changes: Any,
    ) -> Engine:
        """The engine of an earlier run, continued where its journal ends; bit-equal to one that never stopped.

        model: where the base is now, if it was moved; the same module again, with its first weights, if the run was
        made from one in memory. method: of a class of the caller's own, as it was. changes: settings that do not alter
        the numbers (offload, window, threads), and `objective`, `tokenizer`. A run that ended before its first weights
        were in place has no journal; it is begun anew.
        Raises JournalError if run_dir is not a run, or names what differs from it.
        """
        run_dir = Path(run_dir).absolute()
        record = runs.load_config(run_dir)
        if not (run_dir / runs.JOURNAL).exists() and (run_dir / runs.METRICS).exists():
            raise JournalError(f"{run_dir}: {runs.JOURNAL} is missing, and it is the run. Restore it")
        base = record["model"] if model is None else model
        if base is None:
            raise ConfigError(f"{run_dir} was made from a module in memory: pass it again, resume(run_dir, model)")
        if isinstance(base, str) and model is None and Path(base).is_absolute() and not Path(base).exists():
            raise CheckpointError(
                f"{run_dir} stands on {base}, which is not there. If it was moved, say where it is now: "
                "Engine.resume(run_dir, model=...) (--base)"
            )
        if record["settings"]["trainable"] == "<predicate>" and "trainable" not in changes:
            raise ConfigError(f"{run_dir} was made with trainable=<a function>: pass the same one to resume")
        passed = {k: changes.pop(k) for k in ("objective", "tokenizer", "model_class", "example") if k in changes}
        if record.get("model_class") is not None:
            passed.setdefault("model_class", record["model_class"])
        settings = {**record["settings"], **changes, "run_dir": run_dir}
        method = runs.make_method(record["method"]) if method is None else method
        engine = cls(base, method=method, _resume=True, **passed, **settings)
        engine._last_fit = record.get("fit")
        return engine

    @property
    def eps_halvings(self) -> int:
        """How often on_nonfinite="halve_eps" has halved eps."""
        return self._parts.stepper.halvings if self._parts is not None else 0

    # ---- training --------------------------------------------------------------------------------------------------

    @entry
    def fit(
        self,
        train_data: Any = None,
        *,
        steps: int | None = None,
        batch_size: int | None = None,
        eval_data: Any = None,
        eval_every: int | None = None,
        micro_batches: int | None = None,
        progress: bool = False,
        callback: Callable[[StepRecord], None] | None = None,
        new_data: bool = False,
        **data_options: Any,
    ) -> FitResult:
        """Train until `steps` steps have been taken in all (a resumed run counts from its journal).

        train_data: a DataLoader or other iterable of dicts of tensors, a dataset or list of dicts, or a path to JSONL
        or CSV; see `data.make_batches` for data_options. micro_batches: parts a batch is cut into, each a lane of its
        own (gradient accumulation: same weights, same step). eval_every: also at the end. callback: after each step.
        A resumed run repeats what is not given as it was: files, sizes, options, steps (eval_data=False: none).
        new_data: a run may go on with other data than it was begun with; otherwise that is an error.
        SIGINT and SIGTERM end it after the step with `Stopped` (a KeyboardInterrupt), a second one at once.
        Raises DataError, DivergenceError, StorageError; whatever happens, the journal holds every finished step.
        """
        call = FitCall(train_data, eval_data, steps, batch_size, micro_batches, eval_every, data_options)
        call = call.after(self._last_fit)
        call.check()
        steps = self.method.steps if call.steps is None else call.steps
        rows, parts_of_batch = call.batch_size or self.method.batch_size, call.micro_batches or 1
        batches = self._batches(call.data, rows, dict(call.options))
        evaluation = None
        if call.eval_data is not None:
            evaluation = self._batches(call.eval_data, rows, dict(call.options), shuffle=False)
        binding = Binding.of(batches, parts_of_batch, self.method, steps, new_data=new_data)
        if self.journal is not None:
            binding.check(self.journal)
        parts = self._begin(
            batches.batch(0), parts_of_batch, self._objective_of(batches), largest=batches.largest(),
            admit=binding.check,
        )  # fmt: skip
        check_horizon(self._horizon, steps)
        self._horizon = binding.horizon if self._horizon is None else self._horizon
        if self.journal is not None and self.run_dir is not None:
            self._horizon = binding.bind(self.journal)
            runs.save_fit(self.run_dir, replace(call, steps=steps, batch_size=rows).record())
        factor = lr_schedule(self.method.schedule, self.method.warmup_steps, self._horizon or steps)
        if self._check_data and not new_data:
            assert self.journal is not None
            check_same_data(batches, self.journal.steps[bound_from(self.journal) :])
        self._check_data = False
        return Training(
            self, parts.streamer, batches, evaluation, steps, lambda step: self.method.lr * factor(step),
            parts_of_batch, call.eval_every, progress, callback,
        ).run()  # fmt: skip

    def take_steps(
        self,
        batches: Batches,
        steps: range,
        lr: Callable[[int], float],
        micro_batches: int,
        pause_after: Callable[[int], bool],
    ) -> Iterator[tuple[StepRecord, Batch]]:
        """Take `steps`; their records and batches as they are settled: on a GPU, each after the next one is launched.

        pause_after(version): nothing is launched after that many steps before all of them are settled.
        """
        waiting: deque[tuple[Launched, Any]] = deque()
        for step in steps:
            batch: Batch = batches.batch(step)
            launched = self.launch(batch, lr(step), micro_batches=micro_batches, objective=batches.objective)
            waiting.append((launched, batch))
            late = self._start().stepper.late
            ahead = 1 if late and step + 1 < steps.stop and not pause_after(step + 1) else 0
            while len(waiting) > ahead:
                launched, its_batch = waiting.popleft()
                yield self.finish(launched), its_batch

    @entry
    def step(self, batch: Batch, lr: float | None = None, *, micro_batches: int = 1) -> StepRecord:
        """One step on one batch: lanes, update, journal. The update reaches each block at its next visit."""
        return self.finish(self.launch(batch, lr, micro_batches=micro_batches))

    @entry
    def launch(
        self, batch: Batch, lr: float | None = None, *, micro_batches: int = 1, objective: Objective | None = None
    ) -> Launched:
        """A step as far as it goes without looking at its losses: on a GPU, enqueued. `finish` each, in order.

        objective: in place of the engine's. Raises DataError where no label of the batch counts, unless such steps are
        skipped (on_nonfinite="skip").
        """
        if self._make_session is not None:
            raise ConfigError("a replayed engine does not train: export this step, or resume its run")
        parts = self._begin(batch, micro_batches, objective)
        self._check_objective(self.journal)
        self._keep_budget(parts, batch, micro_batches, objective)
        stepper = parts.stepper
        lr = self.method.lr if lr is None else lr
        with self._work():
            stepper.begin()
            perturbations = stepper.current.perturbations(self.config.seed, self.log.version)
            losses = parts.passes.losses(
                batch, perturbations, micro_batches, step=self.log.version, late=stepper.late, objective=objective,
                empty=self.method.on_nonfinite == "skip",
            )  # fmt: skip
            self._planned_bytes = max(self._planned_bytes, _part_bytes(batch, micro_batches))
            launched = stepper.launch(losses, lr, fingerprint(batch))
            if parts.session.snapshots is not None:
                parts.session.snapshots.tick(self.log.version, parts.streamer.window)
        return launched

    def _keep_budget(self, parts: Parts, batch: Batch, micro_batches: int, objective: Objective | None) -> None:
        """A batch larger than any before is within the memory budget, or BudgetError says so before its step."""
        if self.memory.budget is None or _part_bytes(batch, micro_batches) <= self._planned_bytes:
            return
        if self.memory.unknown:
            parts.passes.watch_next()
        else:
            asked = self._asked(objective)
            self._prepared.check_batch(self.memory, batch, objective=asked, micro_batches=micro_batches)

    def _asked(self, objective: Objective | None) -> Objective:
        """The objective of one call, the engine's where it has none of its own."""
        return self.objective if objective is None else objective

    @entry
    def finish(self, launched: Launched) -> StepRecord:
        """Read a launched step's losses and put it on record. Raises what `on_nonfinite` says."""
        parts = self._start()
        with self._work():
            record = parts.stepper.settle(launched)
            parts.watch.see(record)
            return record

    @property
    def learning(self) -> LearningWatch:
        """What watches whether the steps that were taken since this engine began teach the model anything."""
        return self._start().watch

    @entry
    def evaluate(self, data: Any, *, batch_size: int | None = None, **data_options: Any) -> dict[str, float]:
        """Mean loss, and accuracy where the data defines it, at the current weights. See `data.make_batches`."""
        rows = self.method.batch_size if batch_size is None else batch_size
        batches = self._batches(data, rows, data_options, shuffle=False)
        self._start(batches.first(), objective=self._objective_of(batches))
        try:
            self._check_objective(self.journal)
        except JournalError as error:
            _log.warning("this evaluation is of another loss than the run's: %s", error)
        return self.measure(batches)

    @entry
    def measure(self, batches: Batches, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`evaluate` on batches that are made already, once under way. between: called before each batch."""
        passes = self._start().passes
        with self._work():
            return passes.measure(batches, between)

    @entry
    def run(self, batch: Batch, call: Callable[[nn.Module, Batch], Any] | None = None) -> Any:
        """One forward at the current weights: `call(model, batch)`, default `model(**batch)`. For logits, say."""
        passes = self._start(batch, objective=plain_forward).passes  # no loss is asked for
        with self._work():
            return passes.forward([Lane(STILL, batch)], call or (lambda model, inputs: model(**inputs)), exact=True)[0]

    @entry
    def generate(self, prompts: Any, **options: Any) -> Any:
        """`model.generate` at the current weights: texts for prompts, or token ids for a batch of them.

        prompts: a text, a conversation (a list of messages, dicts with role and content), a list of either, or a dict
        of tensors named as the model's arguments (input_ids, attention_mask, input_features, ...). One pass a token,
        for all rows together. options: of transformers' `generate` (max_new_tokens, do_sample, ...). A text comes back
        as what follows it; of one prompt with num_return_sequences, or of a list, a list. Raises ConfigError.
        """
        check_generates(self.model)
        model: Any = self.model
        prompts = {"input_ids": prompts} if isinstance(prompts, Tensor) else prompts
        if isinstance(prompts, Mapping) and "role" not in prompts:
            inputs = as_inputs(prompts, input_dtype(model))
            return self.run(inputs, lambda _, placed: model.generate(**placed, **options))
        return generate_texts(self, self._tokenizer(), prompts, **options)

    # ---- results -----------------------------------------------------------------------------------------------------

    @entry
    def save_pretrained(
        self, directory: str | Path, *, max_shard_bytes: int | float | str = 5e9, overwrite: bool = False
    ) -> list[Path]:
        """Write the current weights as a checkpoint that plain transformers loads, a block in memory at a time.

        Configs and tokenizer go along. overwrite: into a directory that is not empty; see `export.save_pretrained`. Of
        a PeftModel the adapter is written, for `PeftModel.from_pretrained`; ConfigError if more than it was trained.
        """
        if wrong := beside_adapter(self.model, self._trained()):
            raise ConfigError(wrong)
        parts = self._start()
        self._flush()
        with self._work():
            return save_pretrained(
                Path(directory), model=self.model, names=list(self.plan.params), weights=parts.streamer.reader,
                checkpoint=self.checkpoint, max_shard_bytes=int(parse_bytes(max_shard_bytes, "max_shard_bytes")),
                overwrite=overwrite, tokenizer=self.tokenizer,
                run=lambda call: parts.passes.forward([Lane(STILL, {})], lambda *_: call(), exact=True)[0],
            )  # fmt: skip

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, current value in the storage dtype) of every parameter, one in memory at a time."""
        self._flush()
        named = self.model.named_parameters()
        return ((name, self._read(name) if name in self.plan.params else p.detach().cpu()) for name, p in named)

    @entry
    def _read(self, name: str) -> Tensor:
        reader = self._start().streamer.reader
        with self._work():
            return reader.read(name)

    @entry
    def restore(self) -> nn.Module:
        """Put the current weights into the module's parameters, whole, and return it; the engine is closed.

        The module is where it was when it was given (a checkpoint's, on the host). Its parameters are other objects
        than then if they were not on the engine's device.
        """
        if self._weights is None:
            self._weights = {name: value for name, value in self.weights() if name in self.plan.params}
        self.close()
        assert self._homes is not None
        self._lift_guard()
        self._homes.bring_back(self.model, self._weights)
        self._weights = None
        untie(self.model, self._ties)
        self._ties = ()
        return self._given if self._given is not None else self.model

    def _lift_guard(self) -> None:
        if self._away is not None:
            self._away.lift()
            self._away = None

    def close(self) -> None:
        """Flush, end the worker threads, close the journal, leave the model; all of it, whatever fails on the way.

        Raises what kept the steps from the disk, once everything is released. Safe to call twice; `with Engine(...)`
        calls it. An engine that is dropped without it is closed without the flush: its journal has its steps.
        """
        if self._door.is_forked:  # all of it is the parent's
            return
        self._close()

    @entry
    def _close(self) -> None:
        if self._parts is not None and self._parts.passes.is_inside():
            raise ConfigError("the engine cannot be closed from within one of its own passes")
        first, self._closed = not self._closed, True
        try:
            if first and not self._at_once and self._parts is not None:
                self._flush()
        except TornError as torn:  # nothing that can be flushed; what can be done is done when it is reopened
            _log.warning("%s", torn)
        finally:
            self._closing.close()

    @entry
    def settle(self, *, at_once: bool = False) -> None:
        """End of a call of `fit`: flush and sync, or (at once) leave it all to the journal, now and in `close`."""
        self._at_once = at_once
        if self._parts is None or self._closed:
            return
        if at_once:
            with self._work():
                self._parts.stepper.settle_before(self.log.version)
        else:
            self._flush()

    def wait_share(self, traffic: Traffic, seconds: float) -> float:
        """Share of the time that compute waited for blocks; on a GPU, that the link needed for what was moved."""
        if self.link is None:
            return traffic.wait_s / seconds
        return min(1.0, self.link.seconds(traffic.fetch_bytes, traffic.flush_bytes) / seconds)

    @entry
    def _flush(self) -> None:
        """Every block to the last step, in its tier; the journal to the disk."""
        parts = self._parts if self._parts is not None else self._start()
        with self._work():
            parts.stepper.settle_before(self.log.version)
            parts.session.settle()
            parts.streamer.flush_all()
            if self.journal is not None:
                self.journal.make_durable(self.log.version)

    def _work(self) -> Whole:
        """Around all that is done with the parts; see `whole.py`."""
        assert self._whole is not None
        return self._whole

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "an engine has threads, files and memory of its own and can be neither copied nor pickled: save_pretrained "
            "keeps its weights, and Engine.resume(run_dir) opens its run again"
        )

    # ---- getting under way -------------------------------------------------------------------------------------------

    def _plan_memory(
        self, batch: Batch | None, micro_batches: int = 1, objective: Objective | None = None
    ) -> MemoryPlan:
        """Window and service order for lanes on a part of `batch`; without one, activations count as nothing."""
        return self._prepared.plan_memory(
            batch, objective=self._asked(objective), micro_batches=micro_batches, process=self.process_bytes
        )

    def _check_objective(self, journal: Journal | None) -> None:
        """Raise JournalError if the run's steps so far were computed with another objective."""
        if journal is not None:
            check_objective(objective_name(self.objective, model_loss), journal.header, str(self.run_dir))

    def _start(
        self,
        batch: Batch | None = None,
        micro_batches: int = 1,
        *,
        objective: Objective | None = None,
        admit: Callable[[Journal], None] | None = None,
    ) -> Parts:
        """What takes steps; at the first use, fill or reopen the tier, hollow the model, and wire it all.

        admit: raises if a run that is reopened cannot go on as is asked; called before weights are read.
        """

        def admit_all(journal: Journal) -> None:
            if admit is not None:
                self._check_objective(journal)
                admit(journal)

        if self._closed:
            raise ConfigError("this engine is closed; make another, or Engine.resume(run_dir)")
        if self._parts is not None:
            return self._parts
        if batch is not None:
            self.memory = self._plan_memory(batch, micro_batches, objective)
            self._planned_bytes = _part_bytes(batch, micro_batches)
        else:
            self.memory = self._prepared.plan_blindly(process=self.process_bytes)
        if self._session is None:
            self._open_session(admit_all)
        self._parts = self._make_parts()
        return self._parts

    def _begin(
        self,
        batch: Batch,
        micro_batches: int,
        objective: Objective | None,
        *,
        largest: Batch | None = None,
        admit: Callable[[Journal], None] | None = None,
    ) -> Parts:
        """`_start` for steps: a batch that cannot be cut, or in which nothing counts, is named before that.

        largest: a batch as large as any that will come, if that is known: memory is planned for it.
        """
        if self._parts is None and self.method.on_nonfinite != "skip":
            weigh = weighing(self.model, self._asked(objective))
            weigh.shares(split_micro_batches(batch, micro_batches, self.config.whole))
        planned = batch if largest is None else largest
        return self._start(planned, micro_batches, objective=objective, admit=admit)

    def _open_session(self, admit: Callable[[Journal], None]) -> None:
        """Fill or reopen the tier, hollow the model. If it is broken off nothing is left of it."""
        self._undo_session()  # that, too, may have been broken off
        make = self._make_session
        try:
            session = make(self) if make is not None else Maker(
                self.plan, self.layout, self.base, self.config, self.method, self.offload, self.fold_every,
                self.device, model_name=self._model_name, model_class=self._model_class,
                directory=None if self.checkpoint is None else self.checkpoint.path, model=self.model,
                objective=objective_name(self.objective, model_loss), fresh=not self._resumes,
                modes=modes_of(self.model, self.config.mode), gains=self.gains,
            ).start(admit)  # fmt: skip
            self._closing.add(self.device.trim)  # the window is gone: what an allocator keeps of it is others' to use
            self._closing.add(session.close)
            self._door.pid = os.getpid()
            self._homes = Homes(self.model)
            kept = set(self.plan.tree.kept.values())
            load_kept(self.model, kept, self.base)
            hollow(self.model, self.device.torch_device, self.plan.params)
            move_what_stays(self.model, self.device.torch_device, kept)
            self._away = Away(self.model, self.plan.params)
            self._closing.add(self._away.close)
            self.log, self.journal, self.gains = session.log, session.journal, session.gains
            self._check_data = session.reopened
            if session.reopened and self.journal is not None:
                found = runs.evaluations(self._path(runs.METRICS))
                self.evals = [values for values in found if self._has_reached(values)]
            self._session = session
            self._resumes = True  # from here on what run_dir holds is this engine's
        except BaseException:
            if self._session is None:
                self._undo_session()
            raise

    def _undo_session(self) -> None:
        self._closing.close()
        self._lift_guard()
        if isinstance(self.base, ModuleBase) and self._homes is not None and self.base.values:
            values = {name: self.base.values[name] for name in self.plan.params}
            self._homes.bring_back(self.model, values)
        self._homes = None

    def _make_parts(self) -> Parts:
        """Wire it all. If it is broken off it can be done again: the session has the weights."""
        assert self._session is not None
        session, before = self._session, 3  # the session's own, see above
        self._closing.close(down_to=before)
        if isinstance(self.base, ModuleBase) and self._make_session is None:
            self.base.let_go()
        self.device.trim()  # of what the base's tensors took while they were read
        if self.device.late and not isinstance(self.log, LateLog):
            factors = {gain.update for gain in session.gains.values()}
            self.log = LateLog(self.log, UpdateTable(self.device.torch_device, self.device.upload, factors))
        formats = [place.fmt.torch_dtype for place in self.layout.places.values()]
        stepper = Stepper(
            self.method, self.config.seed, self.fold_every, self.log, self.journal, self.device,
            min((torch.finfo(dtype).max for dtype in formats), default=math.inf)
            / max((1.0, *(gain.update for gain in session.gains.values()))),
            halvings=sum(record.halved for record in self.journal.steps) if self.journal is not None else 0,
        )  # fmt: skip
        # the link first: page-locking, which begins behind our back, would take part in the measurement
        self.link = self.device.measure_link() if self.offload != "none" else None
        if session.bare is None:
            session.bare = session.tier
        session.tier = self.device.wrap(session.bare, self.offload, self.layout.block_bytes, self.config.host_memory)
        try:
            streamer = Streamer(
                self.plan, self.layout, session.tier, self.device, self.log, window=self.memory.window,
                fold_every=self.fold_every, noise=self.method.noise, rounding=self.config.rounding,
                gains=session.gains, threads=self.config.threads,
            )  # fmt: skip
            self._closing.add(streamer.close)
            passes = Passes(
                self.model, self.plan, streamer, self.device, objective=self.objective, order=self.memory.order,
                fixed=self.config.order != "auto", compute=self.config.compute, mode=self.config.mode,
                seed=self.config.seed, whole=self.config.whole, on_plan=_told_weakly(self),
                on_measured=self.memory.check_reserve,
            )  # fmt: skip
            self._closing.add(passes.close)
            watch = LearningWatch(streamer.changes, _warns(self.journal))
            parts = Parts(session, streamer, passes, stepper, watch)
            self._whole = Whole(parts, [block.name for block in self.plan.blocks], self.run_dir)
            return parts
        except BaseException:
            self._closing.close(down_to=before)
            raise

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def streamer(self) -> Streamer:
        """Where weights come from and what it counts; once the engine is under way."""
        return self._start().streamer

    def _batches(self, data: Any, batch_size: int, options: dict[str, Any], shuffle: bool = True) -> Batches:
        """Data as batches. Text without a tokenizer given uses the checkpoint's own."""
        options = {"tokenizer": self._tokenizer(), **options}
        own_objective = self.objective is not model_loss
        batches = make_batches(
            data, batch_size=batch_size, kind=self.kind, own_objective=own_objective, version=self._encoding(),
            seed=self.config.seed, shuffle=shuffle, **options,
        )  # fmt: skip
        if own_objective and isinstance(batches, StreamBatches):  # it may give tuples
            batches.objective = as_given(self.objective)
        return batches

    def _encoding(self) -> int:
        """Number of the encoding of rows that a run was begun with; the present one where none was begun."""
        path = self._path(runs.JOURNAL)
        if path is None or not self._resumes or not path.exists():
            return ENCODING
        header = self.journal.header if self.journal is not None else load_header(path)
        return int(header.get("encoding", 1))

    def _objective_of(self, batches: Batches) -> Objective:
        """The objective that the data asks for, else the engine's; both would be one too many."""
        if batches.objective is None:
            return self.objective
        if self.objective is not model_loss and isinstance(batches.objective, OptionsLoss):
            raise ConfigError("loss='options' and objective= are two losses: leave one of them out")
        return batches.objective

    def _tokenizer(self) -> Any:
        """The one that was given, else the checkpoint's own, if it has one."""
        path = None if self.checkpoint is None else self.checkpoint.path
        if self.tokenizer is not None or path is None or not has_tokenizer(path):
            return self.tokenizer
        if self._own_tokenizer is None:
            self._own_tokenizer = load_tokenizer(path, trust_remote_code=self.config.trust_remote_code)
        return self._own_tokenizer

    def _trained(self) -> set[str]:
        return {name for name, spec in self.plan.params.items() if spec.trainable}

    def _has_reached(self, values: dict[str, float]) -> bool:
        """Whether an evaluation is of this run's past; the journal may have been cut since."""
        return values["step"] <= self.log.version

    def _path(self, name: str) -> Path | None:
        return None if self.run_dir is None else self.run_dir / name


def _told_weakly(engine: Engine) -> Callable[[Plan], None]:
    """Tells the engine a corrected plan, without keeping it: its parts must not hold one that nobody else does."""
    adopt = weakref.WeakMethod(engine._adopt)

    def tell(plan: Plan) -> None:
        told = adopt()
        if told is not None:
            told(plan)

    return tell


def _warns(journal: Journal | None) -> Callable[[str, str], None]:
    """Warns of a run that learns nothing, and notes in the journal what does not follow from its records."""

    def warn(kind: str, text: str) -> None:
        if journal is not None and kind == "vanishing":
            journal.note({"warning": text})
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    return warn


def _release_dropped(closing: Closing, door: Door, where: str) -> None:
    """An engine was dropped: release what it has, if `close` was not called."""
    if not len(closing) or door.is_forked:
        return
    warnings.warn(f"an engine ({where}) was dropped without close(): use `with Engine(...)`", ResourceWarning, 2)
    try:
        closing.close()
    except Exception as error:  # nobody is there to raise to
        _log.warning("an engine (%s) that was dropped without close(): %s", where, error)
