"""What a run is: everything that must be equal for its journal to mean the same weights, with digests that name it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from . import __version__, runs
from .config import EngineConfig
from .encode import ENCODING
from .errors import JournalError
from .fused import Gains
from .gains import record_of
from .layout import Layout
from .methods import MeZO, known_record
from .noise import NoiseSpec
from .plan import Plan
from .storage import is_lossless
from .weights import Base

MAY_CHANGE = (
    "Steps, evaluation, devices, window, threads and offload tier may change; the base weights, storage, folding, "
    "compute, mode, rounding, block_numel, trainable parameters, seed, noise, method and data may not"
)
SAMPLE = 16


def identity(
    plan: Plan,
    layout: Layout,
    config: EngineConfig,
    method: MeZO,
    fold_every: int,
    base_digest: str,
    data: dict[str, Any] | None,
    modes: str,
) -> dict[str, Any]:
    """What must be equal for a journal to mean the same weights; checked on resume, key by key.

    modes: which modules train while the engine runs them (`modes.modes_of`).
    data: what the engine knows of its data set when the run begins (`Batches.identity`), None if nothing.
    """
    trained = "\n".join(sorted(name for name, spec in plan.params.items() if spec.trainable))
    shapes = "\n".join(
        f"{n} {s.param_id} {list(s.shape)} {s.dtype}{_cuts(plan, n)}" for n, s in sorted(plan.params.items())
    )
    formats = "\n".join(f"{name} {fmt.name}" for name, fmt in sorted(layout.formats.items()))
    return {
        "format": 2,
        "base": base_digest,
        "plan": _digest(shapes),
        "trainable": _digest(trained),
        "storage": _digest(formats),
        "fold_every": "any" if is_lossless(plan, layout) else fold_every,
        "rounding": config.rounding,
        "mode": modes,
        "seed": config.seed,
        "noise": {"distribution": method.distribution, "rounds": method.rounds, "layout": NoiseSpec.layout_version},
        "method": {
            k: v for k, v in asdict(method).items() if k not in ("steps", "batch_size", "on_nonfinite", "tunes")
        },
        "data": data,
    }


def header_of(
    wanted: dict[str, Any],
    base: Base,
    plan: Plan,
    layout: Layout,
    config: EngineConfig,
    model: str | None,
    model_class: str | None,
    gains: Gains,
) -> dict[str, Any]:
    """The journal's header: the identity, and what `replay` needs to make the same engine from the base alone."""
    settings = runs.settings_of(config)
    if settings["trainable"] == runs.PREDICATE:
        settings["trainable"] = sorted(name for name, spec in plan.params.items() if spec.trainable)
    return {
        **wanted,
        "sample": {name: base.digest_of(name) for name in _sampled(plan)},
        "layout": layout.digest(),
        "gains": record_of(gains),
        "settings": settings,
        "model": model,
        "model_class": model_class,
        "encoding": ENCODING,
        "versions": {
            "zo_offload": __version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def check_sample(base: Base, header: dict[str, Any]) -> None:
    """Raise JournalError if the base is visibly not the journal's: a few of its tensors, against their digests.

    The whole base is compared when it is read (`digest`); a run whose blocks are all on the disk does not read it.
    """
    sample = header.get("sample")
    for name, wanted in sorted(sample.items()) if isinstance(sample, dict) else []:
        found = base.digest_of(name)
        if found != wanted:
            raise JournalError(
                f"this run cannot be continued as asked; the base weights are not the run's: {name!r} has digest "
                f"{found}, the journal has {wanted}. " + MAY_CHANGE
            )


def _sampled(plan: Plan) -> list[str]:
    """Names of SAMPLE parameters, evenly spaced among the smaller three quarters: quick to read, hard to share."""
    names = sorted(plan.params, key=lambda name: (plan.params[name].numel, name))
    names = names[: max(1, 3 * len(names) // 4)]
    return sorted({names[i * len(names) // SAMPLE] for i in range(SAMPLE)})


def _cuts(plan: Plan, name: str) -> str:
    """Where a parameter is cut: pieces may be multiplied one by one, and a product's last bits depend on its size."""
    pieces = plan.pieces_of(name)
    return f" cut {[piece.start for piece in pieces]}" if len(pieces) > 1 else ""


def _modes_without(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`modes` of a run of a version that had none: a checkpoint's modules evaluated, others were as they were given."""
    if found.get("model") is not None:
        return "eval"
    modes = str(wanted.get("mode"))
    return modes if modes.startswith("as_is") else "as_is"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_identity(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise JournalError naming every part of a run's identity that differs from the journal's."""
    found = {"mode": _modes_without(found, wanted), **found}
    if isinstance(found.get("method"), dict):
        found = {**found, "method": known_record(found["method"])}
    differ = [
        f"{key}: the journal has {found.get(key)!r}, this engine {wanted[key]!r}"
        for key in sorted(wanted)
        if found.get(key) != wanted[key]
    ]
    if differ:
        raise JournalError("this run cannot be continued as asked; " + "; ".join(differ) + ". " + MAY_CHANGE)
