"""Names of a model's tensors in GGUF files, and how their values differ there: for reading and for writing.

transformers (with the package gguf) has the names, and undoes llama.cpp's conversions of the tensors. Those that are
implemented here too are of four kinds: rows of q and k in another order (Llama), norms stored plus one (Gemma,
Nemotron), stacked experts whose gate and up are two tensors, a router's row without its first dimension.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..hf import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from ..modules.away import shapes_only
from ..modules.compiled import plain_name

_DONE = ("TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor", "Gemma2TensorProcessor",
         "Qwen2MoeTensorProcessor")  # fmt: skip
"""transformers' tensor processors whose conversions are also implemented here."""


class Tower:
    """A model for transformers' naming code, without the modules inside its layers.

    transformers makes a table of all layers' names again for every module: quadratic in the layers, and minutes for
    eighty. A layer's parts have no names of their own in a GGUF file; modules that contain layers may (a file of
    BloomModel, opened as BloomForCausalLM).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self.config = module, getattr(module, "config", None)

    def state_dict(self) -> dict[str, Tensor]:
        with shapes_only():
            return {plain_name(name): tensor for name, tensor in self._module.state_dict().items()}

    def named_children(self) -> list[tuple[str, Tower]]:
        return [
            (name, Tower(child))
            for name, child in self._module.named_children()
            if not isinstance(child, nn.ModuleList) and any(isinstance(m, nn.ModuleList) for m in child.modules())
        ]


@dataclass(frozen=True)
class Naming:
    """The names of one model's tensors in files of one architecture."""

    names: Mapping[str, str]
    """Name in the files -> in the model's state dict. A stack of gates and ups has two names in the files."""
    kind: str
    """transformers' processor of the architecture."""

    @classmethod
    def of(cls, model: nn.Module, arch: str, config: Any, where: Path) -> Naming:
        """where: a path for errors. Raises CheckpointError: an architecture that gguf does not know, or whose tensors
        are converted in a way that is not done here."""
        processor: Any = TENSOR_PROCESSORS.get(arch, TensorProcessor)
        processor = processor(config=config.to_dict())
        kind = type(processor).__name__
        if kind not in _DONE:
            raise CheckpointError(
                f"{where}: GGUF of architecture {arch!r} is not supported: transformers computes with its tensors "
                f"({kind}). Convert it to safetensors there."
            )
        try:
            found = get_gguf_hf_weights_map(Tower(model), processor, model_type=arch)
        except Exception as error:  # an architecture that the package gguf does not know
            raise CheckpointError(f"{where}: {type(error).__name__}: {error}") from error
        # stacked experts are parameters, not modules: their names come without the end that files have
        return cls({f"{name}.weight" if name.endswith("_exps") else name: to for name, to in found.items()}, kind)

    def heads(self, name: str, config: Any) -> int:
        """For a tensor whose rows are in another order in the files, its number of heads; else 0."""
        part = re.search(r"\.attn_([qk])\.", name) if self.kind == "LlamaTensorProcessor" else None
        if part is None:
            return 0
        heads = int(config.num_attention_heads)
        return heads if part[1] == "q" else int(getattr(config, "num_key_value_heads", None) or heads)

    def is_plus_one(self, name: str) -> bool:
        """Whether files have a tensor's values plus one."""
        return self.kind in ("NemotronTensorProcessor", "Gemma2TensorProcessor") and "norm.weight" in name

    def is_one_row(self, name: str) -> bool:
        """Whether files have a tensor of one row without its first dimension."""
        return "ffn_gate_inp_shexp" in name

    def part(self, name: str) -> str:
        """Of a stack of gates and ups, which of them a tensor of the files is; else ""."""
        if not self.names.get(name, "").endswith("gate_up_proj"):
            return ""
        return "gate" if "ffn_gate" in name else "up"
