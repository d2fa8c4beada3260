"""A run's identity: everything that must be equal for its journal to mean the same weights, as digests."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoint.weights import Base
from ..config import EngineConfig
from ..data.encode import ENCODING
from ..errors import CheckpointError, JournalError
from ..formats import Format
from ..hf import transformers
from ..kernels.records import Gains, Masks
from ..methods import METHODS, Method, known_record
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..plan.storage import is_lossless
from ..system import diskio
from . import masks as masks_in_header
from . import run_directory
from .gains import record_of

_log = logging.getLogger(__name__)

MAY_CHANGE = (
    "Steps, evaluation, devices, window, threads and offload tier may change; the base (weights and config), storage, "
    "folding, compute, mode, rounding, block_numel, trainable parameters, tail, seed, noise, method, objective and "
    "data may not (data may, if asked for: new_data=True)"
)
SAMPLE = 16
FORMAT = 3
SINCE_3 = ("format", "config", "compute", "model_type")
"""Keys that runs of format 2 do not have; they stay without."""
_SHAPES_NO_NUMBER = frozenset({"transformers_version", "use_cache"})
"""A config's keys that do not affect the numbers (besides names with "_" in front): origin, and generation."""
_OF_FILES = frozenset({"architectures", "dtype", "torch_dtype"})
"""A config's keys about building and loading a model; a model in memory is built already."""


def identity(
    plan: Plan,
    layout: Layout,
    config: EngineConfig,
    method: Method,
    fold_every: int,
    base_digest: str,
    about: Mapping[str, Any],
    modes: str,
    tail: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that must be equal for a journal to mean the same weights; checked on resume, key by key.

    about: from `about_base`. modes: which modules train while the engine runs them (`modes.modes_of`). Data and
    objective are kept separately: see binding.py. tail: parameters that their exact gradient trains.
    """
    trained = "\n".join(sorted(name for name, spec in plan.params.items() if spec.trainable))
    about_tail = {**config.about_tail, **({"lr": method.lr} if method.tail_alone else {})}
    shapes = "\n".join(
        f"{n} {s.param_id} {list(s.shape)} {s.dtype}{_cuts(plan, n)}" for n, s in sorted(plan.params.items())
    )
    return {
        "format": FORMAT,
        "base": base_digest,
        **about,
        "plan": _digest(shapes),
        "trainable": _digest(trained),
        "storage": storage_digest(layout.formats),
        "fold_every": "any" if is_lossless(plan, layout) else fold_every,
        "compute": config.compute,
        "rounding": config.rounding,
        "mode": modes,
        "seed": config.seed,
        "noise": {"distribution": method.distribution, "rounds": method.rounds, "layout": method.noise_layout},
        "method": {
            k: v
            for k, v in run_directory.method_of(method).items()
            if k not in ("steps", "batch_size", "on_nonfinite", "tunes")
        },
        **({"tail": {"parameters": sorted(tail), **about_tail}} if tail else {}),
    }


def storage_digest(formats: Mapping[str, Format]) -> str:
    """Identity of the storage format of each parameter."""
    return _digest("\n".join(f"{name} {fmt.name}" for name, fmt in sorted(formats.items())))


def about_base(
    model: nn.Module | None, directory: Path | None, config: EngineConfig, adapter: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The facts of a base besides its weights: the class that computes with them, and its config.json.

    directory: a checkpoint's; None for a module in memory, which has its own config, if any, and whose class the caller
    must keep. adapter: the settings of an adapter that was put on a checkpoint; its weights belong to the base. Raises
    CheckpointError.
    """
    if directory is not None and (directory / "config.json").exists():  # a GGUF file has no config.json
        path = directory / "config.json"
        try:
            found = json.loads(diskio.read_file(path))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        overrides = dict(getattr(config, "config_overrides", None) or {})
        about = {"model_type": type(model).__name__, "config": _of_numbers({**found, **overrides})}
        return about if adapter is None else {**about, "adapter": dict(adapter)}
    carried = getattr(model, "config", None)
    to_dict = getattr(carried, "to_dict", None)
    found = None if to_dict is None else {k: v for k, v in to_dict().items() if k not in _OF_FILES}
    return {"model_type": None, "config": _of_numbers(found)}


def _of_numbers(config: Any) -> Any:
    """A config as JSON, without the keys about its origin."""
    if isinstance(config, Mapping):
        pairs = ((str(key), value) for key, value in config.items())
        return {k: _of_numbers(v) for k, v in pairs if k not in _SHAPES_NO_NUMBER and not k.startswith("_")}
    if isinstance(config, (list, tuple)):
        return [_of_numbers(value) for value in config]
    if isinstance(config, (set, frozenset)):
        return sorted(map(str, config))
    if isinstance(config, (str, int, float, bool, type(None))):
        return config
    return type(config).__name__ if " at 0x" in str(config) else str(config)


def objective_name(objective: Callable[..., Any], default: Callable[..., Any]) -> str | None:
    """An objective's name: its module and qualified name, or those of its class; None for the default objective."""
    if objective is default:
        return None
    named: Any = objective if hasattr(objective, "__qualname__") else type(objective)
    inner = getattr(objective, "func", None)  # of a functools.partial
    named = inner if hasattr(inner, "__qualname__") else named
    return f"{named.__module__}:{named.__qualname__}"


def check_objective(wanted: str | None, header: Mapping[str, Any], where: str) -> None:
    """Raise JournalError if the steps of a journal were computed with another objective than `wanted`.

    A function is identified by its name, wherever its file is; all lambdas look the same.
    """
    if "objective" not in header or _same_name(wanted, header["objective"]):
        return
    found = header["objective"]
    if wanted is None:
        raise JournalError(
            f"{where} was trained with objective={found!r}, but would go on with the model's own loss: pass it again, "
            "Engine.resume(run_dir, objective=...)"
        )
    was = "the model's own loss" if found is None else f"objective={found!r}"
    raise JournalError(f"{where} was trained with {was}, but would go on with objective={wanted!r}. Pass the same one")


def _same_name(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    (module, name), (other_module, other_name) = one.split(":", 1), other.split(":", 1)
    if "<lambda>" in name or "<lambda>" in other_name:
        return True
    return name == other_name and (module == other_module or "__main__" in (module, other_module))


def warn_of_versions(header: Mapping[str, Any], where: str) -> None:
    """Warn if a run began with other versions of the libraries that compute its losses."""
    found = header.get("versions")
    here = {"torch": torch.__version__, "transformers": transformers.__version__}
    differ = [
        f"{n} {found[n]} (here {v})"
        for n, v in here.items()
        if isinstance(found, dict) and found.get(n) != v and n in found
    ]
    if differ:
        _log.warning(
            "%s was begun with %s: losses may differ, the weights of its steps so far do not", where, ", ".join(differ)
        )


def header_of(
    wanted: dict[str, Any],
    base: Base,
    plan: Plan,
    layout: Layout,
    config: EngineConfig,
    model: str | None,
    model_class: str | None,
    gains: Gains,
    masks: Masks,
    wide: Sequence[str],
    objective: str | None,
) -> dict[str, Any]:
    """The journal's header: the identity, and everything that `replay` needs to make the same engine from the base.

    wide: layers that compute in float32 where forwards have 16 bits; `class_heads.wide_of` reads them.
    """
    settings = run_directory.settings_of(config)
    if settings["trainable"] == run_directory.PREDICATE:
        settings["trainable"] = sorted(name for name, spec in plan.params.items() if spec.trainable)
    return {
        **wanted,
        "sample": {name: base.digest_of(name) for name in _sampled(plan)},
        "layout": layout.digest(),
        "gains": record_of(gains),
        **({"masks": masks_in_header.record_of(masks)} if masks else {}),
        **({"wide": [*wide]} if wide else {}),
        "objective": objective,
        "settings": settings,
        "model": model,
        "model_class": model_class,
        "encoding": ENCODING,
        "versions": {
            "zo_offload": __version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def check_sample(base: Base, header: dict[str, Any]) -> None:
    """Raise JournalError if a few tensors of the base do not match the journal's digests.

    The whole base is compared when it is read (`digest`); a run whose blocks are all on the disk does not read it.
    """
    sample = header.get("sample")
    for name, wanted in sorted(sample.items()) if isinstance(sample, dict) else []:
        found = base.digest_of(name)
        if found != wanted:
            raise JournalError(
                f"this run cannot be continued as asked; the base weights are not the run's: {name!r} has digest "
                f"{found}, the journal has {wanted}. " + MAY_CHANGE
            )


def _sampled(plan: Plan) -> list[str]:
    """Names of SAMPLE parameters, evenly spaced among the smaller three quarters: quick to read, hard to share."""
    names = sorted(plan.params, key=lambda name: (plan.params[name].numel, name))
    names = names[: max(1, 3 * len(names) // 4)]
    return sorted({names[i * len(names) // SAMPLE] for i in range(SAMPLE)})


def _cuts(plan: Plan, name: str) -> str:
    """A parameter's cuts: pieces may be multiplied one by one, and a product's last bits depend on its size."""
    pieces = plan.pieces_of(name)
    return f" cut {[piece.start for piece in pieces]}" if len(pieces) > 1 else ""


def _modes_without(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`modes` for a run of a version without it: a checkpoint's modules were in eval mode, others as given."""
    if found.get("model") is not None:
        return "eval"
    modes = str(wanted.get("mode"))
    return modes if modes.startswith("as_is") else "as_is"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_identity(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise JournalError naming every part of a run's identity that differs from the journal's."""
    found = {"mode": _modes_without(found, wanted), **found}
    if isinstance(found.get("method"), dict):
        found = {**found, "method": known_record(found["method"])}
    if found.get("format") == 2:
        wanted = {key: value for key, value in wanted.items() if key not in SINCE_3}
    wanted = _with_class_of(wanted, found)
    differ: list[str] = []
    for key in sorted(wanted):
        # another version of transformers may add settings to a config in memory, but not to a file
        shared = key == "config" and wanted.get("model_type") is None
        differ += differences(key, found.get(key), wanted[key], shared=shared)
        if key == "storage" and found.get(key) != wanted[key]:
            differ[-1] += _as_stored_by(found)
    if differ:
        raise JournalError("this run cannot be continued as asked; " + "; ".join(differ) + ". " + MAY_CHANGE)


def _as_stored_by(found: Mapping[str, Any]) -> str:
    """The setting and the version that the formats of a journal's run are of."""
    settings, versions = found.get("settings"), found.get("versions")
    if not isinstance(settings, dict) or not isinstance(versions, dict):
        return ""
    return (
        f" (formats; the run began with storage={settings.get('storage')!r} in zo_offload "
        f"{versions.get('zo_offload')}: if you ask for the same, go on with that version)"
    )


def _with_class_of(wanted: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """`wanted`, with the method's class named as in the journal if only the module's name differs.

    Before classes had names of their own, a user's class had the name of the package's class that it was derived from.
    """
    method, known = wanted.get("method"), found.get("method")
    if not isinstance(method, dict) or not isinstance(known, dict) or not {"class"} <= method.keys() & known.keys():
        return wanted
    if not _same_name(str(method["class"]), str(known["class"])):
        return wanted
    as_named = {"class": known["class"]}
    if (name := known.get("name")) in METHODS and METHODS[name].own():
        as_named["name"] = name
    return {**wanted, "method": {**method, **as_named}}


def differences(name: str, found: Any, wanted: Any, *, shared: bool = False) -> list[str]:
    """Each part of two JSON values that differs, by its path. shared: ignore names that only one of two objects has."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = found.keys() & wanted.keys() if shared else found.keys() | wanted.keys()
        parts = (differences(f"{name}.{key}", found.get(key), wanted.get(key), shared=shared) for key in sorted(keys))
        return [part for found_parts in parts for part in found_parts]
    return [] if found == wanted else [f"{name}: the journal has {_short(found)}, this engine {_short(wanted)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
