"""A decided step's record as JSON, exact to the bit: a pool's keeper sends it, and members apply it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..journal.format import StepRecord
from ..kernels.records import Update


def told(record: StepRecord) -> dict[str, Any]:
    return {
        "step": record.step, "updates": [[u.seed, u.coeff.hex(), u.decay.hex(), u.fold] for u in record.updates],
        "numbers": [float(x).hex() for x in (record.loss, record.grad, record.lr, *record.scalars)],
        "skipped": record.skipped, "halved": record.halved, "batch_crc": record.batch_crc,
    }  # fmt: skip


def heard(values: Mapping[str, Any]) -> StepRecord:
    updates = tuple(
        Update(seed, float.fromhex(coeff), float.fromhex(decay), fold, begins=not i)
        for i, (seed, coeff, decay, fold) in enumerate(values["updates"])
    )
    loss, grad, lr, *scalars = map(float.fromhex, values["numbers"])
    return StepRecord(
        values["step"], updates, loss, grad, lr, values["skipped"], values["batch_crc"], values["halved"],
        tuple(scalars),
    )  # fmt: skip
