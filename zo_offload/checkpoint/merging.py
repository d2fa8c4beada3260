"""Merges an adapter into its base during an export: the whole model, as from peft's `merge_and_unload`.

peft merges one layer at a time, and so does this module: one layer gets its values, in float32, and the merged result
is rounded once to the dtype of the export. Other weights are read unchanged. Memory: one adapted layer, and its change.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .adapters import is_peft
from .weights import Placed, Weights


def why_not(model: nn.Module) -> str:
    """Why an adapter cannot be merged; "" if it can."""
    if not is_peft(model):
        return "merge=True is for a model with an adapter, and this one has none: leave it out"
    configs: Any = cast(Any, model).peft_config
    if any(config.is_prompt_learning for config in configs.values()):
        kinds = ", ".join(sorted(str(config.peft_type.value) for config in configs.values()))
        return f"an adapter of the kind {kinds} is no change of weights and cannot be merged: export it as it is"
    return ""


class Merged:
    """The plain model's weights with the adapter merged into them (`weights.Placed`). See the module.

    model: peft's. shadow: a copy of it on meta. weights: current values, by the names in peft's model; `names` has
    those of the plain one.
    """

    def __init__(self, model: nn.Module, shadow: nn.Module, weights: Weights, known: set[str]) -> None:
        """known: names that `weights` has. Raises ConfigError if peft cannot merge."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._shadow, self._weights = shadow, weights
        self._name_of = {id(p): name for name, p in shadow.named_parameters()}
        self._buffers = {id(b): model.get_buffer(name) for name, b in shadow.named_buffers()}
        marks: dict[int, str] = {}
        memo: dict[int, Any] = dict(self._buffers)
        for name, p in shadow.named_parameters():
            if name in known:
                on_meta = torch.empty(weights.shape_of(name), dtype=weights.dtype_of(name), device="meta")
                memo[id(p)] = nn.Parameter(on_meta, requires_grad=False)
                marks[id(memo[id(p)])] = name
            else:
                memo[id(p)] = model.get_parameter(name)
        kept_alive = list(memo.values())  # marks go by identity
        whole: Any = copy.deepcopy(shadow, memo)
        self._layer_of: dict[str, str] = {}
        for path, module in whole.named_modules():
            if isinstance(module, BaseTunerLayer):
                inside = module.get_base_layer().parameters()
                self._layer_of.update((marks[id(p)], path) for p in inside if id(p) in marks)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model: nn.Module = whole.merge_and_unload()
        except Exception as error:  # peft's own methods are many, and some cannot be merged
            raise ConfigError(f"peft cannot merge this adapter: {type(error).__name__}: {error}") from error
        self._of = {name: marks[id(p)] for name, p in self.model.named_parameters() if id(p) in marks}
        del kept_alive
        self._held: tuple[str, dict[str, Tensor]] | None = None

    @property
    def names(self) -> list[str]:
        return list(self._of)

    def beside(self, names: Collection[str]) -> set[str]:
        """The plain names of those of these parameters (named as in peft's model) that the adapter leaves alone."""
        return {name for name, inner in self._of.items() if inner in names and inner not in self._layer_of}

    def shape_of(self, name: str) -> torch.Size:
        return self._weights.shape_of(self._of[name])

    def dtype_of(self, name: str) -> torch.dtype:
        return self._weights.dtype_of(self._of[name])

    def place_of(self, name: str, element: int) -> int:
        return self._weights.place_of(self._of[name], element) if isinstance(self._weights, Placed) else 0

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        inner = self._of[name]
        path = self._layer_of.get(inner)
        if path is None:
            self._weights.read_into(inner, start, out)
        else:
            out.copy_(self._layer(path)[inner].view(-1)[start : start + len(out)])

    def _layer(self, path: str) -> dict[str, Tensor]:
        """The parameters of one adapted layer's base, merged, by their names in peft's model."""
        if self._held is None or self._held[0] != path:
            self._held = None  # before the next one is made
            self._held = (path, self._merge(path))
        return self._held[1]

    @torch.no_grad()
    def _merge(self, path: str) -> dict[str, Tensor]:
        layer = self._shadow.get_submodule(path)
        memo: dict[int, Any] = dict(self._buffers)
        for p in layer.parameters():
            name = self._name_of[id(p)]
            value = torch.empty(self._weights.shape_of(name), dtype=self._weights.dtype_of(name), device="cpu")
            self._weights.read_into(name, 0, value.view(-1))
            memo[id(p)] = nn.Parameter(value.float(), requires_grad=False)
        real: Any = copy.deepcopy(layer, memo)
        names = {id(memo[id(p)]): self._name_of[id(p)] for p in layer.parameters()}
        real.merge()
        base = real.get_base_layer().parameters()
        return {names[id(p)]: p.detach().to(self._weights.dtype_of(names[id(p)])).contiguous() for p in base}
