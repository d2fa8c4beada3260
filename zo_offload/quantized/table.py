"""All schemes; finds the scheme of a checkpoint.

The tensors decide; the settings (quantization_config, or the library's own file next to config.json) are used only if
the tensors are not enough. A weight is quantized if its side tensors exist. Decoded weights replace the tensors that
they are made of; all other tensors are unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ..errors import CheckpointError
from .awq import AWQ
from .base import Decoded, Scheme, Settings, Wanted
from .bitsandbytes import BitsAndBytes
from .compressed import CompressedTensors
from .files import Files, Spec
from .gptq import GPTQ
from .mxfp4 import MXFP4
from .packed_float import ModelOptimizer
from .scaled import ScaledFP8

SCHEMES: tuple[Scheme, ...] = (
    CompressedTensors(), ScaledFP8(), GPTQ(), AWQ(), MXFP4(), ModelOptimizer(), BitsAndBytes(),
)  # fmt: skip
METHODS = sorted({method for scheme in SCHEMES for method in scheme.methods})

_IGNORED = (".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point", ".k_scale", ".v_scale",
            ".q_scale", ".output_scale")  # fmt: skip
"""Suffixes of scales for quantized activations; activations are not quantized here."""
_TOGETHER = ({"fp8", "modelopt nvfp4"},)
"""Schemes that one library may mix in one checkpoint."""


def method_of(settings: Settings) -> str:
    """The scheme's name in the settings; "" if there is none. CheckpointError: not known."""
    method = settings.get("quant_method") or ""
    name = str(getattr(method, "value", method)).lower()
    if name and name not in METHODS:
        raise CheckpointError(f"its weights are quantized ({name}), which is not supported. Supported: {supported()}.")
    return name


def supported() -> str:
    return ", ".join((*METHODS, "gguf"))


def find(files: Files, settings: Settings, dtype: torch.dtype) -> tuple[list[Decoded], set[str]]:
    """The quantized weights of a checkpoint, and the names of the tensors that are not the model's.

    dtype: of the model. CheckpointError: an unknown scheme, a mixture, or tensors that do not fit together.
    """
    method = method_of(settings)
    candidates = [scheme for scheme in SCHEMES if not method or method in scheme.methods]
    wanted = Wanted(settings, dtype)
    found: dict[str, list[Decoded]] = {}
    for scheme in candidates:
        if scheme.name == "fp8" and "compressed-tensors" in found:
            continue  # its own scheme has decoded its fp8 weights
        decoded = list(scheme.find(files, wanted))
        if decoded:
            found[scheme.name] = decoded
    if len(found) > 1 and not any(set(found) <= names for names in _TOGETHER):
        some = "; ".join(f"{name}: {weights[0].uses[0]!r}" for name, weights in found.items())
        raise CheckpointError(f"its weights are quantized in several schemes, which nobody writes together ({some}).")
    weights = [weight for several in found.values() for weight in several]
    used = Counter(name for weight in weights for name in weight.uses)
    hidden = set(used) | {name for name in files.specs if weights and name.endswith(_IGNORED)}
    _check_names(weights, files.specs, hidden)
    return weights, hidden


def _check_names(weights: list[Decoded], specs: Mapping[str, Spec], hidden: set[str]) -> None:
    seen: set[str] = set()
    for weight in weights:
        if weight.name in seen or (weight.name in specs and weight.name not in hidden):
            raise CheckpointError(
                f"{weight.name!r} is in the files twice: quantized ({weight.uses[0]!r}) and otherwise."
            )
        seen.add(weight.name)
