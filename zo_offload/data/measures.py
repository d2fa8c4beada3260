"""Measures of a batch's outputs: loss, accuracy, and scores of a prompt's verbalizers.

Logits and labels are aligned by the kind of model: a causal model predicts a label one position before it, others at
its position; virtual tokens (peft's prompt tuning) come before both, and have logits but no labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from .encode import IGNORED, Batch, Encoder
from .labels import SPANS
from .outputs import describe, logits_of, spans_of
from .prompts import continued

Options = Sequence[list[int]]
"""Tokens of each verbalizer, in the order of the labels."""

Keep = Callable[[Any, Any], None]

_RIGHT = "right_option"  # in a batch with a row for each option: the index of the right option for each original row
_WORDS = "words_of_options"  # in a batch of verbalizers of one token each: [rows, options]


def measure(
    encoder: Encoder,
    model: nn.Module,
    batch: Batch,
    loss: Callable[[Any, Batch], float],
    weight: float,
    options: Sequence[Options] | None = None,
    keep: Keep | None = None,
) -> dict[str, tuple[float, float]]:
    """{"loss": (mean, weight), "accuracy": (share, rows)} of one batch, from a single forward.

    Accuracy is there if the data defines it: over the verbalizers for prompts, over classes for class labels; rows
    whose label does not count are left out. If a verbalizer has several tokens, each row runs with each verbalizer,
    scored by the mean log-probability of its tokens, and the loss is that of the right ones. options: each row's
    options, if rows have their own. keep: called with the scores and the index of the right one; see metrics.py.
    """
    options = options if options is not None or not encoder.options else [encoder.options] * len(batch["labels"])
    if options is not None and not _are_single(options):
        return _measure_options(encoder, model, batch, options, keep)
    with _last_output(model) as last:
        values = {"loss": (float(loss(model, batch)), weight)}
    if keep is not None and (span := spans_of(last.get("output"))) and set(SPANS) <= batch.keys():
        keep(span, tuple(batch[name] for name in SPANS))
        return values
    logits, labels = logits_of(last.get("output")), batch.get("labels")
    if logits is None or not isinstance(labels, Tensor):
        return values
    if labels.dtype.is_floating_point:  # numbers of a regression, several labels a row: no accuracy, but metrics
        if keep is not None:
            keep(logits, labels)
        return values
    if options is not None:
        chosen, right = _option_logits(encoder, _words(options, labels.device), logits, labels)
        if keep is not None:
            keep(chosen, right)
        values["accuracy"] = (float((chosen.argmax(-1) == right).double().mean()), float(len(right)))
        return values
    if keep is not None:
        keep(logits, labels)
    if labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1 and bool((counted := labels != IGNORED).any()):
        right = logits.argmax(-1)[counted] == labels[counted]
        values["accuracy"] = (float(right.double().mean()), float(len(right)))
    return values


class OptionsLoss:
    """An objective: cross-entropy among the verbalizers alone (MeZO's --train_as_classification).

    If a verbalizer has several tokens, their scores are the means of their tokens' log-probabilities. The model's own
    loss is over the whole vocabulary, so it also rewards making the verbalizers likely at all. Raises DataError without
    verbalizers.
    """

    def __init__(self, encoder: Encoder) -> None:
        if not encoder.options:
            raise DataError("loss='options' compares the verbalizers of a template: pass template= and verbalizers=")
        self.encoder = encoder

    def prepared(self, batch: Batch) -> Batch:
        """The batch that the objective takes, made on the host: with options of several tokens, one row per option."""
        if _RIGHT in batch or _WORDS in batch:
            return batch
        options = [self.encoder.options] * len(batch["labels"])
        if not _are_single(options):
            return _expanded(self.encoder, batch, options)
        return {**batch, _WORDS: _words(options, batch["labels"].device)}

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        wide = self.prepared(dict(batch))
        if _RIGHT in wide:
            totals, counts = _scores(self.encoder, model, wide)
            means = (totals / counts).view(-1, len(self.encoder.options))
            return nn.functional.cross_entropy(means, wide[_RIGHT])
        chosen, right = _option_logits(self.encoder, wide[_WORDS], _logits(self.encoder, model, wide), wide["labels"])
        return nn.functional.cross_entropy(chosen.float(), right)


def _are_single(options: Sequence[Options]) -> bool:
    return all(len(ids) == 1 for row in options for ids in row)


def _logits(encoder: Encoder, model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits. Labels are passed only to a decoder, which makes its inputs from them."""
    left_out = {_RIGHT, _WORDS} if encoder.kind.name == "seq2seq" else {_RIGHT, _WORDS, "labels"}
    output = model(**{name: value for name, value in batch.items() if name not in left_out})
    logits = logits_of(output)
    if logits is None:
        raise DataError(f"{encoder.kind.model} returned no logits to compare verbalizers by: {describe(output)}")
    return logits


def _words(options: Sequence[Options], device: torch.device) -> Tensor:
    """[rows, options] tokens of verbalizers of one token each."""
    return torch.tensor([[ids[0] for ids in row] for row in options], device=device)


def _option_logits(encoder: Encoder, words: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, options] logits of the words at each row's answer, and the index of the right word."""
    at = (labels != IGNORED).int().argmax(1)  # the first token with a loss
    rows = torch.arange(len(labels), device=labels.device)
    right = (labels[rows, at][:, None] == words).int().argmax(-1)
    return lined_up(logits, labels, 0)[rows, at - encoder.kind.shift].gather(1, words), right


def lined_up(logits: Tensor, labels: Tensor, shift: int) -> Tensor:
    """The logits that predict labels[:, shift:], as [rows, labels, vocabulary], without those of virtual tokens."""
    before = logits.shape[1] - labels.shape[1]
    if before < 0:
        raise DataError(
            f"the model returned logits of {logits.shape[1]} positions for labels of {labels.shape[1]}, so they cannot "
            "be aligned, and accuracy cannot be computed. Evaluate without template and verbalizers"
        )
    return logits[:, before : logits.shape[1] - shift]


# ---- a row for each option -------------------------------------------------------------------------------------------


def _measure_options(
    encoder: Encoder, model: nn.Module, batch: Batch, options: Sequence[Options], keep: Keep | None
) -> dict[str, tuple[float, float]]:
    wide = batch if _RIGHT in batch else _expanded(encoder, batch, options)
    totals, counts = _scores(encoder, model, wide)
    truth, sizes = wide[_RIGHT][:, None], [len(its) for its in options]
    means = _table(totals / counts, sizes, -math.inf)
    totals, counts = _table(totals, sizes, 0.0), _table(counts, sizes, 0)
    rows = float(len(truth))
    if keep is not None:
        keep(means, truth[:, 0])
    accuracy = (float((means.argmax(1) == truth[:, 0]).double().mean()), rows)
    if encoder.loss == "options":
        return {"loss": (float(nn.functional.cross_entropy(means, truth[:, 0])), rows), "accuracy": accuracy}
    tokens = float(counts.gather(1, truth).sum())
    return {"loss": (-float(totals.gather(1, truth).sum()) / tokens, tokens), "accuracy": accuracy}


def _table(values: Tensor, sizes: Sequence[int], missing: float) -> Tensor:
    """[rows, most options] from a list with one value per option, row after row."""
    if len(set(sizes)) == 1:
        return values.view(-1, sizes[0])
    return nn.utils.rnn.pad_sequence(list(torch.split(values, list(sizes))), batch_first=True, padding_value=missing)


def _scores(encoder: Encoder, model: nn.Module, wide: Batch) -> tuple[Tensor, Tensor]:
    """Sums of the log-probabilities of each option's tokens, row by row, and the numbers of tokens."""
    labels, shift = wide["labels"], encoder.kind.shift
    logits, labels = lined_up(_logits(encoder, model, wide), labels, shift).float(), labels[:, shift:]
    scored = labels != IGNORED
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    return picked.sum(1), scored.sum(1)


def _expanded(encoder: Encoder, batch: Batch, options: Sequence[Options]) -> Batch:
    """Each row once with each option in place of its answer, and the indices of the right options."""
    rows: list[dict[str, Any]] = []
    right: list[int] = []
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for ids, mask, labels, its in zip(batch["input_ids"], masks, batch["labels"], options, strict=True):
        answer = labels[labels != IGNORED].tolist()
        fitting = [i for i, option in enumerate(its) if answer[: len(option)] == option]
        if not fitting:
            raise DataError(f"a row's labels {answer} do not match any of the verbalizers' tokens {list(its)}")
        index = max(fitting, key=lambda i: len(its[i]))
        right.append(index)
        closing = answer[len(its[index]) :]  # for example an end of text
        kept, asked = ids[mask != 0].tolist(), labels[mask != 0].tolist() if labels.shape == ids.shape else []
        rows += [_answered(encoder, kept, asked, len(answer), option + closing) for option in its]
    longest, limit = max(len(row["input_ids"]) for row in rows), encoder.kind.positions
    if limit is not None and longest > limit:
        raise DataError(
            f"with the longest verbalizer a row has {longest} tokens, but the model takes at most {limit}. Pass "
            f"max_length={limit - (longest - int(batch['input_ids'].shape[1]))}, or choose shorter ones"
        )
    wide = encoder.collate(rows, "options")
    wide[_RIGHT] = torch.tensor(right, device="cpu")
    return {name: value.to(batch["labels"].device) for name, value in wide.items()}


def _answered(encoder: Encoder, ids: list[int], asked: list[int], length: int, answer: list[int]) -> dict[str, Any]:
    """A row's inputs with another answer. asked: its labels, aligned with ids; length: the length of its own answer."""
    kind = encoder.kind.name
    if kind in ("seq2seq", "masked"):  # the answer is not in the model's input
        places = iter(answer)
        labels = answer if kind == "seq2seq" else [next(places) if x != IGNORED else IGNORED for x in asked]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    return continued(encoder.kind, ids[: len(ids) - length], answer)


@contextlib.contextmanager
def _last_output(model: nn.Module) -> Iterator[dict[str, Any]]:
    """While open, the model's last output is stored under "output", so that one forward gives loss and accuracy."""
    last: dict[str, Any] = {}
    handle = model.register_forward_hook(lambda module, args, output: last.update(output=output))
    try:
        yield last
    finally:
        handle.remove()
