"""An evaluation: the lanes' measures, and for tasks whose answers are generated, exact match and F1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.answers import exact_match, f1
from ..data.batches import Batches, RowBatches
from ..data.encode import IGNORED, Encoder
from ..data.tasks import Scoring, task_of
from ..data.texts import as_text
from ..devices.placing import as_inputs, input_dtype
from ..errors import ConfigError, DataError
from ..journal import tail_files
from ..journal.calls import FitCall
from ..methods import lr_schedule
from ..system.plain import user_path
from .active import Run
from .generation import check_generates, texts_after


def evaluated(
    run: Run, batches: Batches, tokenizer: Callable[[], Any], between: Callable[[], None] = lambda: None, *,
    at: str | None = None,
) -> dict[str, float] | None:  # fmt: skip
    """Loss, accuracy and metrics of `batches`; also "em" and "f1" if texts are generated. between: called before each
    batch; at: see `Passes.measure`, also for when it returns None."""
    values = run.measure(batches, between=between, at=at)
    if values is not None and at is not None and run.journal is not None and run.prepared.tail:
        tail_files.keep(run.journal.path.parent, run.log.version)
    if values is None or batches.scoring is None:
        return values
    return {**values, **_generated(run, batches, batches.scoring, tokenizer(), between)}


def _generated(
    run: Run, batches: Batches, scoring: Scoring, tokenizer: Any, between: Callable[[], None]
) -> dict[str, float]:
    """Exact match and F1, means over the rows, of the line of text that the model generates greedily."""
    assert isinstance(batches, RowBatches)
    sums = {"em": 0.0, "f1": 0.0}
    for begin in range(0, len(batches.rows), batches.batch_size):
        between()
        rows = [batches.rows[i] for i in range(begin, min(begin + batches.batch_size, len(batches.rows)))]
        prompts = [_prompt_of(batches, row, f"{batches.name} row {begin + i}") for i, row in enumerate(rows)]
        said = texts_said(run, tokenizer, prompts, max_new_tokens=scoring.max_new_tokens)
        for i, (text, row) in enumerate(zip(said, rows, strict=True)):
            answers = row.get(scoring.answers)
            answers = answers if isinstance(answers, (list, tuple)) else [] if answers is None else [answers]
            where = f"{batches.name} row {begin + i}"
            if not answers:
                raise DataError(f"{where} has no answers in {scoring.answers!r}.")
            answers = [as_text(answer, where, scoring.answers) for answer in answers]
            line = next((line for line in text.split("\n") if line.strip()), "")
            sums["em"] += exact_match(line, answers)
            sums["f1"] += f1(line, answers)
    return {name: value / len(batches.rows) for name, value in sums.items()}


def texts_said(run: Run, tokenizer: Any, prompts: Sequence[list[int]], *, max_new_tokens: int) -> list[str]:
    """The texts that the model says after prompts of token ids, greedily. Raises ConfigError if it generates none."""
    check_generates(run.opened.model)
    model: Any = run.opened.model

    def generate(inputs: dict[str, Any], **options: Any) -> Any:
        placed = as_inputs(inputs, input_dtype(model))
        return run.forward(placed, lambda _, batch: model.generate(**batch, **options))

    return texts_after(model, tokenizer, prompts, generate, max_new_tokens=max_new_tokens, do_sample=False)


def _prompt_of(batches: RowBatches, row: Any, where: str) -> list[int]:
    """A row's tokens without its answer, as they are in training."""
    return parted(batches.encoder, batches.encoder(row, where, ""))[0]


def parted(encoder: Encoder, encoded: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(prompt, answer): an encoded row's tokens before its answer, and the answer's."""
    ids: list[int] = list(encoded["input_ids"])
    answer = [int(label) for label in encoded["labels"] if label != IGNORED]
    if encoder.kind.name == "seq2seq":
        return ids, answer
    begin = len(ids) - len(answer)
    return ids[:begin], ids[begin:]


def with_defaults(call: FitCall, run: Run) -> FitCall:
    """A new run's call of `fit`, completed with the defaults of a task or of a published recipe.

    A task in a folder is evaluated on its dev split. With a task or a recipe the best step is kept, if there is an
    evaluation and a base to rebuild it from. A recipe's loss is over the verbalizers, if they are the same for all
    rows. Raises DataError; ConfigError for a warm-up that the schedule has not.
    """
    task, options = task_of(call.options.get("task")), dict(call.options)
    if task is not None and str(options["task"]).endswith(".toml"):  # the process may change its directory
        options["task"] = str(user_path(options["task"]).absolute())
    if run.last_fit is not None:
        return replace(call, options=options)
    method = run.method
    if method.warmup_steps and lr_schedule(method.schedule, method.warmup_steps, method.warmup_steps + 2)(0) == 1.0:
        raise ConfigError(
            f"warmup_steps={method.warmup_steps}: schedule {method.schedule!r} has no warm-up. Choose one that has, "
            "such as constant_with_warmup, linear or cosine (schedule=, --schedule), or leave it out"
        )
    is_recipe = method.tunes is not None
    if (
        task is not None
        and call.eval_data is None
        and isinstance(call.data, (str, Path))
        and task.has(call.data, "dev")
    ):
        call = replace(call, eval_data=call.data)
    if is_recipe and task is None and _are_fixed(options.get("verbalizers")):
        options.setdefault("loss", "options")
    can_keep = run.opened.name is not None and run.run_dir is not None and call.eval_data not in (None, False)
    if (is_recipe or task is not None) and can_keep and call.keep_best is None:
        metric = call.metric or ("f1" if task is not None and task.scoring is not None else None)
        call = replace(call, keep_best=True, metric=metric)
    return replace(call, options=options)


def _are_fixed(verbalizers: Any) -> bool:
    """Whether verbalizers are given, and name no columns."""
    words = verbalizers.values() if isinstance(verbalizers, Mapping) else verbalizers
    return words is not None and not isinstance(words, str) and not any("{" in str(word) for word in words)
