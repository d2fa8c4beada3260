"""Passes: all lanes once through the model, its weights streamed, and the plan corrected by what a pass shows.

The plan comes from a trace. Where the model does something that the trace did not show (a weight used outside of its
module, tensors kept between calls), the first pass, which is watched, finds out; it is run again under a better plan or
another order of lanes, and nothing of the first attempt is left in the weights or the random generators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .activations import ServiceOrder
from .chunked_loss import losses_in_chunks
from .data import Batches, loss_weight, split_micro_batches
from .devices import CpuDevice
from .errors import BudgetError, ConfigError, DataError, PlanError
from .fused import STILL, Perturbation
from .lanes import Hub, Lane, LanesShareState, PlanFault
from .late import divide
from .meta_model import config_parts
from .on_device import PlacedBatches, matmul_precision, tensor_bytes
from .plan import Plan, relift
from .streamer import Streamer

Batch = Mapping[str, Any]
Objective = Callable[[nn.Module, Batch], Any]

_MAX_CORRECTIONS = 8  # of the plan, by watched runs; each adds a use, so a few are enough


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The default objective: `model(**batch).loss`."""
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise DataError(
            f"{type(model).__name__} returned no loss for a batch with {sorted(batch)}: give labels, "
            "or pass objective=(model, batch) -> loss"
        )
    return loss


def own_loss(
    model: nn.Module, objective: Objective, parts: Sequence[nn.Module] | None = None
) -> contextlib.AbstractContextManager[None]:
    """While open, the loss that the model itself computes is computed in chunks; not under an objective given."""
    return losses_in_chunks(model, parts) if objective is model_loss else contextlib.nullcontext()


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
    configs = [part.config for part in parts] if objective is model_loss else []
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
    with without_cache(model, objective), own_loss(model, objective):
        yield


class Passes:
    """Passes of one model over one streamer.

    order: in which lanes are served; fixed: and no other, even if the model needs lanes one after another. compute:
    "tf32" for float32 products on the matrix units. on_plan: told each corrected plan. on_measured: told the
    bytes of activations that a watched pass held, batches included; may raise, and the pass then has no results.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        streamer: Streamer,
        device: CpuDevice,
        *,
        objective: Objective,
        order: ServiceOrder,
        fixed: bool,
        compute: str | None,
        on_plan: Callable[[Plan], None],
        on_measured: Callable[[int], None],
    ) -> None:
        self.model, self.plan, self.streamer, self.device, self.objective = model, plan, streamer, device, objective
        self._fixed, self._compute, self._on_plan, self._on_measured = fixed, compute, on_plan, on_measured
        self._parts = language_models(model)
        self._hub = self._attach(order)
        streamer.is_watched = lambda: self._hub.watching

    def close(self) -> None:
        """The model is as it was, but for its weights."""
        self._hub.detach()

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(
        self, batch: Batch, perturbations: Sequence[Perturbation], micro_batches: int, *, late: bool
    ) -> list[float] | list[Tensor]:
        """The loss of each perturbation over the whole batch: micro-batches weighted by their labels.

        late: float64 scalars on the device, which nobody waited for.
        """
        parts = split_micro_batches(batch, micro_batches)
        weights = [loss_weight(part) for part in parts]
        lanes = [Lane(perturbation, part) for perturbation in perturbations for part in parts]
        with without_cache(self.model, self.objective, self._parts):
            losses = self.forward(lanes, self._late_loss if late else self._loss)
        if len(parts) == 1:
            return losses
        total = sum(weights)
        sums = [sum(w * losses[i * len(parts) + j] for j, w in enumerate(weights)) for i in range(len(perturbations))]
        return [divide(x, total) if isinstance(x, Tensor) else x / total for x in sums]

    def measure(self, batches: Batches, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Weighted means of what `batches` measure, over one epoch. between: called before each batch."""
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}

        def measure(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
            return batches.measure(model, dict(batch), self._loss)

        for batch in batches.epoch():
            between()
            with without_cache(self.model, self.objective, self._parts):
                values = self.forward([Lane(STILL, batch)], measure)[0]
            for name, (value, weight) in values.items():
                sums[name] = sums.get(name, 0.0) + value * weight
                weights[name] = weights.get(name, 0.0) + weight
        return {name: sums[name] / weights[name] for name in sums if weights[name]}

    def _loss(self, model: nn.Module, batch: Batch) -> float:
        loss = self._scalar(self.objective(model, batch))
        return float(loss.item()) if isinstance(loss, Tensor) else loss

    def _late_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss as float64 on the device: nobody waits for it."""
        loss = self._scalar(self.objective(model, batch))
        if isinstance(loss, Tensor):
            return loss.to(torch.float64)
        return torch.full((), loss, dtype=torch.float64, device=self.device.torch_device)

    def _scalar(self, loss: Any) -> Tensor | float:
        if not isinstance(loss, Tensor):
            return float(loss)
        if loss.numel() != 1:
            raise ConfigError(f"the objective returned a tensor of shape {tuple(loss.shape)}; expected a scalar")
        return loss.detach().reshape(())

    # ---- one pass ----------------------------------------------------------------------------------------------------

    def forward(self, lanes: Sequence[Lane], call: Callable[[nn.Module, Batch], Any]) -> list[Any]:
        """What `call(model, batch)` gives in each lane. A failure leaves the weights unharmed, and all of this usable.

        Raises PlanError if the plan cannot be corrected, LanesShareState if it is fixed that lanes take turns.
        """
        placed = PlacedBatches(self.device)
        lanes = [Lane(lane.perturbation, placed.place(lane.batch)) for lane in lanes]
        for _ in range(_MAX_CORRECTIONS):
            hub, streamer = self._hub, self.streamer
            streamer.begin_pass(exact=all(lane.perturbation.scale == 0.0 for lane in lanes))
            hub.host_of = placed.host_of
            seen = hub.trace
            try:
                with (
                    torch.no_grad(),
                    matmul_precision(self._compute),
                    own_loss(self.model, self.objective, self._parts),
                ):
                    results = hub.run(lanes, call)
                streamer.end_pass()
            except PlanFault as fault:  # a weight was used where the plan did not have it: lift its owner, run again
                streamer.abort_pass()
                last: PlanError = fault
                self._adopt(relift(self.plan, fault.trace))
                continue
            except LanesShareState:  # a module keeps tensors between calls: one lane after another, as its code expects
                streamer.abort_pass()
                if self._fixed:
                    raise
                hub.detach()
                self._hub = self._attach("lane")
                continue
            except BaseException:
                streamer.abort_pass()
                raise
            if hub.trace is not seen:  # a watched run: each module's weights had memory of their own
                self.device.trim()
                self._measured(hub.activation_bytes + tensor_bytes(lane.batch for lane in lanes))
            if not self.plan.traced and hub.trace is not None and hub.trace.complete:
                self._adopt(relift(self.plan, hub.trace))  # the first real run shows what tracing could not
            return results
        raise PlanError(f"the plan still has faults after {_MAX_CORRECTIONS} corrections; the last: {last}")

    def watch_next(self) -> None:
        """Watch the next pass, whatever was seen before."""
        self._hub.adopt(self.plan)

    def _measured(self, nbytes: int) -> None:
        try:
            self._on_measured(nbytes)
        except BudgetError:
            self.watch_next()  # a second try is refused again
            raise

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self._on_plan(plan)
        self.streamer.set_plan(plan)
        self._hub.adopt(plan)

    def _attach(self, order: ServiceOrder) -> Hub:
        hub = Hub(self.model, self.plan, self.streamer, order=order)
        hub.attach()
        return hub
