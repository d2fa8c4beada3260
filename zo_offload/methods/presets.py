"""Published recipes, by method: rates with their eps, and with the kind of parameters that they train."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import ConfigError
from ..plan.plan import Plan

SCALE_UNITS = 2.71
"""Root mean square of GPTQ's symmetric 4-bit codes of normal weights in groups of 128, which QZO's paper trains: its
eps is SCALE_UNITS times as much in units of weights, its lr SCALE_UNITS squared times, its clip one SCALE_UNITS-th."""

_MEZO = dict(schedule="constant", batch_size=16, steps=20_000)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Malladi et al. 2023, appendix on hyper-parameters; batch and steps are theirs too
    "mezo": {
        "opt": dict(lr=1e-6, eps=1e-3, tunes="all", **_MEZO),
        "opt-squad": dict(lr=5e-7, eps=1e-3, tunes="all", **_MEZO),
        "opt-lora": dict(lr=1e-4, eps=1e-2, tunes="lora", **_MEZO),
        "opt-prefix": dict(lr=1e-2, eps=1e-1, tunes="prefix", **_MEZO),
        "roberta": dict(lr=1e-6, eps=1e-3, tunes="all", schedule="constant", batch_size=64, steps=100_000),
    },
    # from the paper's code (github.com/DKmiyan/FZOO): the command of its README, and the defaults of its fzoo.sh
    "fzoo": {
        "opt": dict(lr=5e-5, eps=1e-4, directions=8, tunes="all", schedule="constant", batch_size=16),
        "opt-script": dict(lr=1e-5, eps=1e-3, directions=8, tunes="all", schedule="constant", batch_size=16),
        # measured here, `benchmarks.learning`: an adapter in a basis of the inputs; a constant rate stalls
        "basis": dict(lr=6e-2, eps=1e-3, directions=32, tunes="lora", schedule="linear", batch_size=16, steps=60),
    },
    # Shang et al. 2025: lr 1e-5, eps 1e-3 and clip 100 in units of scales
    "qzo": {
        "llama": dict(lr=1e-5 * SCALE_UNITS**2, eps=1e-3 * SCALE_UNITS, clip=100 / SCALE_UNITS, tunes="all", **_MEZO),
    },
}

WHOLE, SMALL = 4, 16
"""More than 1/4 of a model is not an adapter; less than 1/16 is not the whole model."""


def recipe(method: str, name: str) -> dict[str, Any]:
    """The fields of a method's recipe. Raises ConfigError if it has none of that name."""
    known = PRESETS.get(method, {})
    if name not in known:
        others = [other for other in PRESETS if name in PRESETS[other] and other != method]
        there = f"there are {', '.join(sorted(known))}" if known else "it has none"
        hint = f"; it is one of {', '.join(others)}, whose rates are no use here" if others else ""
        raise ConfigError(f"preset {name!r} is not known to {method}: {there}{hint}")
    return known[name]


def check_tunes(tunes: str | None, lr: float, eps: float, plan: Plan) -> None:
    """Raise ConfigError if a preset's rates are those of adapters and a whole model trains; warn of the opposite."""
    if tunes is None:
        return
    share = f"{plan.trainable_numel:,} of {plan.numel:,} parameters train ({plan.trainable_numel / plan.numel:.0%})"
    if tunes != "all" and plan.trainable_numel * WHOLE > plan.numel:
        raise ConfigError(
            f"the preset's lr={lr:g} and eps={eps:g} are rates for {_OF[tunes]}, but {share}. "
            "Train an adapter: adapter='r=8' (--lora 8) on a checkpoint, or a PEFT model and "
            "trainable='requires_grad'. Or take a preset for whole models"
        )
    if tunes == "all" and plan.trainable_numel * SMALL < plan.numel:
        warnings.warn(
            f"the preset's lr={lr:g} and eps={eps:g} are rates for whole models, but {share}: a part of "
            "a model may need a hundred times as much (MeZO.preset('opt-lora') is for adapters)",
            stacklevel=3,
        )


_OF = {"lora": "LoRA adapters", "prefix": "prefix tuning"}
