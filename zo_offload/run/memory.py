"""The memory plan: every term predicted before anything is allocated, and the largest window a budget allows.

    window       slots x the largest streamed block, in storage bytes
    pinned       blocks that stay in the window for the whole run (what the budget can spare)
    scratch      weights of the modules that lanes are inside, in compute bytes: trained weights one copy per lane, the
                 others one copy for all lanes that are served together
    activations  held by the running lane's forward, and by the other lanes while they wait (`activations.py`)
    tail         a tail's numbers, and what one lane keeps for its gradient (`tail.py`)
    store        the model itself, if the tier is memory (offload "none" or "host")
    process      in use before: interpreter, torch, libraries, the caller's own data

The budget `device_memory` covers the first five (and the store for "none", because the tier is then the device).

Some forwards cannot be measured without weights (they branch on values, or leave torch). Then the plan says so, and
under a budget takes the smallest window and reserves the rest for activations. The first pass measures them; if it
holds more than the reserve, it ends with a BudgetError before its step is taken (`check_reserve`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import BudgetError
from ..plan.activations import NOT_MEASURED, Activations, ServiceOrder
from ..plan.layout import Layout
from ..plan.plan import Owner, Plan
from ..stream.scratch import padded
from ..stream.slots import WindowSize
from ..system.units import show_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """A window, a service order, and each term of memory in bytes."""

    window: WindowSize
    order: ServiceOrder
    terms: Mapping[str, int]
    budget: int | None
    unknown: str = ""
    """Why activations could not be measured. `terms` then counts the reserve, or without a budget the batch."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for readers of the figures."""
        if not self.unknown:
            return ()
        held = (
            "they are not in the figures"
            if self.budget is None
            else f"the {show_bytes(self.terms['activations'])} that device_memory leaves are kept for them"
        )
        return (f"activations could not be measured without weights ({self.unknown}): {held}",)

    def check_reserve(self, seen_bytes: int) -> None:
        """Raise BudgetError if a pass held more activations, batches included, than an unmeasured plan reserves."""
        reserve = self.terms["activations"]
        if not self.unknown or self.budget is None or seen_bytes <= reserve:
            return
        least = self.device_bytes - reserve + seen_bytes
        raise BudgetError(
            f"device_memory={show_bytes(self.budget)} is too small: the activations of this batch take "
            f"{show_bytes(seen_bytes)}, and the smallest window leaves {show_bytes(reserve)}. They could "
            f"only be measured in the first pass ({self.unknown}), whose results are not used. Use shorter or smaller "
            f"batches, micro_batches, or device_memory of at least {show_bytes(least)}"
        )

    @property
    def device_bytes(self) -> int:
        """The bytes that `device_memory` limits."""
        return sum(self.terms[name] for name in ("window", "pinned", "scratch", "activations", "tail"))

    @property
    def total_bytes(self) -> int:
        return sum(self.terms.values())

    def with_reserve(self) -> MemoryPlan:
        """The same plan with the rest of the budget reserved for activations."""
        assert self.budget is not None
        kept = self.terms["activations"] + self.budget - self.device_bytes
        return replace(self, terms={**self.terms, "activations": kept})

    def rows(self) -> list[tuple[str, int]]:
        return [(name, nbytes) for name, nbytes in self.terms.items() if nbytes]


def scratch_bytes(plan: Plan, order: ServiceOrder, perturbations: int, rows: int, micro_batches: int = 1) -> int:
    """Largest scratch in use at once: a module and the owners around it that are still active.

    rows: the most rows of an embedding that one batch looks up.
    """
    inner, outer = dict[str, int](), dict[str, int]()
    for owner in plan.owners:
        if order == "module" or (order == "block" and _spans(plan, owner)):  # all lanes together
            inner[owner.name] = outer[owner.name] = _owner_bytes(plan, owner, rows, perturbations, 1)
            continue
        inner[owner.name] = _owner_bytes(plan, owner, rows, 1, 1)
        # in block order each lane reaches it alone, and may wait inside it for the others
        lanes = 1 if order == "lane" else perturbations * micro_batches
        outer[owner.name] = _owner_bytes(plan, owner, rows, lanes, lanes)
    worst = 0
    for name, held in inner.items():
        around = sum(nbytes for other, nbytes in outer.items() if other != name and _contains(other, name))
        worst = max(worst, held + around)
    return worst


def _contains(outer: str, inner: str) -> bool:
    return outer == "" or inner.startswith(outer + ".")


def _spans(plan: Plan, owner: Owner) -> bool:
    """Whether a portion of `owner` lies in several blocks; it is then served to all lanes at once in any order."""
    return any(len(plan.streamed_blocks(portion)) > 1 for portion in plan.portions(owner))


def _owner_bytes(plan: Plan, owner: Owner, rows: int, trained: int, frozen: int) -> int:
    """Scratch of an owner's largest portion, with `trained` copies of trained parameters and `frozen` of the others."""
    if owner.rows:
        (spec,) = (plan.params[name] for name in owner.params)
        shapes: list[dict[str, tuple[int, ...]]] = [{spec.name: (min(rows, spec.shape[0]), spec.row_numel)}]
    else:
        shapes = [plan.shapes(portion) for portion in plan.portions(owner)]
    copies = {name: trained if plan.params[name].trainable else frozen for name in owner.params}
    return max(
        sum(
            copies[name] * padded(math.prod(shape) * plan.params[name].dtype.itemsize)
            for name, shape in portion.items()
        )
        for portion in shapes
    )


def pinned_blocks(plan: Plan, count: int) -> frozenset[int]:
    """`count` blocks to pin: first those visited more than once a pass, then evenly spread."""
    visits = Counter(plan.visits)
    often = frozenset(sorted((b for b in visits if visits[b] > 1), key=lambda b: -visits[b])[:count])
    rest = [block.index for block in plan.blocks if block.index not in often]
    left = count - len(often)
    return often | {rest[i * len(rest) // left] for i in range(left)}


def plan_memory(
    plan: Plan,
    layout: Layout,
    *,
    offload: str,
    perturbations: int,
    micro_batches: int = 1,
    rows: int = 1 << 60,
    activations: Activations = NOT_MEASURED,
    budget: int | None = None,
    num_slots: int | None = None,
    ahead: int | None = None,
    order: str = "auto",
    io_threads: int = 1,
    process: int = 0,
    tail: int = 0,
) -> MemoryPlan:
    """The window and order to run with. Without a budget: the smallest window that overlaps, module order.

    With a budget: the most pinned blocks that fit, module order if it fits with 3 slots, else block order, else 2
    slots. If activations are unknown: as few pinned blocks as possible, and the rest of the budget reserved for
    activations. If nothing fits, raises BudgetError with the terms and the least budget that works.
    """
    orders: list[ServiceOrder] = ["module", "block"] if order == "auto" else [order]  # type: ignore[list-item]
    fewest = 1 if io_threads == 0 else 2
    slot_choices = [num_slots] if num_slots is not None else [3, 2, 1][: 4 - fewest]
    smallest: MemoryPlan | None = None
    for which in orders:
        held = held_together(activations, which, perturbations, micro_batches)
        fixed = {
            "scratch": scratch_bytes(plan, which, perturbations, rows, micro_batches),
            "activations": held,
            "tail": tail,
            "process": process,
        }
        for slots in slot_choices:
            ask = _Ask(plan, layout, offload, which, slots, ahead, io_threads, fixed, budget, activations.unknown)
            least = ask.with_pinned(frozenset(range(len(plan.blocks))) if offload == "none" else frozenset())
            if budget is None:
                return least
            if least.device_bytes <= budget:
                if activations.unknown:
                    return least.with_reserve()
                return least if offload == "none" else ask.with_most_pinned(budget)
            if smallest is None or least.device_bytes < smallest.device_bytes:
                smallest = least
    assert smallest is not None and budget is not None
    raise _too_small(plan, layout, smallest, budget, offload)


def held_together(activations: Activations, order: ServiceOrder, perturbations: int, micro_batches: int) -> int:
    """Bytes that all lanes of a step hold at once, for all parts of the batch."""
    return activations.together(order, perturbations * micro_batches) + activations.inputs * (micro_batches - 1)


def step_bytes(plan: Plan, layout: Layout, pinned: frozenset[int], fold_every: int) -> tuple[float, float]:
    """Bytes fetched and flushed per step, on average over fold_every steps, by the blocks that stream.

    A visit fetches the streamed part. The one step in fold_every that folds also fetches residual parts, and flushes
    both. A block that ends one pass and begins the next is not fetched again.
    """
    streamed = [block for block in plan.visits if block not in pinned]
    if len(streamed) > 1 and streamed[0] == streamed[-1]:
        del streamed[0]
    fetched = sum(layout.stream_bytes[block] for block in streamed)
    residual = sum(layout.block_bytes[b] - layout.stream_bytes[b] for b in streamed if b in layout.written)
    flushed = sum(nbytes for block in set(streamed) for _, nbytes in layout.spans[block])
    return fetched + residual / fold_every, flushed / fold_every


@dataclass(frozen=True)
class _Ask:
    """One service order and number of slots, with their memory cost besides the blocks."""

    plan: Plan
    layout: Layout
    offload: str
    order: ServiceOrder
    slots: int
    ahead: int | None
    io_threads: int
    fixed: Mapping[str, int]
    budget: int | None
    unknown: str

    def with_pinned(self, pinned: frozenset[int]) -> MemoryPlan:
        """The plan that pins the blocks `pinned` and streams the others."""
        sizes, pinned = self.layout.block_bytes, pinned | self.plan.resident
        streamed = [sizes[b] for b in range(len(sizes)) if b not in pinned]
        used = min(self.slots, len(streamed))
        most_ahead = max(0, used - 1)
        ahead = most_ahead if self.ahead is None else min(self.ahead, most_ahead)
        terms = {
            "window": used * max(streamed, default=0),
            "pinned": sum(sizes[b] for b in pinned),
            "scratch": self.fixed["scratch"],
            "activations": self.fixed["activations"],
            "tail": self.fixed["tail"],
            "store": self.layout.total_bytes if self.offload == "host" else 0,
            "process": self.fixed["process"],
        }
        window = WindowSize(max(used, 1), ahead, pinned, self.io_threads)
        return MemoryPlan(window, self.order, terms, self.budget, self.unknown)

    def with_most_pinned(self, budget: int) -> MemoryPlan:
        """The plan with the most pinned blocks that the budget allows; the empty set is known to fit."""

        def pinning(count: int) -> MemoryPlan:
            return self.with_pinned(pinned_blocks(self.plan, count))

        fits, too_many = 0, len(self.plan.blocks) + 1
        if pinning(too_many - 1).device_bytes <= budget:  # no window: less than with a few streamed blocks
            return pinning(too_many - 1)
        while too_many - fits > 1:  # bisect: there may be thousands of blocks
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if pinning(middle).device_bytes <= budget else (fits, middle)
        # blocks differ in size, and the choice of blocks depends on their number: a few more may still fit
        further = (pinning(count) for count in range(min(fits + 16, len(self.plan.blocks)), fits, -1))
        return next((plan for plan in further if plan.device_bytes <= budget), pinning(fits))


def _too_small(plan: Plan, layout: Layout, least: MemoryPlan, budget: int, offload: str) -> BudgetError:
    largest = max(plan.blocks, key=lambda block: layout.block_bytes[block.index])
    bounded = [(name, nbytes) for name, nbytes in least.rows() if name not in ("process", "store")]
    terms = ", ".join(f"{name} {show_bytes(nbytes)}" for name, nbytes in bounded)
    hint = (
        "Use offload='disk' or 'host'"
        if offload == "none"
        else "Use a smaller storage format, shorter or smaller batches, or micro_batches"
    )
    return BudgetError(
        f"device_memory={show_bytes(budget)} is too small: the least that works with offload={offload!r} is "
        f"{show_bytes(least.device_bytes)} ({terms}; largest block {largest.name!r} "
        f"{show_bytes(layout.block_bytes[largest.index])}). {hint}, or device_memory of at least that"
    )
