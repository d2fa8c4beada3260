"""The window's slots, their contents, and traffic counters.

A stay that does not write its block needs no copy if the tier can lend the bytes in place (a file in the page cache,
`tiers/lending.py`). Lent bytes are given back before the slot is fetched into again, so at most as many blocks are lent
as there are slots. Bytes that will be folded into are always a copy. (The slot keeps its own memory meanwhile: freeing
it and getting it again, zeroed by the system, costs more than the saved copies.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..devices import Event
from ..numerics.calls import Mark
from ..plan.blocks import Piece
from ..plan.layout import Layout
from ..plan.plan import Plan
from ..system.spans import Times
from ..tiers import UNKNOWN, Lent, Tier


@dataclass(frozen=True)
class WindowSize:
    """The window's size. num_slots: slots that blocks stream through; ahead: stays fetched before they are needed;
    pinned: blocks that stay in memory; io_threads: workers for fetches (0: every op runs in order on the caller)."""

    num_slots: int
    ahead: int
    pinned: frozenset[int]
    io_threads: int = 1


@dataclass
class Slot:
    """A place for one block, with the state of its bytes. `version` is per piece during a visit."""

    memory: Tensor
    """The block's bytes: `own`, or bytes that the tier has lent."""
    block: int = -1
    lent: Lent | None = None
    ready: Event | None = None
    used: Event | None = None  # all that was computed with these bytes; None before the first visit
    version: dict[Piece, int] = field(default_factory=dict)
    stored: int = 0
    """The version that was fetched."""
    writing: tuple[dict[Piece, int], int, Mark] | None = None
    """(pieces with their versions before, version after, how far) of passes that write: between `begin_write` and
    `end_write`."""
    dirty: bool = False
    residual: bool = False
    """Whether the residual part is present too, or the block has none."""
    fetched: int = 0
    """Bytes fetched and not counted yet."""
    streamed: dict[Piece, Tensor] = field(default_factory=dict)
    """Views of streamed parts, of whatever block they were asked for: a piece always lies in the same place."""

    def __post_init__(self) -> None:
        self.own = self.memory

    def streamed_part(self, piece: Piece, offset: int, nbytes: int) -> Tensor:
        """The bytes of a piece's streamed part: a view, which takes microseconds to make."""
        part = self.streamed.get(piece)
        if part is None:
            part = self.streamed[piece] = self.memory[offset : offset + nbytes]
        return part

    def fetch(
        self, block: int, pieces: Iterable[Piece], tier: Tier, layout: Layout, target: int | None, whole: bool = True
    ) -> None:
        """Read a block, or borrow it: the streamed part, and the residual part if a fold up to `target` is lacking
        (whole: both in any case). target: None if the bytes have to be the slot's own whatever is folded.

        Runs on the fetch stream, after the block's last flush: only then is its version in the tier the last word.
        """
        self.give_back()
        folds = target is None or (block in layout.written and tier.version(block) < target)
        nbytes = (layout.block_bytes if whole or folds else layout.stream_bytes)[block]
        self.residual = nbytes == layout.block_bytes[block]
        used = layout.used_bytes[block][self.residual]
        if folds or (lent := tier.lend(block, used)) is None:
            tier.fetch(block, self.own[:nbytes])
        else:
            self.lent, self.memory, self.streamed = lent, lent.memory, {}
        # asked again: a tier that found damage has gone back to an older version
        self.stored = tier.version(block)
        self.version = dict.fromkeys(pieces, self.stored)
        self.fetched += nbytes

    def fetch_residual(self, pieces: Iterable[Piece], tier: Tier, layout: Layout) -> None:
        """Read the residual part of a block that was fetched without it.

        The tier's residual belongs to the slot's bytes: a slot without it cannot have been folded into, and while the
        block is in this slot nobody else flushes it.
        """
        assert not self.dirty, "a block was folded into without its residual"
        if self.lent is not None:
            self.fetch_own(pieces, tier, layout)
            return
        part = self.memory[layout.stream_bytes[self.block] : layout.block_bytes[self.block]]
        tier.fetch(self.block, part, layout.stream_bytes[self.block])
        self.fetched += part.numel()
        if tier.version(self.block) != self.stored:  # damaged: both parts have to be of one version
            self.fetch(self.block, pieces, tier, layout, None)
        self.residual = True

    def fetch_own(self, pieces: Iterable[Piece], tier: Tier, layout: Layout) -> None:
        """Read the block that is lent: all of it, checked, into the slot's own memory. It may have gone back to an
        older version, where it was damaged."""
        self.fetch(self.block, pieces, tier, layout, None)

    def give_back(self) -> None:
        """The slot's own memory again, whatever was in it, in place of what was lent."""
        if self.lent is not None:
            self.lent.give_back()
            self.lent, self.memory, self.streamed = None, self.own, {}

    def begin_write(self, pieces: Iterable[Piece], after: int) -> Mark:
        """Before one call that brings pieces to version `after`: until `end_write` theirs is UNKNOWN."""
        assert self.lent is None, "lent bytes are not written to"
        before, mark = {piece: self.version[piece] for piece in pieces}, Mark()
        self.writing = (before, after, mark)
        self.version.update(dict.fromkeys(before, UNKNOWN))
        return mark

    def end_write(self) -> None:
        """The call is done."""
        assert self.writing is not None
        before, after, _ = self.writing
        self.dirty = True
        self.version.update(dict.fromkeys(before, after))
        self.writing = None

    def uniform_version(self, plan: Plan) -> int:
        """The common version of all trained pieces in the block; 0 if nothing trains."""
        versions = {self.version[p] for p in plan.blocks[self.block].pieces if plan.params[p.name].trainable}
        assert len(versions) < 2, f"block {self.block} would be flushed at versions {sorted(versions)}"
        return versions.pop() if versions else 0

    def count(self, traffic: Traffic) -> None:
        """Count the fetched bytes, once."""
        traffic.fetch_bytes += self.fetched
        self.fetched = 0

    def mend(self) -> bool:
        """After an interrupted pass: find out how far it got; returns whether the version of every piece is known."""
        if self.writing is not None:
            before, after, mark = self.writing
            if mark.is_done is not None:
                self.dirty |= mark.is_done
                self.version.update(dict.fromkeys(before, after) if mark.is_done else before)
                self.writing = None
        return self.writing is None


@dataclass
class Traffic:
    """Counted since the last reset: bytes both ways, and seconds the compute thread spent where."""

    fetch_bytes: int = 0
    flush_bytes: int = 0
    wait_s: float = 0.0
    fused_s: float = 0.0
    times: Times | None = None
    """Of the step under way, where they are wanted."""
