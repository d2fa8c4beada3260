"""Arguments of transformers' `from_pretrained`: each has the same meaning here, or is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..modules.kind import ModelKind

OVERRIDES = ("num_labels", "id2label", "label2id", "problem_type", "attn_implementation")
"""Settings of a checkpoint's config.json."""
_STORED = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_STREAMED = "weights stream through a small window: offload='disk', device_memory='6GB' say where and how much"
_CODES = "a frozen low-bit base is storage='int4', 'nf4' or 'int8'"
_CACHE = "give the directory (huggingface_hub.snapshot_download), or set HF_HOME"
REFUSED = {
    "device_map": _STREAMED, "max_memory": _STREAMED, "offload_folder": _STREAMED, "offload_state_dict": _STREAMED,
    "low_cpu_mem_usage": f"no model is ever whole in memory here; leave it out ({_STREAMED})",
    "load_in_4bit": _CODES, "load_in_8bit": _CODES, "quantization_config": _CODES,
    "cache_dir": _CACHE, "token": _CACHE, "use_auth_token": _CACHE, "proxies": _CACHE, "force_download": _CACHE,
    "local_files_only": "set HF_HUB_OFFLINE=1, or give a directory",
    "subfolder": "give the directory itself", "gguf_file": "give the file itself as the model",
    "variant": "leave one variant's files in the directory: it is found by its name",
    "use_safetensors": "safetensors are taken where there are any, else pytorch_model.bin",
    "ignore_mismatched_sizes": "a checkpoint is used whole; for another head give num_labels and a body without a head",
    "tp_plan": "one device computes", "device_mesh": "one device computes",
    "peft_config": "adapter= takes it", "adapter_kwargs": "adapter= takes a directory",
}  # fmt: skip
"""Arguments without an equivalent, with advice on what to use."""


_OF_CLASSES = ("num_labels", "id2label", "label2id", "problem_type")
_NO_CLASSES = ("causal", "masked", "seq2seq", "choice", "bare")


def check_overrides(kind: ModelKind, overrides: Mapping[str, Any] | None) -> None:
    """Raise ConfigError for settings of a head of classes, of a model that has none: it would not look at them."""
    asked = [name for name in _OF_CLASSES if name in (overrides or {})] if kind.name in _NO_CLASSES else []
    if asked:
        assert overrides is not None
        raise ConfigError(
            f"{asked[0]}={overrides[asked[0]]!r}: {kind.model} has no head of classes and does not look at it. Pass "
            "model_class='AutoModelForSequenceClassification' (--model-class) for one, or leave it out and give "
            "template= and verbalizers= (--template, --verbalizers)"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def as_settings(model: Any, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(model, settings of the engine) of a call with some of from_pretrained's arguments. Raises ConfigError.

    num_labels and the like become config_overrides, dtype storage and compute, revision a part of the hub id.
    """
    settings = dict(given)
    for name, instead in REFUSED.items():
        if name in settings:
            raise ConfigError(f"{name}= is an argument of from_pretrained that has no place here: {instead}")
    overrides = {name: settings.pop(name) for name in OVERRIDES if name in settings}
    if isinstance(overrides.get("id2label"), Mapping):  # numbers, which JSON has as names
        named = {str(label): name for label, name in overrides["id2label"].items()}
        overrides = {"label2id": {name: int(label) for label, name in named.items()}, **overrides, "id2label": named}
    if overrides:
        written = dict(settings.get("config_overrides") or {})
        if twice := sorted(overrides.keys() & written.keys()):
            raise ConfigError(f"{twice[0]} is given twice, by itself and in config_overrides: leave one out")
        settings["config_overrides"] = {**written, **overrides}
    if not _is_count(overrides.get("num_labels", 1)):
        raise ConfigError(f"num_labels={overrides['num_labels']!r}: expected a whole number of classes, 1 or more")
    if settings.get("dtype", settings.get("torch_dtype")) != settings.get("torch_dtype", settings.get("dtype")):
        raise ConfigError(
            f"dtype={settings['dtype']!r} and torch_dtype={settings['torch_dtype']!r} are one setting of "
            "from_pretrained, given twice: leave one out"
        )
    dtypes = [(name, settings.pop(name)) for name in ("dtype", "torch_dtype") if name in settings]
    for name, dtype in dtypes:
        if dtype in (None, "auto"):
            continue
        asked: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        stored = _STORED.get(asked)
        if stored is None:
            raise ConfigError(
                f"{name}={dtype!r}: weights are stored by storage= and computed with by compute=; as one setting for "
                f"both there are {', '.join(map(str, _STORED))} and 'auto'"
            )
        settings = {"storage": stored, "compute": stored, **settings}
    revision = settings.pop("revision", None)
    if revision is not None:
        if not isinstance(model, (str, Path)) or Path(model).expanduser().exists():
            raise ConfigError(
                f"revision={revision!r} is of a hub id, and the model given is here already: leave it out"
            )
        model = f"{model}@{revision}"
    return model, settings
