"""Builds a transformers model with its parameters on meta, and makes buffers and new parameters real.

`from_pretrained` does the same before it loads weights; this follows it step by step (transformers 5.17 to 5.23).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from ..errors import CheckpointError
from ..hf import PreTrainedModel, patch_output_recorders
from ..hf import initialization as hf_init
from ..modules.modes import in_contexts

MAX_REGISTRATIONS = 1_000_000
"""The most modules and parameters of a model that is built from its config alone."""
MAX_MADE_BYTES = 16 << 30
"""The most bytes of buffers and new parameters together, whose size a config alone determines."""


def construct(
    cls: type[PreTrainedModel], config: Any, dtype: torch.dtype, *, most: int = MAX_REGISTRATIONS
) -> PreTrainedModel:
    """cls(config) with everything on meta, nothing tied and nothing initialised yet. The config is copied.

    most: the most modules and parameters that may be registered. Raises CheckpointError if there are more, or if the
    class refuses the config.
    """
    config = copy.deepcopy(config)
    for part in config_parts(config):
        part.dtype = dtype
    try:
        contexts = [*cls.get_init_context(dtype, False, False, None), _at_most(most, cls.__name__)]
        model = in_contexts(contexts, lambda: cls(config))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a class makes of numbers that no one has checked
        raise CheckpointError(
            f"{cls.__name__} cannot be built from config.json: {type(error).__name__}: {error}"
        ) from error
    patch_output_recorders(model)
    for part in config_parts(model.config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return model


@contextlib.contextmanager
def _at_most(most: int, name: str) -> Iterator[None]:
    """Raise CheckpointError in the construction of a model once it has registered more modules and parameters."""
    count, is_open = 0, True

    def registered(module: nn.Module, key: str, value: Any) -> None:
        nonlocal count
        count += is_open
        if count > most:
            raise CheckpointError(
                f"config.json describes a {name} of more than {most} modules and parameters, which is more than the "
                "checkpoint can hold. Correct its number of layers."
            )

    handles: list[RemovableHandle] = []
    try:
        for register in (register_module_module_registration_hook, register_module_parameter_registration_hook):
            handles.extend(map(register, [registered]))  # no interrupt comes between registering and noting it
        yield
    finally:
        is_open = False
        for handle in handles:
            handle.remove()


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype, names: Iterable[str]) -> None:
    """Convert to fp32 the parameters and buffers among `names` that the class keeps so (`_keep_in_fp32_modules`)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    wanted = re.compile("|".join(pattern.replace("*", ".*") for pattern in plan))
    entries = model.state_dict(keep_vars=True)
    changes: dict[int, Tensor] = {}
    for tensor in (entries[name] for name in names if wanted.search(name) and name in entries):
        wide = tensor.detach().float()
        changes[id(tensor)] = nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide
    replace_tensors(model, changes)


def replace_tensors(model: nn.Module, by_id: dict[int, Tensor]) -> None:
    """Replace parameters and buffers by other tensors, wherever they are registered (ties stay ties)."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in by_id:
                    table[name] = by_id[id(tensor)]  # type: ignore[assignment]


def make_real(model: PreTrainedModel, loaded: dict[str, Tensor], fresh: Iterable[str], seed: int) -> dict[str, Tensor]:
    """Make all buffers real: the `loaded` ones as given, the others by the model's own `_init_weights`.

    Returns the fp32 values of `_init_weights` for the parameters named in `fresh`; these stay on meta in the model.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' init functions skip these
    fresh = list(fresh)
    made = sum(4 * model.get_parameter(name).numel() for name in fresh)
    made += sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in loaded)
    if made > MAX_MADE_BYTES:
        raise CheckpointError(
            f"config.json describes a {type(model).__name__} with {made / 1e9:.1f} GB of buffers and new parameters, "
            f"which no file holds; at most {MAX_MADE_BYTES / 1e9:.1f} GB are made. Correct its sizes."
        )
    changes: dict[int, Tensor] = {}
    for name, buffer in model.named_buffers():
        if name in loaded:
            changes[id(buffer)] = loaded[name].to(buffer.dtype)
            changes[id(buffer)]._is_hf_initialized = True  # type: ignore[attr-defined]
        else:
            changes[id(buffer)] = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.clone()
    on_meta = {name: model.get_parameter(name) for name in fresh}
    real = {name: nn.Parameter(torch.zeros(p.shape, device="cpu"), requires_grad=False) for name, p in on_meta.items()}
    changes.update({id(p): real[name] for name, p in on_meta.items()})
    replace_tensors(model, changes)
    _initialise(model, seed)
    replace_tensors(model, {id(real[name]): p for name, p in on_meta.items()})
    return {name: p.detach() for name, p in real.items()}


@torch.no_grad()
def _initialise(model: PreTrainedModel, seed: int) -> None:
    """`model.initialize_weights()` for uninitialised modules, each with its own seed."""

    def visit(module: nn.Module, path: str, owner: PreTrainedModel) -> None:
        for name, child in module.named_children():
            inner = child if isinstance(child, PreTrainedModel) else owner
            visit(child, f"{path}.{name}" if path else name, inner)
        if any(not getattr(t, "_is_hf_initialized", False) for t in (*module.parameters(), *module.buffers())):
            torch.default_generator.manual_seed(_module_seed(seed, path))
            owner._initialize_weights(module)

    in_contexts((default_generator_kept(), hf_init.guard_torch_init_functions()), lambda: visit(model, "", model))


def _module_seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {path}".encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def default_generator_kept() -> Iterator[None]:
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def config_parts(config: Any) -> list[Any]:
    """A config and the configs inside it."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(part for child in inner if child is not None for part in config_parts(child))]
