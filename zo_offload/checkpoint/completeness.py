"""Checks that the files of a checkpoint hold the whole model, and nothing that the model would ignore.

Names are compared relative to the body (the model without its head: `base_model_prefix`), and with *siblings*: the
class that config.json names, and transformers' classes of the bare and of the pretrained model for the same config. So
the rules need no model's name:

    a tensor that the files lack
        new    a task's head on the body of another class: the class that config.json names has no such tensor, and the
               model is not a language model (its head is pretrained; one made up at random is never meant)
        lost   any other
    a tensor that the model has no place for
        unused  a sibling has it (a pooler, a language model's head), or it is of a whole module beside the body
        alien   any other: of a layer that config.json does not count, of a fork with other names, an adapter's, a bias

Tensors that transformers itself knows to be harmless (`_keys_to_ignore_on_load_*`) are neither, nor are constants in
files of older versions (causal masks, position ids). Lost and alien tensors are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..hf import PreTrainedModel
from ..quantized.table import supported

Siblings = Callable[[], tuple[PreTrainedModel | None, list[PreTrainedModel]]]
"""On meta: the model of the class that config.json names, if there is one, and those of other classes of its config."""

_SHOWN = 4
_CONSTANTS = re.compile(r"(^|\.)(masked_bias|position_ids|inv_freq)$")
"""Buffers of older versions, which the model computes now."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # of such too, if it is [1, 1, n, n] and so no bias of a layer's
_COUNTERS = re.compile(r"num_batches_tracked$")  # of BatchNorm: counts, and weighs nothing

QUANTIZED: tuple[tuple[str, str], ...] = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map)$", "bitsandbytes"),
    (r"\.quant_state\.\w+$", "bitsandbytes"),
    (r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map)$", "bitsandbytes"),
    (r"\.(weight_packed|weight_zero_point|weight_global_scale|input_global_scale)$", "compressed-tensors"),
    (r"\.(weight_scale|weight_scale_inv|weight_scale_2|input_scale|k_scale|v_scale)$", "scaled fp8, fp4 or int8"),
    (r"_(blocks|scales)$", "MXFP4"),
    (r"\.(scales|zeros|qscales|codebooks|codes|B_24|W_q)$", "a quantizer"),
)
"""Name endings that only quantized weights have, with their quantization. Only tensors without a place are checked."""

_SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json")


@dataclass(frozen=True)
class Differences:
    """The differences between files and model."""

    lost: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    alien: tuple[str, ...] = ()


def differences(
    model: PreTrainedModel,
    missing: Iterable[str],
    unexpected: Iterable[str],
    siblings: Siblings,
    in_files: Mapping[str, Tensor],
) -> Differences:
    """Classify the names that the files lack and those that the model has no place for; may call `siblings`.

    in_files: the files' tensors, on meta.
    """
    missing = sorted(name for name in missing if not _COUNTERS.search(name))
    unexpected = sorted(name for name in unexpected if not _is_constant(name, in_files.get(name)))
    if not missing and not unexpected:
        return Differences()
    declared, others = siblings()
    declared_names = None if declared is None else _names(declared)
    known = set().union(*(_names(other) for other in others), declared_names or ())
    new = [name for name in missing if _is_new(model, name, declared_names)]
    unused = [name for name in unexpected if _relative(model, name) in known or _is_beside(model, name)]
    return Differences(
        tuple(name for name in missing if name not in new),
        tuple(new),
        tuple(unused),
        tuple(name for name in unexpected if name not in unused),
    )


def check(
    found: Differences, model: PreTrainedModel, path: Path | None, shapes: Mapping[str, Tensor], total: int
) -> None:
    """Raise CheckpointError if a tensor is lost or alien. shapes: for names in files and model; total: in files."""
    if not found.lost and not found.alien:
        return
    parts = []
    if found.lost:
        parts.append(f"they lack {len(found.lost)} of its tensors: {_some(found.lost, shapes)}")
    if found.alien:
        parts.append(f"{len(found.alien)} of their {total} tensors have no place in it: {_some(found.alien, shapes)}")
    raise CheckpointError(
        f"{path}: its files do not hold the {type(model).__name__} that config.json describes: {'; '.join(parts)}. "
        f"{_advice(found, model)}"
    )


def check_quantized(names: Iterable[str], path: Path | None, method: str) -> None:
    """Raise CheckpointError if one of these names, which the model does not take, is of quantized weights. method: the
    scheme in the settings, "" if there is none."""
    for name in sorted(names):
        kind = next((kind for pattern, kind in QUANTIZED if re.search(pattern, name)), None)
        if kind is not None:
            beside = [file for file in _SETTINGS if path is not None and (path / file).exists()]
            also = f", beside {beside[0]}" if beside else ""
            also += f"; quantization_config says {method!r}" if method else ""
            raise CheckpointError(
                f"{path}: its weights are quantized ({kind}: {name!r}{also}) in a way that is not supported, or "
                "tensors beside them are missing, or the settings are of another scheme. Supported: "
                f"{supported()}. Complete the files, or dequantize them in the library that made them, "
                "save_pretrained the result, and use that directory."
            )


def notes(found: Differences) -> tuple[str, ...]:
    """Notes for the user about allowed differences."""
    told = []
    if found.new:
        told.append(f"a new head: the checkpoint has no {_listed(found.new)}; made from the run's seed, to be trained")
    if found.unused:
        told.append(f"of the checkpoint's tensors {len(found.unused)} are not used: {_listed(found.unused)}")
    return tuple(told)


def _is_constant(name: str, tensor: Tensor | None) -> bool:
    if _MASK.search(name) and tensor is not None:
        return tensor.dim() == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return _CONSTANTS.search(name) is not None


def _names(model: PreTrainedModel) -> set[str]:
    return {_relative(model, name) for name in model.state_dict()}


def _relative(model: PreTrainedModel, name: str) -> str:
    """A name relative to the body; a head's name unchanged."""
    prefix = model.base_model_prefix
    return name.removeprefix(f"{prefix}.") if prefix else name


def _is_in_body(model: PreTrainedModel, name: str) -> bool:
    prefix = model.base_model_prefix
    body = getattr(model, prefix, model) if prefix else model
    if body is not model and name.startswith(f"{prefix}."):
        return True
    first = _relative(model, name).partition(".")[0]
    return first in {*body._modules, *body._parameters, *body._buffers}


def _is_beside(model: PreTrainedModel, name: str) -> bool:
    """Whether a name belongs to a module that the model lacks: another head, another tower."""
    first, _, rest = _relative(model, name).partition(".")
    return bool(rest) and not _is_in_body(model, name) and not hasattr(model, first)


def _is_language_model(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]


def _is_new(model: PreTrainedModel, name: str, declared: set[str] | None) -> bool:
    if _is_language_model(model):
        return False
    if declared is None:
        return not _is_in_body(model, name)
    return _relative(model, name) not in declared


def _advice(found: Differences, model: PreTrainedModel) -> str:
    if not found.alien and _is_language_model(model) and not any(_is_in_body(model, name) for name in found.lost):
        return (
            "A language model's head is not made up. Complete the files, or choose the model_class that they were "
            "saved from."
        )
    if found.alien and not found.lost:
        return (
            "Correct config.json (number of layers, biases, ...), merge adapters into their base, or take the tensors "
            "out."
        )
    return (
        "Complete the files, rename their tensors to transformers' names, or give the model_class they were saved of."
    )


def _some(names: tuple[str, ...], shapes: Mapping[str, Tensor]) -> str:
    shown = ", ".join(f"{name}{f' {list(shapes[name].shape)}' if name in shapes else ''}" for name in names[:_SHOWN])
    return shown + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _listed(names: tuple[str, ...]) -> str:
    return _some(names, {})
