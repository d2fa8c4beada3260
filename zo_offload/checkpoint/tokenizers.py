"""A checkpoint's tokenizer, loaded by transformers; its own code runs only if it is trusted."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..hf import AutoTokenizer, transformers

_log = logging.getLogger(__name__)

FILES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
"""A tokenizer's files besides those named tokenizer*; older checkpoints have only these."""


_NAMES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|spiece|sentencepiece|tekken).*"
)


def is_of_tokenizer(name: str) -> bool:
    """Whether a file belongs to a tokenizer, by its path in a checkpoint."""
    return name.startswith("additional_chat_templates/") or _NAMES.fullmatch(name) is not None


def check_saves(tokenizer: Any) -> None:
    """Raise CheckpointError, before training, if an export could not write this tokenizer."""
    if not hasattr(tokenizer, "save_pretrained"):
        return  # any callable can make batches; the export then warns that it writes no tokenizer
    with tempfile.TemporaryDirectory() as folder:
        save(tokenizer, Path(folder))


def save(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files. Raises CheckpointError if that fails; OSError of the disk passes through."""
    if not hasattr(tokenizer, "save_pretrained"):
        _log.warning("the tokenizer (%s) has no save_pretrained and is not exported", type(tokenizer).__name__)
        return
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a tokenizer may be anyone's
        raise CheckpointError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be saved, so no export could hold it: "
            f"{type(error).__name__}: {error}"
        ) from error


def has_tokenizer(directory: Path) -> bool:
    return any(p.name.startswith("tokenizer") or p.name in FILES for p in directory.iterdir() if p.is_file())


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory, a cached hub id or a GGUF file. CheckpointError; never prompts or runs unasked."""
    place, options = path, dict[str, Any]()
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        place, options = Path(path).parent, {"gguf_file": Path(path).name}
    try:
        return AutoTokenizer.from_pretrained(
            place, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # whatever transformers makes of a stranger's files
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: its tokenizer is defined by code of its own, and code that comes with a checkpoint is not "
                "run. If you have read it and trust it: trust_remote_code=True (--trust-remote-code); or pass "
                "tokenizer=."
            ) from error
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} cannot load its tokenizer: "
            f"{type(error).__name__}: {error}"
        ) from error
