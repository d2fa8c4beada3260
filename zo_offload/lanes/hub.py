"""Lanes: perturbed forwards of the unmodified model in lockstep, one greenlet each.

A lane is one forward with one perturbation. Forward pre-hooks on the plan's owners pass control to the hub, which waits
until every lane is before an owner, serves the owner that comes first in the plan (makes its scratch weights and lets
each lane through) and continues. Lanes need not reach the same owners, or in the same order.

While an owner runs in a lane its parameters hold that lane's scratch; at all other times a Parameter keeps its
identity, shape, dtype and device, and its values are NaN. If an owner's children switch lanes, its weights are switched
too. Lanes that are served together share scratch if they have the same perturbation (micro-batches), and all of them
share one tensor of a frozen parameter. An `nn.Embedding` gets only the rows that the waiting lanes look up, and
remapped ids. A cut `nn.Linear`, and cut stacked experts, get portion after portion: for the hub each portion is a
separate call, so lanes are in lockstep over (call, portion).

Orders of service (results are bit-equal):
    module  all lanes waiting at the earliest owner are served together; noise is made once
    block   one lane at a time through a block; scratch of one lane, only hidden states are held per lane. A portion
            that lies in several blocks is served to all lanes together, since each block is visited once
    lane    one lane after another; for models whose modules keep tensors between calls

A plan can be wrong (`watch.py`), so the first run of each kind of batch is watched. A weight used while it is away
raises `PlanFault`, whose trace lets `relift` make a better plan; state shared between lanes raises PlanError. Watched
runs cost Python per op; others only two hooks per owner call.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import PlanError
from ..kernels.records import Perturbation
from ..modules.generators import Generators, drawn_from
from ..modules.recorder import ForwardCall, Trace
from ..modules.state import ModuleState
from ..modules.trees import tensors_of
from ..plan.plan import Plan
from .attachment import Attachment
from .control import Control
from .hollow import install, uninstall
from .rows import gather
from .serving import Emission, Frame, Lane, LaneRun, Portion, Source, code_of, kind_of, laid_out_as
from .watched import BatchIsWritten, LanesShareState, PlanFault, WatchedRun

__all__ = ["Hub", "Lane", "LanesShareState", "Order", "PlanFault", "Source"]

Order = Literal["module", "block", "lane"]


class Hub:
    """Runs lanes of one model. Use as a context manager, or `attach` and `detach`.

    While attached, the model's own values are put aside (a hollow model has none), and it can only be called by `run`.
    Not thread-safe; one run at a time. wide: linear layers that compute in float32. recorded: see `recording.py`.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, source: Source, *, order: Order = "module", wide: Collection[str] = (),
        recorded: Collection[str] = (),
    ) -> None:  # fmt: skip
        if order not in ("module", "block", "lane"):
            raise PlanError(f"order={order!r}: choose 'module', 'block' or 'lane'")
        self.model, self.source, self.order = model, source, order
        self.trace: Trace | None = None
        """The trace of the last watched run; `relift(plan, trace)` refines a plan that was not traced."""
        self.notes: tuple[str, ...] = ()
        """Remarks of the last watched run."""
        self.activation_bytes = 0
        """The most bytes that the lanes of the last watched run held at once, without their batches."""
        self._host_of: Callable[[Tensor], Tensor | None] | None = None  # for the current run, like this:
        self._upload: Callable[[Tensor], Tensor] = _as_it_is
        self._control = Control()
        self._attachment = Attachment(model, self._control, wide, recorded)
        self.recording = self._attachment.recording
        self._installed: LaneRun | None = None  # the lane whose weights are in the model
        self._lanes: list[LaneRun] = []  # of the current run
        self._unentered: list[Frame] = []  # served, but their lanes have not gone on yet
        self._generators, self._rng_kinds = Generators(), frozenset[str]()
        self._state = ModuleState(model, self._generators)
        self._modules = list(model.modules())
        self._callers: dict[str, Any] = {}  # states of the caller's generators, while lanes have seeded ones
        self._own_batches = False  # the forward changes its batch, so each lane is given one of its own
        self._set_plan(plan)

    def _set_plan(self, plan: Plan) -> None:
        self.plan = plan
        self._seen: set[Any] = set()
        self._positions: list[list[int]] = [[] for _ in plan.owners]
        for position, owner in enumerate(plan.calls):
            self._positions[owner].append(position)

    # ---- the model ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put hooks on the owners and the model's values aside. PlanError if the model is not the planned one."""
        self._attachment.attach(self.plan)

    def detach(self) -> None:
        """Take the hooks off and put the model's own values back."""
        self._attachment.detach()

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def adopt(self, plan: Plan) -> None:
        """Use another plan of the same model (a relifted one); the next run is watched again."""
        attached = self._attachment.is_attached
        if attached:
            self._attachment.take_hooks_off()
        self._set_plan(plan)
        if attached:
            self._attachment.put_hooks_on(plan)

    def mend(self) -> None:
        """End a run that was interrupted, even in its clean-up, and restore the model's state between runs."""
        if self._control.is_running:
            self._clean_up(self._lanes)
        self._lanes = []
        self._attachment.mend(self.plan)

    def is_inside(self) -> bool:
        """Whether the caller runs inside a lane of this hub."""
        now = greenlet.getcurrent()
        return any(lane.glet is now for lane in self._lanes)

    # ---- a run ---------------------------------------------------------------------------------------------------

    def run(
        self,
        lanes: Sequence[Lane],
        call: ForwardCall | None = None,
        *,
        seed: int | None = None,
        watch: bool | None = None,
        host_of: Callable[[Tensor], Tensor | None] | None = None,
        upload: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Any]:
        """Results of `call(model, lane.batch)` (default `model(**batch)`), in lane order, under no_grad.

        Every lane starts with the same random numbers: those of `seed`, and the generators are restored at the end;
        without a seed, those of the present generators, which are then advanced as by one forward. Every lane starts
        with the modules' present state, which is restored at the end (`modules/state.py`). watch: None watches the
        first run of each kind of batch, for each combination of the modules' modes. host_of: returns the host's copy of
        a batch's tensor on a GPU, or None. upload: copies a host tensor to the batches' device.

        Raises the error of a lane, with a note that names lane and module; PlanFault (see there), with the generators
        restored; PlanError if no plan is possible. The hub can be used again after any of them.
        """
        if not self._attachment.is_attached:
            raise PlanError("the hub is not attached to its model: use `with hub:` or call attach()")
        if self._control.is_running:
            raise PlanError("a hub runs one set of lanes at a time; this call came from within a lane")
        if not lanes:
            return []
        call = call or _call_model
        modes = tuple([module.training for module in self._modules])
        kinds = {(kind_of(lane.batch), code_of(lane.call or call), modes) for lane in lanes}
        new = not kinds <= self._seen if watch is None else watch
        known = self._state.note(watching=new)
        watching = new or not known if watch is None else watch
        self._host_of, self._upload = host_of, upload or _as_it_is
        with torch.no_grad():
            results = self._run([LaneRun(i, self._own(lane)) for i, lane in enumerate(lanes)], call, watching, seed)
        self._seen |= kinds
        return results

    def _own(self, lane: Lane) -> Lane:
        """The lane with its own batch, as far as needed: it may remove entries, or change tensors."""
        batch = copy.copy(lane.batch) if isinstance(lane.batch, dict) else lane.batch
        if self._own_batches:
            batch = tree_map_only(Tensor, Tensor.clone, dict(batch) if isinstance(batch, Mapping) else batch)
        return Lane(lane.perturbation, batch, lane.call)

    def _run(self, lanes: list[LaneRun], call: ForwardCall, watching: bool, seed: int | None) -> list[Any]:
        if watching:
            self._state.watch(t for lane in lanes for t in tensors_of(lane.lane.batch))
        start = self._generators.state()
        self._carried = frozenset(start) if watching else self._rng_kinds
        self._lanes, cache = lanes, torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._control.begin()
        try:
            if watching:
                params = self._attachment.params
                self._control.watch = WatchedRun(self.model, self.plan, params, lanes, self._state)
            if seed is not None:
                self._callers = {kind: state for kind, state in start.items() if kind in self._carried}
                self._generators.seed(self._carried, seed)
            first = self._generators.state(self._carried)
            for lane in lanes:
                lane.rng = first
                self._control.launch(lane, partial(lane.lane.call or call, self.model, lane.lane.batch))
            with self.recording.keeping(self._control.lane_here):
                self._loop(lanes)
            for lane in lanes:
                if lane.error is not None:
                    where = f"in module {lane.failed_in!r}" if lane.failed_in else f"at or after module {lane.last!r}"
                    lane.error.add_note(f"zo_offload: {lane}, {where}")
            alone = seed is None and len(lanes) == 1  # then nobody else has used what it used
            if self._control.watch is not None:
                self._judge(lanes, self._control.watch, start, alone)
            self._settle_rng(lanes, start, first, alone)
            for lane in lanes:
                if lane.error is not None:
                    raise lane.error
            self._settle_state(lanes)
            return [lane.result for lane in lanes]
        finally:
            try:
                self._clean_up(lanes)
            finally:
                torch.set_autocast_cache_enabled(cache)

    def _loop(self, lanes: list[LaneRun]) -> None:
        """Run lanes to their next owner and serve the earliest, until all lanes have ended or one has failed."""
        waiting: list[LaneRun] = []
        one_by_one = list(lanes) if self.order == "lane" else []
        for lane in lanes[:1] if one_by_one else lanes:
            if not self._resume(lane, waiting):
                return
        last: LaneRun | None = None
        block = -1
        while True:
            while not waiting and len(one_by_one) > 1:
                one_by_one.pop(0)
                self._state.put_back()
                self._installed = None
                if not self._resume(one_by_one[0], waiting):
                    return
            if not waiting:
                return
            group = self._pick(waiting, last, block)
            last, block = group[0], self._portion_of(group[0]).block
            self._unentered = self._serve(group)
            for lane in group:
                waiting.remove(lane)
                if not self._resume(lane, waiting, self._unentered.pop(0)):
                    return

    def _pick(self, waiting: list[LaneRun], last: LaneRun | None, block: int) -> list[LaneRun]:
        """The lanes to serve next; all wait for the same portion. last, block: the lane and block served before."""
        alone = self.order != "module"
        if alone and last in waiting:
            portion = self._portion_of(last)
            if portion.block == block and not portion.spans:
                return [last]
        first = waiting[0]
        for lane in waiting:
            if (lane.position, lane.portion) < (first.position, first.portion):
                first = lane
        if alone and not self._portion_of(first).spans:
            return [first]
        return [lane for lane in waiting if lane.want == first.want and lane.portion == first.portion]

    def _portion_of(self, lane: LaneRun) -> Portion:
        """The portion that a lane waits for."""
        return self._attachment.served[lane.want].portions[lane.portion]

    def _resume(self, lane: LaneRun, waiting: list[LaneRun], frame: Frame | None = None) -> bool:
        """Run a lane until it waits for an owner (it joins `waiting`) or ends. False if it failed."""
        if self._installed is not lane:
            if self._installed is not None:
                uninstall(self._installed.frames)
                self._installed.cells = self._state.take()
            self._state.give(lane.cells)
            for outer in lane.frames:
                install(outer)
            self._installed = lane
        if frame is not None:
            lane.frames.append(frame)
            install(frame)
        if self._carried:
            self._generators.set(lane.rng)
        self._control.switch_to(lane)
        if self._carried:
            lane.rng = self._generators.state(self._carried)
        if lane.glet.dead:  # type: ignore[union-attr]
            return lane.error is None
        self._locate(lane)
        waiting.append(lane)
        return True

    def _locate(self, lane: LaneRun) -> None:
        """Find a lane's next call in the plan: the next one of its owner, if any is left."""
        if lane.portion:
            return  # in the midst of it
        calls, cursor = self.plan.calls, lane.cursor
        if cursor < len(calls) and calls[cursor] == lane.want:
            lane.position = cursor
        else:
            places = self._positions[lane.want]
            at = bisect_left(places, cursor)
            if at == len(places):
                lane.position = cursor  # not expected here: it keeps its turn
                return
            lane.position = places[at]
        lane.cursor = lane.position + 1

    def _serve(self, group: list[LaneRun]) -> list[Frame]:
        """Emit scratch for the lanes of a group; returns one frame per lane."""
        served, portion = self._attachment.served[group[0].want], self._portion_of(group[0])
        watch = self._control.watch
        places: dict[Perturbation, int] = {}
        index = [places.setdefault(lane.lane.perturbation, len(places)) for lane in group]
        rows = gather(served, group, self._host_of, self._upload) if served.rows else None
        scratch = self.source.emit(served.owner, list(places), rows, portion.pieces, fresh=watch is not None)
        emission = Emission(scratch, len(group), self.source.release, portion.params)
        if rows is None and portion.is_laid_out:
            scratch = laid_out_as(portion.strides, emission.scratch)
            self.source.release(emission.scratch)
            emission = Emission(scratch, len(group), None, portion.params)
        frames = [Frame(served, portion, scratch[i], emission) for i in index]
        return frames if watch is None else watch.serve(group, frames, rows)

    # ---- the end of a run ----------------------------------------------------------------------------------------

    def _clean_up(self, lanes: list[LaneRun]) -> None:
        """End running lanes, remove weights, release scratch; afterwards the hub has its state before the run."""
        odd = self._control.watch is not None or any(lane.error is not None for lane in lanes)
        self._control.end_lanes(lanes)
        self._installed = None
        for frame in self._unentered:
            frame.emission.leave()
        self._unentered = []
        for lane in lanes:
            uninstall(lane.frames)
            for frame in lane.frames:
                frame.emission.leave()
            lane.frames = []
        if odd:  # what broke off may have put something else into a parameter
            self._attachment.rest()
        self._state.end()
        self._generators.set(self._callers)
        self._callers = {}
        self._control.end()  # last: until then `mend` does it all again
        self._lanes = []

    def _judge(self, lanes: list[LaneRun], watch: WatchedRun, start: dict[str, Any], alone: bool) -> None:
        """Keep the trace of a watched run; raise if its results are wrong, with the generators restored."""
        self.trace = watch.trace(lanes)
        self.notes = self.trace.notes
        self.activation_bytes = watch.mode.peak_bytes
        met = [(g, state) for g, state in watch.mode.generators.values() if self._generators.meet(g, state)]
        try:
            watch.judge(lanes, self.trace, lockstep=self.order != "lane", own_batches=self._own_batches)
            if met and not alone:
                raise self._again("the forward draws from a generator that was not known")
        except PlanError as error:
            self._own_batches |= isinstance(error, BatchIsWritten)
            self._generators.set(start)
            for generator, state in met:
                generator.set_state(state)
            raise

    def _settle_state(self, lanes: list[LaneRun]) -> None:
        """Restore the modules' state before the run. Raises PlanFault if lanes changed shared state unexpectedly."""
        new = self._state.end()
        if self._control.rewritten:
            where = ", ".join(repr(name) for name in sorted(self._control.rewritten)[:3])
            raise self._again(f"the forward of {where} changed a weight in place, which it had not when it was watched")
        if new and self._control.watch is None and len(lanes) > 1 and self.order != "lane":
            raise self._again("the forward changed its modules, which it had not done when it was watched")

    def _again(self, message: str) -> PlanFault:
        return PlanFault(f"{message}: run it again", self.trace or Trace({}, (), False))

    def _settle_rng(self, lanes: list[LaneRun], start: dict[str, Any], first: dict[str, Any], alone: bool) -> None:
        """Find the generators that the lanes drew from, and advance them as by one forward."""
        if self._control.watch is not None:
            for lane in lanes:
                self._rng_kinds |= drawn_from(first, lane.rng)
        else:
            loose = frozenset(start) - self._carried
            drawn = drawn_from({k: start[k] for k in loose}, self._generators.state(loose))
            self._rng_kinds |= drawn
            if drawn and not alone:  # the lanes drew from one stream: wrong for all but one
                self._generators.set(start)
                if not any(lane.error for lane in lanes):
                    raise self._again("the forward drew random numbers, which it had not done when it was watched")
        if self._carried:
            self._generators.set(lanes[0].rng)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _call_model(model: nn.Module, batch: Any) -> Any:
    return model(**batch)
