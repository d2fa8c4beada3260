"""The loss of a forward: the model's own or an objective's; and the contexts opened around the model for it."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.meta_model import config_parts
from ..devices.placing import input_dtype, inputs_in
from ..errors import ConfigError, DataError
from ..hf import PreTrainedModel, transformers
from ..modules.chunked_loss import losses_in_chunks
from ..modules.kind import ModelKind, kind_of, unwrapped
from ..modules.positions import virtual_tokens
from .measures import OptionsLoss
from .micro_batches import Weighing, batch_rows, label_counts, rows_weigh
from .outputs import describe, loss_of

Batch = Mapping[str, Any]
Objective = Callable[[nn.Module, Any], Any]  # a user's own may take any batch: dict, Mapping, tuple

_HEADS = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForSequenceClassification",
    "ForImageClassification",
)  # fmt: skip


def model_loss(model: nn.Module, batch: Batch) -> Any:
    """The default objective: the loss that `model(**batch)` gives.

    The loss is `.loss` or ["loss"] of the output, the first element of a tuple, or the output itself: one number, or a
    tensor without dimensions. Raises DataError if there is none.
    """
    name = type(unwrapped(model)).__name__
    try:
        output = model(**batch)
    except TypeError as error:
        if unknown := _not_taken(model, batch):
            raise DataError(
                f"{name}.forward takes no {', '.join(map(repr, unknown))}.{_headless(model)} Leave them out of the "
                "data, or pass objective=(model, batch) -> loss"
            ) from error
        raise
    loss = loss_of(output)
    if loss is not None:
        return loss
    raise DataError(
        f"{name} gave no loss for a batch with {sorted(batch)}, but {describe(output)}.{_headless(model)} Give the "
        "labels that its forward takes, or pass objective=(model, batch) -> loss"
    )


def plain_forward(model: nn.Module, batch: Batch) -> Any:
    """A forward without a loss, to plan memory for it: an encoder-decoder without an answer gets the start of one."""
    config = getattr(unwrapped(model), "config", None)
    given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(batch)
    if getattr(config, "is_encoder_decoder", False) and not given:
        batch = {**batch, "decoder_input_ids": torch.zeros(batch_rows(batch), 1, dtype=torch.int64, device="cpu")}
    return model(**batch)


def as_objective(objective: Any) -> Objective:
    """The objective, unchanged. Raises ConfigError if it cannot be called with a model and a batch."""
    if not callable(objective):
        raise ConfigError(f"objective={str(objective)[:60]!r}: expected a function (model, batch) -> loss")
    try:
        inspect.signature(objective).bind(None, None)
    except TypeError as error:
        name = getattr(objective, "__name__", type(objective).__name__)
        raise ConfigError(f"objective={name}: expected a function (model, batch) -> loss; {error}") from None
    except ValueError:
        pass  # a C function without a signature
    return objective  # type: ignore[no-any-return]


def scalar(loss: Any) -> Tensor | float:
    """An objective's result as one number, or a tensor without dimensions. Raises ConfigError."""
    hint = ""
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and not loss.is_complex() and not loss.is_meta:
            return loss.detach().reshape(())
        hint = ". Return its mean, say" if loss.numel() > 1 else ""
    elif isinstance(loss, (Real, np.number, np.bool_)) and not isinstance(loss, np.complexfloating):
        try:
            return float(loss)
        except OverflowError:
            return math.inf if loss > 0 else -math.inf  # type: ignore[operator]
    elif loss_of(loss) is not None:
        hint = ". Return the loss alone, such as model(**batch).loss"
    raise ConfigError(f"the objective returned {describe(loss)}; expected one number or a tensor with one{hint}")


def weighing(model: nn.Module, objective: Objective) -> Weighing:
    """The weights of batches' losses relative to each other.

    For the model's own loss: the number of labels that count, by the model's kind; where logits predict the next token,
    the first label of a row is not predicted, unless virtual tokens come before it. Without labels, and for regression:
    the number of rows. A CTC loss that is a sum over rows is added up, and an evaluation returns its mean. Terms that a
    model adds to the mean (a router's loss, say) get the same weights, which is not exact. For an objective: its
    attribute `weight`, a function of the batch, else the number of rows.
    """
    if getattr(objective, "weight", None) is not None:
        return Weighing(partial(_said, objective))
    if objective is not model_loss:
        return Weighing(rows_weigh)
    kind, config = kind_of(model), getattr(unwrapped(model), "config", None)
    if kind.model.endswith("ForCTC"):
        return Weighing(rows_weigh, summed=getattr(config, "ctc_loss_reduction", None) == "sum", model=kind.model)
    if kind.problem == "regression":
        return Weighing(rows_weigh, model=kind.model)
    shift = kind.shift if puts_before(model) == 0 else 0
    return Weighing(partial(_counts, kind, shift), model=kind.model)


def _said(objective: Any, batch: Batch) -> dict[str, float]:
    weight = float(objective.weight(batch))
    if not 0 <= weight < math.inf:
        raise ConfigError(f"the objective's weight of a batch is {weight}: expected a finite number, 0 or more")
    return {"weight": weight}


def _counts(kind: ModelKind, shift: int, batch: Batch) -> dict[str, float]:
    counts = label_counts(batch, shift)
    if kind.name == "other" and "labels" in counts:  # a user's own module, which may shift labels or not
        counts["labels but the first of a row"] = label_counts(batch, 1)["labels"]
    return counts


def puts_before(model: nn.Module) -> int:
    """Number of logit positions before the input's: peft's virtual tokens, unless these are keys and values."""
    tokens = virtual_tokens(model)
    if not tokens:
        return 0
    kind = cast(Any, model.active_peft_config).peft_type
    return 0 if str(getattr(kind, "value", kind)) == "PREFIX_TUNING" else tokens


def _not_taken(model: nn.Module, batch: Batch) -> list[str]:
    """Names in the batch that are not arguments of the model's forward."""
    taken = inspect.signature(unwrapped(model).forward).parameters.values()
    if any(argument.kind is argument.VAR_KEYWORD for argument in taken):
        return []
    return sorted(set(batch) - {argument.name for argument in taken})


def _headless(model: nn.Module) -> str:
    """Advice for a model that is a body without a head."""
    inner = unwrapped(model)
    if kind_of(model).name != "bare" or not isinstance(inner, PreTrainedModel):
        return ""
    prefix = type(inner).__name__.removesuffix("Model")
    heads = [name for end in _HEADS if hasattr(transformers, name := prefix + end)]
    such = f" such as {', '.join(heads)}" if heads else ""
    return f" It is a body without a head: choose a class with one, model_class=... (--model-class),{such}."


def is_ours(objective: Objective) -> bool:
    """Whether the objective is known to do nothing but one forward on the batch."""
    return objective is model_loss or isinstance(objective, OptionsLoss)


def own_loss(
    model: nn.Module, objective: Objective, parts: Sequence[nn.Module] | None = None
) -> contextlib.AbstractContextManager[None]:
    """While open, the model computes its own loss in chunks; has no effect with a user's objective."""
    return losses_in_chunks(model, parts) if is_ours(objective) else contextlib.nullcontext()


def language_models(model: nn.Module) -> list[PreTrainedModel]:
    """The model and the models inside it that are transformers'."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@contextlib.contextmanager
def without_cache(
    model: nn.Module, objective: Objective, parts: Sequence[PreTrainedModel] | None = None
) -> Iterator[None]:
    """While open, `use_cache` is off in the configs: a loss generates no tokens and needs no cache.

    Otherwise every layer's keys and values would stay in memory for the whole pass, for each lane. Has no effect with a
    user's objective. parts: see `language_models`.
    """
    parts = language_models(model) if parts is None else parts
    configs = [part.config for part in parts] if is_ours(objective) else []
    with_it = {id(part): part for config in configs for part in config_parts(config)}
    on = [part for part in with_it.values() if getattr(part, "use_cache", False)]
    try:
        for part in on:
            part.use_cache = False
        yield
    finally:
        for part in on:
            part.use_cache = True


@contextlib.contextmanager
def for_a_loss(model: nn.Module, objective: Objective) -> Iterator[None]:
    """All contexts that a pass for losses opens around the model, for callers that measure such a pass."""
    with without_cache(model, objective), own_loss(model, objective), inputs_in(model, input_dtype(model)):
        yield
