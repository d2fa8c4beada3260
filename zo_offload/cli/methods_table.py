"""`zo-offload methods`: the costs of a step for each method, computed from the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..journal.format import StepRecord, pack_step
from ..kernels.records import Update
from ..methods import METHODS, PRESETS, Method

HEAD = ("method", "forwards", "visits", "noises", "in lanes", "remembers", "journal", "what it is")


def table() -> Iterator[str]:
    """One line per method, as a GitHub table."""
    made: list[Callable[[], Method]] = [METHODS[name] for name in sorted(METHODS) if METHODS[name].own()]
    rows = [HEAD, *(_row(method()) for method in made)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for index, row in enumerate(rows):
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        if index == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def presets() -> Iterator[str]:
    """One line per recipe."""
    for name, recipes in sorted(PRESETS.items()):
        for recipe, fields in recipes.items():
            told = (
                f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items()
            )
            yield f"{name} --preset {recipe}: {', '.join(told)}"


def _row(method: Method) -> tuple[str, ...]:
    forwards = method.forwards
    comes_back = forwards > len(method.perturbations(0, 0))
    scalars = method.scalars(torch.zeros(forwards, dtype=torch.float64, device="cpu"))
    updates = tuple(Update(i + 1, 0.5, 1.0, i == method.noises - 1) for i in range(method.noises))
    record = StepRecord(0, updates, 0.0, 0.0, 0.0, scalars=tuple(scalars.tolist()))
    told = (type(method).__doc__ or "").partition("\n")[0].partition(": ")[0].rstrip(".")
    return (
        method.name, str(forwards), "2" if comes_back else "1", str(method.noises), str(method.lane_noises),
        f"{len(method.first_memory())} numbers" if method.first_memory() else "-",
        f"{len(pack_step(record)[0])} B", told,
    )  # fmt: skip
