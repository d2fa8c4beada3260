"""Writes a PEFT model's adapter in peft's own form: adapter_config.json and adapter_model.safetensors.

peft chooses the tensors of an adapter, and renames them. It is called first with tensors on meta, so that only the
chosen ones are read, and then again with their values. The base is not read, so an adapter of megabytes needs only
megabytes of memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..modules.away import shapes_only
from .weights import Weights

Run = Callable[[Callable[[], Any]], Any]
"""Calls a function while the model's modules have their current weights, and returns its result."""

IN_FULL = "safetensors-f32"
"""safetensors with values of formats of few bits, or of split ones, in float32, which holds them exactly."""
USUAL = ("safetensors", IN_FULL, "peft", "merged")
"""Names of what is written without a scheme; see `usual`."""


def usual(model: nn.Module, scheme: str | None, merge: bool) -> tuple[str | None, bool]:
    """(scheme, merge) without the names of the usual layouts: "safetensors", as without a scheme; "peft", the adapter
    alone; "merged", the whole model with its adapter merged. ConfigError if the model has no adapter for that."""
    if scheme in ("peft", "merged"):
        if not is_peft(model):
            raise ConfigError(f"an export as {scheme!r} is of a model with an adapter: this one has none, leave it out")
        if scheme == "peft" and merge:
            raise ConfigError("an export as 'peft' is the adapter alone: leave out merge=True (--merge), or the scheme")
        return None, scheme == "merged"
    return (None if scheme == "safetensors" else scheme), merge


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is a PeftModel; peft is not imported for it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapter_names(model: Any) -> set[str]:
    """Canonical names of the parameters that peft would save of the model's adapters."""
    found = {name for name, _ in model.named_parameters() if set(name.split(".")) & set(model.peft_config)}
    metas = _metas(model)
    name_of = {id(tensor): name for name, tensor in metas.items()}
    canonical = _canonical(model)
    for adapter in model.peft_config:
        if not model.peft_config[adapter].is_prompt_learning:
            taken = chosen(model, metas, adapter)
            found.update(canonical[name_of[id(t)]] for t in taken.values() if name_of.get(id(t)) in canonical)
    return found


def beside_adapter(model: nn.Module, trained: set[str]) -> str:
    """The reason against exporting only the adapter of a PEFT model; "" unless more than the adapter is trained."""
    lost = sorted(trained - adapter_names(model)) if is_peft(model) else []
    if not lost:
        return ""
    return (
        f"{len(lost)} trained parameters of this PeftModel are its base's, not its adapter's ({lost[0]}, ...), and an "
        "exported adapter would not hold what they learn. Give trainable='requires_grad', or take the whole model out "
        "with restore() or save_pretrained(merge=True)"
    )


_MERGED, _DISABLED, _OTHER = "merged into the base's weights", "disabled", "not the active one"
_REMEDIES = {
    _MERGED: "Call model.unmerge_adapter() first",
    _DISABLED: "Call model.base_model.enable_adapter_layers() first, or leave `with model.disable_adapter()`",
    _OTHER: "Call model.set_adapter({!r}) first, or choose with trainable= what is active",
}  # fmt: skip


def beside_forward(model: nn.Module, trained: Collection[str], chosen: object, *, switches: bool) -> str:
    """Why steps would teach an adapter nothing: "" unless what trains of it is merged, disabled or not the active one,
    or none of a PeftModel requires a gradient and all of its base would train. chosen: `trainable`, as it was given.
    switches: the objective is a caller's own, which may enable and choose adapters itself.
    """
    if sys.modules.get("peft") is None:
        return ""
    peft_model = is_peft(model)
    if peft_model and chosen is None and not any(p.requires_grad for p in model.parameters()):
        return (
            "no parameter of this PeftModel requires a gradient: its adapter was opened for inference, or disabled, "
            "and the whole base would be trained in its place. Open it with is_trainable=True (inference_mode=False for"
            " a new one), or enable it with model.base_model.enable_adapter_layers(); trainable='*' trains all of it"
        )
    tuners = {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}
    states = {name: _state(tuners, name) for name in trained}
    if peft_model:
        states.update({name: _prompt_state(model, name) for name in trained if name.startswith("prompt_encoder.")})
    away = [(*state, name) for name, state in states.items() if state is not None]
    if switches:
        away = [one for one in away if one[1] == _MERGED]
    for adapter, state, name in away[:1]:
        return (
            f"adapter {adapter!r} is {state}: {len(away)} of {len(trained)} parameters that train ({name}, ...) are "
            f"not in the forward, and nothing would be learned in them. {_REMEDIES[state].format(adapter)}"
        )
    return ""


def _state(tuners: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """(adapter, why it is not in the forward) of a parameter that lies in one of peft's layers."""
    parts = name.split(".")
    for i in range(len(parts)):
        layer = tuners.get(".".join(parts[:i]))
        for within in () if layer is None else layer.adapter_layer_names:
            at = i + within.count(".") + 1
            if parts[i:at] != within.split(".") or at >= len(parts):
                continue
            if getattr(layer, "disable_adapters", False):
                return parts[at], _DISABLED
            if getattr(layer, "merged", False):
                return parts[at], _MERGED
            if parts[at] not in getattr(layer, "active_adapters", [parts[at]]):
                return parts[at], _OTHER
    return None


def _prompt_state(model: Any, name: str) -> tuple[str, str] | None:
    adapter = name.split(".")[1]
    if getattr(model, "_adapters_disabled", False):
        return adapter, _DISABLED
    return None if adapter == model.active_adapter else (adapter, _OTHER)


def save_adapter(
    work: Path, model: Any, weights: Weights | None, metadata: Mapping[str, str], run: Run | None = None
) -> None:
    """Writes all adapters of the model into `work`, the default one at its root.

    weights: current values by canonical name; None: the model's own. run: for adapters (prompts) whose files hold a
    module's output and not its weights. Raises CheckpointError if peft cannot save it.
    """
    names = adapter_names(model)
    values: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for name in names:
        values[name] = parameters[name].detach() if weights is None else _read(weights, name)
    canonical = _canonical(model)
    with shapes_only():
        entries = model.state_dict(keep_vars=True).items()
    state = {name: values[canonical[name]] if canonical.get(name) in values else tensor for name, tensor in entries}
    prompts = any(config.is_prompt_learning for config in model.peft_config.values())
    save = partial(type(model).save_pretrained, model, str(work), state_dict=state)
    try:
        with shapes_only():
            save() if run is None or not prompts else run(save)
    except OSError:
        raise
    except Exception as error:  # peft's own methods are many, and some cannot be saved
        raise CheckpointError(f"peft cannot save this adapter: {type(error).__name__}: {error}") from error
    for file in work.rglob("adapter_model.safetensors"):
        tensors = load_file(file)
        small = sorted(str(p.relative_to(file.parent)) for p in file.parent.iterdir() if p.is_file() and p != file)
        save_file(tensors, file, metadata={**metadata, "files": json.dumps(small)})


def _read(weights: Weights, name: str) -> Tensor:
    out = torch.empty(weights.shape_of(name), dtype=weights.dtype_of(name), device="cpu")
    weights.read_into(name, 0, out.view(-1))
    return out


def _metas(model: nn.Module) -> dict[str, Tensor]:
    with shapes_only():
        entries = model.state_dict(keep_vars=True).items()
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in entries if isinstance(t, Tensor)}


def _canonical(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first one."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def chosen(model: Any, state: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The tensors of a state dict that peft saves for one adapter, by their names in its files. CheckpointError."""
    from peft import get_peft_model_state_dict

    try:
        with shapes_only():  # it asks for the whole model's too, for the names in it
            chosen: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
    except Exception as error:
        raise CheckpointError(f"peft cannot save adapter {adapter!r}: {type(error).__name__}: {error}") from error
    return chosen
