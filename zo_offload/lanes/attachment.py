"""Attaches a hub to a model: parameters are away, owners have hooks, cut weights come in portions.

The hooks run inside lanes. A pre-hook passes control to the hub until the owner's weights are installed; the hook after
the forward removes them. `hub.Hub` decides which lane runs.

While attached, a plain nn.Linear whose weight the plan cuts has another forward, which computes piece by piece
(`tiles.py`), and stacked experts have one that computes run by run (`experts.py`): always, so that the results do not
depend on how they are served. If such a module is an owner itself, its pre-hook waits for the first portion and its
forward for the others; if its weights are there whole (lifted, or because the module has other hooks), it takes the
portions from them. The last layer of a head on classes may have a forward in float32 (`class_heads.py`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PlanError
from ..modules.class_heads import in_float32
from ..modules.experts import in_runs, is_stack_of_experts, set_rows
from ..modules.recorder import Running, WeightAway, is_in_transform
from ..modules.tiles import tiled_linear
from ..modules.tree import computes_in_portions, has_hooks, is_plain_linear
from ..plan.blocks import Piece
from ..plan.plan import Owner, Plan
from .control import Control
from .hollow import install, placeholder, set_data
from .recording import Recording
from .serving import LaneRun, PlainState, Portion, Served


class Attachment:
    """A model whose values are put aside, with hooks on the owners of a plan.

    control: the control of the hub that the model is attached to. wide: paths of linear layers that compute in float32.
    recorded: parameters whose gradient some lanes record.
    """

    def __init__(
        self, model: nn.Module, control: Control, wide: Collection[str] = (), recorded: Collection[str] = ()
    ) -> None:
        self.model, self._control, self._wide = model, control, wide
        self.recording = Recording(recorded)
        self.params: dict[str, nn.Parameter] = {}
        """The parameters that stream, while attached."""
        self.served: list[Served] = []
        """The owners, in the plan's order, while hooks are on."""
        self._own_data: dict[str, Tensor] = {}
        self._resting: dict[str, Tensor] = {}
        self._begun: dict[str, PlainState] = {}  # state of owners whose weights the forward changes in place
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, Callable[..., Tensor]]] = []  # and the forward each was given
        self._mark = object()  # on every hook of ours
        self._hooked = False  # all hooks are on; False while they are being changed

    @property
    def is_attached(self) -> bool:
        return bool(self.params)

    # ---- attaching -----------------------------------------------------------------------------------------------

    def attach(self, plan: Plan) -> None:
        """Put hooks on the owners and the model's values aside. PlanError if the model is not the planned one."""
        if self.params:
            return
        every = dict(self.model.named_parameters())
        specs, kept = plan.params, set(plan.tree.kept.values())
        params = {name: p for name, p in every.items() if name not in kept}
        if params.keys() != specs.keys() or not kept <= every.keys():
            odd = sorted((params.keys() ^ specs.keys()) | (kept - every.keys()))
            raise PlanError(f"the model's parameters are not the plan's: {odd[:5]} ({len(odd)} differ): plan it")
        for name, p in params.items():
            if p.shape != specs[name].shape or p.dtype != specs[name].dtype:
                raise PlanError(
                    f"{name!r} is {tuple(p.shape)} {p.dtype}, planned as {tuple(specs[name].shape)} {specs[name].dtype}"
                )
            if p.is_meta:
                raise PlanError(f"{name!r} is on the meta device: call hollow(model, device) before attaching a hub")
        self._own_data = {name: p.data for name, p in params.items()}
        self._resting = {name: placeholder(p) for name, p in params.items()}
        self.params = params
        for name, p in params.items():
            set_data(p, self._resting[name])
        self.recording.begin(params)
        self.put_hooks_on(plan)

    def detach(self) -> None:
        """Take the hooks off and put the model's own values back."""
        if self._control.is_running:
            raise PlanError("a hub cannot be detached from within a lane")
        self.take_hooks_off()
        for state in self._begun.values():
            state.put_back()
        for name, data in self._own_data.items():
            set_data(self.params[name], data)
        self.recording.end()
        self.params, self._own_data, self._resting = {}, {}, {}

    def mend(self, plan: Plan) -> None:
        """After an interruption: make every parameter of an attached model rest, and put all hooks on, once."""
        self.rest()
        if self.params and not self._hooked:
            self.take_hooks_off()
            self.put_hooks_on(plan)

    def rest(self) -> None:
        """Give every parameter its placeholder."""
        for name, p in self.params.items():
            set_data(p, self._resting[name])

    def put_hooks_on(self, plan: Plan) -> None:
        """Put hooks on the owners of a plan, and forwards in portions on cut modules; there must be none yet."""
        owners = plan.owners
        count: dict[str, int] = {}
        for owner in owners:
            for name in owner.params:
                count[name] = count.get(name, 0) + 1
        self.served = []
        for index, owner in enumerate(owners):
            module = self.model.get_submodule(owner.name)
            served = Served(index, owner, module, self._portions(plan, owner, module))
            served.overlaps = any(count[n] > 1 for n in owner.params)
            served.resting = [(n, self.params[n], self._resting[n].data_ptr()) for n in owner.params]
            if not plan.trace.writes.isdisjoint(owner.params) and owner.name not in self._begun:
                self._begun[owner.name] = PlainState(module)
            self.served.append(served)
        for served in self.served:
            # ours first and last: hooks of others (old-style weight norm) see the weights
            if served.rows:
                hook = self._mine(self._rows_hook(served))
                handle = served.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            else:
                hook = self._mine(self._enter_hook(served))
                handle = served.module.register_forward_pre_hook(hook, prepend=True)
            self._handles.append(handle)
            hook = self._mine(self._leave_hook(served))
            self._handles.append(served.module.register_forward_hook(hook, always_call=True))

        self._replace_forwards(plan)
        self._hooked = True

    def _mine(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a hook, so that `take_hooks_off` finds it even if its registration was interrupted."""
        vars(hook)["zo_offload"] = self._mark
        return hook

    def _portions(self, plan: Plan, owner: Owner, module: nn.Module) -> list[Portion]:
        """The portions in which the owner is served: one with everything, or several."""
        portions = plan.portions(owner)
        if len(portions) == 1 or not computes_in_portions(module) or has_hooks(module):
            return [self._portion(plan, owner, None)]
        return [self._portion(plan, owner, pieces) for pieces in portions]

    def _portion(self, plan: Plan, owner: Owner, pieces: tuple[Piece, ...] | None) -> Portion:
        held = plan.pieces_in(owner) if pieces is None else pieces
        found = plan.shapes(held)
        names = tuple(name for name in owner.params if name in found)
        shapes = tuple(found[name] for name in names)
        blocks = plan.streamed_blocks(held)
        params, resting = tuple(self.params[n] for n in names), tuple(self._resting[n] for n in names)
        specs = [plan.params[name] for name in names]
        strides = tuple(s.strides if tuple(s.shape) == tuple(found[s.name]) else None for s in specs)
        block = blocks[0] if blocks else owner.block
        return Portion(pieces, block, len(blocks) > 1, names, params, shapes, resting, strides, any(strides))

    def _replace_forwards(self, plan: Plan) -> None:
        """Give every module whose weights are cut, and that can, a forward that computes portion by portion; and layers
        that compute in float32 one that does."""
        wide = {id(self.model.get_submodule(path)) for path in self._wide}
        names = {id(p): name for name, p in self.params.items()}
        in_portions = {id(served.module): served for served in self.served if len(served.portions) > 1}
        for module in self.model.modules():
            served, rows = in_portions.get(id(module)), list[slice]()
            if is_plain_linear(module) and id(module.weight) in names:
                pieces, columns = plan.pieces_of(names[id(module.weight)]), int(module.weight.shape[1])  # type: ignore[index]
                rows = [slice(p.start // columns, p.stop // columns) for p in pieces]
                forward: Callable[..., Tensor] = self._tiled_forward(module, rows, served, id(module) in wide)
            elif is_stack_of_experts(module) and all(id(p) in names for p in module.parameters()):
                rows = list(plan.runs([names[id(p)] for p in module.parameters()]))
                forward = self._runs_forward(module, rows, served)
            if len(rows) > 1:
                self._replace(module, forward)
            elif id(module) in wide and isinstance(module, nn.Linear) and is_plain_linear(module):
                self._replace(module, in_float32(module))

    def _replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._replaced.append((module, forward))
        vars(module)["forward"] = forward

    def take_hooks_off(self) -> None:
        """Restore the model's own forwards and hooks."""
        self._hooked = False
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if getattr(hook, "zo_offload", None) is self._mark]:
                    del hooks[key]
        for module, forward in self._replaced:
            if vars(module).get("forward") is forward:  # else somebody has put another in its place since
                del vars(module)["forward"]
        self._handles, self._replaced = [], []

    # ---- hooks: these run inside lanes ---------------------------------------------------------------------------

    def _enter_hook(self, served: Served) -> Callable[..., None]:
        index, name = served.index, served.owner.name
        begun, control = self._begun.get(name), self._control

        def enter(module: nn.Module, args: Any) -> None:
            lane = control.lane_here()
            if lane is None:
                self._refuse(served)
            if is_in_transform():
                what = "is called inside of a function transform (torch.vmap, torch.func)"
                self._cannot_be_served(lane, served, what, lane.recorder.stack)
            if moved := self._moved(lane, served):
                lane.recorder.writes.update(moved)
                what = "is called with other data in its parameters (`parameter.data = ...`) than the engine put there"
                self._cannot_be_served(lane, served, what, lane.recorder.stack[:-1])
            self._note_replaced(lane)
            if begun is not None:
                begun.put_back()
            lane.want, lane.portion, lane.last = index, 0, name
            control.wait(lane)
            self.recording.entered(lane, served.owner.params)

        return enter

    def _cannot_be_served(self, lane: LaneRun, served: Served, what: str, path: Sequence[Running]) -> NoReturn:
        """Handle an owner that cannot get its weights at this call: an owner around it, of `path`, must hold them.

        No lane can wait inside vmap, grad, ...; data that a forward put into a parameter would be overwritten.
        """
        what = f"{served.owner.name!r} {what}"
        watch = self._control.watch
        if watch is None:
            raise PlanError(f"{what}, which it was not when its forward was watched. Call it so from the first time on")
        for name in served.owner.params:
            lane.recorder.use(name, path)
        watch.mode.faults.append(what)
        raise WeightAway(what)

    def _moved(self, lane: LaneRun, served: Served) -> list[str]:
        """Parameters of an owner to be served that hold neither a placeholder nor an outer owner's weights."""
        if torch._C._len_torch_function_stack():  # a lane's function modes are for what the model does
            with torch._C.DisableTorchFunction():
                return self._moved_from(lane, served)
        return self._moved_from(lane, served)

    @staticmethod
    def _moved_from(lane: LaneRun, served: Served) -> list[str]:
        moved = [(n, p) for n, p, address in served.resting if p.data_ptr() != address]
        if not moved:
            return []
        around = {id(p): w.data_ptr() for frame in lane.frames for p, w in frame.held()}
        return [name for name, p in moved if p.data_ptr() != around.get(id(p))]

    def _note_replaced(self, lane: LaneRun) -> None:
        """Called before a lane yields. If its forward replaced a weight's data, no other lane may run in between."""
        for frame in lane.frames:
            with _no_function_modes():
                replaced = frame.replaced()
            if not replaced:
                continue
            if self._control.watch is None:
                self._control.rewritten.add(frame.served.owner.name)
            for name in replaced:
                lane.recorder.writes.add(name)

    def _rows_hook(self, served: Served) -> Callable[..., Any]:
        enter, control = self._enter_hook(served), self._control

        def enter_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if control.lane is not None:
                control.lane.ids = args[0] if args else kwargs["input"]
            enter(module, args)
            lane = control.lane
            assert lane is not None
            ids, lane.ids = lane.ids, None
            return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input": ids})

        return enter_rows

    def _tiled_forward(
        self, module: Any, pieces: Sequence[slice], served: Served | None, wide: bool
    ) -> Callable[[Tensor], Tensor]:
        """The forward that replaces a cut layer's own. served: None if its weight never comes in pieces. wide: it
        computes in float32."""

        def as_computed(x: Any) -> Any:
            return x.float() if wide and x is not None else x

        def forward(input: Tensor) -> Tensor:
            lane, x, bias = self._lane_inside(served), as_computed(input), as_computed(module.bias)
            if lane is None:
                whole = module.weight  # there, or away: then this is a fault of the plan, as with any other module
                return tiled_linear(x, pieces, lambda k: as_computed(whole[pieces[k]]), bias)

            def piece(k: int) -> Tensor:
                self._next_portion(lane, k)
                return as_computed(module.weight)  # type: ignore[no-any-return]

            return tiled_linear(x, pieces, piece, bias)

        return forward

    def _runs_forward(self, module: nn.Module, runs: Sequence[slice], served: Served | None) -> Callable[..., Tensor]:
        """The same for stacked experts."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            lane = self._lane_inside(served)
            if lane is not None:
                return in_runs(module, runs, args, kwargs, lambda k: self._next_portion(lane, k))
            whole = [p.data for p in module.parameters()]
            try:
                return in_runs(module, runs, args, kwargs, lambda k: set_rows(module, [w[runs[k]] for w in whole]))
            finally:
                set_rows(module, whole)

        return forward

    def _lane_inside(self, served: Served | None) -> LaneRun | None:
        """The running lane, if this owner is its innermost; it then has its first portion."""
        lane = self._control.lane
        return lane if served is not None and lane and lane.frames and lane.frames[-1].served is served else None

    def _next_portion(self, lane: LaneRun, k: int) -> None:
        """Release a lane's portion and wait for the k-th, unless that is the first."""
        if k:
            self._leave(lane, failed=False)
            lane.portion = k
            self._control.wait(lane)

    def _leave_hook(self, served: Served) -> Callable[..., None]:
        control = self._control

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            lane = control.lane
            if lane is None or not lane.frames or lane.frames[-1].served is not served:
                return  # its pre-hook did not get through
            failed = output is None and sys.exc_info()[1] is not None
            if failed and not lane.failed_in:
                lane.failed_in = served.owner.name
            self._leave(lane, failed)

        return leave

    def _leave(self, lane: LaneRun, failed: bool) -> None:
        """Remove the innermost owner's weights from the model and release the lane's share of them."""
        if torch._C._len_torch_function_stack():  # a lane's function modes are for what the model does
            with torch._C.DisableTorchFunction():
                self._take_out(lane, failed)
        else:
            self._take_out(lane, failed)

    def _take_out(self, lane: LaneRun, failed: bool) -> None:
        frame, watch = lane.frames[-1], self._control.watch
        if watch is not None:
            watch.leave(lane, frame, check=not failed)
            watch.mode.recorder = None  # what hub and source do with memory is not the model's doing
        elif frame.is_changed():
            self._control.rewritten.add(frame.served.owner.name)
        del lane.frames[-1]
        served = frame.served
        for p, rest in zip(frame.portion.params, frame.portion.resting, strict=True):
            set_data(p, rest)
        if served.overlaps:
            for outer in lane.frames:
                install(outer)
        frame.weights = []  # the frame may live on in the hub for a while, the memory must not
        frame.emission.leave()
        if watch is not None:
            watch.mode.recorder = lane.recorder

    def _refuse(self, served: Served) -> NoReturn:
        name = served.owner.name or "the model"
        if self._control.lane is None or not self._control.is_running:
            raise PlanError(
                f"{name!r} was called while its weights are away: a hub is attached. Call the model through the hub "
                f"(or the engine), or detach the hub first."
            )
        raise PlanError(
            f"{name!r} was called in thread {threading.current_thread().name!r}, but lanes run in one thread. Make the "
            f"forward call its modules in the thread it was called in."
        )


def _no_function_modes() -> contextlib.AbstractContextManager[Any]:
    """Turn off a lane's function modes, which are only for the model's own ops."""
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else contextlib.nullcontext()
