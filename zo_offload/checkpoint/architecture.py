"""A checkpoint's config.json, and its model class.

config.json is untrusted: things that transformers would do beyond making a config (load kernels from a hub, build a
list as long as a number in it, run the checkpoint's own code) are refused or limited first. A checkpoint's own code
runs only with trust_remote_code=True; then the checkpoint's class is used wherever its `auto_map` names one, as in
transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..hf import AutoConfig, GenerationConfig, PreTrainedModel, get_class_from_dynamic_module, transformers
from .files import CONFIG
from .meta_model import config_parts

MAX_CONFIG_BYTES = 32 << 20
MAX_COUNT = 1_000_000
"""The largest accepted number of layers, classes and the like."""
_COUNTS = re.compile(r"num_labels|layer|block|depth|stages|experts", re.IGNORECASE)
_IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


def read_config(directory: Path, *, trust_remote_code: bool = False, overrides: Mapping[str, Any] | None = None) -> Any:
    """transformers' config of a checkpoint directory, with settings replaced by `overrides`.

    Raises CheckpointError, also for an override that is not a setting of the config.
    """
    path = directory / CONFIG
    given = dict(overrides or {})
    raw = _read_json(path)
    _check_values(path, {**raw, **given})
    if isinstance(named := given.get("id2label"), Mapping):  # by numbers, as transformers has them
        given["id2label"] = {int(label): name for label, name in named.items()}
    if raw.get("auto_map") and not trust_remote_code and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise _needs_trust(path, f"model_type {raw.get('model_type')!r} is defined by code of its own")
    try:
        config, unknown = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **given
        )
    except Exception as error:  # whatever transformers makes of a stranger's file, or the checkpoint's own code raises
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} cannot use it: {type(error).__name__}: {error}"
        ) from error
    if unknown := sorted(unknown):
        raise CheckpointError(f"{type(config).__name__} has no setting {', '.join(unknown)} (config_overrides).")
    if not trust_remote_code:
        _check_implementations(path, config)
    return config


def read_generation_config(directory: Path) -> GenerationConfig:
    """transformers' generation config of a directory that has one. Raises CheckpointError."""
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever transformers makes of a stranger's file
        raise CheckpointError(
            f"{directory / 'generation_config.json'} cannot be used: {type(error).__name__}: {error}"
        ) from error


def find_class(
    config: Any, given: type[PreTrainedModel] | str | None, directory: Path | None, *, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """The class of the model: `given` itself, by its name or an auto class's, or the first of config.architectures.

    Raises CheckpointError.
    """
    if isinstance(given, type):
        if not issubclass(given, PreTrainedModel):
            raise CheckpointError(f"model_class={given.__name__} is not a transformers model class.")
        return given
    architectures = list(getattr(config, "architectures", None) or ())
    name = given or (architectures[0] if architectures else None)
    if name is None:
        raise CheckpointError(
            f"config.json names no architectures (model_type {config.model_type!r}): pass model_class, for "
            "example 'AutoModelForCausalLM'."
        )
    reference = _own_class(config, name, chosen=given is not None)
    if reference is not None and trust_remote_code and directory is not None:
        return _load_class(reference, directory)
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    mapping = getattr(found, "_model_mapping", None)
    if mapping is None or (reference is not None and type(config) not in mapping):
        if reference is not None:
            raise _needs_trust(directory or CONFIG, f"its class {name} is in {reference.partition('.')[0]}.py")
        raise CheckpointError(
            f"transformers {transformers.__version__} has no model class {name!r}. "
            "Pass model_class, for example 'AutoModelForCausalLM'."
        )
    if type(config) not in mapping:
        raise CheckpointError(f"{name} has no model of type {config.model_type!r}; pass another model_class.")
    choice = mapping[type(config)]
    choices: list[type[PreTrainedModel]] = list(choice) if isinstance(choice, (list, tuple)) else [choice]
    return next((c for c in choices if c.__name__ in architectures), choices[0])


def sibling_classes(config: Any) -> list[type[PreTrainedModel]]:
    """transformers' classes of the bare and of the pretrained model for a config."""
    found = []
    for auto in (transformers.AutoModel, transformers.AutoModelForPreTraining):
        choice = auto._model_mapping.get(type(config), ())
        found += list(choice) if isinstance(choice, (list, tuple)) else [choice]
    return [cls for cls in found if cls is not None]


def _own_class(config: Any, name: str, *, chosen: bool) -> str | None:
    """ "file.Class" of the checkpoint's own code, for an auto class's name or a class's own. Not chosen by anyone, and
    unknown to transformers: the only one there is."""
    auto_map = getattr(config, "auto_map", None)
    references = auto_map if isinstance(auto_map, dict) else {}
    models = {auto: ref for auto, ref in references.items() if isinstance(ref, str) and auto.startswith("AutoModel")}
    found = models.get(name) or next((ref for ref in models.values() if ref.rpartition(".")[2] == name), None)
    if found is None and not chosen and not hasattr(transformers, name) and len(set(models.values())) == 1:
        return next(iter(models.values()))
    return found


def _load_class(reference: str, directory: Path) -> type[PreTrainedModel]:
    try:
        found = get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{directory}: its own code ({reference}) fails: {type(error).__name__}: {error}"
        ) from error
    if not issubclass(found, PreTrainedModel):
        raise CheckpointError(f"{directory}: {reference} is not a transformers model class.")
    model_class: type[PreTrainedModel] = found
    return model_class


def _needs_trust(where: object, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {what}, and code that comes with a checkpoint is not run. If you have read it and trust it: "
        "trust_remote_code=True (--trust-remote-code)."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; a model's configuration has a few thousand.")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} cannot use it: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is a JSON {type(value).__name__}, not a model's configuration.")
    return value


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Check values that transformers uses without checks: class names, and numbers that become lengths of lists."""
    architectures, auto_map = values.get("architectures"), values.get("auto_map")
    if not isinstance(architectures, (list, type(None))) or not all(isinstance(n, str) for n in architectures or ()):
        raise CheckpointError(f"{path}: architectures is {architectures!r:.100}; expected a list of class names.")
    if not isinstance(auto_map, (dict, type(None))):
        raise CheckpointError(f"{path}: auto_map is {auto_map!r:.100}; expected classes by the name of an auto class.")
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for key, number in part.items():
            if _COUNTS.search(key) and isinstance(number, (int, float)) and number > MAX_COUNT:
                raise CheckpointError(f"{path}: {key}={number}; at most {MAX_COUNT} are taken.")


def _check_implementations(path: Path, config: Any) -> None:
    """Raise for a name with a "/": it is a repository of kernels, which transformers would fetch and run."""
    for part in config_parts(config):
        for name in (getattr(part, key, None) for key in _IMPLEMENTATIONS):
            if name is not None and (not isinstance(name, str) or "/" in name):
                raise CheckpointError(
                    f"{path}: asks for kernels from a hub ({name!r}), which are code and are not run. Give "
                    "config_overrides={'attn_implementation': 'sdpa'}, or take the name out."
                )
