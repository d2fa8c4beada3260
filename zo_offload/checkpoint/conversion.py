"""Converts between tensors in a checkpoint's files and in a transformers model, one group of tensors at a time.

transformers 5 may rename, merge (one fused tensor of all experts), split (a fused qkv) or permute tensors when it loads
a checkpoint, and undoes that when it saves. It does so for a whole model at once. This module uses its transforms to
find the tensors that belong together, and runs them on meta tensors to find the outputs and the source of each element
(`recipe.py`); a transform that does more than move elements is run on its group when one of its tensors is read.
Everything that depends on the internals of transformers (5.17 to 5.23) and is not about building a model is in this
module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..hf import (
    PrefixChange,
    PreTrainedModel,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from ..modules.away import shapes_only
from ..modules.compiled import plain_name
from .recipe import Finder, Reader, Recipe, Source, Whole


@dataclass
class Group:
    """Tensors that are converted together. sources: names to read, in order; outputs: final name -> meta tensor;
    recipes: final name -> the sources of its elements."""

    sources: list[str]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    _patterns: list[str] = field(default_factory=list)
    _transform: WeightConverter | None = None  # None: the tensor as it is, under another name
    _first: str = ""  # the name transformers files this group under

    @classmethod
    def plain(cls, name: str, meta: Tensor) -> Group:
        """One tensor that keeps its name."""
        return cls([name], {name: meta}, {name: Source(name, meta.numel(), meta.dtype)}, [name], None, name)

    def _convert(self, tensors: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The converted sources, by the transform's names."""
        assert self._transform is not None
        if len({t.dtype for t in tensors}) > 1:  # torch.stack and friends would refuse or depend on the order
            common = tensors[0].dtype
            for tensor in tensors:
                common = torch.promote_types(common, tensor.dtype)
            tensors = [t.to(common) for t in tensors]
        transform = deepcopy(self._transform)
        for source, pattern, tensor in zip(self.sources, self._patterns, tensors, strict=True):
            transform.add_tensor(self._first, source, pattern, tensor)  # type: ignore[arg-type]  # as when saving
        del tensors  # the transform drops its own references as it goes
        try:
            converted = transform.convert(self._first, model=model, config=model.config)
        except Exception as error:
            raise CheckpointError(
                f"transformers could not convert {self.sources[0]!r} and {len(self.sources) - 1} more into "
                f"{self._first!r}: {type(error).__name__}: {error}"
            ) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in converted.items()}

    def _try(self, metas: Mapping[str, Tensor], model: nn.Module, rename: Callable[[str], str]) -> None:
        """Find outputs and recipes by a run on meta tensors."""
        given = [metas[name].detach() for name in self.sources]  # tensors of our own: recipes go by identity
        recipes = [Source(name, t.numel(), t.dtype) for name, t in zip(self.sources, given, strict=True)]
        if self._transform is None:
            self.outputs, self.recipes = {self._first: given[0]}, {self._first: recipes[0]}
            return
        with Finder() as finder:
            for tensor, source in zip(given, recipes, strict=True):
                finder.add(tensor, source)
            converted = self._convert(given, model)

        def run(reader: Reader) -> dict[str, Tensor]:
            """All outputs, from whole sources."""
            parts = zip(recipes, (metas[name].shape for name in self.sources), strict=True)
            made = self._convert([source.part(reader, 0, source.numel).view(shape) for source, shape in parts], model)
            return {rename(name): tensor for name, tensor in made.items()}

        for name, tensor in converted.items():
            final = rename(name)
            self.outputs[final] = tensor
            found = finder.recipe(tensor)
            self.recipes[final] = found or Whole(
                final, run, len(converted), self.sources[0], tensor.numel(), tensor.dtype
            )


def loading_groups(
    model: PreTrainedModel, metas: Mapping[str, Tensor]
) -> tuple[list[Group], set[str], list[WeightTransform]]:
    """The groups by which `from_pretrained` would fill this model from files with `metas` (name -> meta tensor).

    Returns the groups, the names that the model does not use, and the transforms that were used (transformers keeps
    these on the model, to undo them when saving). Follows `convert_and_load_state_dict_in_model`.
    """
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings, converters = _split(transforms)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    for key in sorted(metas, key=dot_natural_key):
        prefix = model.base_model_prefix
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if renamed not in wanted and key in wanted:
            renamed, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if renamed in wanted:
            _collect(groups, renamed, key, pattern, by_pattern)
        elif pattern is None:
            unexpected.add(renamed)
        else:
            first, *_ = targets = by_pattern[pattern].target_patterns
            unexpected.update(renamed.replace(first, target) for target in targets)
    for group in groups.values():
        group._try(metas, model, lambda name: name)
        for name in [n for n in group.outputs if n not in wanted]:
            unexpected.add(name)
    used = [t for t in transforms if t.was_used()]
    return list(groups.values()), unexpected, used


def saving_groups(model: PreTrainedModel, metas: Mapping[str, Tensor]) -> list[Group]:
    """The groups by which `save_pretrained` would write the entries `metas` of this model's state dict.

    Follows `revert_weight_conversion`: the transforms used when the model was loaded, in reverse order and direction;
    for a model that was not loaded, the registered ones (those that add or remove a prefix left out).
    """
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        registered = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [t for t in registered if not isinstance(t, PrefixChange)]
    renamings, converters = _split([t.reverse_transform() for t in reversed(transforms)])
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    groups: dict[str, Group] = {}
    for key in sorted(metas, key=dot_natural_key):
        for converter in converters:
            first, pattern = converter.rename_source_key(key)
            if pattern is not None:
                _collect(groups, first, key, pattern, by_pattern)
                break
        else:
            _collect(groups, rename(key), key, None, by_pattern)
    for group in groups.values():
        group._try(metas, model, rename)
    return list(groups.values())


def tied_name_patterns(model: nn.Module) -> list[str]:
    """Regexes of the names that a model declares as copies of others (`_tied_weights_keys`), from its root."""
    patterns = []
    for path, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None) or {}
        patterns += [f"{path}.{name}" if path else name for name in tied]
    return patterns


def names_to_save(model: nn.Module) -> dict[str, Tensor]:
    """State dict entries that belong in the files: tensors shared under several names once, ignored ones left out.

    Parts that torch.compile wraps have their plain names, which a model that is not compiled has. Which of the names is
    kept of a shared tensor follows `remove_tied_weights_from_state_dict`, but identity decides what is shared, so
    it is right whatever the tensors' data is. A tie that the model class does not declare is kept under every name
    for a PreTrainedModel (loading would not tie it again), else under the first.
    """
    with shapes_only():
        entries = {k: t for k, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    if isinstance(model, PreTrainedModel):
        entries = {plain_name(name): tensor for name, tensor in entries.items()}
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        entries.pop(name, None)
    shared: dict[int, list[str]] = {}
    for name, tensor in entries.items():
        shared.setdefault(id(tensor), []).append(name)
    patterns = tied_name_patterns(model)
    for names in shared.values():
        copies = [name for name in sorted(names) if any(re.search(p, name) for p in patterns)]
        if len(copies) == len(names):
            copies.pop()
        if not isinstance(model, PreTrainedModel):
            copies = names[1:]
        for name in copies if len(names) > 1 else ():
            del entries[name]
    return entries


def _split(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = list(transforms)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    return renamings, [t for t in transforms if isinstance(t, WeightConverter)]


def _collect(groups: dict[str, Group], first: str, key: str, pattern: str | None, by_pattern: dict[str, Any]) -> None:
    group = groups.get(first)
    if group is None:
        transform = by_pattern[pattern] if pattern is not None else None
        groups[first] = Group([key], _patterns=[pattern or key], _transform=transform, _first=first)
    elif group._transform is not None:
        group.sources.append(key)
        group._patterns.append(pattern or key)
    # else: two names in files map to one parameter; like transformers, use the first in its order
