"""A run's masks: the elements of a parameter that its method perturbs and updates, found once, when the run begins.

A method asks for them (`Method.mask`). A random mask needs nothing else. A mask of the smallest weights has a
threshold, which is found in the base: the magnitude that the given share of the parameter's elements does not exceed,
exact to the last bit. It is found in one pass over chunks (two for weights with more bits than bfloat16) that counts
magnitudes by their upper and lower 16 bits. All masks are in the journal's header: a resumed or replayed run takes them
from there, and a run whose header has no masks has none. For a list of elements the header has its length and digest;
the list itself is in the run directory's `masks.safetensors` (by parameter, int64 indices). If that file is missing,
the method must give the list again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..checkpoint.weights import Base, chunks
from ..errors import ConfigError, JournalError
from ..kernels.records import Mask, Masks, Smallest
from ..methods import Method
from ..plan.plan import Plan
from ..system import diskio

_log = logging.getLogger(__name__)

_BINS = 1 << 16
LISTS = "masks.safetensors"
"""In a run directory."""


def decide_masks(plan: Plan, method: Method, base: Base, run_seed: int) -> dict[str, Mask]:
    """The masks of a new run. Reads the base's trained parameters if the method asks for their smallest weights.

    Raises ConfigError if in more than half of the weights that are asked for, the smallest ones are all 0.
    """
    found, zeros = dict[str, Mask](), list[str]()
    asked = {
        name: mask
        for name, spec in plan.params.items()
        if spec.trainable and (mask := method.mask(run_seed, name, spec.shape)) is not None
    }
    for name, mask in asked.items():
        if isinstance(mask, Mask):
            found[name] = mask
            continue
        limit = smallest_limit(base, name, mask.share)
        if limit:
            found[name] = Mask("magnitude", limit)
        else:
            zeros.append(name)
    _check_zeros(plan, method, asked, zeros)
    if found and all(mask.kind == "listed" and not mask.limit for mask in found.values()):
        raise ConfigError(f"method {method.name!r}: its lists of elements have none of any parameter that trains")
    return found


def smallest_limit(base: Base, name: str, share: float) -> int:
    """The bits of the float32 that `share` of a parameter's elements, rounded up, do not exceed in magnitude."""
    dtype, numel = base.dtype_of(name), base.shape_of(name).numel()
    if not numel:
        return 0
    rank = min(numel, max(1, math.ceil(share * numel)))
    read = partial(_magnitudes, base, name)
    upper, rank = _bin_of(read, lambda bits: bits >> 16, rank)
    if dtype == torch.bfloat16:
        return upper << 16
    lower, _ = _bin_of(read, lambda bits: bits[bits >> 16 == upper] & 0xFFFF, rank)
    return min(upper << 16 | lower, 0x7F7FFFFF)


def _magnitudes(base: Base, name: str, take: Callable[[Tensor], Tensor]) -> Tensor:
    """Number of a parameter's magnitudes in each bin."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device="cpu")
    for _, values in chunks(partial(base.read_into, name), base.dtype_of(name), 0, base.shape_of(name).numel()):
        bits = values.float().view(torch.int32) & 0x7FFFFFFF
        counts += torch.bincount(take(bits), minlength=_BINS)
    return counts


def _bin_of(
    counted: Callable[[Callable[[Tensor], Tensor]], Tensor], take: Callable[[Tensor], Tensor], rank: int
) -> tuple[int, int]:
    """The bin of the element with that rank (from 1 on), and its rank in the bin."""
    below = counted(take).cumsum(0)
    at = int(torch.searchsorted(below, rank))
    return at, rank - (int(below[at - 1]) if at else 0)


def _check_zeros(plan: Plan, method: Method, asked: Mapping[str, Mask | Smallest], zeros: list[str]) -> None:
    """Check parameters that train whole since their smallest weights are 0 and would leave a mask."""
    if not zeros:
        return
    numel = sum(plan.params[name].numel for name in zeros)
    of = sum(plan.params[name].numel for name in asked)
    if 2 * numel > of:
        raise ConfigError(
            f"method {method.name!r} trains the smallest weights, and those of {len(zeros)} parameters ({zeros[0]!r}, "
            f"{numel:,} of {of:,} weights) are all 0: there is no threshold between them, as in an adapter that begins "
            "at 0. Take a method without a mask by magnitude: mezo, random-mask"
        )
    _log.info("%d parameters (%s, ...) begin at 0 and train without a mask", len(zeros), zeros[0])


# ---- in the journal's header -----------------------------------------------------------------------------------------


def record_of(masks: Masks) -> dict[str, list[Any]]:
    """Plain JSON."""
    return {name: [mask.kind, mask.limit, mask.seed] for name, mask in sorted(masks.items())}


def save_lists(run_dir: Path, masks: Masks) -> None:
    """Write the lists among a run's masks; nothing if there are none."""
    if lists := {name: mask.indices for name, mask in masks.items() if mask.kind == "listed"}:
        diskio.replace_file(run_dir / LISTS, save(lists))


def masks_of(
    header: Mapping[str, Any], plan: Plan, where: str, *, method: Method | None = None, run_dir: Path | None = None
) -> dict[str, Mask]:
    """The masks in a journal's header, if any. Raises JournalError if they are malformed.

    Lists are read from run_dir, else asked of the method; JournalError if one is not that of the header. Without a
    method lists are not read: a mask then has only its length and digest.
    """
    record = header.get("masks", {})
    try:
        found = {name: Mask(kind, limit, seed) for name, (kind, limit, seed) in record.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise JournalError(f"{where}: the header's masks are malformed: {str(record)[:100]}") from error
    if odd := [name for name in found if name not in plan.params]:
        raise JournalError(f"{where}: the header has masks that cannot be of this model: {', '.join(odd[:5])}")
    listed = {name: mask for name, mask in found.items() if mask.kind == "listed"}
    if not listed or method is None:
        return found
    file = None if run_dir is None else run_dir / LISTS
    lists = load(diskio.read_file(file)) if file is not None and file.exists() else {}
    for name, mask in listed.items():
        spec, there = plan.params[name], name in lists
        given = Mask.listed(lists[name], spec.numel) if there else method.mask(int(header["seed"]), name, spec.shape)
        if given != mask or not isinstance(given, Mask):
            raise JournalError(
                f"{where}: {file if there else 'what the method reads'} has another list of {name!r}'s elements than "
                f"the run, whose header has {mask.limit} elements with digest {mask.seed:016x}. Restore {LISTS}"
            )
        found[name] = given
    return found
