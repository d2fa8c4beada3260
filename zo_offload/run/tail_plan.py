"""What a tail is made of, and how much memory it takes, before a weight is read.

The tail is trained by its exact gradient (`tail.py`), the rest by lanes: in the plan of the lanes it does not train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..config import EngineConfig
from ..errors import ConfigError
from ..modules.compiled import eagerly
from ..modules.recorder import ForwardCall
from ..modules.tree import select_names
from ..modules.watch import storage_key
from ..plan.plan import Plan
from ..plan.trace import meta_copy

_log = logging.getLogger(__name__)

_COPIES = 7
"""float32 numbers of a parameter of the tail: values and two moments, before and after a step, and the gradient."""


def without_tail(plan: Plan, config: EngineConfig, alone: bool) -> tuple[Plan, tuple[str, ...]]:
    """The plan of the lanes, in which the tail does not train, and the tail: what trains of the parameters that the
    globs select, in the plan's order. alone: nothing trains beside it. Raises ConfigError where the tail is nothing, or
    cannot be cut off, or where it is all and lanes are to train, too."""
    globs = config.tail
    if alone and config.tail_lr is not None:
        raise ConfigError(f"tail_lr={config.tail_lr}: this method has a rate of its own, lr, and trains a tail alone")
    if globs is None and alone:
        raise ConfigError(
            "this method trains a tail alone, and none is named: tail=GLOB (--tail), such as 'classifier'"
        )
    if globs is None:
        return plan, ()
    chosen = select_names(plan.tree, globs, "tail")
    tail = tuple(name for name, spec in plan.params.items() if name in chosen and spec.trainable)
    if not tail:
        raise ConfigError(
            f"tail={globs!r} selects {len(chosen)} parameters, and none of them trains: choose some that trainable= "
            "selects, too"
        )
    if shared := next((name for name in tail if plan.params[name].aliases), None):
        raise ConfigError(
            f"tail={globs!r}: {shared!r} is also {plan.params[shared].aliases[0]!r}, so it is not used last alone. A "
            "tail shares no parameter with the rest of the model"
        )
    if rows := next((owner.name for owner in plan.owners if owner.rows and {*owner.params} & {*tail}), None):
        raise ConfigError(f"tail={globs!r}: {rows!r} is an embedding, where a forward begins. A tail is used last")
    if cut := next((name for name in tail if len(plan.pieces_of(name)) > 1), None):
        raise ConfigError(
            f"tail={globs!r}: {cut!r} has {plan.params[cut].numel:,} elements and is cut into pieces. A tail is a few "
            "numbers, such as a class head or an adapter's coefficients; or raise block_numel"
        )
    if written := sorted(plan.trace.writes):
        raise ConfigError(
            f"tail={globs!r}: this model's forward changes its weights in place ({written[0]!r}), so the tail cannot "
            "be cut off. Leave it out"
        )
    lanes = frozenset() if alone else {name for name, spec in plan.params.items() if spec.trainable} - {*tail}
    if not lanes and not alone:
        raise ConfigError(
            f"tail={globs!r} selects all that trains, and nothing is left to the lanes. Train less as the tail; or "
            "take method 'tail-alone', which has no other lanes"
        )
    return replace(plan, params={n: replace(spec, trainable=n in lanes) for n, spec in plan.params.items()}), tail


def tail_bytes(
    plan: Plan, tail: Sequence[str], model: nn.Module | None = None, batch: Mapping[str, Any] | None = None,
    call: ForwardCall | None = None, *,
    losses: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext(),
) -> int:  # fmt: skip
    """Bytes of a tail's numbers and, with a model on meta and a batch, of all that a graph of its gradient keeps:
    activations, and copies of weights. Where that cannot be measured, of its numbers alone. losses: the context around
    the call."""
    own = _COPIES * 4 * sum(plan.params[name].numel for name in tail)
    if not tail or model is None or call is None or batch is None:
        return own
    shadow, kept = meta_copy(model), dict[int, int]()
    params = dict(shadow.named_parameters())
    for name, p in params.items():
        if p.is_floating_point():
            p.requires_grad_(name in tail)

    def keep(tensor: Tensor) -> Tensor:
        if (key := storage_key(tensor)) is not None:
            kept[key] = tensor.untyped_storage().nbytes()
        return tensor

    def record(*_: Any) -> None:
        torch.set_grad_enabled(True)

    for owner in plan.owners:
        if not {*owner.params}.isdisjoint(tail):
            shadow.get_submodule(owner.name).register_forward_pre_hook(record)
    inputs = {k: v.to("meta") if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    try:
        with torch.no_grad(), losses(shadow), eagerly(), saved_tensors_hooks(keep, _as_it_is):
            call(shadow, inputs)
    except Exception:  # whatever a model's code may raise without real values
        _log.debug("what a tail's gradient keeps could not be measured", exc_info=True)
    return own + sum(kept.values())


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
