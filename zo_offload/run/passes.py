"""Passes: all lanes go once through the model, its weights are streamed, and passes correct the plan.

The plan comes from a trace. If the model does something that the trace did not show (it uses a weight outside its
module, or keeps tensors between calls), the first pass, which is watched, detects it. The pass then runs again under a
corrected plan or another order of lanes; the first attempt leaves no effect on the weights or the random generators.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batches
from ..data.losses import Batch, Objective, language_models, own_loss, scalar, weighing, without_cache
from ..data.measures import OptionsLoss
from ..data.micro_batches import Weighing, agree, nothing_counts, split_micro_batches
from ..devices import Device
from ..devices.placing import PlacedBatches, input_dtype, inputs_in, matmul_precision
from ..errors import BudgetError, DataError, PlanError
from ..kernels.records import STILL, Perturbation
from ..kernels.scalars import divide
from ..lanes.hub import Hub, Lane, LanesShareState, PlanFault
from ..methods import Method
from ..modules.compiled import eagerly
from ..modules.generators import lane_seed
from ..modules.modes import module_modes
from ..modules.recorder import Trace
from ..modules.trees import tensor_bytes
from ..plan.activations import ServiceOrder
from ..plan.plan import Plan, relift
from ..ranks.alone import Alone
from ..stream.streamer import Streamer
from .tail import Tail, recording_lane

_MAX_CORRECTIONS = 8  # corrections of the plan by watched runs; each adds a use, so a few are enough


def _divide(x: Any, by: float) -> Any:
    return divide(x, by) if isinstance(x, Tensor) else x / by


_COARSE = {torch.bfloat16: 3, torch.float16: 4}
"""Decimal digits of losses that are not float32."""


class Passes:
    """Passes of one model over one streamer.

    order: the order in which lanes are served; fixed: never another order, even if the model needs lanes one after
    another. compute: "tf32" for float32 products on the matrix units. mode: the modules' mode while they run
    (`modes.module_modes`). seed: the run's seed, for the random numbers of forwards (`generators.py`). wide: paths of
    layers that compute in float32 (`class_heads.py`). whole: see `split_micro_batches`. ranks: the processes that share
    the lanes of a step, and evaluations if asked to. on_measured: called with the bytes of activations that a watched
    pass held, batches included; if it raises, the pass has no results. `plan` is the current plan: as given, or
    corrected. tail: gets its exact gradient from one lane of each step.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        streamer: Streamer,
        device: Device,
        *,
        objective: Objective,
        order: ServiceOrder,
        fixed: bool,
        compute: str | None,
        mode: str,
        seed: int,
        wide: Collection[str],
        whole: Collection[str] | None = None,
        ranks: Alone,
        on_measured: Callable[[int], None],
        tail: Tail | None = None,
    ) -> None:
        self.model, self.plan, self.streamer, self.device, self.objective = model, plan, streamer, device, objective
        self._fixed, self._compute, self._on_measured = fixed, compute, on_measured
        self._told_coarse, self._wide = False, wide
        self._mode, self._seed, self._modules = mode, seed, list(model.modules())
        self._parts, self._whole, self._ranks = language_models(model), whole, ranks
        self._own_weighing = weighing(model, objective)
        self._input_dtype, self._tail = input_dtype(model), tail
        self._hub = self._attach(order)

    def close(self) -> None:
        """Restore the model to its former state, except for its weights."""
        self._hub.mend()
        self._hub.detach()

    def mend(self) -> None:
        """Clean up after a pass was interrupted anywhere: nothing of it runs, and the model is as between passes."""
        self._hub.mend()

    def is_inside(self) -> bool:
        """Whether the caller is code inside a lane: a forward, or an objective."""
        return self._hub.is_inside()

    # ---- losses ------------------------------------------------------------------------------------------------------

    def of_step(
        self, batch: Batch, method: Method, bound: Callable[[Sequence[Perturbation]], Sequence[Perturbation]],
        lr: float, micro_batches: int, *, step: int, late: bool, objective: Objective | None,
    ) -> list[Any]:  # fmt: skip
        """The losses of all lanes of one step of `method`, as `losses` returns them; fewer, if no more are needed.

        bound: gives lanes the coefficients of the sums that they are perturbed along.
        """
        found, lanes = list[Any](), method.perturbations(self._seed, step)
        while lanes:
            more = self.losses(
                batch, bound(lanes), micro_batches, step=step, late=late, objective=objective,
                empty=method.on_nonfinite == "skip", tail=None if found else self._tail,
            )  # fmt: skip
            if more is None:
                break
            found += more
            lanes = method.next_lanes(self._seed, step, found, lr) if method.comes_back else ()
        return found

    def losses(
        self,
        batch: Batch,
        perturbations: Sequence[Perturbation],
        micro_batches: int,
        *,
        step: int,
        late: bool,
        objective: Objective | None = None,
        empty: bool = False,
        tail: Tail | None = None,
    ) -> list[float] | list[Tensor] | None:
        """The loss of each perturbation over the whole batch; each micro-batch has the weight of its counted labels.

        Returns None if the step was meanwhile decided elsewhere. step: all lanes get the random numbers of this step.
        late: return float64 scalars on the device without waiting for them. objective: used in place of the engine's.
        empty: compute a loss also for a batch in which nothing counts; otherwise such a batch raises DataError. A part
        in which nothing counts is left out. tail: gets its gradient from one of the perturbations.
        """
        objective = self.objective if objective is None else objective
        weigh = self._weighing(objective)
        parts = split_micro_batches(batch, micro_batches, self._whole)
        weights = [1.0] * len(parts) if empty and not any(map(weigh, parts)) else weigh.shares(parts)
        parts = [part for part, weight in zip(parts, weights, strict=True) if weight]
        weights = [weight for weight in weights if weight]
        if isinstance(objective, OptionsLoss):
            parts = [objective.prepared(part) for part in parts]
        own = None if tail is None else partial(self._recorded_loss, objective)
        at = -1 if tail is None else recording_lane(perturbations)
        lanes = [Lane(p, part, own if i == at else None) for i, p in enumerate(perturbations) for part in parts]
        with without_cache(self.model, objective, self._parts):
            call = partial(self._late_loss if late else self._loss, objective)
            losses: list[Any] | None = self._shared(lanes, call, step, late)
        if tail is not None and losses is not None:
            pairs = losses[at * len(parts) : (at + 1) * len(parts)]
            losses[at * len(parts) : (at + 1) * len(parts)] = [loss for loss, _ in pairs]
            of_each = zip(*[gradient for _, gradient in pairs], strict=True)  # micro-batches, of each parameter
            whole = len(parts) == 1
            tail.offer(step, [g[0] if whole else weigh.together(g, weights, lambda x, by: x / by) for g in of_each])
        if len(parts) == 1 or losses is None:
            return losses
        by_lane = (losses[i : i + len(parts)] for i in range(0, len(losses), len(parts)))
        return [weigh.together(these, weights, _divide) for these in by_lane]

    def _shared(
        self, lanes: Sequence[Lane], call: Callable[[nn.Module, Batch], Any], step: int, late: bool
    ) -> list[Any] | None:
        """The losses of all lanes: this rank computes its own, and the other ranks send theirs.

        A lane's random numbers and loss do not depend on the other lanes that run with it.
        """
        seed = lane_seed(self._seed, "step", step)

        def compute(cells: Sequence[int]) -> list[Any]:
            return self.forward([lanes[i] for i in cells], call, exact=False, seed=seed)

        losses = self._ranks.share(step, len(lanes), compute)
        if losses is None or not (late and self._ranks.tells):
            return losses
        return list(torch.tensor(losses, dtype=torch.float64, device=self.device.torch_device))

    def measure(
        self, batches: Batches, between: Callable[[], None] = lambda: None, *, at: str | None = None
    ) -> dict[str, float] | None:
        """Weighted means of the measures of `batches`, over one epoch. between: called before each batch.

        at: a label of this point of the run: all ranks must call this, and each takes some of the batches; returns None
        if a stop was requested meanwhile. Without `at` this process takes all batches. Batches in which nothing counts
        are left out. Raises DataError if nothing counts in any batch.
        """
        objective = self.objective if batches.objective is None else batches.objective
        weigh, counts = self._weighing(objective), []
        ranks = Alone() if at is None else self._ranks
        mine: dict[int, dict[str, Any]] = {}
        any_counts, metrics = False, batches.metrics
        if metrics is not None:
            metrics.begin()
        for i, batch in enumerate(batches.epoch()):
            between()
            if ranks.is_stopping():
                break
            counts.append(weigh.counts(batch))
            if not (of_batch := weigh(batch)):
                last = batch
                continue
            any_counts = True
            if i % ranks.world != ranks.rank:
                continue
            options = getattr(batch, "options", None)
            call = partial(self._values_of, batches, partial(self._loss, objective), of_batch, options)
            with without_cache(self.model, objective, self._parts):
                seed = lane_seed(self._seed, "evaluation", i)
                mine[i], seen = self.forward([Lane(STILL, batch)], call, exact=True, seed=seed)[0]
            for scores, right in seen:
                if metrics is not None:
                    metrics.see(scores, right)
        found = ranks.split("evaluation" if at is None else f"evaluation {at}", mine)
        if found is None:
            return None
        if not any_counts:
            raise DataError(f"nothing to evaluate: {nothing_counts([last])}")
        if not agree(counts):
            warnings.warn(
                f"the evaluation weights batches by {next(iter(counts[0]))!r}; the loss of {weigh.model} may be a mean "
                f"over {', '.join(map(repr, list(counts[0])[1:]))}, and then it depends a little on batch_size",
                stacklevel=2,
            )
        means = self._means([found[i] for i in sorted(found)], weigh.summed)
        return means if metrics is None else {**means, **metrics.values()}

    def _means(self, found: Sequence[dict[str, Any]], is_sum: bool) -> dict[str, float]:
        """Means of (value, weight) by name, batch after batch. is_sum: the loss is a sum already, not a mean."""
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for values in found:
            for name, (value, weight) in values.items():
                sums[name] = sums.get(name, 0.0) + value * (1.0 if is_sum and name == "loss" else weight)
                weights[name] = weights.get(name, 0.0) + weight
        return {name: sums[name] / weights[name] for name in sums if weights[name]}

    def _values_of(
        self, batches: Batches, loss: Callable[[nn.Module, Batch], float], weight: float, options: Any,
        model: nn.Module, batch: Batch,
    ) -> tuple[dict[str, tuple[float, float]], list[tuple[Tensor, Tensor]]]:  # fmt: skip
        """A batch's measures, and the inputs of its metrics; nothing is kept from a pass that is run again."""
        seen: list[tuple[Tensor, Tensor]] = []
        keep = None if batches.metrics is None else lambda scores, right: seen.append((scores, right))
        return batches.measure(model, dict(batch), loss, weight, options, keep), seen

    def _weighing(self, objective: Objective) -> Weighing:
        return self._own_weighing if objective is self.objective else weighing(self.model, objective)

    def _loss(self, objective: Objective, model: nn.Module, batch: Batch) -> float:
        loss = self._scalar(objective, model, batch)
        return float(loss.item()) if isinstance(loss, Tensor) else loss

    def _recorded_loss(self, objective: Objective, model: nn.Module, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
        """The loss, and its gradient by the tail. The lane's hooks turn autograd on; it is off again afterwards."""
        with torch.set_grad_enabled(False):
            made = objective(model, batch)
            loss = self._told(scalar(made))
            gradient = self._hub.recording.gradients(made)
        return (float(loss.item()) if isinstance(loss, Tensor) else loss), gradient

    def _late_loss(self, objective: Objective, model: nn.Module, batch: Batch) -> Tensor:
        """The loss as float64 on the device, without waiting for it."""
        loss = self._scalar(objective, model, batch)
        if isinstance(loss, Tensor):
            return loss.to(torch.float64)
        return torch.full((), loss, dtype=torch.float64, device=self.device.torch_device)

    def _scalar(self, objective: Objective, model: nn.Module, batch: Batch) -> Tensor | float:
        return self._told(scalar(objective(model, batch)))

    def _told(self, loss: Tensor | float) -> Tensor | float:
        """The loss, with one warning if it has 16 bits: the difference between two lanes is smaller than its steps."""
        if isinstance(loss, Tensor) and loss.dtype in _COARSE and not self._told_coarse:
            self._told_coarse = True
            warnings.warn(
                f"the loss of {type(self.model).__name__} comes in {str(loss.dtype).removeprefix('torch.')}, with "
                f"{_COARSE[loss.dtype]} digits: lanes differ by less than that, and steps teach little. Compute in "
                "fp32 (compute='fp32'), or give an objective that computes the loss in float32 from the logits",
                stacklevel=2,
            )
        return loss

    # ---- one pass ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        lanes: Sequence[Lane],
        call: Callable[[nn.Module, Batch], Any],
        *,
        exact: bool,
        seed: int | None = None,
    ) -> list[Any]:
        """The result of `call(model, batch)` in each lane. A failure leaves the weights unchanged and this usable.

        exact: an evaluation with unperturbed lanes: for split formats it sees the masters. The lanes of a step never
        do, perturbed or not, since their losses are compared with one another. seed: for the lanes' random numbers;
        None: the caller's generators are used, and then advanced as after one forward. Raises PlanError if the plan
        cannot be corrected, LanesShareState if lanes need another order and the order is fixed.
        """
        placed = PlacedBatches(self.device)
        lanes = [replace(lane, batch=placed.place(lane.batch)) for lane in lanes]
        for _ in range(_MAX_CORRECTIONS):
            hub, streamer = self._hub, self.streamer
            streamer.begin_pass(exact)
            seen = hub.trace
            try:
                with (
                    self.device.entered(),
                    torch.no_grad(),
                    matmul_precision(self._compute),
                    inputs_in(self.model, self._input_dtype),
                    eagerly(),
                    own_loss(self.model, self.objective, self._parts),
                    module_modes(self._modules, self._mode),
                ):
                    results = hub.run(lanes, call, seed=seed, host_of=placed.host_of, upload=self.device.upload)
                streamer.end_pass()
            except PlanFault as fault:  # a weight was used where the plan did not expect it: lift its owner, run again
                streamer.mend()
                last: PlanError = fault
                self._adopt(relift(self.plan, fault.trace))
                continue
            except LanesShareState:  # a module keeps tensors between calls: lanes run one after another
                streamer.mend()
                if self._fixed:
                    raise
                hub.detach()
                self._hub = self._attach("lane")
                continue
            except BaseException:
                hub.mend()
                streamer.mend()
                raise
            if hub.trace is not seen:  # a watched run: each module's weights had memory of their own
                self.device.trim()
                self._measured(hub.activation_bytes + tensor_bytes(lane.batch for lane in lanes))
            if not self.plan.traced and hub.trace is not None and hub.trace.complete:
                self._adopt(relift(self.plan, hub.trace))  # the first real run shows what tracing could not
            if hub.trace is not seen and any(lane.perturbation.scale or lane.call for lane in lanes):
                self._check_reach(hub.trace)
            return results
        raise PlanError(f"the plan still has faults after {_MAX_CORRECTIONS} corrections; the last: {last}")

    def _check_reach(self, trace: Trace | None) -> None:
        """Raise PlanError where a whole pass used nothing that trains, and ran no module that has any of it. An
        objective that does not call the model is left to the learning watch."""
        assert trace is not None
        trains = {n for n, s in self.plan.params.items() if s.trainable} or {*(self._tail.names if self._tail else ())}
        run = {"", *(name for _, name in trace.order)}
        held = (owner.params for owner in self.plan.owners if owner.name in run)
        if trace.complete and trace.order and not trains & {*trace.uses, *(name for params in held for name in params)}:
            self.watch_next()  # a second try is refused again
            raise PlanError(
                f"the forward runs none of the modules that hold what trains ({len(trains)} parameters, such as "
                f"{min(trains)!r}): nothing would be learned. Look at trainable=, and at what the loss depends on"
            )

    def watch_next(self) -> None:
        """Watch the next pass, even if an earlier pass was watched."""
        self._hub.adopt(self.plan)

    def _measured(self, nbytes: int) -> None:
        try:
            self._on_measured(nbytes)
        except BudgetError:
            self.watch_next()  # so that a second try is refused again
            raise

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.streamer.set_plan(plan)
        self._hub.adopt(plan)

    def _attach(self, order: ServiceOrder) -> Hub:
        recorded = () if self._tail is None else self._tail.names
        hub = Hub(self.model, self.plan, self.streamer, order=order, wide=self._wide, recorded=recorded)
        hub.attach()
        return hub
