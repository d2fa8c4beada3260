"""The engine: fine-tune any transformer with forward passes only, its weights streamed through a small window.

    engine = Engine("path/to/checkpoint", method=MeZO(lr=1e-6), offload="disk", run_dir="runs/a")
    result = engine.fit("train.jsonl", steps=2000, eval_data="dev.jsonl")
    engine.save_pretrained("tuned/")

One step of a method (here MeZO), as `active.Run` does it:

    perturbations = method.perturbations(seed, step)              # +eps z, -eps z
    losses = [loss of the model at w + perturbation, ...]         # lanes in lockstep, each block visited once
    outcome = method.update(seed, step, losses, lr)               # coefficients of each noise
    journal.append(outcome); log.append(outcome)                  # applied when each block is next visited

`Engine` is the public interface: it opens a model (`opening.py`) and passes each call to the current `Run`
(`active.py`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Unpack

from torch import Tensor, nn

from .checkpoint.basis import Basis
from .checkpoint.load_options import as_settings
from .config import EngineConfig, EngineSettings, as_config
from .data.batches import check_options
from .data.idle import idle_of
from .data.losses import Batch, Objective, as_objective, model_loss
from .data.metrics import ComputeMetrics
from .data.options import DataOptions
from .data.survey import examples, survey
from .devices.placing import as_inputs, input_dtype
from .errors import BudgetError, ConfigError, JournalError, ZOError
from .journal.calls import OPTIONS, FitCall
from .journal.identity import objective_name
from .journal.journal import Journal, StepRecord
from .journal.rounds import Round
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
from .run.local_round import take_rounds, train_round
from .run.memory import MemoryPlan
from .run.opening import open_model
from .run.reopening import check_changes, joined, resumed
from .run.result import FitResult
from .run.saving import Which, at_step, save, save_run, step_of
from .run.session import Maker
from .run.training import train
from .run.whole import entry, release_dropped
from .stream.ingest import Base, ModuleBase
from .system.plain import as_rate, is_whole, plain_value, user_path

_log = logging.getLogger(__name__)


class Engine:
    """Zeroth-order fine-tuning of a checkpoint on disk or a module in memory. See the module's docstring.

    model: a checkpoint directory, a cached hub id, or an nn.Module. A module's weights move into the engine at its
    first use; `restore`, or the end of `with Engine(module)`, puts the trained weights back; after `close` alone its
    parameters hold NaN. Weights that accelerate offloaded are read from its hooks. objective: (model, batch) -> scalar,
    default `model(**batch).loss`; it need not be differentiable. example: a batch to trace with, if the model has no
    dummy inputs of its own. base: the initial weights of a module on meta. ranks: the processes that train together,
    each of which makes this engine: "auto": those that torchrun or accelerate launched, or those of an initialised
    process group; `Group(...)`: the same with settings; None: this process alone (docs/ranks.md). settings: fields of
    `EngineConfig`, and these arguments of from_pretrained: num_labels, attn_implementation, dtype, revision. An error
    in a setting is raised here, before weights are read or anything is written. An error that depends on the batch is
    raised at the first `fit`, before memory is taken.
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
            config = as_config(config, given)
            method = method if method is not None else DEFAULT()
            objective = as_objective(objective) if objective is not None else model_loss
            opened = open_model(model, method, config, model_class=model_class, example=example, base=base, ranks=team)
        begin = Maker(opened, objective_name(objective, model_loss)).start
        self._hold(Run(opened, objective, begin, example=example), tokenizer)

    @classmethod
    def of(cls, run: Run, tokenizer: Any = None) -> Engine:
        """An engine for a run that was made elsewhere: a resumed or a replayed one."""
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
        self.decided, self.device, self.run_dir = prepared.decided, opened.device, run.run_dir
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

        model: the base's present path, if it was moved; for a run that was made from a module in memory, the same
        module with its initial weights. method: for a method class of your own, the same method or its class. changes:
        settings that do not alter the numbers (offload, window, threads), and `objective`, `tokenizer`. ranks: as in
        `Engine`; the number of ranks may differ from before. A run that ended before its initial weights were stored
        has no journal; it starts again. Raises JournalError if run_dir is not a run; if settings differ from the run's,
        the error names them.
        """
        team = find(ranks)
        with team.together("opening"):
            found = resumed(user_path(run_dir).absolute(), model, method, changes, team)
            return cls.of(found.run, found.tokenizer)

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

        address: HOST:PORT, or several with commas between them: another keeper may take the run over there
        (`save_run`). model: the path of the run's base on this machine, or a module in memory with its initial weights.
        token: the keeper's token. wait: how many seconds to look for a keeper that does not answer, now and later.
        patience: as in `Pool`. changes: settings that do not alter the numbers (offload, window, threads, a run_dir of
        the member's own for blocks on disk), and `objective`, `tokenizer`, `example`. `fit()` uses the arguments that
        the keeper was given; pass data to it if the keeper's was not a file, or if the file has another path here. It
        ends with the run, or by a signal; the other processes go on. Raises RankError if nobody answers or the keeper
        refuses (it says why); JournalError if the base or the data is not the run's.
        """
        check_changes(changes)
        member = Member.join(address, token, patience=patience, wait_s=wait)
        with member.together("opening"):
            found = joined(member, model, method, changes)
            return cls.of(found.run, found.tokenizer)

    # ---- its state ---------------------------------------------------------------------------------------------------

    @property
    def objective(self) -> Objective:
        """The function that returns the loss; the same for the whole run."""
        return self.active.objective

    @property
    def plan(self) -> Plan:
        """Blocks and owners: the plan as it was made, or as passes have corrected it."""
        return self.active.plan

    @property
    def memory(self) -> MemoryPlan:
        """The planned bytes by term, and the window: for the example batch at first, then for the first real batch."""
        return self.active.memory

    @property
    def log(self) -> UpdateLog:
        """The updates of all steps so far; `log.version` is the number of steps."""
        return self.active.log

    @property
    def journal(self) -> Journal | None:
        """The run's journal; None without a run_dir, and before the run has started."""
        return self.active.journal

    @property
    def ranks(self) -> Alone:
        """The processes that train together: `rank`, `world`; `leads` on the one that writes and prints."""
        return self.active.ranks

    @property
    def evals(self) -> list[dict[str, float]]:
        """All evaluations of the run so far on its eval_data, including those before it was resumed."""
        return self.active.evals

    @property
    def gains(self) -> Gains | None:
        """The gains of all parameters whose gain is not 1, once they are decided: see `gains.py`."""
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
        """Train until the run has `steps` steps in total (a resumed run counts the steps in its journal).

        train_data: a DataLoader or other iterable of dicts of tensors, a dataset or list of dicts, or a path to JSONL
        or CSV; see `make_batches` for data_options. micro_batches: the number of parts a batch is cut into; each part
        has its own lanes (gradient accumulation: same weights, same step). `FitCall` describes the other arguments.
        progress: show progress on standard error. callback: a function that gets each step's record; callbacks: more
        such functions, or transformers' TrainerCallbacks (classes or objects). A callback may call `engine.stop()`:
        `fit` then ends after the step. compute_metrics: as Trainer's, for an evaluation's predictions
        (`data/metrics.py`). A resumed run uses its earlier values for arguments that are not given: files, sizes,
        options, steps (eval_data=False: no evaluation). new_data: let a run go on with other data than it began with;
        otherwise other data is an error. SIGINT and SIGTERM end `fit` after the step with `Stopped` (a
        KeyboardInterrupt), a second signal at once. Raises DataError, DivergenceError, StorageError; whatever happens,
        the journal holds every finished step.
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
        """Make `fit` end after the current step and return its result. Call it from a callback or another thread."""
        self.active.stopping = why or "engine.stop() was called"

    def preview(
        self, data: Any, *, rows: int = 3, batch_size: int | None = None, **options: Unpack[DataOptions]
    ) -> str:
        """A preview of the data that `fit` would train on: one line about its contents, then its first rows as the
        model will see them, with the trained tokens in »«. No weights are read."""
        batches = self.batching.batches(data, batch_size or self.method.batch_size, {**options})
        return "\n".join([survey(batches), *examples(batches, rows)])

    @entry
    def step(self, batch: Batch, lr: float | None = None, *, micro_batches: int = 1) -> StepRecord:
        """One step on one batch: lanes, update, journal. The update reaches each block at its next visit.

        With several ranks, each rank must call it with the same batch.
        """
        with self.active.ranks.telling():
            return self.active.finish(
                self.active.launch(batch, None if lr is None else as_rate(lr), micro_batches=micro_batches)
            )

    @entry
    def train_round(
        self,
        data: Any,
        *,
        client: str,
        steps: int,
        batch_size: int | None = None,
        micro_batches: int = 1,
        rows: int | None = None,
        callback: Callable[[StepRecord], Any] | None = None,
        **data_options: Unpack[DataOptions],
    ) -> Round:
        """Local steps of a client on its own data, for a round of FedKSeed (method SeedPool): they are taken back, so
        the run and its weights stay as they are, and a sum for each seed is returned. docs/ranks.md has an example.

        data, data_options: as in `fit`. client: a name that no other client has: which seeds are drawn depends on it.
        steps: local steps. rows: the weight in the mean (default: the number of rows of the data). callback: gets each
        local step's record. Raises ConfigError, DataError, DivergenceError.
        """
        check_options(data_options, OPTIONS)
        return train_round(
            self.active, self.batching, data, client=client, steps=steps, batch_size=batch_size,
            micro_batches=micro_batches, rows=rows, options={**data_options}, callback=callback,
        )  # fmt: skip

    @entry
    def take_rounds(self, rounds: Iterable[Round | str | Path]) -> StepRecord:
        """Take the mean of clients' rounds, weighted by their rows, as the run's next step: `Round.mean`, in an engine
        that is open. rounds: the clients', or one mean; or their files. Raises JournalError for a round of another run
        or another step, ConfigError for a client that is there twice; then nothing was changed."""
        return take_rounds(self.active, [each if isinstance(each, Round) else Round.load(each) for each in rounds])

    @entry
    def evaluate(
        self, data: Any, *, batch_size: int | None = None, eval_rows: int | None = None,
        shots: int = 0, demonstrations: Any = None, compute_metrics: ComputeMetrics | None = None,
        **data_options: Unpack[DataOptions],
    ) -> dict[str, float]:  # fmt: skip
        """Mean loss at the current weights; also accuracy if the data defines it, EM and F1 for a task whose answers
        are generated, and your own metrics. See `make_batches` and `fit`.

        shots: the number of demonstrations before each prompt: rows with their answers, which the run's seed chooses
        from `demonstrations` (a file or rows; default for a task's folder: its train split). With several ranks, each
        rank that calls it computes all of it and does not wait for the others.
        """
        rows = self.method.batch_size if batch_size is None else batch_size
        if not is_whole(shots := plain_value(shots), 0):
            raise ConfigError(f"shots={shots!r}: expected a whole number of demonstrations")
        few = Shots(shots, data if demonstrations is None else demonstrations, self.config.seed)
        batches = self.batching.batches(
            data, rows, {**data_options}, shuffle=False, rows=eval_rows, compute_metrics=compute_metrics, shots=few
        )
        first = batches.first()
        if idle := idle_of([batches], data_options):
            _log.warning("%s", idle)
        self.active.start(first, objective=self.batching.objective_of(batches))
        try:
            self.active.check_objective(self.journal)
        except JournalError as error:
            _log.warning("this evaluation uses another loss than the run: %s", error)
        found = evaluated(self.active, batches, self.batching.tokenizer)
        assert found is not None, "nothing stops an evaluation outside of fit"
        return found

    def run(self, batch: Batch, call: Callable[[nn.Module, Batch], Any] | None = None) -> Any:
        """One forward at the current weights: `call(model, batch)`, default `model(**batch)`. For logits, say."""
        return self.active.forward(batch, call)

    def activation_basis(self, batch: Batch, rank: int = 4, *, layers: str | Collection[str] | None = None) -> Basis:
        """A basis of `rank` directions for each linear layer, from the inputs that `batch` gives it; one forward.

        layers: one or several globs on parameter names ("model.layers"); default: all layers but the head on the
        vocabulary. `Basis.save` writes it as an adapter's directory, for a new engine: adapter=DIRECTORY,
        trainable=["lora_B"], keep=["lora_A"]. Raises ConfigError if the batch has too few tokens.
        """
        return activation_basis(self.active, batch, rank, layers=layers)

    @entry
    def generate(self, prompts: Any, **options: Any) -> Any:
        """`model.generate` at the current weights: texts for prompts, or token ids for a batch of token ids.

        prompts: a text, a conversation (a list of messages, dicts with role and content), a list of either, or a dict
        of tensors named as the model's arguments (input_ids, attention_mask, input_features, ...). Each token costs one
        pass for all rows together. options: those of transformers' `generate` (max_new_tokens, do_sample, ...). Returns
        the text that follows the prompt; for a list of prompts, or with num_return_sequences, a list of texts. Raises
        ConfigError.
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
        scheme: str | None = None,
    ) -> list[Path]:
        """Write the weights as a checkpoint that plain transformers loads; only one block is in memory at a time.

        Configs and tokenizer are written too. step: the weights of an earlier step, or "best"; see `at`. overwrite:
        write into a directory that is not empty; see `export.save_pretrained`. For a model with an adapter, only the
        adapter is written, for `PeftModel.from_pretrained`; ConfigError if anything else was trained. merge: write the
        whole model with the adapter merged into its weights; one adapted layer at a time is then whole in memory.
        scheme: another layout. "fp8" rounds the linear layers to 8-bit floats in blocks of 128 x 128, for transformers;
        "gguf" writes one GGUF file, "gguf-f16", "gguf-q8_0" and others with matrices of that type. "kept" writes the
        layout that a quantized checkpoint came in, its codes as they were read. "safetensors", "peft" and "merged" name
        what is written without a scheme. "safetensors-f32": values of storage formats with scales or residuals in
        float32, exactly, instead of rounded to bf16. The run stays as it is. With several ranks, rank 0 writes; on the
        other ranks this does nothing and does not wait.
        """
        if not self.ranks.leads:
            return []
        is_now = self.active.parts is not None and step is not None and step_of(self.active, step) == self.log.version
        if step is not None and not is_now:
            with self.at(step) as then:
                return then.save_pretrained(
                    directory, max_shard_bytes=max_shard_bytes, overwrite=overwrite, merge=merge, scheme=scheme
                )
        return save(
            self.active, Path(directory), self.batching.given, max_shard_bytes=max_shard_bytes,
            overwrite=overwrite, merge=merge, scheme=scheme,
        )  # fmt: skip

    def save_run(self, directory: str | Path) -> Path:
        """Write the run as this process knows it, its config.json and its journal, into a directory that holds no run;
        returns the directory. Any process with the base resumes it (`Engine.resume`), also as the keeper of a pool: so
        a member whose keeper is gone saves the run. No weights are written, and this engine stays as it is.

        Of the arguments of `fit`, a member knows those that numbers depend on: give evaluations and exports again.
        Raises ConfigError, StorageError.
        """
        return save_run(self.active, user_path(directory).absolute())

    @entry
    def at(self, step: Which) -> Engine:
        """An engine with the weights of an earlier step, or of the "best" evaluated step by `metric`, rebuilt from the
        base and the journal. It evaluates, generates and exports, but does not train. Raises ConfigError."""
        return Engine.of(at_step(self.active, step), self.batching.given)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, current value in the storage dtype) of every parameter, one in memory at a time."""
        self.active.flush()
        named = self.model.named_parameters()  # the iterator keeps the engine alive
        return ((name, self.active.read(name) if name in self.plan.params else p.detach().cpu()) for name, p in named)

    def restore(self) -> nn.Module:
        """Put the current weights back into the module's parameters, close the engine, and return the module.

        The module is on the device where it was when it was given (a checkpoint's module: on the host). Its parameters
        are new objects if they were not on the engine's device.
        """
        return self.active.restore()

    def close(self) -> None:
        """Flush, end the worker threads, close the journal, release the model; all of it, even if a part fails.

        If steps could not be written to the disk, raises that error after everything is released. Safe to call twice;
        `with Engine(...)` calls it, or `restore` if the weights came from a module in memory. An engine that is dropped
        without `close` is closed without the flush: its steps are in its journal.
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
        else:
            try:
                self.restore()
            except (ZOError, OSError) as also:
                if error is None and not isinstance(also, BudgetError):
                    raise
                _log.warning(
                    "the module did not get its weights back: %s", also
                )  # the first error is the one to report
                self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "an engine has threads, files and memory of its own and can be neither copied nor pickled: save_pretrained "
            "writes its weights, and Engine.resume(run_dir) opens its run again"
        )
