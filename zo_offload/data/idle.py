"""Options of the data that nothing in it was looked at for: a template for rows that are tokens, a size for batches
that are ready. None of them may be passed over in silence.

An encoder notes which forms its rows had. Which options a form looks at is the table here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import DataError
from ..system.plain import plain_option
from .batches import Batch, Batches
from .encode import Encoder
from .micro_batches import batch_rows
from .tasks import KINDS

_log = logging.getLogger(__name__)

_LOOKS_AT = {
    "prompt": {"template", "verbalizers", "label_column", "prefix", "max_length"},
    "completion": {"template", "target_column", "text_column", "prefix", "max_length"},
    "chat": {"max_length"},
    "class": {"text_column", "label_column", "max_length"},
    "plain": {"text_column", "max_length"},
    "packed": {"text_column", "max_length"},
    "tokens": {"label_column", "max_length"},
    "features": {"label_column"},
    "batch": set[str](),
}  # fmt: skip
_WORDS = {
    "prompt": "prompts", "completion": "prompts with their answers", "chat": "conversations",
    "class": "texts with a label", "plain": "texts without an answer", "packed": "texts that are packed",
    "tokens": "rows that are tokens already", "features": "rows without text", "batch": "batches that are ready",
}  # fmt: skip
_READY = {"tokens", "features", "batch"}
_MEANT = ("template", "verbalizers", "label_column", "text_column", "target_column", "prefix", "max_length")


def check_idle(
    data: Sequence[Batches], given: Mapping[str, Any], batch_size: int | None, first: Batch, *, goes_on: bool
) -> None:
    """Raise DataError for options that mean nothing to the data of a call of `fit`, evaluations included.

    batch_size: as it was given; first: the first batch. goes_on: the run was begun with these options and keeps them,
    so that it can only be told.
    """
    wrong = idle_of(data, given)
    ready = all(batches.encoder.forms == {"batch"} for batches in data)
    if not wrong and ready and not goes_on and batch_size is not None and (rows := batch_rows(first)) != batch_size:
        wrong = (
            f"batch_size={batch_size}: the data has batches that are ready, of {rows} rows. Leave it out, or change "
        )
        wrong += "those"
    if wrong and not goes_on:
        raise DataError(wrong)
    if wrong:
        _log.warning("%s", wrong)


def idle_options(batches: Batches, given: Mapping[str, Any]) -> set[str]:
    """Of the options that were given, those that no row so far was looked at for; none where no row was seen."""
    encoder = batches.encoder
    forms = {"packed"} if encoder.packing else encoder.forms
    if not forms or encoder.version == 1:
        return set()
    defaults = {f.name: f.default for f in fields(Encoder)}
    set_apart = {n for n in given if n in defaults and plain_option(given[n]) != defaults[n]}
    used = set[str]().union(*(_LOOKS_AT[form] for form in forms))
    if forms & _READY and "verbalizers" in set_apart:  # accuracy, and the loss over options, are among them
        used |= {"template", "verbalizers"}
    idle = {name for name in _MEANT if name in set_apart} - used
    if forms == {"batch"}:
        idle |= set_apart & {"task", "pad_to_multiple_of"}
    elif forms <= _READY and given.get("task", "auto") not in KINDS:
        idle.add("task")
    return idle


def idle_of(all_batches: Iterable[Batches], given: Mapping[str, Any]) -> str:
    """What was given and means nothing to any of these data, in words; "" if there is none."""
    several = list(all_batches)
    idle = set.intersection(*(idle_options(batches, given) for batches in several))
    if not idle:
        return ""
    forms = sorted({"packed"} if several[0].encoder.packing else several[0].encoder.forms)
    names = ", ".join(f"{name}={plain_option(given[name])!r:.60}" for name in sorted(idle))
    return (
        f"{names}: nothing in the data is looked at for that: it has {_listed(forms)}. Leave it out, or pass rows that "
        "it is for"
    )


def _listed(forms: Collection[str]) -> str:
    return " and ".join(_WORDS[form] for form in forms)
