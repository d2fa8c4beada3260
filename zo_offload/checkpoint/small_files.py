"""The small files of an export: configs, the tokenizer, and what is copied from the model's checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..hf import PreTrainedModel
from . import tokenizers
from .tokenizers import is_of_tokenizer

GENERATION = "generation_config.json"


class Origin(Protocol):
    """The parts of a model's original checkpoint that an export reads (`checkpoint.Checkpoint`)."""

    @property
    def path(self) -> Path | None:
        """Its directory; None for a config alone."""

    @property
    def carried(self) -> Sequence[Path]:
        """Files to copy: tokenizer, generation config, chat template, ..."""

    @property
    def config(self) -> Any:
        """The config as read."""

    @property
    def gguf(self) -> Path | None:
        """The GGUF file with the tokenizer, if it is in one."""

    def coded(self) -> object:
        """Its quantized tensors, if there are any."""

    @property
    def trust_remote_code(self) -> bool: ...


def write_small_files(
    work: Path, model: nn.Module, checkpoint: Origin | None, dtype: torch.dtype | None, tokenizer: Any, settings: Any
) -> None:
    if checkpoint is not None and checkpoint.path is not None:
        for source in checkpoint.carried:
            name = source.relative_to(checkpoint.path)
            if tokenizer is not None and is_of_tokenizer(name.as_posix()):
                continue  # the tokenizer used in training replaces it
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, work / name)
    file = None if checkpoint is None else checkpoint.gguf
    if tokenizer is None and file is not None and not tokenizers.has_tokenizer(work):
        tokenizer = tokenizers.load_tokenizer(file.parent if tokenizers.has_tokenizer(file.parent) else file)
    if tokenizer is not None:
        tokenizers.save(tokenizer, work)
    if not isinstance(model, PreTrainedModel):
        return
    config = copy.deepcopy(model.config if checkpoint is None else checkpoint.config)
    config.architectures = [type(model).__name__]
    if settings is not None:
        config.quantization_config = settings
    if dtype is not None:
        config.dtype = dtype
        for name in getattr(config, "sub_configs", {}):
            if (part := getattr(config, name, None)) is not None:
                part.dtype = dtype
    config.save_pretrained(work)
    if model.can_generate() and not (work / GENERATION).exists():
        # as it is: its own save_pretrained refuses what transformers finds inconsistent, and the weights would be lost
        model.generation_config.to_json_file(work / GENERATION, use_diff=True, keys_to_pop=["compile_config"])


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
