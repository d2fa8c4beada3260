"""What `zo-offload plan` tells of a model on this device, without the command line around it."""

from __future__ import annotations

from typing import Any

from zo_offload.cli.plan_details import details, plan_step
from zo_offload.run.auto import rates


def plan_report(model: str, **options: Any) -> list[str]:
    """The lines. options: of `plan_step`."""
    made = plan_step(model, **options)
    return list(details(made, lambda: rates(made.prepared.config.device)))
