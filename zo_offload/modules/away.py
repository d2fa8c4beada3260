"""A guard on a model whose weights are in an engine: copying, saving, moving or loading its placeholders is an error.

While an engine has a model's weights, its parameters hold NaN. Hooks and attributes stop every way to read them through
the module (`state_dict`, which transformers' `save_pretrained` and `torch.save` use, `copy.deepcopy`, `pickle`), to
move them (`to`, `half`, `cuda`) or to write them (`load_state_dict`); they are removed when the weights are back. After
an engine was closed without giving the weights back, a call of the model is an error too; while the engine runs, its
hub does that.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.jit import ScriptModule

from ..errors import PlanError

_MARK = "_zo_away"
_here = threading.local()


class Away:
    """The guard on one model, from the time that the parameters `names` are taken until `lift`."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._why = (
            "its weights are in an engine. engine.save_pretrained(directory) writes them, engine.weights() gives them "
            "one by one, engine.restore() puts them back"
        )
        self._closed = False
        self._handles: list[Any] = []
        self._params = [p for name, p in model.named_parameters() if name in names]
        self._modules = [m for m in model.modules() if not isinstance(m, ScriptModule)]
        for p in self._params:
            setattr(p, _MARK, self)
            vars(p).update(__deepcopy__=self._stop("copied"), __reduce_ex__=self._stop("pickled"))
        for module in self._modules:
            saved, loaded = self._stop("saved", unless_shapes=True), self._stop("loaded into")
            self._handles.append(module.register_state_dict_pre_hook(saved))  # type: ignore[no-untyped-call]
            self._handles.append(module.register_load_state_dict_pre_hook(loaded))  # type: ignore[no-untyped-call]
            vars(module).update(_apply=self._convert(module), __reduce_ex__=self._reduce(module))

    def close(self) -> None:
        """The engine was closed without giving the weights back. Calling it again has no effect."""
        if self._closed or not self._modules:
            return
        self._closed = True
        self._why = (
            "its weights were left in an engine that was closed. Call engine.restore() instead of close(), inside of "
            "the with block; now they are in the run_dir, if there was one: Engine.resume(run_dir, a model made anew)"
        )
        for module in self._modules:
            if any(True for _ in module.parameters(recurse=False)) or module is self._modules[0]:
                self._handles.append(module.register_forward_pre_hook(self._stop("called"), prepend=True))

    def lift(self) -> None:
        for p in self._params:
            for name in (_MARK, "__deepcopy__", "__reduce_ex__"):
                vars(p).pop(name, None)
        for module in self._modules:
            for name in ("_apply", "__reduce_ex__"):
                vars(module).pop(name, None)
        for handle in self._handles:
            handle.remove()
        self._handles, self._params, self._modules = [], [], []

    def refuse(self, what: str) -> NoReturn:
        raise PlanError(f"the model cannot be {what}: {self._why}")

    def _reduce(self, module: nn.Module) -> Callable[[Any], Any]:
        def reduce(protocol: Any) -> Any:
            if not getattr(_here, "shapes_only", False):
                self.refuse("copied or pickled")
            return type(module).__reduce_ex__(module, protocol)

        return reduce

    def _convert(self, module: nn.Module) -> Callable[..., nn.Module]:
        def convert(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            """Allow `self.head.to(x.dtype)`, as in routers' forwards, if it changes nothing."""
            if any(fn(t) is not t for t in [*module.parameters(), *module.buffers()]):
                self.refuse("moved or converted")
            return module

        return convert

    def _stop(self, what: str, *, unless_shapes: bool = False) -> Callable[..., None]:
        def stop(*args: Any, **kwargs: Any) -> None:
            if not (unless_shapes and getattr(_here, "shapes_only", False)):
                self.refuse(what)

        return stop


def is_away(p: nn.Parameter) -> bool:
    return hasattr(p, _MARK)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """While open, this thread may take a state dict or a copy of a guarded model, for names, shapes and ties."""
    before = getattr(_here, "shapes_only", False)
    _here.shapes_only = True
    try:
        yield
    finally:
        _here.shapes_only = before


def check_present(model: nn.Module, elsewhere: Collection[str] = ()) -> None:
    """Raise PlanError, with the name, if weights are missing: in another engine, on meta, or not made yet.

    elsewhere: parameters on meta whose values are known to be somewhere else."""
    for name, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter):
            raise PlanError(
                f"parameter {name!r} of {type(model).__name__} has no shape yet, as in a lazy module. Call the model "
                "with one batch, then give it to the engine"
            )
        away: Away | None = getattr(p, _MARK, None)
        if away is not None:
            away.refuse("given to another engine")
        if p.is_meta and name not in elsewhere:
            hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
            how = " (accelerate has hooks on the model, but holds no value of this one)" if hooked else ""
            raise PlanError(
                f"parameter {name!r} of {type(model).__name__} is on the meta device, without values{how}. Give the "
                "engine the checkpoint's directory, or a model loaded whole (no device_map), or base= to read from"
            )
