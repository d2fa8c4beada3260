"""Lanes: perturbed forwards of the unmodified model in lockstep, one greenlet each.

A lane is one forward under one perturbation. Forward pre-hooks on the plan's owners hand control to the hub, which
waits until every lane stands before an owner, serves the earliest of those in the plan (makes its scratch weights,
lets each lane through) and goes on. Lanes need not meet owners in the same order, nor the same owners.

While an owner runs in a lane its parameters hold that lane's scratch; at all other times a Parameter keeps its
identity, shape, dtype and device, and its values are NaN. An owner whose children switch lanes has its weights
changed with the lane. Lanes with the same perturbation (micro-batches) share scratch. An `nn.Embedding` gets only the
rows that the waiting lanes ask for, and remapped ids.

Orders of service (results are the same bit for bit):
    module  all lanes waiting at the earliest owner are served together; noise is made once
    block   one lane at a time through a block; scratch of one lane, only hidden states are held per lane
    lane    one lane after another; for models whose modules keep tensors between calls

A plan can be wrong (`trace.py`), so the first run of each kind of batch is watched. A weight used while it is away
raises `PlanFault`, whose trace lets `relift` make a better plan; state shared between lanes raises PlanError. Watched
runs cost Python per op; others only two hooks per owner call.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

import greenlet
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import PlanError
from .fused import Perturbation
from .modes import LaneModes, current_modes, restore_modes, rng_kinds_that_differ, rng_state, set_rng_state
from .plan import Owner, Plan, gathers_rows, relift
from .trace import ForwardCall, Origin, Recorder, RunWatch, Trace, hook_module_calls, trace_of

Order = Literal["module", "block", "lane"]

_set_data: Callable[[nn.Parameter, Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Lane:
    """One perturbed forward: whose weights, on which micro-batch."""

    perturbation: Perturbation
    batch: Any


class Source(Protocol):
    """Where scratch weights come from. Called under the modes of `Hub.run`'s caller and no_grad."""

    def emit(
        self, owner: Owner, perturbations: Sequence[Perturbation], rows: Tensor | None = None
    ) -> list[list[Tensor]]:
        """[perturbation][parameter of owner.params], in the parameters' shapes, dtypes and device.

        rows: int64 [U], only for owners with `rows`: the result is [U, D], row i that of id rows[i].
        """

    def release(self, scratch: list[list[Tensor]]) -> None:
        """Every lane that used `scratch` (the object `emit` returned) has left the owner. May come in a lane's modes."""


class PlanFault(PlanError):
    """A watched run used weights where the plan does not have them. Relift the plan with `trace` and run again."""

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


def placeholder(like: Tensor, device: torch.device | str | None = None) -> Tensor:
    """NaN (integers: the lowest value) expanded to a tensor's shape: a few bytes, and loud if computed with."""
    if like.dtype.is_floating_point or like.dtype.is_complex:
        value: float = float("nan")
    else:
        value = 0 if like.dtype is torch.bool else torch.iinfo(like.dtype).min
    return torch.full((), value, dtype=like.dtype, device=device or like.device).expand(like.shape)


def hollow(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give every parameter a placeholder on `device` instead of its values; ties stay ties.

    Parameters that are on that device keep their identity; others (on meta) are replaced in every module that holds
    them. Afterwards only lanes can run the model.
    """
    device = torch.device(device)
    fresh: dict[int, nn.Parameter] = {}
    keep: list[nn.Parameter] = []  # an id is only an id while its object lives
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if p.device == device or (p.device.type == device.type and device.index is None):
                _set_data(p, placeholder(p))
                continue
            if id(p) not in fresh:
                keep.append(p)
                fresh[id(p)] = nn.Parameter(placeholder(p, device), requires_grad=p.requires_grad)
            setattr(module, name, fresh[id(p)])  # not _parameters[name]: nn.RNN keeps a second list


# ---- what a run is made of -------------------------------------------------------------------------------------------


class _Served:
    """One owner as the hub sees it: its parameters, and what they hold while it does not run."""

    __slots__ = ("index", "module", "overlaps", "owner", "params", "resting", "rows")

    def __init__(self, index: int, owner: Owner, module: nn.Module, params: list[nn.Parameter], resting: list[Tensor]):
        self.index, self.owner, self.module, self.params, self.resting = index, owner, module, params, resting
        self.overlaps = False  # another owner has one of its parameters too
        self.rows = owner.rows and gathers_rows(module)


class _Emission:
    """Scratch of one emit, until the last of its lanes has left the owner."""

    __slots__ = ("lanes_inside", "release", "scratch")

    def __init__(self, scratch: list[list[Tensor]], lanes_inside: int, release: Callable[[Any], None] | None) -> None:
        self.scratch, self.lanes_inside, self.release = scratch, lanes_inside, release

    def leave(self) -> None:
        self.lanes_inside -= 1
        if self.lanes_inside == 0:
            if self.release is not None:
                self.release(self.scratch)
            self.scratch = []


class _Frame:
    """An owner that is running in a lane, with the lane's weights for it."""

    __slots__ = ("emission", "origins", "served", "weights")

    def __init__(self, served: _Served, weights: list[Tensor], emission: _Emission, origins: list[Origin]) -> None:
        self.served, self.weights, self.emission, self.origins = served, weights, emission, origins


class _LaneRun:
    """One lane of the run under way."""

    __slots__ = (
        "cursor", "error", "failed_in", "frames", "glet", "ids", "index", "lane", "last", "modes", "position",
        "recorder", "result", "rng", "want",
    )  # fmt: skip

    def __init__(self, index: int, lane: Lane) -> None:
        self.index, self.lane = index, lane
        self.glet: greenlet.greenlet | None = None
        self.frames: list[_Frame] = []  # owners running in it, outermost first
        self.want = -1  # owner it waits for
        self.ids: Tensor | None = None  # in: ids an embedding is called with; out: their places among the rows
        self.cursor = 0  # calls of the plan behind it
        self.position = 0  # call of the plan it waits for
        self.modes = LaneModes()
        self.rng: dict[str, Any] = {}
        self.recorder = Recorder()
        self.result: Any = None
        self.error: BaseException | None = None
        self.last = self.failed_in = ""

    def __str__(self) -> str:
        p = self.lane.perturbation
        return f"lane {self.index} (seed {p.seed}, scale {p.scale:g})"


class Hub:
    """Runs lanes of one model. Use as a context manager, or `attach` and `detach`.

    While attached, the model's own values are put aside (those of a hollow model are nothing) and put back on
    detach; the model can be called through `run` only. Not thread-safe; one run at a time.
    """

    def __init__(self, model: nn.Module, plan: Plan, source: Source, *, order: Order = "module") -> None:
        if order not in ("module", "block", "lane"):
            raise PlanError(f"order={order!r}: choose 'module', 'block' or 'lane'")
        self.model, self.source, self.order = model, source, order
        self.trace: Trace | None = None
        """What the last watched run saw; `relift(plan, trace)` refines a plan that was not traced."""
        self.notes: tuple[str, ...] = ()
        """Remarks of the last watched run."""
        self.watching = False
        """The run under way is watched."""
        self._params: dict[str, nn.Parameter] = {}
        self._own_data: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._home: greenlet.greenlet | None = None
        self._current: _LaneRun | None = None
        self._installed: _LaneRun | None = None
        self._watch: RunWatch | None = None
        self._rng_kinds: frozenset[str] = frozenset()
        self._set_plan(plan)

    # ---- attaching -----------------------------------------------------------------------------------------------

    def _set_plan(self, plan: Plan) -> None:
        self.plan = plan
        self._seen: set[Any] = set()
        self._positions: list[list[int]] = [[] for _ in plan.owners]
        for position, owner in enumerate(plan.calls):
            self._positions[owner].append(position)

    def adopt(self, plan: Plan) -> None:
        """Take another plan of the same model (a relifted one); the next run is watched again."""
        attached = bool(self._params)
        if attached:
            self._unhook()
        self._set_plan(plan)
        if attached:
            self._hook()

    def attach(self) -> None:
        """Put hooks on the owners and the model's values aside. Raises PlanError if the model is not the planned one."""
        if self._params:
            return
        params = dict(self.model.named_parameters())
        specs = self.plan.params
        if params.keys() != specs.keys():
            odd = sorted(params.keys() ^ specs.keys())
            raise PlanError(f"the model's parameters are not the plan's: {odd[:5]} ({len(odd)} differ). Plan this model.")
        for name, p in params.items():
            if p.shape != specs[name].shape or p.dtype != specs[name].dtype:
                raise PlanError(
                    f"{name!r} is {tuple(p.shape)} {p.dtype}, planned as {tuple(specs[name].shape)} {specs[name].dtype}"
                )
            if p.is_meta:
                raise PlanError(f"{name!r} is on the meta device: call hollow(model, device) before attaching a hub")
        self._params = params
        self._own_data = {name: p.data for name, p in params.items()}
        self._resting = {name: placeholder(p) for name, p in params.items()}
        self._default_generators = frozenset({"torch", *(str(p.device) for p in params.values() if p.is_cuda)})
        for name, p in params.items():
            _set_data(p, self._resting[name])
        self._hook()

    def detach(self) -> None:
        """Take the hooks off and put the model's own values back."""
        if self._home is not None:
            raise PlanError("a hub cannot be detached from within a lane")
        self._unhook()
        for name, data in self._own_data.items():
            _set_data(self._params[name], data)
        self._params, self._own_data, self._resting = {}, {}, {}

    def __enter__(self) -> Hub:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _hook(self) -> None:
        owners = self.plan.owners
        count: dict[str, int] = {}
        for owner in owners:
            for name in owner.params:
                count[name] = count.get(name, 0) + 1
        self._served: list[_Served] = []
        for index, owner in enumerate(owners):
            module = self.model.get_submodule(owner.name)
            params, resting = [self._params[n] for n in owner.params], [self._resting[n] for n in owner.params]
            served = _Served(index, owner, module, params, resting)
            served.overlaps = any(count[n] > 1 for n in owner.params)
            self._served.append(served)
        for served in self._served:
            # ours first and last: hooks of others (old-style weight norm) see the weights
            if served.rows:
                hook = self._rows_hook(served)
                handle = served.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            else:
                handle = served.module.register_forward_pre_hook(self._enter_hook(served), prepend=True)
            self._handles.append(handle)
            self._handles.append(served.module.register_forward_hook(self._leave_hook(served), always_call=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- hooks: these run inside lanes ---------------------------------------------------------------------------

    def _enter_hook(self, served: _Served) -> Callable[..., None]:
        index, name = served.index, served.owner.name

        def enter(module: nn.Module, args: Any) -> None:
            lane = self._current
            if lane is None or threading.get_ident() != self._thread:
                self._refuse(served)
            lane.want, lane.last = index, name
            self._wait(lane)

        return enter

    def _rows_hook(self, served: _Served) -> Callable[..., Any]:
        enter = self._enter_hook(served)

        def enter_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._current is not None:
                self._current.ids = args[0] if args else kwargs["input"]
            enter(module, args)
            lane = self._current
            assert lane is not None
            ids, lane.ids = lane.ids, None
            return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input": ids})

        return enter_rows

    def _wait(self, lane: _LaneRun) -> None:
        """Give control to the hub until it has installed what the lane wants."""
        if self._aborting:
            raise greenlet.GreenletExit
        if torch.is_autocast_cache_enabled():  # its casts of weights are kept by parameter: another lane's weights
            torch.set_autocast_cache_enabled(False)
        lane.modes.park(self._modes)
        try:
            self._home.switch()  # type: ignore[union-attr]
        finally:
            lane.modes.resume(self._modes)

    def _leave_hook(self, served: _Served) -> Callable[..., None]:
        params, resting = served.params, served.resting

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            lane = self._current
            if lane is None or not lane.frames or lane.frames[-1].served is not served:
                return  # its pre-hook did not get through
            if output is None and not lane.failed_in and sys.exc_info()[1] is not None:
                lane.failed_in = served.owner.name
            if self._watch is not None:
                self._watched_leave(lane, lane.frames[-1])
            frame = lane.frames.pop()
            for p, rest in zip(params, resting, strict=True):
                _set_data(p, rest)
            if served.overlaps:
                for outer in lane.frames:
                    _install(outer)
            frame.emission.leave()

        return leave

    def _refuse(self, served: _Served) -> NoReturn:
        name = served.owner.name or "the model"
        if self._current is None or self._home is None:
            raise PlanError(
                f"{name!r} was called while its weights are away: a hub is attached. Call the model through the hub (or "
                f"the engine), or detach the hub first."
            )
        raise PlanError(
            f"{name!r} was called in thread {threading.current_thread().name!r}, but lanes run in one thread. Make the "
            f"forward call its modules in the thread it was called in."
        )

    # ---- a run ---------------------------------------------------------------------------------------------------

    def run(self, lanes: Sequence[Lane], call: ForwardCall | None = None, *, watch: bool | None = None) -> list[Any]:
        """Results of `call(model, lane.batch)` (default `model(**batch)`), in lane order, under no_grad.

        Every lane starts with the same random numbers, as forwards run after the same seed would; the generators end
        as after one of them. watch: None watches the first run of each kind of batch.

        Raises what a lane raised, with a note that names lane and module; PlanFault (see there), with the generators
        as they were; PlanError for what no plan can follow. The hub can be used again after any of them.
        """
        if not self._params:
            raise PlanError("the hub is not attached to its model: use `with hub:` or call attach()")
        if self._home is not None:
            raise PlanError("a hub runs one set of lanes at a time; this call came from within a lane")
        if not lanes:
            return []
        call = call or _call_model
        code = getattr(call, "__code__", type(call))
        kinds = {(_kind_of(lane.batch), code, self.model.training) for lane in lanes}
        watching = not kinds <= self._seen if watch is None else watch
        with torch.no_grad():
            results = self._run([_LaneRun(i, lane) for i, lane in enumerate(lanes)], call, watching)
        self._seen |= kinds
        return results

    def _run(self, lanes: list[_LaneRun], call: ForwardCall, watching: bool) -> list[Any]:
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._home, self._thread, self._modes, self._aborting = (
            greenlet.getcurrent(), threading.get_ident(), current_modes(), False,
        )  # fmt: skip
        start = rng_state(None if watching else self._rng_kinds | self._default_generators)
        self._carried = frozenset(start) if watching else self._rng_kinds
        hooks: list[RemovableHandle] = []
        self.watching = watching
        if watching:
            self._watch = RunWatch(self._params)
            for name, p in self._params.items():
                self._watch.track(p, name)
            hooks = hook_module_calls(self.model, lambda: self._watch.recorder if self._watch else None)
        try:
            for lane in lanes:
                self._launch(lane, call, {k: v for k, v in start.items() if k in self._carried})
            self._loop(lanes)
            for lane in lanes:
                if lane.error is not None:
                    where = f"in module {lane.failed_in!r}" if lane.failed_in else f"at or after module {lane.last!r}"
                    lane.error.add_note(f"zo_offload: {lane}, {where}")
            if self._watch is not None:
                self._judge(lanes, self._watch, start)
            self._check_rng(lanes, start)
            for lane in lanes:
                if lane.error is not None:
                    raise lane.error
            return [lane.result for lane in lanes]
        finally:
            for handle in hooks:
                handle.remove()
            self._clean_up(lanes)
            torch.set_autocast_cache_enabled(cache)

    def _launch(self, lane: _LaneRun, call: ForwardCall, rng: dict[str, Any]) -> None:
        model, watch = self.model, self._watch

        def body() -> None:
            try:
                if watch is None:
                    lane.result = call(model, lane.lane.batch)
                else:
                    with watch:
                        lane.result = call(model, lane.lane.batch)
            except greenlet.GreenletExit:
                pass  # the hub gives this run up
            except BaseException as error:
                lane.error = error

        lane.rng = rng
        lane.glet = greenlet.greenlet(body, parent=self._home)
        lane.glet.gr_context = contextvars.copy_context()  # else it would start without the caller's

    def _loop(self, lanes: list[_LaneRun]) -> None:
        """Let lanes run to the next owner, serve the earliest, until all are through or one failed."""
        waiting: list[_LaneRun] = []
        one_by_one = list(lanes) if self.order == "lane" else []
        for lane in lanes[:1] if one_by_one else lanes:
            if not self._resume(lane, waiting):
                return
        last: _LaneRun | None = None
        block = -1
        while True:
            while not waiting and len(one_by_one) > 1:
                one_by_one.pop(0)
                if not self._resume(one_by_one[0], waiting):
                    return
            if not waiting:
                return
            group = self._pick(waiting, last, block)
            last, block = group[0], self.plan.owners[group[0].want].block
            for lane, frame in zip(group, self._serve(group), strict=True):
                waiting.remove(lane)
                if not self._resume(lane, waiting, frame):
                    return

    def _pick(self, waiting: list[_LaneRun], last: _LaneRun | None, block: int) -> list[_LaneRun]:
        """The lanes to let through next; all want the same owner. last, block: what was served before."""
        if self.order != "module":
            if last in waiting and self.plan.owners[last.want].block == block:
                return [last]
            return [min(waiting, key=lambda lane: (lane.position, lane.index))]
        first = waiting[0]
        for lane in waiting:
            if lane.position < first.position:
                first = lane
        return [lane for lane in waiting if lane.want == first.want]

    def _resume(self, lane: _LaneRun, waiting: list[_LaneRun], frame: _Frame | None = None) -> bool:
        """Run a lane until it waits for an owner (it joins `waiting`) or ends. False if it failed."""
        if self._installed is not lane:
            if self._installed is not None:
                _uninstall(self._installed.frames)
            for outer in lane.frames:
                _install(outer)
            self._installed = lane
        if frame is not None:
            lane.frames.append(frame)
            _install(frame)
        if self._carried:
            set_rng_state(lane.rng)
        if self._watch is not None:
            self._watch.recorder = lane.recorder
        self._current = lane
        lane.glet.switch()  # type: ignore[union-attr]
        self._current = None
        if self._watch is not None:
            self._watch.recorder = None
        if self._carried:
            lane.rng = rng_state(self._carried)
        if lane.glet.dead:  # type: ignore[union-attr]
            return lane.error is None
        self._locate(lane)
        waiting.append(lane)
        return True

    def _locate(self, lane: _LaneRun) -> None:
        """Find the call of the plan that a lane stands before: the next one of that owner, if any is left."""
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

    def _serve(self, group: list[_LaneRun]) -> list[_Frame]:
        """Scratch of the owner that the lanes of a group wait for, one frame a lane."""
        served = self._served[group[0].want]
        places: dict[Perturbation, int] = {}
        index = [places.setdefault(lane.lane.perturbation, len(places)) for lane in group]
        rows = _gather(served, group) if served.rows else None
        scratch = self.source.emit(served.owner, list(places), rows)
        emission = _Emission(scratch, len(group), self.source.release)
        origins: list[list[Origin]] = [[] for _ in places]
        if self._watch is not None:
            self._check_shapes(served.owner, scratch, len(places), rows)
            emission, origins = self._track(served.owner, emission)
            for lane, i in zip(group, index, strict=True):
                for origin in origins[i]:
                    origin.held[lane.recorder] = tuple(lane.recorder.stack)
        return [_Frame(served, emission.scratch[i], emission, origins[i]) for i in index]

    # ---- the end of a run ----------------------------------------------------------------------------------------

    def _clean_up(self, lanes: list[_LaneRun]) -> None:
        """End what still runs, take weights out, release scratch; whatever happened, the hub is as before the run."""
        self._aborting = True
        for lane in lanes:
            if lane.glet is not None and lane.glet and not lane.glet.dead:
                if self._watch is not None:
                    self._watch.recorder = None
                self._current = lane
                lane.glet.throw(greenlet.GreenletExit)
            lane.glet = None
        self._current = self._home = self._watch = self._installed = None
        self.watching = False
        restore_modes(self._modes)
        for lane in lanes:
            _uninstall(lane.frames)
            for frame in lane.frames:
                frame.emission.leave()
            lane.frames = []

    def _check_rng(self, lanes: list[_LaneRun], start: dict[str, Any]) -> None:
        if self.watching:
            for lane in lanes:
                self._rng_kinds |= rng_kinds_that_differ(start, lane.rng)
        else:
            loose = frozenset(start) - self._carried
            drawn = rng_kinds_that_differ({k: start[k] for k in loose}, rng_state(loose)) if loose else loose
            if drawn and not any(lane.error for lane in lanes):  # the lanes drew from one stream: wrong for all but one
                self._rng_kinds |= drawn
                set_rng_state(start)
                raise PlanFault(
                    "the forward drew random numbers, which it had not done when it was watched: run it again",
                    self.trace or Trace({}, (), False),
                )
        if self._carried:
            set_rng_state(lanes[0].rng)

    # ---- watched runs --------------------------------------------------------------------------------------------

    def _check_shapes(self, owner: Owner, scratch: list[list[Tensor]], copies: int, rows: Tensor | None) -> None:
        for tensors in scratch:
            for name, t in zip(owner.params, tensors, strict=True):
                spec = self.plan.params[name]
                want = spec.shape if rows is None else torch.Size((rows.numel(), spec.shape[1]))
                assert t.shape == want and t.dtype == spec.dtype, f"{name}: emitted {t.shape} {t.dtype}"
        assert len(scratch) == copies

    def _track(self, owner: Owner, emission: _Emission) -> tuple[_Emission, list[list[Origin]]]:
        """Have the watch know the scratch. Memory that was or will be used again would hide a view that outlived its
        module, so what is not a tensor of its own is copied first."""
        watch = self._watch
        assert watch is not None
        own = all(t.untyped_storage().nbytes() == t.nbytes for tensors in emission.scratch for t in tensors)
        if own:
            origins = [[watch.track(t, n) for n, t in zip(owner.params, ts, strict=True)] for ts in emission.scratch]
            if all(origin is not None for tensors in origins for origin in tensors):
                return emission, origins  # type: ignore[return-value]
        copies = [[t.clone(memory_format=torch.contiguous_format) for t in tensors] for tensors in emission.scratch]
        if emission.release is not None:
            emission.release(emission.scratch)
        origins = [[watch.track(t, n) for n, t in zip(owner.params, ts, strict=True)] for ts in copies]
        return _Emission(copies, emission.lanes_inside, None), origins  # type: ignore[return-value]

    def _watched_leave(self, lane: _LaneRun, frame: _Frame) -> None:
        for origin in frame.origins:
            path = origin.held.pop(lane.recorder, None)
            if path is not None:
                origin.retired[lane.recorder] = path
        for name, p, w in zip(frame.served.owner.params, frame.served.params, frame.weights, strict=True):
            if p.data_ptr() != w.data_ptr():
                raise PlanError(
                    f"the data of parameter {name!r} was replaced in the forward of {frame.served.owner.name!r}. "
                    f"Weights are away between calls, so such a change is lost: make it outside of the forward."
                )

    def _judge(self, lanes: list[_LaneRun], watch: RunWatch, start: dict[str, Any]) -> None:
        """Raise what a watched run found; keep its trace."""
        whole = all(lane.error is None for lane in lanes)
        self.notes = tuple(watch.notes)
        self.trace = trace_of([lane.recorder for lane in lanes], complete=whole, notes=self.notes)
        errors = [lane for lane in lanes if lane.error is not None]
        for lane in errors:
            if isinstance(lane.error, PlanError):
                raise lane.error
        now = dict(self.model.named_parameters())
        swapped = [n for n in {**self._params, **now} if now.get(n) is not self._params.get(n)]
        if swapped:
            raise PlanError(
                f"parameters were replaced or added in the forward: {swapped[:5]}. Weights are served to the parameters "
                f"that were planned: make such changes before planning."
            )
        if watch.faults:
            set_rng_state(start)
            faults = list(dict.fromkeys(watch.faults))
            message = f"{len(faults)} uses of weights that the plan does not have there, such as: {faults[0]}"
            raise PlanFault(message, self.trace) from (errors[0].error if errors else None)
        if watch.crossings and self.order != "lane":
            where = ", ".join(list(dict.fromkeys(watch.crossings))[:3])
            raise PlanError(
                f"lanes see each other's tensors in {where}: a module keeps a tensor between calls. Use order='lane' "
                f"(one lane after another), or pass the tensor through the forward."
            )


def _call_model(model: nn.Module, batch: Any) -> Any:
    return model(**batch)


def _kind_of(batch: Any) -> Any:
    """What of a batch may steer the way through the model."""
    if isinstance(batch, Mapping):
        return tuple((k, _kind_of(v)) for k, v in sorted(batch.items(), key=lambda item: str(item[0])))
    if isinstance(batch, Tensor):
        return batch.ndim, batch.dtype
    if isinstance(batch, (list, tuple)):
        return tuple(_kind_of(v) for v in batch)
    return batch if batch is None or isinstance(batch, (bool, str)) else type(batch)


def _install(frame: _Frame) -> None:
    for p, w in zip(frame.served.params, frame.weights, strict=True):
        _set_data(p, w)


def _uninstall(frames: list[_Frame]) -> None:
    for frame in frames:
        for p, rest in zip(frame.served.params, frame.served.resting, strict=True):
            _set_data(p, rest)


def _gather(served: _Served, group: list[_LaneRun]) -> Tensor:
    """Rows [U] that the lanes of a group ask for; each lane's ids become places among them.

    F.embedding checks padding_idx against the number of rows, so there are at least padding_idx + 1 (the last ones
    are row 0 again).
    """
    ids = [lane.ids for lane in group]
    assert all(isinstance(i, Tensor) for i in ids)
    flat = torch.cat([i.reshape(-1) for i in ids])  # type: ignore[union-attr]
    rows, places = torch.unique(flat.long(), return_inverse=True)
    num_rows = served.params[0].shape[0]
    if rows.numel() and not (0 <= int(rows[0]) and int(rows[-1]) < num_rows):
        odd = int(rows[-1]) if int(rows[-1]) >= num_rows else int(rows[0])
        raise IndexError(f"id {odd} is out of range for {served.owner.name!r}, an embedding of {num_rows} rows")
    start = 0
    for lane, i in zip(group, ids, strict=True):
        lane.ids = places[start : start + i.numel()].view(i.shape)  # type: ignore[union-attr]
        start += i.numel()  # type: ignore[union-attr]
    padding = served.module.padding_idx
    return nn.functional.pad(rows, (0, max(0, (0 if padding is None else int(padding)) + 1 - rows.numel())))  # type: ignore[arg-type]


def run_settled(
    hub: Hub,
    lanes: Sequence[Lane],
    call: ForwardCall | None = None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    attempts: int = 8,
) -> list[Any]:
    """`hub.run`, relifting the plan after each fault. on_plan: told each new plan before it is used."""
    for _ in range(attempts):
        try:
            return hub.run(lanes, call)
        except PlanFault as fault:
            last = fault
            plan = relift(hub.plan, fault.trace)
            if on_plan is not None:
                on_plan(plan)
            hub.adopt(plan)
    raise PlanError(f"the plan still has faults after {attempts} corrections; the last: {last}")
