"""The engine: fine-tune any transformer with forward passes only, its weights streamed through a small window.

    engine = Engine("path/to/checkpoint", method=MeZO(lr=1e-6), offload="disk", run_dir="runs/a")
    result = engine.fit("train.jsonl", steps=2000, eval_data="dev.jsonl")
    engine.save_pretrained("tuned/")

One step of a method (here MeZO), as `active.Run` takes it:

    perturbations = method.perturbations(seed, step)              # +eps z, -eps z
    losses = [loss of the model at w + perturbation, ...]         # lanes in lockstep, each block visited once
    outcome = method.update(seed, step, losses, lr)               # coefficients of each noise
    journal.append(outcome); log.append(outcome)                  # applied when each block is next visited

The engine is what a caller sees: it opens a model (`opening.py`), and hands each call to the run under way (`active`).
"""

from __future__ import annotations

import logging
import weakref
from base64 import b64decode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Unpack

from torch import Tensor, nn

from .checkpoint.basis import Basis
from .checkpoint.load_options import as_settings
from .config import EngineConfig, EngineSettings, check_settings
from .data.batches import check_options
from .data.losses import Batch, Objective, as_objective, model_loss
from .data.metrics import ComputeMetrics
from .data.options import DataOptions
from .data.survey import examples, survey
from .devices.placing import as_inputs, input_dtype
from .errors import CheckpointError, ConfigError, JournalError, ZOError
from .journal import run_directory
from .journal.calls import OPTIONS, FitCall
from .journal.format import read_journal
from .journal.identity import objective_name
from .journal.journal import Journal, StepRecord
from .kernels.records import Gains
from .methods import DEFAULT, Method
from .numerics.updates import UpdateLog
from .plan.plan import Plan
from .ranks.alone import Alone
from .ranks.find import Ranks, find
from .ranks.member import Member
from .ranks.pool import WAIT_S
from .run.active import Run
from .run.basis import activation_basis
from .run.batching import Batching, Shots
from .run.evaluation import evaluated
from .run.generation import check_generates, generate_texts
from .run.joining import SHARED, record_of
from .run.memory import MemoryPlan
from .run.opening import open_model
from .run.result import FitResult
from .run.saving import Which, at_step, save, step_of
from .run.session import Maker
from .run.training import train
from .run.whole import entry, release_dropped
from .stream.ingest import Base, ModuleBase
from .system.plain import as_rate, is_whole, plain_value, user_path

_log = logging.getLogger(__name__)


class Engine:
    """Zeroth-order fine-tuning of a checkpoint on disk or a module in memory. See the module's docstring.

    model: a checkpoint directory, a cached hub id, or an nn.Module. A module's weights move into the engine at its
    first use; the end of `with Engine(module)` and `restore` put the trained ones back, after `close` alone its
    parameters hold NaN. objective: (model,
    batch) -> scalar, default `model(**batch).loss`; it may be non-differentiable. example: a batch to trace with,
    where the model has no dummy inputs of its own. base: first weights of a module on meta. ranks: processes that train
    together, each of which makes this engine: "auto" those that torchrun or accelerate launched, or of an initialised
    process group; `Group(...)` the same with settings; None: this process alone (docs/ranks.md). settings: fields of
    `EngineConfig`, and what is meant by from_pretrained's arguments (num_labels, attn_implementation, dtype, revision).
    Every error a setting can cause is raised here, before weights are read or anything is written; what depends on the
    batch, at the first `fit`, before memory is taken.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        method: Method | None = None,
        objective: Objective | None = None,
        tokenizer: Any = None,
        model_class: Any = None,
        example: Batch | None = None,
        base: Base | None = None,
        config: EngineConfig | None = None,
        ranks: Ranks = "auto",
        **settings: Unpack[EngineSettings],
    ) -> None:
        team = find(ranks)
        with team.together("opening"):
            model, given = as_settings(model, {**settings})
            if config is None:
                check_settings(given)
                config = EngineConfig(**given)
            method = method if method is not None else DEFAULT()
            objective = as_objective(objective) if objective is not None else model_loss
            opened = open_model(model, method, config, model_class=model_class, example=example, base=base, ranks=team)
        begin = Maker(opened, objective_name(objective, model_loss)).start
        self._hold(Run(opened, objective, begin, example=example), tokenizer)

    @classmethod
    def of(cls, run: Run, tokenizer: Any = None) -> Engine:
        """An engine over a run that was put together elsewhere: one that is resumed, or replayed."""
        engine = cls.__new__(cls)
        engine._hold(run, tokenizer)
        return engine

    def _hold(self, run: Run, tokenizer: Any) -> None:
        opened, prepared = run.opened, run.prepared
        self.active, self.door = run, run.door
        self.batching = Batching(opened, run.objective, tokenizer, run.encoding)
        self.model, self.base, self.checkpoint, self.kind = opened.model, opened.base, opened.checkpoint, opened.kind
        self.config, self.method = prepared.config, prepared.method
        self.layout, self.offload, self.fold_every = prepared.layout, prepared.offload, prepared.fold_every
        self.storage_note, self.device, self.run_dir = prepared.storage_note, opened.device, run.run_dir
        weakref.finalize(self, release_dropped, run.closing, run.door, str(run.run_dir or "no run_dir"))

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        model: str | Path | nn.Module | None = None,
        *,
        method: Method | type[Method] | None = None,
        ranks: Ranks = "auto",
        **changes: Any,
    ) -> Engine:
        """The engine of an earlier run, continued where its journal ends; bit-equal to one that never stopped.

        model: where the base is now, if it was moved; the same module again, with its first weights, if the run was
        made from one in memory. method: of a class of the caller's own, as it was, or the class. changes: settings that
        do not alter the numbers (offload, window, threads), and `objective`, `tokenizer`. ranks: as in `Engine`, and as
        many as there are now, whatever the run had before. A run that ended before its
        first weights were in place has no journal; it is begun anew.
        Raises JournalError if run_dir is not a run, or names what differs from it.
        """
        team = find(ranks)
        with team.together("opening"):
            return cls._resume(user_path(run_dir).absolute(), model, method, changes, team)

    @classmethod
    def _resume(
        cls, run_dir: Path, model: Any, method: Method | type[Method] | None, changes: dict[str, Any], team: Alone
    ) -> Engine:
        record, told = team.first("resuming", lambda: run_directory.resumed(run_dir, tells=team.world > 1))
        data = None if told is None or team.leads else b64decode(told)
        where = record["model"] if model is None else model
        if where is None:
            raise ConfigError(f"{run_dir} was made from a module in memory: pass it again, resume(run_dir, model)")
        if isinstance(where, str) and model is None and Path(where).is_absolute() and not Path(where).exists():
            raise CheckpointError(
                f"{run_dir} stands on {where}, which is not there. If it was moved, say where it is now: "
                "Engine.resume(run_dir, model=...) (--base)"
            )
        if record["settings"].get("trainable") == run_directory.PREDICATE and "trainable" not in changes:
            raise ConfigError(f"{run_dir} was made with trainable=<a function>: pass the same one to resume")
        passed = _passed(changes)
        config = EngineConfig(**{**record["settings"], **changes, "run_dir": run_dir})
        return cls._reopened(where, config, record, data, method, passed, team)

    @classmethod
    def _reopened(
        cls, where: Any, config: EngineConfig, record: Mapping[str, Any], data: bytes | None, method: Any,
        passed: Mapping[str, Any], team: Alone,
    ) -> Engine:  # fmt: skip
        objective = model_loss if passed["objective"] is None else as_objective(passed["objective"])
        made = run_directory.make_method(record["method"], method)
        opened = open_model(
            where, made, config, model_class=passed["model_class"] or record.get("model_class"),
            example=passed["example"], base=passed["base"], fresh=False, ranks=team,
        )  # fmt: skip
        opened = opened if data is None else replace(opened, header=read_journal(data).header)
        begin = Maker(opened, objective_name(objective, model_loss), fresh=False, told=data).start
        run = Run(opened, objective, begin, example=passed["example"], resumes=True, last_fit=record.get("fit"))
        return cls.of(run, passed["tokenizer"])

    @classmethod
    def join(
        cls,
        address: str,
        model: str | Path | nn.Module,
        *,
        token: str,
        method: Method | type[Method] | None = None,
        patience: float | None = None,
        wait: float = WAIT_S,
        **changes: Any,
    ) -> Engine:
        """A member of the run that a keeper serves at `address` (`ranks=Pool(...)`): `fit` trains with it.

        model: the run's base, here; a module in memory with its first weights. token: the keeper's. wait: seconds for
        which a keeper that is gone is looked for, now and later. patience: as in `Pool`. changes: settings that do not
        alter the numbers (offload, window, threads, a run_dir of its own for blocks on disk), and `objective`,
        `tokenizer`, `example`. `fit()` takes what the keeper was given; data that was not a file, or is elsewhere here,
        is passed. It ends with the run, or by a signal; the others go on.
        Raises RankError where nobody answers, or the keeper refuses, and says why; JournalError where the base or the
        data is not the run's.
        """
        if unknown := sorted(changes.keys() & {*SHARED} - {"adapter", "trainable"}):
            raise ConfigError(f"{', '.join(unknown)}: a member takes what the run has; leave it out")
        member = Member.join(address, token, patience=patience, wait_s=wait)
        with member.together("opening"):
            record, passed = record_of(member.about_run), _passed(changes)
            run_directory.check_settings(record["settings"], f"the keeper at {address}")
            config = EngineConfig(**{**record["settings"], "snapshot_minutes": None, **changes})
            return cls._reopened(model, config, record, member.journal, method, passed, member)

    # ---- where it is -------------------------------------------------------------------------------------------------

    @property
    def objective(self) -> Objective:
        """The function that gives the loss; a run keeps it from its beginning."""
        return self.active.objective

    @property
    def plan(self) -> Plan:
        """Blocks and owners, as they were planned or as passes have corrected them."""
        return self.active.plan

    @property
    def memory(self) -> MemoryPlan:
        """The planned bytes by term, and the window; for the example batch at first, then for the first real one."""
        return self.active.memory

    @property
    def log(self) -> UpdateLog:
        """Updates of all steps so far; `log.version` counts them."""
        return self.active.log

    @property
    def journal(self) -> Journal | None:
        """None without a run_dir, and before the run is under way."""
        return self.active.journal

    @property
    def ranks(self) -> Alone:
        """The processes that train together: `rank`, `world`; `leads` on the one that writes and prints."""
        return self.active.ranks

    @property
    def evals(self) -> list[dict[str, float]]:
        """All evaluations of the run so far on its eval_data, those before it was resumed included."""
        return self.active.evals

    @property
    def gains(self) -> Gains | None:
        """The gains of parameters that have one other than 1, once they are decided: see `gains.py`."""
        return self.active.gains

    @property
    def eps_halvings(self) -> int:
        """How often on_nonfinite="halve_eps" has halved eps."""
        return self.active.parts.stepper.halvings if self.active.parts is not None else 0

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
        brake: bool | None = None,
        epochs: float | None = None,
        train_rows: int | None = None,
        eval_rows: int | None = None,
        metric: str | None = None,
        keep_best: bool | None = None,
        early_stopping: int | None = None,
        save_every: int | None = None,
        save_dir: str | Path | None = None,
        log_every: int | None = None,
        report_to: str | None = None,
        progress: bool = False,
        callback: Callable[[StepRecord], Any] | None = None,
        callbacks: Iterable[Any] = (),
        compute_metrics: ComputeMetrics | None = None,
        new_data: bool = False,
        **data_options: Unpack[DataOptions],
    ) -> FitResult:
        """Train until `steps` steps have been taken in all (a resumed run counts from its journal).

        train_data: a DataLoader or other iterable of dicts of tensors, a dataset or list of dicts, or a path to JSONL
        or CSV; see `make_batches` for data_options. micro_batches: parts a batch is cut into, each a lane of its
        own (gradient accumulation: same weights, same step). `FitCall` says what each of the others is. progress: show
        where it is, on standard error. callback: a function of each step's record; callbacks: more of them, or
        transformers' TrainerCallbacks (classes or objects). `engine.stop()` in one of them ends it after the step.
        compute_metrics: as Trainer's, of an evaluation's predictions (`data/metrics.py`).
        A resumed run repeats what is not given as it was: files, sizes, options, steps (eval_data=False: none).
        new_data: a run may go on with other data than it was begun with; otherwise that is an error.
        SIGINT and SIGTERM end it after the step with `Stopped` (a KeyboardInterrupt), a second one at once.
        Raises DataError, DivergenceError, StorageError; whatever happens, the journal holds every finished step.
        """
        check_options(data_options, OPTIONS)
        call = FitCall(
            train_data, eval_data, steps=steps, epochs=epochs, batch_size=batch_size, train_rows=train_rows,
            eval_rows=eval_rows, micro_batches=micro_batches, eval_every=eval_every, brake=brake, metric=metric,
            keep_best=keep_best, early_stopping=early_stopping, save_every=save_every,
            save_dir=None if save_dir is None else str(save_dir), log_every=log_every, report_to=report_to,
            options={**data_options},
        )  # fmt: skip
        several = [*callbacks] if isinstance(callbacks, Iterable) else [callbacks]
        told = several if callback is None else [callback, *several]
        return train(
            self.active, self.batching, call, new_data=new_data, progress=progress, callbacks=told,
            compute_metrics=compute_metrics,
        )  # fmt: skip

    def stop(self, why: str = "") -> None:
        """From a callback, or another thread: `fit` ends after the step that is under way, and returns its result."""
        self.active.stopping = why or "engine.stop() was called"

    def preview(
        self, data: Any, *, rows: int = 3, batch_size: int | None = None, **options: Unpack[DataOptions]
    ) -> str:
        """What `fit` would make of the data: a line of what it holds, and its first rows as the model will see them,
        with what is learned in »«. No weights are read."""
        batches = self.batching.batches(data, batch_size or self.method.batch_size, {**options})
        return "\n".join([survey(batches), *examples(batches, rows)])

    @entry
    def step(self, batch: Batch, lr: float | None = None, *, micro_batches: int = 1) -> StepRecord:
        """One step on one batch: lanes, update, journal. The update reaches each block at its next visit.

        With several ranks each of them calls it, with the same batch.
        """
        with self.active.ranks.telling():
            return self.active.finish(
                self.active.launch(batch, None if lr is None else as_rate(lr), micro_batches=micro_batches)
            )

    @entry
    def evaluate(
        self, data: Any, *, batch_size: int | None = None, eval_rows: int | None = None,
        shots: int = 0, demonstrations: Any = None, compute_metrics: ComputeMetrics | None = None,
        **data_options: Unpack[DataOptions],
    ) -> dict[str, float]:  # fmt: skip
        """Mean loss, accuracy where the data defines it, EM and F1 of a task whose answers are generated, and your own
        metrics, at the current weights. See `make_batches` and `fit`.

        shots: so many demonstrations before each prompt, rows with their answers chosen by the run's seed of
        `demonstrations` (a file or rows; of a task's folder its train split).
        Of several ranks each that calls it computes all of it; those that do not are not waited for.
        """
        rows = self.method.batch_size if batch_size is None else batch_size
        if not is_whole(shots := plain_value(shots), 0):
            raise ConfigError(f"shots={shots!r}: expected a whole number of demonstrations")
        few = Shots(shots, data if demonstrations is None else demonstrations, self.config.seed)
        batches = self.batching.batches(
            data, rows, {**data_options}, shuffle=False, rows=eval_rows, compute_metrics=compute_metrics, shots=few
        )
        self.active.start(batches.first(), objective=self.batching.objective_of(batches))
        try:
            self.active.check_objective(self.journal)
        except JournalError as error:
            _log.warning("this evaluation is of another loss than the run's: %s", error)
        found = evaluated(self.active, batches, self.batching.tokenizer)
        assert found is not None, "nothing stops an evaluation outside of fit"
        return found

    def run(self, batch: Batch, call: Callable[[nn.Module, Batch], Any] | None = None) -> Any:
        """One forward at the current weights: `call(model, batch)`, default `model(**batch)`. For logits, say."""
        return self.active.forward(batch, call)

    def activation_basis(self, batch: Batch, rank: int = 4, *, layers: str | Collection[str] | None = None) -> Basis:
        """A basis of `rank` directions for each linear layer, from the inputs that `batch` gives it; one forward.

        layers: a glob on parameters' names, or several, of the layers meant ("model.layers"); default all but the head
        on the vocabulary. `Basis.save` makes an adapter's directory of it, for a new engine: adapter=DIRECTORY,
        trainable=["lora_B"], keep=["lora_A"]. Raises ConfigError if the batch has too few tokens for it.
        """
        return activation_basis(self.active, batch, rank, layers=layers)

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
        return generate_texts(model, self.batching.tokenizer(), prompts, self.generate, **options)

    # ---- results -----------------------------------------------------------------------------------------------------

    @entry
    def save_pretrained(
        self,
        directory: str | Path,
        *,
        step: Which | None = None,
        max_shard_bytes: int | float | str = 5e9,
        overwrite: bool = False,
        merge: bool = False,
    ) -> list[Path]:
        """Write the weights as a checkpoint that plain transformers loads, a block in memory at a time.

        Configs and tokenizer go along. step: of an earlier step, or "best"; see `at`. overwrite: into a directory that
        is not empty; see `export.save_pretrained`. Of a model with an adapter that is written, for
        `PeftModel.from_pretrained`; ConfigError if more than it was trained. merge: the whole model instead, with the
        adapter in its weights; an adapted layer at a time is then whole in memory. Of several ranks, rank 0 writes; on
        the others this does nothing, and nobody is waited for.
        """
        if not self.ranks.leads:
            return []
        is_now = self.active.parts is not None and step is not None and step_of(self.active, step) == self.log.version
        if step is not None and not is_now:
            with self.at(step) as then:
                return then.save_pretrained(
                    directory, max_shard_bytes=max_shard_bytes, overwrite=overwrite, merge=merge
                )
        return save(
            self.active, Path(directory), self.batching.to_export(), max_shard_bytes=max_shard_bytes,
            overwrite=overwrite, merge=merge,
        )  # fmt: skip

    @entry
    def at(self, step: Which) -> Engine:
        """An engine at the weights of an earlier step, or of the "best" evaluated one by `metric`, made from the base
        and the journal. It evaluates, generates and exports; it does not train. Raises ConfigError."""
        return Engine.of(at_step(self.active, step), self.batching.given)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, current value in the storage dtype) of every parameter, one in memory at a time."""
        self.active.flush()
        named = self.model.named_parameters()  # what is returned holds the engine, which may be asked for this alone
        return ((name, self.active.read(name) if name in self.plan.params else p.detach().cpu()) for name, p in named)

    def restore(self) -> nn.Module:
        """Put the current weights into the module's parameters, whole, and return it; the engine is closed.

        The module is where it was when it was given (a checkpoint's, on the host). Its parameters are other objects
        than then if they were not on the engine's device.
        """
        return self.active.restore()

    def close(self) -> None:
        """Flush, end the worker threads, close the journal, leave the model; all of it, whatever fails on the way.

        Raises what kept the steps from the disk, once everything is released. Safe to call twice; `with Engine(...)`
        calls it, or `restore` where the weights came from a module in memory. An engine that is dropped without it is
        closed without the flush: its journal has its steps.
        """
        self.active.close()

    def __repr__(self) -> str:
        where = f", run_dir={str(self.run_dir)!r}" if self.run_dir is not None else ""
        return (
            f"Engine({type(self.model).__name__}, {self.plan.numel:,} parameters, {self.method.name}, "
            f"offload={self.offload!r}, {self.log.version} steps{where})"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        run = self.active
        away = isinstance(self.base, ModuleBase) and run.parts is not None and not run.closed and not run.at_once
        if not away or self.door.is_forked:
            self.close()
        elif error is None:
            self.restore()
        else:
            try:
                self.restore()
            except (ZOError, OSError) as also:  # the first error is the one to be seen
                _log.warning("the module did not get its weights back: %s", also)
                self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "an engine has threads, files and memory of its own and can be neither copied nor pickled: save_pretrained "
            "keeps its weights, and Engine.resume(run_dir) opens its run again"
        )


def _passed(changes: dict[str, Any]) -> dict[str, Any]:
    """What is no setting of the engine's, taken out of `changes`."""
    return {name: changes.pop(name, None) for name in ("objective", "tokenizer", "model_class", "example", "base")}
