"""Updates, perturbations and masks of a fused pass, and their bytes for the kernels on CPU and GPU."""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, Self

import torch
from torch import Tensor

from ..errors import ConfigError

Rounding = Literal["nearest", "stochastic"]
Target = Literal["values", "scales"]
Trains = Literal["values", "scales", "shifts"]
"""What a method trains. scales: each group's scale, about its centre; shifts: each group's scale, from its minimum."""

UPDATE = struct.Struct("<QffII")
"""struct zo_update of csrc/api.h: seed, coefficient, decay, flags (1: it folds, 2: not the first of its step), 0."""
LANE = struct.Struct("<QQfI")
"""struct zo_lane: seed, address of its output, scale, code of the output's format. A lane along a sum (`SUM` is in the
code) has, in place of the seed, the index of its first term plus 2**32 times the number of its terms."""
SUM = 256


def _check(what: str, seed: int, **scalars: float) -> None:
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"{what} has seed={seed}: must be >= 0 and < 2**64")
    for name, value in scalars.items():
        if not math.isfinite(value) or ctypes.c_float(value).value != value:
            raise ConfigError(
                f"{what} has {name}={value!r}: must be finite and exactly a float32; round it where it is made"
            )


@dataclass(frozen=True)
class Update:
    """One step's change of a parameter: w <- fma(-coeff, z(seed), w * decay)."""

    seed: int
    coeff: float
    """Learning rate times projected gradient; exactly a float32."""
    decay: float = 1.0
    """1 - learning rate * weight decay; exactly a float32."""
    fold: bool = True
    """Round to the storage format after this update; False keeps the sum in float32 for the next one."""
    begins: bool = True
    """The first of its step: a mask by magnitude is evaluated again before it."""
    packed: bytes = field(init=False, repr=False, compare=False)
    """struct zo_update of csrc/api.h."""

    def __post_init__(self) -> None:
        _check("an update", self.seed, coeff=self.coeff, decay=self.decay)
        object.__setattr__(self, "packed", UPDATE.pack(self.seed, self.coeff, self.decay, self.flags, 0))

    @property
    def flags(self) -> int:
        """The flags of struct zo_update."""
        return bool(self.fold) | (not self.begins) << 1


class Updates(tuple[Update, ...]):
    """Updates in step order, packed for kernels once."""

    folds: bool
    """Whether any of them folds."""
    packed: bytes
    """Their structs zo_update, concatenated."""

    def __new__(cls, updates: Iterable[Update] = ()) -> Self:
        made = super().__new__(cls, updates)
        made.folds = any(update.fold for update in made)
        made.packed = b"".join([update.packed for update in made])
        return made


@dataclass(frozen=True)
class Mask:
    """The elements of a parameter that are perturbed and updated (weight decay too); the others are only read.

    magnitude: those with |w| at most a threshold; `limit` is its float32 bits. w is float32 and current: before the
    first update of each step for its updates, after all updates for lanes; so a step's lanes and its updates have the
    same mask, except in a split format, where lanes see the coarse part and folds the master. random: those whose 16
    random bits, a function of (seed, parameter, element), are less than `limit`. listed: the elements of a list;
    `limit` is their number, `seed` the list's digest.
    """

    kind: Literal["magnitude", "random", "listed"]
    limit: int
    seed: int = 0
    elements: Tensor | None = field(default=None, compare=False, repr=False)
    """The list for kernels, uint8: for each 1024 elements, and for the end, the number of listed elements before them
    (uint32), then each listed element's index among its 1024 (uint16). None: only the digest is known."""

    def __post_init__(self) -> None:
        most = MOST_LIMITS.get(self.kind, -1)
        if not 0 <= self.limit <= most or not 0 <= self.seed < 1 << 64:
            raise ConfigError(
                f"a mask of kind {self.kind!r} has limit={self.limit}, seed={self.seed}: kinds and their largest "
                f"limits are {MOST_LIMITS}, seeds are below 2**64"
            )

    @classmethod
    def smallest(cls, threshold: float) -> Mask:
        """The mask of elements with |w| <= threshold."""
        if not 0 <= threshold < math.inf:
            raise ConfigError(f"threshold={threshold}: expected zero or a positive number")
        return cls("magnitude", int.from_bytes(struct.pack("<f", threshold), "little"))

    @classmethod
    def random(cls, share: float, seed: int) -> Mask:
        """The mask of a random share of all elements, to a 65536th."""
        if not 0 < share <= 1:
            raise ConfigError(f"share={share}: expected more than 0 and at most 1")
        return cls("random", max(1, round(share * 65536)), seed)

    @classmethod
    def listed(cls, indices: Tensor, numel: int) -> Mask:
        """The mask of the elements with these indices, int64 [any], rising, in a parameter of `numel` elements."""
        at = indices.to("cpu", torch.int64).contiguous()
        odd = at.dim() != 1 or bool((at[1:] <= at[:-1]).any())
        if odd or (at.numel() and (int(at[0]) < 0 or int(at[-1]) >= numel)):
            raise ConfigError(
                f"a mask of listed elements needs indices from 0 to {numel - 1} in one dimension, each larger than the "
                f"one before; there are {at.numel()} of shape {tuple(at.shape)}"
            )
        tiles = -(-numel // LISTED)
        starts = torch.searchsorted(at, torch.arange(tiles + 1, device="cpu") * LISTED).to(torch.int32)
        places = (at % LISTED).to(torch.int16)
        digest = hashlib.blake2b(at.numpy().tobytes(), digest_size=8).digest()
        packed = torch.cat([starts.view(torch.uint8), places.view(torch.uint8)])
        return cls("listed", at.numel(), int.from_bytes(digest, "little"), packed)

    def on(self, upload: Callable[[Tensor], Tensor]) -> Mask:
        """The mask with its list uploaded."""
        return self if self.elements is None else replace(self, elements=upload(self.elements))

    @property
    def indices(self) -> Tensor:
        """The elements of a list that is in memory: int64 [limit]."""
        assert self.elements is not None
        end = self.elements.numel() - 2 * self.limit
        counts = self.elements[:end].view(torch.int32).to(torch.int64).diff()
        first = torch.repeat_interleave(torch.arange(len(counts), device="cpu") * LISTED, counts)
        return first.add(self.elements[end:].view(torch.int16))

    @property
    def words(self) -> tuple[int, int]:
        """`mask_seed` and `mask_limit` of struct zo_pass: for a list, its address and its number of 1024s."""
        if self.elements is None:
            return self.seed, self.limit
        return self.elements.data_ptr(), (self.elements.numel() - 2 * self.limit) // 4 - 1

    @property
    def threshold(self) -> float:
        """The largest |w| in a mask by magnitude."""
        return float(struct.unpack("<f", self.limit.to_bytes(4, "little"))[0])


@dataclass(frozen=True)
class Smallest:
    """A mask that a method asks for: the given share of a parameter's weights, those of smallest magnitude in the base,
    where its threshold is found."""

    share: float


MASKS = {"magnitude": 1, "random": 2, "listed": 3}
"""Codes of csrc/api.h."""
MOST_LIMITS = {"magnitude": 0x7F7FFFFF, "random": 65536, "listed": 0x7FFFFFFF}
LISTED = 1024
"""Elements per chunk of a list."""


@dataclass(frozen=True, eq=False)
class Terms:
    """A sum of noises that lanes are perturbed along, in float32, term after term: d = fma(coeff, z(seed), d), from 0.

    A term with coefficient 0 is skipped: no noise is made. One object is one sum: lanes that share it share d, which
    is made once for consecutive lanes.
    """

    seeds: tuple[int, ...]
    coeffs: tuple[float, ...] | None = None
    """One per seed, exactly float32. None: from the method's `term_coefficients`, or in `records`."""
    records: Tensor | None = None
    """In device memory: struct zo_update of these terms and of those of the other lanes' sums, uint8 [.., 24]."""
    first: int = 0
    """Index of the first term's record."""

    packed: bytes = field(init=False, repr=False)
    """struct zo_update of each term, if the host knows the coefficients; decays and flags are unused."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("a sum of noises has no term: give it one seed or more")
        if self.coeffs is not None and len(self.coeffs) != len(self.seeds):
            raise ConfigError(f"a sum of {len(self.seeds)} noises has {len(self.coeffs)} coefficients: give one a seed")
        pairs = list(zip(self.seeds, self.coeffs or (0.0,) * len(self.seeds), strict=True))
        for seed, coeff in pairs:
            _check("a term", seed, coeff=coeff)
        object.__setattr__(self, "packed", b"".join(UPDATE.pack(*pair, 1.0, 0, 0) for pair in pairs))

    @property
    def is_known(self) -> bool:
        """Whether its coefficients are known, on the host or in device memory."""
        return self.coeffs is not None or self.records is not None

    def read(self) -> bytes:
        """`packed`, from the host or the device. Waits for the device if the coefficients are there."""
        if self.records is None:
            return self.packed
        return self.records[self.first : self.first + len(self.seeds)].cpu().numpy().tobytes()


@dataclass(frozen=True)
class Perturbation:
    """One lane's weights: w + scale * z(seed), or w + scale * d along a sum d. scale == 0 means the weights themselves
    (evaluation)."""

    seed: int
    """0 with `terms`."""
    scale: float
    terms: Terms | None = None

    def __post_init__(self) -> None:
        _check("a perturbation", self.seed, scale=self.scale)

    @classmethod
    def along(cls, terms: Terms, scale: float) -> Perturbation:
        """A perturbation along a sum of noises."""
        return cls(0, scale, terms)

    def __str__(self) -> str:
        return f"{'a sum' if self.terms is not None else f'seed {self.seed}'}, scale {self.scale:g}"


def sums_of(lanes: Iterable[Perturbation]) -> tuple[Terms, ...]:
    """The sums that lanes are perturbed along, each once, in the order of first use."""
    return tuple(dict.fromkeys([lane.terms for lane in lanes if lane.terms is not None]))


def places_of(lanes: Iterable[Perturbation]) -> dict[Terms, int]:
    """For each of the lanes' sums, the index of its first term among all terms, concatenated."""
    places, count = dict[Terms, int](), 0
    for terms in [lane.terms for lane in lanes if lane.terms is not None]:
        if terms in places:
            continue
        places[terms], count = count, count + len(terms.seeds)
    return places


def lane_of(lane: Perturbation, address: int, code: int, places: Mapping[Terms, int]) -> tuple[int, int, float, int]:
    """Fields of struct zo_lane. address, code: the output's address and format; places: each sum's first term."""
    if lane.terms is None:
        return lane.seed, address, lane.scale, code
    return places[lane.terms] | len(lane.terms.seeds) << 32, address, lane.scale, code | SUM


def seeds_of(lanes: Iterable[Perturbation]) -> tuple[int, ...]:
    """The seeds of all noises that lanes are perturbed by, each once, in the order of first use."""
    moved = [lane for lane in lanes if lane.scale != 0]
    return tuple(dict.fromkeys(s for lane in moved for s in (lane.terms.seeds if lane.terms else (lane.seed,))))


def noises_of(lanes: Iterable[Perturbation]) -> int:
    """How many noises a pass makes for lanes: one per seed, and one per term of each sum."""
    moved = [lane for lane in lanes if lane.scale != 0]
    return len({lane.seed for lane in moved if not lane.terms}) + sum(len(terms.seeds) for terms in sums_of(moved))


def with_coefficients(sums: Sequence[Terms], coefficients: Tensor) -> list[Terms]:
    """Sums with their coefficients on the host. coefficients: float32, sum after sum."""
    values = iter(coefficients.tolist())
    return [Terms(terms.seeds, tuple(islice(values, len(terms.seeds)))) for terms in sums]


STILL = Perturbation(0, 0.0)
"""The unperturbed weights: for evaluation, and for parameters that do not train."""


@dataclass(frozen=True)
class Gain:
    """A parameter's factors of a method's perturbation and update (`gains.py`); both exactly float32."""

    lane: float = 1.0
    """The factor of a perturbation's scale."""
    update: float = 1.0
    """The factor of an update's coefficient."""


ONE = Gain()
Gains = Mapping[str, Gain]
"""By canonical name; all other parameters have `ONE`."""
Masks = Mapping[str, Mask]
"""By canonical name; all elements of all other parameters are perturbed and updated."""
