"""The hub's additions to a watched run: tracked scratch, and a check at the end.

The watch itself (`run_watch.RunWatch`) sees ops. This module tells it the owner of memory: scratch is tracked from the
time it is served until the lane leaves the owner, and is known as retired afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import PlanError
from ..modules.recorder import Trace, hook_module_calls, trace_of
from ..modules.run_watch import RunWatch
from ..modules.state import ModuleState
from ..modules.trees import tensors_of
from ..modules.watch import Origin
from ..plan.plan import Plan
from .serving import Emission, Frame, LaneRun, Portion, each_once


class PlanFault(PlanError):
    """A watched run used weights where the plan does not expect it. Relift the plan with `trace` and run again."""

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


class BatchIsWritten(PlanFault):
    """The forward changes its batch: each lane needs its own copy."""


class LanesShareState(PlanError):
    """Modules write into a tensor and read it, so lanes in lockstep would see each other's. order="lane" is right."""


class WatchedRun:
    """One watched run of lanes."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        params: Mapping[str, nn.Parameter],
        lanes: Sequence[LaneRun],
        state: ModuleState,
    ) -> None:
        self.model, self.plan, self.params = model, plan, params
        self._held = dict(model.named_parameters())
        self.mode = RunWatch(params, state)
        self._resting = {name: p.data_ptr() for name, p in params.items()}
        for name, p in params.items():
            self.mode.track(p, name)  # the placeholder
        for lane in lanes:
            self.mode.taint(tensors_of(lane.lane.batch))
        self._handles = hook_module_calls(model, lambda: self.mode.recorder)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def serve(self, lanes: Sequence[LaneRun], frames: Sequence[Frame], rows: Tensor | None) -> list[Frame]:
        """The frames of one group of lanes, with tracked scratch.

        Reused memory would hide a view that outlived its module, so scratch that is not in separate tensors is copied
        first, and released at once.
        """
        first = frames[0]
        emission, names = first.emission, first.portion.names
        self._check(first.portion, emission.scratch, rows)
        origins = self._track(names, emission.scratch)
        if origins is None:
            copies = each_once(emission.scratch, lambda _, w: w.clone())
            place = [next(i for i, row in enumerate(emission.scratch) if row is f.weights) for f in frames]
            if emission.release is not None:
                emission.release(emission.scratch)
            emission = Emission(copies, len(frames), None, first.portion.params)
            origins = self._track(names, copies)
            assert origins is not None
            frames = [Frame(first.served, first.portion, copies[i], emission) for i in place]
        for lane, frame in zip(lanes, frames, strict=True):
            frame.origins = origins[next(i for i, row in enumerate(emission.scratch) if row is frame.weights)]
            for origin in frame.origins:
                origin.held[lane.recorder] = tuple(lane.recorder.stack)
        return list(frames)

    def _check(self, portion: Portion, scratch: list[list[Tensor]], rows: Tensor | None) -> None:
        for weights in scratch:
            for name, shape, w in zip(portion.names, portion.shapes, weights, strict=True):
                want = shape if rows is None else (rows.numel(), *shape[1:])
                right = tuple(w.shape) == want and w.dtype == self.plan.params[name].dtype
                assert right, f"{name}: source gave {tuple(w.shape)} {w.dtype}"

    def _track(self, names: Sequence[str], scratch: list[list[Tensor]]) -> list[list[Origin]] | None:
        """Origins like `scratch`; None if some of its memory is shared or already known."""
        if any(w.untyped_storage().nbytes() != w.nbytes for weights in scratch for w in weights):
            return None
        found = each_once(scratch, lambda i, w: self.mode.track(w, names[i]))
        known = [[origin for origin in origins if origin is not None] for origins in found]
        return known if [*map(len, known)] == [*map(len, found)] else None

    def leave(self, lane: LaneRun, frame: Frame, *, check: bool) -> None:
        """Retire the weights of a lane that leaves an owner. check: that the forward did not replace them."""
        for origin in frame.origins:
            path = origin.held.pop(lane.recorder, None)
            if path is not None:
                origin.retired[lane.recorder] = path
        if check and (replaced := frame.replaced()):
            raise _replaced(replaced[0], f"the forward of {frame.served.owner.name!r}")

    def trace(self, lanes: Sequence[LaneRun]) -> Trace:
        whole = all(lane.error is None for lane in lanes)
        return trace_of([lane.recorder for lane in lanes], complete=whole, notes=tuple(self.mode.notes))

    def judge(self, lanes: Sequence[LaneRun], trace: Trace, *, lockstep: bool, own_batches: bool) -> None:
        """Raise an error if this run's results are wrong, the most informative one first."""
        errors = [lane.error for lane in lanes if lane.error is not None]
        for error in errors:
            if isinstance(error, PlanError):
                raise error
        now: dict[str, Any] = dict(self.model.named_parameters())
        swapped = [n for n in {**self._held, **now} if now.get(n) is not self._held.get(n)]
        if swapped:
            raise PlanError(
                f"parameters were replaced or added in the forward: {swapped[:5]}. Weights are served to the "
                f"parameters that were planned: make such changes before planning."
            )
        faults = list(dict.fromkeys(self.mode.faults))
        if not errors:  # all lanes are through, and all weights away
            for name, p in self.params.items():
                if p.data_ptr() != self._resting[name]:
                    raise _replaced(name, "the forward, and not put back")
        if faults:
            message = f"{len(faults)} uses of weights that the plan does not have there, such as: {faults[0]}"
            raise PlanFault(message, trace) from (errors[0] if errors else None)
        if self.mode.writes_batch and len(lanes) > 1 and not own_batches:
            raise BatchIsWritten("the forward changes its batch in place, which lanes share: run it again", trace)
        if trace.writes and lockstep:
            raise LanesShareState(
                f"the forward changes weights in place ({', '.join(sorted(trace.writes)[:3])}). Use order='lane' (one "
                f"lane after another)"
            )
        if self.mode.crossings and lockstep:
            where = ", ".join(list(dict.fromkeys(self.mode.crossings))[:3])
            raise LanesShareState(
                f"lanes see each other's tensors in {where}: one that they share is changed. Use order='lane' (one "
                f"lane after another), or pass the tensor through the forward."
            )


def _replaced(name: str, where: str) -> PlanError:
    return PlanError(
        f"the data of parameter {name!r} was replaced in {where}. Weights are away between calls, so such a change is "
        "lost: make it outside of the forward."
    )
