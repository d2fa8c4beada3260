"""What a batch's outputs say about the task: loss, accuracy, and how the verbalizers of a prompt compare.

Logits and labels are lined up by the kind of model: a causal one predicts a label one place before it, others where it
stands; virtual tokens (peft's prompt tuning) lie before both, and have logits but no labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .encode import IGNORED, Batch, Encoder
from .errors import DataError
from .outputs import describe, logits_of


def measure(
    encoder: Encoder, model: nn.Module, batch: Batch, loss: Callable[[Any, Batch], float], weight: float
) -> dict[str, tuple[float, float]]:
    """{"loss": (mean, weight), "accuracy": (share, rows)} of one batch, from a single forward.

    Accuracy where the data defines it: over the verbalizers for prompts, over classes for class labels; rows whose
    label does not count have none. If some verbalizer has several tokens, all continuations run as rows of one batch,
    scored by the mean log-probability of their tokens, and the loss is that of the right ones.
    """
    if encoder.task == "prompt" and _single_tokens(encoder) is None:
        return _measure_continuations(encoder, model, batch)
    with _last_output(model) as last:
        values = {"loss": (float(loss(model, batch)), weight)}
    logits, labels = logits_of(last.get("output")), batch.get("labels")
    if logits is None or not isinstance(labels, Tensor) or labels.dtype.is_floating_point:
        return values
    if encoder.task == "prompt":
        chosen, right = _option_logits(encoder, logits, labels)
        values["accuracy"] = (float((chosen.argmax(-1) == right).double().mean()), float(len(right)))
    elif labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1 and bool((counted := labels != IGNORED).any()):
        right = logits.argmax(-1)[counted] == labels[counted]
        values["accuracy"] = (float(right.double().mean()), float(len(right)))
    return values


class OptionsLoss:
    """An objective: cross-entropy among the verbalizers alone, each a single token (MeZO's --train_as_classification).

    The model's own loss is over the whole vocabulary, so it also rewards making the verbalizers likely at all. Raises
    DataError without verbalizers, or if some are of several tokens.
    """

    def __init__(self, encoder: Encoder) -> None:
        if encoder.task != "prompt":
            raise DataError("loss='options' compares the verbalizers of a template: pass template= and verbalizers=")
        if _single_tokens(encoder) is None:
            several = [word for word, ids in zip(encoder.words, encoder.options, strict=True) if len(ids) > 1]
            raise DataError(
                f"loss='options' needs verbalizers of one token each, and {', '.join(map(repr, several))} "
                f"{'is' if len(several) == 1 else 'are'} of more. Choose others, or use loss='model'"
            )
        self.encoder = encoder

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        labels = batch["labels"]
        # a decoder's inputs are made of its labels; nothing else needs them to compute logits
        keep = self.encoder.kind.name == "seq2seq"
        output = model(**{name: value for name, value in batch.items() if keep or name != "labels"})
        logits = logits_of(output)
        if logits is None:
            raise DataError(f"{self.encoder.kind.model} gave no logits to compare verbalizers by: {describe(output)}")
        chosen, right = _option_logits(self.encoder, logits, labels)
        return nn.functional.cross_entropy(chosen.float(), right)


def _option_logits(encoder: Encoder, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, options] logits of the verbalizers where each row is asked, and the index of the right one."""
    at = (labels != IGNORED).int().argmax(1)  # the first token with a loss
    rows = torch.arange(len(labels), device=labels.device)
    words = torch.tensor(_single_tokens(encoder), device=labels.device)
    right = (labels[rows, at][:, None] == words).int().argmax(-1)
    return lined_up(logits, labels, 0)[rows, at - encoder.kind.shift][:, words], right


def lined_up(logits: Tensor, labels: Tensor, shift: int) -> Tensor:
    """The logits that predict labels[:, shift:], as [rows, labels, vocabulary], without those of virtual tokens."""
    before = logits.shape[1] - labels.shape[1]
    if before < 0:
        raise DataError(
            f"the model gave logits of {logits.shape[1]} positions for labels of {labels.shape[1]}: which belong "
            "together cannot be told, and so no accuracy. Evaluate without template and verbalizers"
        )
    return logits[:, before : logits.shape[1] - shift]


def _single_tokens(encoder: Encoder) -> list[int] | None:
    """The verbalizers' tokens if each is a single one, else None."""
    options = encoder.options
    return [ids[0] for ids in options] if all(len(ids) == 1 for ids in options) else None


def _measure_continuations(encoder: Encoder, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
    wide, right = _continuations(encoder, batch)
    labels, shift = wide["labels"], encoder.kind.shift
    keep = encoder.kind.name == "seq2seq"
    output = logits_of(model(**{name: value for name, value in wide.items() if keep or name != "labels"}))
    if output is None:
        raise DataError(f"{encoder.kind.model} gave no logits to compare verbalizers by")
    logits, labels = lined_up(output, labels, shift).float(), labels[:, shift:]
    scored = labels != IGNORED
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    totals, counts = picked.sum(1).view(-1, len(encoder.options)), scored.sum(1).view(-1, len(encoder.options))
    truth = torch.tensor(right, device=labels.device)[:, None]
    tokens = float(counts.gather(1, truth).sum())
    loss = -float(totals.gather(1, truth).sum()) / tokens
    accuracy = float(((totals / counts).argmax(1) == truth[:, 0]).double().mean())
    return {"loss": (loss, tokens), "accuracy": (accuracy, float(len(truth)))}


def _continuations(encoder: Encoder, batch: Batch) -> tuple[Batch, list[int]]:
    """Each row once with each option in the place of its answer, and the indices of the right ones."""
    rows: list[dict[str, Any]] = []
    right: list[int] = []
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for ids, mask, labels in zip(batch["input_ids"], masks, batch["labels"], strict=True):
        answer = labels[labels != IGNORED].tolist()
        index = max(
            (i for i, option in enumerate(encoder.options) if answer[: len(option)] == option),
            key=lambda i: len(encoder.options[i]),
        )
        right.append(index)
        closing = answer[len(encoder.options[index]) :]  # an end of text, say
        for option in encoder.options:
            rows.append(_continued(encoder, ids[mask != 0].tolist(), len(answer), option + closing))
    wide = encoder.collate(rows, "continuations")
    return {name: value.to(batch["labels"].device) for name, value in wide.items()}, right


def _continued(encoder: Encoder, ids: list[int], answered: int, answer: list[int]) -> dict[str, Any]:
    """A row's inputs with another answer. answered: how many of its last tokens are the one it has."""
    if encoder.kind.name == "seq2seq":
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer}
    start = ids[: len(ids) - answered]
    labels = [IGNORED] * len(start) + answer
    return {"input_ids": start + answer, "attention_mask": [1] * len(labels), "labels": labels}


@contextlib.contextmanager
def _last_output(model: nn.Module) -> Iterator[dict[str, Any]]:
    """While open, what the model returns last is under "output", so that one forward serves loss and accuracy."""
    last: dict[str, Any] = {}
    handle = model.register_forward_hook(lambda module, args, output: last.update(output=output))
    try:
        yield last
    finally:
        handle.remove()
