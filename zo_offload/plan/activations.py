"""Activation memory of a forward, measured on meta tensors: no weights, no arithmetic.

One lane runs at a time. The others wait: before an owner (module order), before a block (block order), or they have not
begun or have ended (lane order). So the peak is the running lane's peak plus the bytes that the other lanes hold while
they wait. A forward is therefore measured in segments, from one owner to the next.

Attention is counted with a fused kernel's memory if the device has one for these shapes; on meta, torch would compute
the scores of all pairs of tokens.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modules.chunked_loss import losses_in_chunks
from ..modules.compiled import eagerly
from ..modules.experts import in_runs, set_rows
from ..modules.recorder import ForwardCall, Recorder
from ..modules.tiles import tiled_linear
from ..modules.trees import tensors_of
from ..modules.watch import storage_key
from .blocks import Piece
from .plan import Owner, Plan
from .trace import MetaWatch, meta_copy

ServiceOrder = Literal["module", "block", "lane"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """The part of a lane's forward from one place where it may wait to the next."""

    block: int
    """The block of the owner that the lane waits for; -1: it has not begun."""
    held: int
    """Bytes of its activations while it waits there."""
    peak: int
    """The most bytes that it holds from there until it waits again or ends."""
    together: bool = False
    """It waits for the others in every order but "lane": the owner's blocks are visited once for all lanes."""


@dataclass(frozen=True)
class Activations:
    """Bytes that one lane's forward holds, segment by segment; unknown if there are no segments."""

    segments: tuple[Segment, ...] = ()
    inputs: int = 0
    """Bytes of the batch."""
    unknown: str = ""
    """Why a forward could not be measured; empty if it was measured, or if there was no batch."""

    @property
    def peak(self) -> int:
        return max((segment.peak for segment in self.segments), default=0)

    def together(self, order: ServiceOrder, lanes: int) -> int:
        """The most bytes that `lanes` lanes hold at once: the running lane's, and the waiting lanes'.

        During a segment, lanes behind hold the bytes of its start, lanes ahead those of its end.
        """
        if order == "lane" or not self.segments:
            return self.inputs + self.peak
        segments = merged(self.segments) if order == "block" else self.segments
        ends = [*(segment.held for segment in segments[1:]), 0]
        waiting = ((s.peak, max(s.held, end)) for s, end in zip(segments, ends, strict=True))
        return self.inputs + max(peak + (lanes - 1) * held for peak, held in waiting)


NOT_MEASURED = Activations()
"""Used before there is a batch: counts as 0 bytes."""


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Segments of one stay in a block as one: in block order a lane goes through it without waiting."""
    runs: list[Segment] = []
    for s in segments:
        if runs and runs[-1].block == s.block and not s.together:
            runs[-1] = replace(runs[-1], peak=max(runs[-1].peak, s.peak))
        else:
            runs.append(s)
    return runs


class _LiveWatch(MetaWatch):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages that ops made."""

    def __init__(self) -> None:
        super().__init__({})
        self.live = self.peak = 0
        self.segments: list[Segment] = []
        self._last = Segment(-1, 0, 0)
        self._seen: set[int] = set()
        self.recorder = Recorder()

    def after(self, recorder: Recorder, inputs: list[tuple[Tensor, int | None]], outputs: list[Tensor]) -> None:
        known = {key for _, key in inputs}
        for tensor in outputs:
            key = storage_key(tensor)
            if key is None or key in known or key in self._seen:
                continue
            storage = tensor.untyped_storage()
            nbytes = storage.nbytes()
            self._seen.add(key)
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        self._seen.discard(key)

    def wait(self, block: int = -1, together: bool = False) -> None:
        """Record that the forward is before an owner of `block`, or has ended."""
        self.segments.append(replace(self._last, peak=self.peak))
        self._last = Segment(block, self.live, self.live, together)
        self.peak = self.live


class _FusedAttention(TorchFunctionMode):
    """Makes attention on meta allocate what the device's fused kernel allocates, if it has one for the call."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        attention = func is nn.functional.scaled_dot_product_attention
        if attention and args[0].is_meta and is_fused(self._device, *args, **kwargs):
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def is_fused(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    enable_gqa: bool = False,
    **options: Any,
) -> bool:
    """Whether scaled_dot_product_attention has a kernel that does not store the scores of all pairs (torch 2.13).

    CPU: one, for heads of one size. CUDA: flash for 16 bits without a mask, else the memory-efficient one, which does
    not share keys between heads.
    """
    one_size = query.shape[-1] == value.shape[-1]
    if query.ndim != 4:
        return False
    if device == "cpu":
        return one_size and dropout_p == 0.0
    flash = attn_mask is None and query.dtype.itemsize == 2 and one_size and query.shape[-1] <= 256
    return flash or not enable_gqa


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Allocate what a fused kernel does: a mask in the dtype of the query, a float per row, and the output."""
    batch, heads, tokens = query.shape[:3]
    alive = [query.new_empty((batch, heads, tokens), dtype=torch.float32)]
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        alive.append(torch.empty_like(attn_mask, dtype=query.dtype, device="meta"))
    return query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)


def measure_activations(
    model: nn.Module,
    plan: Plan,
    batch: Mapping[str, Any],
    call: ForwardCall,
    *,
    device: str = "cpu",
    losses: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = losses_in_chunks,
) -> Activations:
    """Bytes that one lane's `call(model, batch)` holds, from owner to owner of the plan, on a device of that kind.

    The model may be hollow or on meta. losses: the context around the call. If the forward cannot run without weights,
    there are no segments and `unknown` has the reason: the memory plan then keeps a reserve (`memory.py`).
    """
    watch = _LiveWatch()
    shadow = meta_copy(model)
    for owner in plan.owners:
        module, portions = shadow.get_submodule(owner.name), plan.portions(owner)
        if len(portions) > 1:
            in_portions = _in_runs if owner.name in plan.tree.stacks else _in_pieces
            vars(module)["forward"] = partial(in_portions, watch, plan, owner, module)
        hook = partial(_wait_before, watch, plan, owner, portions[0])
        module.register_forward_pre_hook(hook, prepend=True)
    inputs = {k: v.to("meta") if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    nbytes = sum(tensor.nbytes for tensor in tensors_of(batch))
    try:
        with torch.no_grad(), losses(shadow), eagerly(), watch, _FusedAttention(device):
            call(shadow, inputs)
    except Exception as error:  # whatever a model's code may raise without real values
        log.debug("activations could not be measured", exc_info=True)
        said = str(error).strip().splitlines()[:1]
        return Activations(inputs=nbytes, unknown=": ".join([type(error).__name__, *said])[:200])
    finally:
        watch.put_generators_back()
    watch.wait()
    return Activations(tuple(watch.segments), nbytes)


def _wait_before(watch: _LiveWatch, plan: Plan, owner: Owner, portion: Sequence[Piece], *_: Any) -> None:
    """A pre-hook of an owner; also called before each later portion of it."""
    blocks = plan.streamed_blocks(portion)
    watch.wait(blocks[0] if blocks else owner.block, len(blocks) > 1)


def _in_pieces(watch: _LiveWatch, plan: Plan, owner: Owner, module: Any, input: Tensor) -> Tensor:
    """The forward of a layer that waits for each piece of its weight while it holds its output."""
    portions, columns = plan.portions(owner), module.weight.shape[1]
    rows = [slice(portion[-1].start // columns, portion[-1].stop // columns) for portion in portions]

    def weight(k: int) -> Tensor:
        if k:
            _wait_before(watch, plan, owner, portions[k])
        return module.weight[rows[k]]  # type: ignore[no-any-return]

    return tiled_linear(input, rows, weight, module.bias)


def _in_runs(watch: _LiveWatch, plan: Plan, owner: Owner, module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of stacked experts that waits for each run, as if every token chose experts of that run only.

    The first and the last run are computed; those between, possibly hundreds, are assumed to take as much as the first.
    """
    portions, runs = plan.portions(owner), plan.runs(owner.params)
    whole = [p.data for p in module.parameters()]
    reached, before, watch.peak = watch.peak, watch.live, watch.live

    def hold(k: int) -> None:
        if k:
            took, watch.peak = watch.peak - before, max(watch.peak, reached)
            for portion in portions[1:]:
                _wait_before(watch, plan, owner, portion)
                watch.peak = watch.live + (took if portion is not portions[-1] else 0)
        set_rows(module, [w[(runs[0], runs[-1])[k]] for w in whole])

    out = in_runs(module, (runs[0], runs[-1]), args, kwargs, hold, masked=True)
    set_rows(module, whole)
    return out
