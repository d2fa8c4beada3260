"""What is in a checkpoint directory: the weight files to read and the small files to carry along.

Nothing here trusts an index: shard names must be plain file names inside the directory.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_CARRIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_CARRIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm"}
_NOT_CARRIED = {CONFIG, "adapter_config.json", "trainer_state.json", "all_results.json", "eval_results.json",
                "quantize_config.json", "quant_config.json", "hf_quant_config.json"}  # fmt: skip
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$")
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt)$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_path(path: str | os.PathLike[str], *, weights: bool, code: bool = False) -> Path:
    """The directory meant by a path or a hub id; it holds a config.json. Raises CheckpointError."""
    given = os.fspath(path)
    directory = Path(given).expanduser()
    if directory.is_file():
        raise CheckpointError(f"{given} is a file; give the checkpoint directory that holds it and its config.json.")
    if not directory.exists():
        if not _HUB_ID.fullmatch(given):
            raise CheckpointError(f"{given} does not exist. Give a directory with config.json and *.safetensors.")
        directory = _from_hub(given, weights=weights, code=code)
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
    """The safetensors files of a checkpoint, in the index's order, all present. Raises CheckpointError."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        return _shards(directory)
    if any(_PICKLED.fullmatch(p.name) for p in directory.iterdir()):
        raise CheckpointError(
            f"{directory}: only pickled weights ({_listing(directory)}), which can run code when read and are refused. "
            "If you trust them: AutoModel.from_pretrained(path).save_pretrained(new_path) with the right auto class "
            "writes safetensors."
        )
    raise CheckpointError(
        f"{directory}: no {SINGLE} and no {INDEX}. Found: {_listing(directory)}. To plan without weights, open it "
        "with weights=False."
    )


def _shards(directory: Path) -> list[Path]:
    try:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise CheckpointError(f"{directory / INDEX}: not a safetensors index ({kind}: {error}).") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or len(name) > 255 or re.search(r"[/\\:\0]", name):
            raise CheckpointError(f"{directory / INDEX}: shard name {name!r} is not a plain file name; refused.")
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


def _from_hub(repo: str, *, weights: bool, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns + ["*.safetensors"] * weights + ["*.py"] * code))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo!r} is neither a directory nor in the local Hugging Face cache, and the hub cannot be reached. "
            "Download it where there is a network, or give a directory."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{repo!r} is not a directory, and the hub does not give it: {error}") from error


def _listing(directory: Path, most: int = 8) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in directory.iterdir())
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"
