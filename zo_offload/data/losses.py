"""What a forward is asked for: the model's own loss or an objective's, and what is opened around the model for it."""

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
Objective = Callable[[nn.Module, Any], Any]  # a user's own says what its batch is: dict, Mapping, tuple

_HEADS = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForSequenceClassification",
    "ForImageClassification",
)  # fmt: skip


def model_loss(model: nn.Module, batch: Batch) -> Any:
    """The default objective: the loss that `model(**batch)` gives.

    As `.loss` or ["loss"] of the output, as the first of a tuple, or as the output itself: one number, or a tensor of
    no dimensions. Raises DataError where there is none.
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
    """A forward without a loss, to plan memory for one: an encoder-decoder that is given no answer begins one."""
    config = getattr(unwrapped(model), "config", None)
    given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(batch)
    if getattr(config, "is_encoder_decoder", False) and not given:
        batch = {**batch, "decoder_input_ids": torch.zeros(batch_rows(batch), 1, dtype=torch.int64, device="cpu")}
    return model(**batch)


def as_objective(objective: Any) -> Objective:
    """An objective as it was given. Raises ConfigError if it cannot be called with a model and a batch."""
    if not callable(objective):
        raise ConfigError(f"objective={str(objective)[:60]!r}: expected a function (model, batch) -> loss")
    try:
        inspect.signature(objective).bind(None, None)
    except TypeError as error:
        name = getattr(objective, "__name__", type(objective).__name__)
        raise ConfigError(f"objective={name}: expected a function (model, batch) -> loss; {error}") from None
    except ValueError:
        pass  # something of C that does not tell
    return objective  # type: ignore[no-any-return]


def scalar(loss: Any) -> Tensor | float:
    """An objective's result as one number, or a tensor of no dimensions. Raises ConfigError."""
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
    """What the losses of batches weigh among each other.

    The model's own: by labels that count, as its kind has them; the first label of a row is not predicted where logits
    predict what follows, unless virtual tokens are before it. Rows where there are no labels, and for regression. A CTC
    loss that is a sum over rows is added up, and an evaluation gives its mean. What a model adds to the mean (a
    router's loss, say) is taken by the same weights, which is not exact. An objective's: what its attribute `weight`, a
    function of the batch, says, or rows.
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
    if kind.name == "other" and "labels" in counts:  # a module of one's own, which may shift them or not
        counts["labels but the first of a row"] = label_counts(batch, 1)["labels"]
    return counts


def puts_before(model: nn.Module) -> int:
    """Positions that the logits have before those of the input: peft's virtual tokens, unless they are a prefix of
    keys and values."""
    tokens = virtual_tokens(model)
    if not tokens:
        return 0
    kind = cast(Any, model.active_peft_config).peft_type
    return 0 if str(getattr(kind, "value", kind)) == "PREFIX_TUNING" else tokens


def _not_taken(model: nn.Module, batch: Batch) -> list[str]:
    """Names in the batch that the model's forward has no argument for."""
    taken = inspect.signature(unwrapped(model).forward).parameters.values()
    if any(argument.kind is argument.VAR_KEYWORD for argument in taken):
        return []
    return sorted(set(batch) - {argument.name for argument in taken})


def _headless(model: nn.Module) -> str:
    """What to do where the model is a body without a head."""
    inner = unwrapped(model)
    if kind_of(model).name != "bare" or not isinstance(inner, PreTrainedModel):
        return ""
    prefix = type(inner).__name__.removesuffix("Model")
    heads = [name for end in _HEADS if hasattr(transformers, name := prefix + end)]
    such = f" such as {', '.join(heads)}" if heads else ""
    return f" It is a body without a head: choose a class with one, model_class=... (--model-class),{such}."


def is_ours(objective: Objective) -> bool:
    """Whether it is known what the objective asks of the model: nothing but a forward on the batch."""
    return objective is model_loss or isinstance(objective, OptionsLoss)


def own_loss(
    model: nn.Module, objective: Objective, parts: Sequence[nn.Module] | None = None
) -> contextlib.AbstractContextManager[None]:
    """While open, the loss that the model itself computes is computed in chunks; not under an objective given."""
    return losses_in_chunks(model, parts) if is_ours(objective) else contextlib.nullcontext()


def language_models(model: nn.Module) -> list[PreTrainedModel]:
    """The model and what is inside of it, as far as that is transformers'."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


@contextlib.contextmanager
def without_cache(
    model: nn.Module, objective: Objective, parts: Sequence[PreTrainedModel] | None = None
) -> Iterator[None]:
    """While open, nothing is kept for tokens that a loss does not generate: `use_cache` is off in the configs.

    Keys and values of every layer would stay for the whole pass, those of each lane. Not under an objective given.
    parts: see `language_models`.
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
    """All that a pass for losses opens around the model, for those who measure one."""
    with without_cache(model, objective), own_loss(model, objective), inputs_in(model, input_dtype(model)):
        yield
