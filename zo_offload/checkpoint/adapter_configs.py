"""The `adapter=` setting: an adapter's directory, or a peft configuration for a new adapter.

`adapter=` takes peft's config object, its fields as a dict, a text with some of them, or a directory that peft (or our
export) wrote. It is kept in a run's files as plain JSON: a dict of peft's fields, or a path.

    "r=16"                                          LoRA of that rank; all else is peft's default
    "r=16,lora_alpha=32,target_modules=q_proj+v_proj"    more of LoraConfig's fields; + between several names
    "prefix=5"   "prompt=10"                        prefix and prompt tuning with so many virtual tokens
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..modules.kind import ModelKind

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16
_SHORT = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
_LISTS = ("target_modules", "exclude_modules", "modules_to_save")
_TASKS = {
    "causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS", "tokens": "TOKEN_CLS",
    "questions": "QUESTION_ANS", "bare": "FEATURE_EXTRACTION",
}  # fmt: skip
_INITS = ("gaussian", "orthogonal")
_ONLY_BEGINS = ("eva",)
"""Initialisations that do not change the base: once the adapter is trained and saved, they do not matter."""
_OF_FILES = frozenset({"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"})
"""Fields about an adapter's origin and loading, which do not affect its arithmetic."""


def plain(adapter: Any) -> dict[str, Any] | str | None:
    """`adapter=` as JSON: peft's fields, or the given path of a directory. Raises ConfigError."""
    if adapter is None:
        return None
    if isinstance(adapter, Path):
        return str(adapter)
    if isinstance(adapter, str):
        return adapter if Path(adapter).expanduser().exists() or "=" not in adapter else _parsed(adapter)
    if isinstance(adapter, Mapping):
        fields = dict(adapter)
        fields.setdefault("peft_type", "LORA")
    elif hasattr(adapter, "peft_type") and hasattr(adapter, "to_dict") and not isinstance(adapter, type):
        fields = adapter.to_dict()
    else:
        raise ConfigError(
            f"adapter={adapter!r:.200}: expected an adapter's directory, a config of peft's such as LoraConfig(r=16), "
            "its fields as a dict, or a text such as 'r=16'"
        )
    return {str(name): _json(value, f"adapter: {name}") for name, value in fields.items()}


def _parsed(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name and value) or name in fields:
            raise ConfigError(
                f"adapter={text!r}: there is no such directory; as a text it is read as name=value, ..., for example "
                "'r=16', 'r=16,lora_alpha=32,target_modules=q_proj+v_proj', 'prefix=5' or 'prompt=10'"
            )
        fields[name] = _value(value)
        if name in _LISTS and isinstance(fields[name], str) and re.fullmatch(r"[\w.]+", value):
            fields[name] = [value]  # as one text it would be a regex of whole names, to peft
    short = [name for name in _SHORT if name in fields]
    for name in short[:1]:
        fields = {"peft_type": _SHORT[name], "num_virtual_tokens": fields.pop(name), **fields}
    return {"peft_type": "LORA", **fields}


def _value(text: str) -> Any:
    if "+" in text:
        return text.split("+")
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def _json(value: Any, what: str) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _json(item, what) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_json(item, what) for item in value)
    if isinstance(value, (list, tuple)):
        return [_json(item, what) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise ConfigError(f"{what} is a {type(value).__name__}, which a run's files cannot hold")


def of_numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's set fields that the arithmetic of an adapter may depend on; not unset ones: a newer peft has more."""
    return {name: value for name, value in sorted(fields.items()) if name not in _OF_FILES and not _is_unset(value)}


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (directory / CONFIG_NAME).is_file() and not (directory / "config.json").is_file()


def read_fields(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a directory. Raises CheckpointError."""
    path = directory / CONFIG_NAME
    if not directory.is_dir():
        raise CheckpointError(
            f"adapter {directory}: there is no such directory. Give the one with {CONFIG_NAME} (of a run whose adapter "
            "was moved: where it is now), or a new adapter's settings, such as 'r=16'."
        )
    if not path.is_file():
        raise CheckpointError(f"adapter {directory}: no {CONFIG_NAME} in it; peft's save_pretrained writes one.")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; an adapter's configuration has some hundred."
            )
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is a JSON {type(fields).__name__}, not an adapter's configuration.")
    return fields


def base_of(directory: Path) -> Path:
    """The local folder that an adapter's config names as its base. Otherwise raises CheckpointError with the remedy."""
    named = read_fields(directory).get("base_model_name_or_path")
    if isinstance(named, str) and named:
        for folder in (Path(named).expanduser(), directory / named):
            if folder.is_dir():
                return folder.resolve()
    raise CheckpointError(
        f"{directory} holds an adapter, and its base, {named!r}, is not a local folder. Give the base as the model, "
        f"and this directory as the adapter: Engine(BASE, adapter={str(directory)!r}) (--adapter)."
    )


def make_config(fields: Mapping[str, Any], where: str, kind: ModelKind, *, loads: bool) -> Any:
    """peft's config of these fields. kind: the model's kind, which gives the task if the fields name none. loads: its
    weights are read from files; prompts are then the embeddings themselves, without the network that made them.

    Raises ConfigError: peft is missing, does not know the type or a field, or refuses a value.
    """
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ConfigError(f"{where}: an adapter needs peft, which is not installed here (pip install peft)") from error
    name = fields.get("peft_type")
    known = {str(getattr(one, "value", one)): cls for one, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in known:
        raise ConfigError(
            f"{where}: peft_type {name!r} is not known to peft {peft.__version__}; there are {', '.join(sorted(known))}"
        )
    cls = known[str(name)]
    takes = set(cls.__dataclass_fields__)
    unknown = {key: value for key, value in fields.items() if key not in takes | {"peft_version"}}
    if asked := {key: value for key, value in unknown.items() if not _is_unset(value)}:
        key, value = next(iter(asked.items()))
        raise ConfigError(
            f"{where}: {cls.__name__} of peft {peft.__version__} has no field {key!r} (here {value!r:.100}), and what "
            "it asks for would be left out. Update peft, or take the field out"
        )
    given = {key: value for key, value in fields.items() if key in takes and key != "peft_type"}
    rank = given.get("r")
    if rank is not None and name == "LORA" and not (type(rank) is int and 1 <= rank <= MAX_RANK):
        raise ConfigError(f"{where}: r={rank!r}; a rank is a whole number from 1 to {MAX_RANK}")
    init = given.get("init_lora_weights", True)
    if name == "LORA" and isinstance(init, str) and init not in _INITS and not (loads and init in _ONLY_BEGINS):
        raise ConfigError(
            f"{where}: init_lora_weights={init!r} begins from the base's weights, or from data, and the base is not in "
            f"memory. Choose True, False or one of {', '.join(_INITS)}, or give the engine peft's model in memory"
        )
    tokens = given.get("num_virtual_tokens")
    if tokens is not None and not (type(tokens) is int and 1 <= tokens <= MAX_RANK):
        raise ConfigError(f"{where}: num_virtual_tokens={tokens!r}; expected a whole number from 1 to {MAX_RANK}")
    # of a saved adapter without a task, peft neither saved nor looks for a head of its own
    with_head = kind.name in ("classification", "tokens")
    if given.get("task_type") is None and kind.name in _TASKS and not (loads and with_head):
        given["task_type"] = _TASKS[kind.name]
    # a saved config says that it is not to train; where it belongs is said by who makes the model
    given = {**given, "inference_mode": False, "base_model_name_or_path": None}
    try:
        config = cls(**given)
        config.inference_mode = loads and config.is_prompt_learning
    except Exception as error:  # whatever peft makes of its fields
        raise ConfigError(f"{where}: peft refuses it: {type(error).__name__}: {error}") from error
    frozen = given.get("num_frozen_tokens", getattr(config, "num_frozen_tokens", 0))
    if frozen and not config.inference_mode:
        raise ConfigError(
            f"{where}: num_frozen_tokens={frozen}: peft joins frozen tokens to the others outside of its modules when "
            "it saves them, and the weights are away there. Pass num_frozen_tokens=0"
        )
    return config
