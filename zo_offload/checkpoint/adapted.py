"""A checkpoint with a peft adapter, built without the checkpoint's weights.

peft wraps the model while its parameters are on meta, as it would wrap one in memory. It makes an adapter's tensors
with values, and then moves them to the base's device (meta); this module keeps each value when it is moved. So a new
adapter is exactly that of `torch.manual_seed(seed)` and `peft.get_peft_model(model, config)` on the model in float32,
and a loaded one that of `PeftModel.from_pretrained`; they are kept in float32. Tensors that peft copies from the base
(a head in modules_to_save) are read from the base; tensors that it would compute from the base's values are an error
that names them.

Memory: the adapter, for a base of any size.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CheckpointError, ConfigError
from ..formats import Format
from ..hf import PreTrainedModel
from ..modules.away import shapes_only
from ..modules.kind import kind_of
from ..modules.modes import in_contexts
from . import adapter_configs
from .adapters import adapter_names, chosen
from .checkpoint import Checkpoint
from .meta_model import default_generator_kept, replace_tensors
from .safetensors_io import SafetensorsFile
from .weights import Base, tensor_digest, together

_log = logging.getLogger(__name__)

MAX_ADAPTER_BYTES = 8 << 30
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class Built:
    """A model on meta, except its buffers, with the source of its weights."""

    model: nn.Module
    base: Base
    notes: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    """The adapter's settings that numbers depend on, including those that peft decided."""


class AdaptedBase:
    """A base's weights and an adapter's (`weights.Base`), by their names in peft's model."""

    def __init__(self, base: Checkpoint, of_base: Mapping[str, str], values: Mapping[str, Tensor]) -> None:
        """of_base: name -> canonical name in the base. values: name -> value, for the adapter's own parameters."""
        self._base, self._of_base, self._values = base, dict(of_base), dict(values)

    def shape_of(self, name: str) -> torch.Size:
        return self._values[name].shape if name in self._values else self._base.shape_of(self._named(name))

    def dtype_of(self, name: str) -> torch.dtype:
        return self._values[name].dtype if name in self._values else self._base.dtype_of(self._named(name))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        if name in self._values:
            out.copy_(self._values[name].view(-1)[start : start + len(out)])
        else:
            self._base.read_into(self._named(name), start, out)

    def peek(self, name: str, start: int, out: Tensor) -> None:
        """`read_into` of elements that will be read again."""
        if name in self._values:
            self.read_into(name, start, out)
        else:
            self._base.peek(self._named(name), start, out)

    def kept_formats(self, name: str) -> tuple[Format, ...]:
        return () if name in self._values else self._base.kept_formats(self._named(name))

    def kept_part(self, name: str, fmt: Format, start: int, count: int) -> Tensor:
        return self._base.kept_part(self._named(name), fmt, start, count)

    def digest_of(self, name: str) -> str:
        if name in self._values:
            return tensor_digest(name, self._values[name])
        return self._base.digest_of(self._named(name))

    def digest(self) -> str:
        own = {name: tensor_digest(name, value) for name, value in self._values.items()}
        return together({"": self._base.digest(), **own})

    def _named(self, name: str) -> str:
        if name not in self._of_base:
            raise CheckpointError(f"the adapted model has no parameter {name!r}")
        return self._of_base[name]


def adapt(checkpoint: Checkpoint, model: PreTrainedModel, adapter: Any, *, seed: int, named: str | None) -> Built:
    """`model`, as `checkpoint.build_model` gave it, with an adapter: a directory, or peft's fields (`adapter_configs`).

    seed: for a new adapter's values. named: the base's name in an exported adapter. Raises ConfigError,
    CheckpointError: an adapter that peft cannot make or load without the base in memory, an adapter of another base,
    missing or additional tensors.
    """
    directory = Path(adapter).expanduser().absolute() if isinstance(adapter, str) else None
    where = "adapter" if directory is None else f"adapter {directory}"
    fields = adapter if directory is None else adapter_configs.read_fields(directory)
    assert isinstance(fields, Mapping)
    config = adapter_configs.make_config(fields, where, kind_of(model), loads=directory is not None)
    of_base = {id(p): name for name, p in model.named_parameters()}
    if named is not None:
        model.name_or_path = named
    watch = _Watch()
    for name, p in model.named_parameters():
        watch.mark(p, name)
    wrapped = _wrap(model, config, where, seed, watch)
    values, names, unknown = _values_of(wrapped, of_base, watch)
    if config.is_prompt_learning:
        wrapped.prompt_encoder.requires_grad_(True)
    if directory is not None:
        values.update(_load(wrapped, values, directory, where))
        unknown = [name for name in unknown if name not in values]
    if unknown:
        raise ConfigError(
            f"{where}: peft would make {unknown[0]!r} ({len(unknown)} such) from the base's weights, which are not in "
            f"memory ({_flags(fields)}). Choose settings that do not look at the base (init_lora_weights=True, "
            "use_dora=False, prompt_tuning_init='RANDOM'), save the adapter with peft and give its directory, or give "
            "the engine peft's model in memory"
        )
    wrapped.train(False)
    count = sum(value.numel() for value in values.values())
    note = f"{config.peft_type.value} adapter of {count:,} parameters"
    note += f", from {directory}" if directory is not None else ", new, made from the run's seed"
    base = AdaptedBase(checkpoint, names, values)
    recorded = adapter_configs.of_numbers(adapter_configs.plain(config))  # type: ignore[arg-type]
    return Built(wrapped, base, (note, *checkpoint.notes), recorded)


def _flags(fields: Mapping[str, Any]) -> str:
    asked = ("peft_type", "use_dora", "prompt_tuning_init", "trainable_token_indices")
    return ", ".join(f"{name}={fields[name]!r}" for name in asked if fields.get(name) not in (None, False))


def _wrap(model: PreTrainedModel, config: Any, where: str, seed: int, watch: _Watch) -> Any:
    from peft import get_peft_model

    def make() -> Any:
        torch.default_generator.manual_seed(seed % (1 << 63))
        with watch:
            return get_peft_model(model, config)

    try:
        return in_contexts([default_generator_kept(), _quiet()], make)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # peft's own methods are many, and say in many ways what does not fit
        raise ConfigError(
            f"{where}: peft cannot put it on {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress peft's warnings about intended things: a base without values, a base with another name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the origin of tensors on meta: a value that was moved there, or a copied parameter of the base. A tensor
    that is written to afterwards has no origin."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[Tensor, Tensor | str]] = {}
        self._bytes = 0
        self._frozen: set[int] = set()

    def is_frozen(self, value: Tensor) -> bool:
        """Whether a value that was moved to meta did not require a gradient there."""
        return id(value) in self._frozen

    def mark(self, tensor: Tensor, stands_for: Tensor | str) -> None:
        self._known[_key(tensor)] = (tensor, stands_for)  # the tensor too: its key must not be used again

    def found(self, tensor: Tensor) -> Tensor | str | None:
        known = self._known.get(_key(tensor))
        return None if known is None else known[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if given is None or not isinstance(made, Tensor) or not made.is_meta:
            return made
        if func._schema.is_mutable:
            self._known.pop(_key(given), None)
        elif func.overloadpacket.__name__ in ("_to_copy", "clone", "detach"):
            stands_for = self.found(given) if given.is_meta else self._value(given)
            if stands_for is not None:
                self.mark(made, stands_for)
        return made

    def _value(self, tensor: Tensor) -> Tensor:
        self._bytes += tensor.nbytes
        if self._bytes > MAX_ADAPTER_BYTES:
            raise ConfigError(
                f"adapter: more than {MAX_ADAPTER_BYTES / 1e9:.1f} GB of weights; an adapter is kept in memory whole. "
                "Give a smaller rank, or fewer target_modules"
            )
        value = tensor.detach().clone()
        if not tensor.requires_grad:
            self._frozen.add(id(value))
        return value


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _values_of(
    model: nn.Module, of_base: Mapping[int, str], watch: _Watch
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Each parameter's value, or its name in the base; third, the parameters with neither. Values leave the model: its
    parameters are then on meta, its buffers are not."""
    values: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unknown: list[str] = []
    changes: dict[int, Tensor] = {}
    for name, p in model.named_parameters():
        found = of_base.get(id(p)) or (watch.found(p) if p.is_meta else p.detach())
        if isinstance(found, str):
            names[name] = found
        elif found is None:
            unknown.append(name)
        else:
            values[name] = _as_kept(found)
            if watch.is_frozen(found):  # peft's own moves make trainable what was not
                p.requires_grad_(False)
        if not p.is_meta and id(p) not in of_base:
            changes[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            real = watch.found(buffer)
            if isinstance(real, Tensor):
                changes[id(buffer)] = real.to(buffer.dtype)
            else:
                unknown.append(name)
    replace_tensors(model, changes)
    return values, names, unknown


def _as_kept(value: Tensor) -> Tensor:
    """An adapter's value in the kept form: float32, in its own memory."""
    value = value.detach()
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True).contiguous()


# ---- an adapter's files ----------------------------------------------------------------------------------------------


def _load(model: Any, values: Mapping[str, Tensor], directory: Path, where: str) -> dict[str, Tensor]:
    """The values of an adapter's files by parameter. Raises CheckpointError unless they hold all of it and no more."""
    from peft import set_peft_model_state_dict

    tensors = _read(directory, where)
    named = dict(model.named_parameters())
    taken = {name for name, p in named.items() if p.requires_grad} | values.keys() | adapter_names(model)
    real = {}
    for name in taken:
        start = values[name].clone() if name in values else torch.zeros(named[name].shape, device="cpu")
        real[name] = nn.Parameter(start, requires_grad=named[name].requires_grad and start.is_floating_point())
    replace_tensors(model, {id(named[name]): p for name, p in real.items()})
    try:
        with torch.no_grad(), _quiet(), shapes_only():
            entries = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
            expected = chosen(model, entries, "default")
            if wrong := _difference(expected, tensors):
                raise CheckpointError(
                    f"{where}: its tensors are not those that its {adapter_configs.CONFIG_NAME} makes on this "
                    f"{type(model.get_base_model()).__name__}: {wrong}. It is of another base, or not whole."
                )
            set_peft_model_state_dict(model, tensors)
    except CheckpointError:
        raise
    except Exception as error:  # whatever peft makes of tensors that are not its own
        raise CheckpointError(f"{where}: peft cannot load it: {type(error).__name__}: {error}") from error
    finally:
        replace_tensors(model, {id(p): named[name] for name, p in real.items()})
    return {name: _as_kept(p) for name, p in real.items()}


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    lacking, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if lacking:
        return f"they lack {len(lacking)}, such as {lacking[0]!r}"
    if more:
        return f"{len(more)} have no place, such as {more[0]!r}"
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            return f"{name!r} is {list(tensor.shape)}, and {list(expected[name].shape)} is expected"
    return ""


def _read(directory: Path, where: str) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if path.is_file():
        with contextlib.closing(SafetensorsFile(path)) as file:
            size = sum(entry.nbytes for entry in file.entries.values())
            if size > MAX_ADAPTER_BYTES:
                raise CheckpointError(f"{path}: {size / 1e9:.1f} GB, and an adapter is kept in memory whole.")
            return {name: file.read(name) for name in file.entries}
    path = directory / PICKLED
    if not path.is_file():
        raise CheckpointError(f"{where}: no {WEIGHTS} in it, and no {PICKLED}.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of torch's loader, which runs no code
        raise CheckpointError(
            f"{path}: torch's weights-only loader refuses it: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} does not hold tensors by name.")
    return dict(tensors)
