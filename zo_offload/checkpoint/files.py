"""Finds the files of a checkpoint directory: weights to read and small files to copy.

Nothing here trusts an index: shard names must be plain file names inside the directory.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import CheckpointError
from ..system.plain import user_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"

_CARRIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
_NOT_CARRIED = {CONFIG, "adapter_config.json", "trainer_state.json", "all_results.json", "eval_results.json",
                "quantize_config.json", "quant_config.json", "hf_quant_config.json"}  # fmt: skip
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$")
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)$")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\..+)")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def resolve_path(path: str | os.PathLike[str], *, weights: bool, code: bool = False) -> Path:
    """The directory of a path or a hub id (org/name, org/name@revision); it holds a config.json.

    Raises CheckpointError.
    """
    given = os.fspath(path)
    directory = user_path(given)
    if directory.is_file():
        raise CheckpointError(f"{given} is a file; give the checkpoint directory that holds it and its config.json.")
    if not directory.exists():
        hub = _HUB_ID.fullmatch(given)
        if hub is None:
            raise CheckpointError(f"{given} does not exist. Give a directory with config.json and *.safetensors.")
        directory = _from_hub(hub["repo"], hub["revision"], weights=weights, code=code)
    if is_run(directory):
        raise CheckpointError(
            f"{given} is a run, not a checkpoint. Go on with it: Engine.resume({given!r}) (fit --resume); or export it."
        )
    if (directory / CONFIG).is_file():
        return directory
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"{given} holds a PEFT adapter, not a model. Merge it into its base model and save that.")
    raise CheckpointError(f"{given} is not a checkpoint: no config.json. Found: {_listing(directory)}.")


def is_run(directory: Path) -> bool:
    """Whether a directory is a run's, see `run_directory.py`: a journal, or the configuration of one that has none."""
    if (directory / "journal.zoj").exists():
        return True
    try:
        file = directory / CONFIG
        values = json.loads(file.read_bytes()) if file.is_file() and file.stat().st_size < 1 << 20 else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"model", "settings", "method"} <= set(values) and "model_type" not in values


def find_weights(directory: Path) -> list[Path]:
    """The files of a checkpoint's weights, in the index's order, all present. Raises CheckpointError.

    The usual names first, safetensors before pickled ones; then files of other names, if one reading of them is
    possible: one index, one file, or all parts of one set.
    """
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _shards(directory, index)
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if found := _of_other_names(directory, pattern):
            return found
    if any(_PICKLED.fullmatch(p.name) for p in directory.iterdir()):
        raise CheckpointError(
            f"{directory}: no safetensors, and of pickled files only {PICKLED} and its shards are read. Found: "
            f"{_listing(directory)}. Rename it, or save_pretrained the model in transformers, which writes safetensors."
        )
    raise CheckpointError(
        f"{directory}: no {SINGLE} and no {INDEX}. Found: {_listing(directory)}. To plan without weights, open it "
        "with weights=False."
    )


def has_weights(directory: Path) -> bool:
    """Whether a directory holds files that look like a model's weights."""
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return any(_is_of_model(path) for pattern in patterns for path in directory.glob(pattern))


def _is_of_model(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "adapter_model", "optimizer"))


def _of_other_names(directory: Path, pattern: str) -> list[Path]:
    """Weights with other names than the usual: a variant's (model.fp16.safetensors), consolidated.safetensors, parts
    without an index. Empty if there are none."""
    files = sorted(path for path in directory.glob(pattern) if _is_of_model(path))
    indices = sorted(path for path in directory.glob(f"{pattern}.index*.json") if _is_of_model(path))
    if len(indices) == 1:
        return _shards(directory, indices[0].name)
    parts = [_PART.fullmatch(file.name) for file in files]
    sets = {(part["stem"], int(part["count"]), part["end"]) for part in parts if part is not None}
    if len(sets) == 1 and all(parts):
        ((_, count, _),) = sets
        numbers = [int(part["number"]) for part in parts if part is not None]
        if numbers == list(range(1, count + 1)):
            return files
        lacking = sorted(set(range(1, count + 1)) - set(numbers))
        raise CheckpointError(
            f"{directory}: {files[0].name} and {len(files) - 1} more are not the {count} parts that their names speak "
            f"of{f' (part {lacking[0]} is missing)' if lacking else ''}. Download or copy it again."
        )
    if len(files) <= 1:
        return files
    names = ", ".join(path.name for path in (indices or files)[:6])
    raise CheckpointError(
        f"{directory}: several files may be its weights ({names}), none has the usual name ({SINGLE}), and no index "
        "says which are meant. Leave one of them, or one set with its index, in the directory."
    )


def _shards(directory: Path, index: str) -> list[Path]:
    try:
        weight_map = json.loads((directory / index).read_text())["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise CheckpointError(f"{directory / index}: not an index of shards ({kind}: {error}).") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or len(name) > 255 or re.search(r"[/\\:\0]", name):
            raise CheckpointError(f"{directory / index}: shard name {name!r} is not a plain file name; refused.")
        if not (directory / name).is_file():
            owned = [key for key, shard in weight_map.items() if shard == name]
            raise CheckpointError(
                f"{directory / name} is missing; the index puts {len(owned)} tensors there, such as {owned[0]!r}. "
                f"It names {len(names)} shards. Download or copy it."
            )
    return [directory / name for name in names]


def carried_files(directory: Path, *, code: bool = False) -> list[Path]:
    """Small files that belong to the model, not to its weights: tokenizer, templates, generation config, licence.

    Paths as found; those in a directory of chat templates included. code: its Python files too.
    """
    found = [
        p
        for p in sorted(directory.iterdir())
        if p.is_file() and (_is_carried(p.name) or (code and p.suffix == ".py" and not p.name.startswith(".")))
    ]
    templates = directory / "additional_chat_templates"
    return found + (sorted(templates.glob("*.jinja")) if templates.is_dir() else [])


def _is_carried(name: str) -> bool:
    if name.startswith(".") or name in _NOT_CARRIED or _WEIGHTS.fullmatch(name):
        return False
    return Path(name).suffix in _CARRIED_SUFFIXES or name.upper().startswith(_CARRIED_NAMES)


def _from_hub(repo: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*"]
    try:
        patterns += ["*.safetensors"] * weights + ["*.py"] * code
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        named = repo if revision is None else f"{repo}@{revision}"
        raise CheckpointError(
            f"{named!r} is neither a directory nor in the local Hugging Face cache, and the hub cannot be reached. "
            "Download it where there is a network, or give a directory."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo!r} is not a directory, and the hub does not give it: {error}") from error


def _listing(directory: Path, most: int = 8) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in directory.iterdir())
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"
