"""A basis of the inputs of a model's linear layers, as a peft adapter that trains in it.

    y = x W^T + b + (x B) C^T + c      B [in, rank]: the basis, frozen; C [out, rank] and c [out]: trained, 0 at first;
                                       no c where some of the layers have no bias b

B's columns are the directions in which a layer's inputs vary most (`run/basis.py` finds them), so C alone, about a
hundredth of a model, holds half of the gradient of all weights, while W is only read and may be int4. It is LoRA with a
frozen A = B^T: lora_A is to be kept (`keep=["lora_A"]`), lora_B to be trained (`trainable=["lora_B"]`). Source: ZO-Act,
arXiv 2607.01125.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError
from .adapted import WEIGHTS


@dataclass(frozen=True)
class Basis:
    """vectors: by a linear layer's path, float32 [rank, in], with orthonormal rows. outs: each layer's number of
    outputs. biased: whether all of the layers have biases."""

    vectors: Mapping[str, Tensor]
    outs: Mapping[str, int]
    biased: bool

    @property
    def rank(self) -> int:
        return max(len(rows) for rows in self.vectors.values())

    def config(self) -> Any:
        """peft's config of an adapter in this basis. Raises ConfigError if peft is missing."""
        try:
            import peft
        except ImportError as error:
            raise ConfigError(
                f"an adapter needs peft, which is not installed here (pip install peft): {error}"
            ) from None
        ranks = {name: len(rows) for name, rows in self.vectors.items() if len(rows) != self.rank}
        return peft.LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=sorted(self.vectors), lora_bias=self.biased,
            rank_pattern=ranks, alpha_pattern=ranks,
        )  # fmt: skip

    def save(self, directory: str | Path) -> None:
        """Write an adapter's directory in peft's form; C and c are 0. Raises ConfigError if `directory` exists."""
        target = Path(directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} is there already; give a fresh directory for the basis")
        config = self.config()
        config.inference_mode = True
        target.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(target))
        save_file(self._tensors("weight"), target / WEIGHTS, metadata={"format": "pt"})

    def put_on(self, model: nn.Module) -> Any:
        """A PeftModel around a module in memory; only C and c require gradients. `model` is changed, as peft does."""
        import peft

        adapted = peft.get_peft_model(model, self.config())
        values = self._tensors("default.weight")
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
                parameter.requires_grad_("lora_B" in name)
        return adapted.eval()

    def _tensors(self, last: str) -> dict[str, Tensor]:
        found = {}
        for path, rows in self.vectors.items():
            name = f"base_model.model.{path}"
            found[f"{name}.lora_A.{last}"] = rows.contiguous()
            found[f"{name}.lora_B.{last}"] = torch.zeros(self.outs[path], len(rows), device="cpu")
            if self.biased:
                found[f"{name}.lora_B.{last.replace('weight', 'bias')}"] = torch.zeros(self.outs[path], device="cpu")
        return found
