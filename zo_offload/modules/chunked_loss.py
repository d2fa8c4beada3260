"""The loss of a language model over a large vocabulary, in chunks of rows.

transformers' losses make a float32 copy of all logits, and log_softmax one more: at 2048 tokens and 50,272 words 412 MB
each, beside 206 MB of logits. Here the two copies exist for a few rows at a time, 16 MB each.

The result is bit-equal. A row's -log p depends on that row alone, and the kernels compute a row in the same way at
every position with the same alignment: chunks are multiples of 4 rows (16 bytes; a vector load of the CUDA kernel,
whose summation order depends on alignment). nll_loss itself takes the mean or sum over rows, on a [rows, 1] table of
log p, and so in the same order as over the whole table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hf import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss, PreTrainedModel

CHUNK_BYTES = 1 << 24
"""Float32 logits of one chunk."""

_ALIGN_ROWS = 4
_IGNORED = -100

LossFunction = Callable[..., Tensor]


def chunk_rows(vocab_size: int) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES holds in float32, a multiple of 4."""
    return max(1, CHUNK_BYTES // (4 * vocab_size) // _ALIGN_ROWS) * _ALIGN_ROWS


def cross_entropy_in_chunks(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None, ignore_index: int = _IGNORED
) -> Tensor:
    """`fixed_cross_entropy(logits.float(), labels, num_items, ignore_index)`, bit for bit, a chunk of rows at a time.

    logits: [N, V], any float dtype. labels: int64 [N], on the same device. Raises what cross_entropy raises.
    """
    step = chunk_rows(logits.shape[1])
    losses = [
        F.cross_entropy(rows.float(), wanted, ignore_index=ignore_index, reduction="none")
        for rows, wanted in zip(torch.split(logits, step), torch.split(labels, step), strict=True)
    ]
    log_p = torch.cat(losses).neg_().unsqueeze(1)
    only = torch.where(labels == ignore_index, _IGNORED, 0)  # the only column, or ignored
    loss = F.nll_loss(log_p, only, ignore_index=_IGNORED, reduction="mean" if num_items is None else "sum")
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)


def _rows_of(logits: Tensor, vocab_size: int) -> Tensor | None:
    """logits as [N, vocab_size] without a copy; None if that is impossible, or not worth it."""
    if logits.ndim < 2 or logits.shape[-1] != vocab_size or not logits.is_floating_point():
        return None
    if torch.is_grad_enabled() and logits.requires_grad:  # autograd's graph holds whole copies anyway
        return None
    rows = logits.numel() // vocab_size
    mergeable = all(
        logits.shape[d] == 1 or logits.stride(d) == logits.stride(d + 1) * logits.shape[d + 1]
        for d in range(logits.ndim - 2)
    )
    return logits.view(-1, vocab_size) if rows > chunk_rows(vocab_size) and mergeable else None


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = _IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss`."""
    rows = _rows_of(logits, vocab_size)
    wanted = shift_labels
    if wanted is None and labels is not None:
        wanted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()  # tokens < n predict n
    if rows is None or wanted is None or wanted.dtype is not torch.int64 or wanted.numel() != len(rows):
        whole: Tensor = ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return whole
    return cross_entropy_in_chunks(rows, wanted.view(-1).to(rows.device), num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | None = None,
    ignore_index: int = _IGNORED,
    **kwargs: Any,
) -> Tensor:
    """`ForMaskedLMLoss`."""
    rows = _rows_of(logits, vocab_size)
    if rows is None or labels.dtype is not torch.int64 or labels.numel() != len(rows):
        whole: Tensor = ForMaskedLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)
        return whole
    return cross_entropy_in_chunks(rows, labels.view(-1).to(rows.device), num_items_in_batch, ignore_index)


_IN_CHUNKS = ((ForCausalLMLoss, causal_lm_loss), (ForMaskedLMLoss, masked_lm_loss))


def _own_loss(module: nn.Module) -> Any:
    """The function `module.loss_function`; None if it is not transformers' own property."""
    if not isinstance(module, PreTrainedModel) or type(module).loss_function is not PreTrainedModel.loss_function:
        return None
    by_type = LOSS_MAPPING.get(getattr(module, "loss_type", None) or "", LOSS_MAPPING["ForCausalLM"])
    return vars(module).get("_loss_function", by_type)


@contextlib.contextmanager
def losses_in_chunks(model: nn.Module, parts: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """While open, `loss_function` of the model, and of models inside it, works in chunks if possible.

    parts: the modules to check, if known: walking over all of a large model takes a millisecond.

    If the loss is not one of the two functions of transformers, or the forward does not call it, nothing changes.
    """
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []  # the changed dicts, with their former values
    try:
        for module in model.modules() if parts is None else parts:
            own = _own_loss(module)
            for theirs, ours in _IN_CHUNKS:
                if own is theirs:
                    attributes = vars(module)
                    changed.append((attributes, {k: v for k, v in attributes.items() if k == "_loss_function"}))
                    attributes["_loss_function"] = ours
        yield
    finally:
        for attributes, before in changed:
            del attributes["_loss_function"]
            attributes.update(before)
