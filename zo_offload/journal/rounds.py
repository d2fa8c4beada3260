"""Rounds of FedKSeed: clients train apart from the same weights, and their mean is one step of the run's journal.

    client    local steps on its own data, from the run's weights after t steps -> one sum for each seed of the pool;
              the local steps are then forgotten (`run/local_round.py`)
    server    the mean of all clients' sums, weighted by their rows -> step t of the journal
    client    the same step, from the mean's file

Only files of K numbers travel. Server and clients each have the journal and the base; replay needs no more than these.

Arithmetic. sum[k] = float32(c1 + c2 + ...), the coefficients (lr times the projected gradient, float32) of the client's
local steps with seed k, added in float64 in step order. mean[k] = float32((n1 sum1[k] + n2 sum2[k] + ...) / (n1 + n2 +
...)), in float64, n the clients' rows, clients in the order of their names. The step has an update for each mean that
is not 0, by rising k, and the last one folds; it is applied like any step of several noises (docs/file_formats.md).

File layout, little-endian
    4 bytes    b"ZOR1"
    u32        bytes of the text
    text       JSON object: what the round belongs to (`_SAME`, step, history), and who it is from
    bits       ceil(K / 8) bytes: bit k % 8 of byte k // 8 is set if seed k has a number
    numbers    f32 for each set bit, by rising k
    u32        crc32 of everything before it
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, JournalError
from ..kernels.records import Update
from ..methods.pooled import Pooled, pooled
from ..system import diskio
from ..system.lock import RunLock
from . import run_directory
from .identity import differences
from .journal import Journal, StepRecord

MAGIC = b"ZOR1"
LONGEST_NAME = 64
_SAME = ("base", "plan", "trainable", "storage", "rounding", "seed", "noise", "method")
"""Keys of the journal's header that a round must share with the run, so that an error can name the difference."""
_U32 = struct.Struct("<I")


@dataclass(frozen=True)
class Round:
    """A client's sums of one round, or the mean of several clients' (client=None)."""

    run: dict[str, Any]
    """The run's base, pool and settings, from its journal's header."""
    step: int
    """The number of steps that the run had when the round began."""
    history: str
    """Names the run's weights at that time, in hexadecimal (docs/file_formats.md)."""
    client: str | None
    """The client's name; None for a mean."""
    clients: int
    """How many clients it is from."""
    rows: int
    """Rows of the client's data: its weight in the mean. For a mean, the total."""
    local_steps: int
    """Local steps; for a mean, the total."""
    loss: float
    """Mean loss of the local steps; for a mean, weighted by rows."""
    sums: tuple[float, ...]
    """For each seed of the pool, the sum of its local steps' coefficients, exactly a float32."""

    def __post_init__(self) -> None:
        if self.client is not None:
            check_client(self.client)
        if not 1 <= self.rows < 1 << 29:
            raise ConfigError(f"{self}: rows={self.rows}, its weight, must be from 1 to {(1 << 29) - 1}")
        if not math.isfinite(self.loss):
            raise JournalError(f"{self}: its loss is {self.loss}. Leave this client out of the round")
        for k, number in enumerate(self.sums):
            if not math.isfinite(number) or float(np.float32(number)) != number:
                raise JournalError(
                    f"{self}: its sum for seed {k} is {number}, expected a finite float32. Leave it out of the round"
                )

    def __str__(self) -> str:
        several = f"the mean of {self.clients} client{'s' * (self.clients != 1)}"
        who = several if self.client is None else f"client {self.client!r}"
        return f"{who}, round after {self.step} steps"

    @property
    def seeds_used(self) -> int:
        """How many seeds have a number other than 0."""
        return sum(number != 0 for number in self.sums)

    # ---- files -------------------------------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """The bytes of its file; see the module."""
        about = {name: value for name, value in asdict(self).items() if name != "sums"}
        text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        sums = np.array(self.sums, dtype="<f4")
        used = sums != 0
        bits: bytes = np.packbits(used, bitorder="little").tobytes()
        numbers: bytes = sums[used].tobytes()
        data = MAGIC + _U32.pack(len(text)) + text + bits + numbers
        return data + _U32.pack(zlib.crc32(data))

    def save(self, path: str | Path) -> int:
        """Write its file; returns the number of bytes. Raises StorageError."""
        data = self.pack()
        try:
            diskio.replace_file(Path(path), data)
        except OSError as error:
            raise diskio.storage_error(error, "writing", Path(path), then="The run is as it was.") from error
        return len(data)

    @classmethod
    def load(cls, path: str | Path) -> Round:
        """Read a round's file. Raises JournalError if it is none, is damaged, or has a number that is not finite."""
        try:
            data = diskio.read_file(Path(path))
        except OSError as error:
            raise JournalError(f"{path} cannot be read: {error}") from error
        if len(data) < 12 or data[:4] != MAGIC:
            raise JournalError(f"{path} is not a round's file (starts with {data[:4]!r}, expected {MAGIC!r})")
        if _U32.unpack(data[-4:])[0] != zlib.crc32(data[:-4]):
            raise JournalError(f"{path} fails its checksum: it was damaged or cut on the way. Send it again")
        try:
            begin = 8 + _U32.unpack_from(data, 4)[0]
            about = json.loads(data[8:begin])
            return cls(**_typed(about), sums=_sums(data[begin:-4], about["run"]["method"]["pool"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise JournalError(f"{path}: {error if str(error) else repr(error)}") from None

    # ---- rounds of one run -------------------------------------------------------------------------------------------

    @classmethod
    def mean(cls, rounds: Sequence[Round]) -> Round:
        """The mean of clients' rounds, weighted by their rows; their order does not matter. A mean alone is returned
        as it is. Raises ConfigError for a client that is there twice, JournalError for rounds of different runs."""
        if not rounds:
            raise ConfigError("a mean of no rounds: give at least one client's")
        if len(rounds) == 1 and rounds[0].client is None:
            return rounds[0]
        if several := [found for found in rounds if found.client is None]:
            raise ConfigError(f"{several[0]} is taken alone: give the clients' own files, or this one")
        ordered = sorted(rounds, key=lambda found: str(found.client))
        for one, other in itertools.pairwise(ordered):
            if one.client == other.client:
                raise ConfigError(f"{one} is there twice: give each client's round once")
        first = ordered[0]
        for other in ordered[1:]:
            check_round(other, first.run, first.step, first.history)
        total = sum(found.rows for found in ordered)
        sums, loss = np.zeros(len(first.sums)), 0.0
        for found in ordered:
            sums += float(found.rows) * np.array(found.sums)
            loss += found.rows * found.loss
        steps = sum(found.local_steps for found in ordered)
        return replace(
            first, client=None, clients=len(ordered), rows=total, local_steps=steps, loss=loss / total,
            sums=tuple((sums / total).astype(np.float32).tolist()),
        )  # fmt: skip

    @staticmethod
    def merge(run_dir: str | Path, rounds: Sequence[Round | str | Path]) -> Round:
        """Append the mean of rounds to the journal of a run that no engine has open, and return it; no weight is read.
        rounds: the clients', or one mean; or their files. Raises ConfigError, JournalError, StorageError; then nothing
        was changed."""
        path = Path(run_dir)
        found = [each if isinstance(each, Round) else Round.load(each) for each in rounds]
        if not (path / run_directory.JOURNAL).is_file():
            raise JournalError(f"{path} is not a run directory: it has no {run_directory.JOURNAL}")
        lock = RunLock.take(path)
        try:
            journal = Journal.open(path / run_directory.JOURNAL, alone=True)
            try:
                mean, record = next_step(journal, found)
                journal.note(mean.note)
                journal.append(record)
                journal.make_durable(len(journal.steps))
            finally:
                journal.close()
        finally:
            lock.release()
        return mean

    def record(self, pool: Pooled, lr: float, run_seed: int) -> StepRecord:
        """A mean as a step of the journal, for a run with this rate."""
        assert self.client is None
        used = [(pool.seed_of(run_seed, k), number) for k, number in enumerate(self.sums) if number]
        last = len(used) - 1
        updates = tuple(Update(seed, x, fold=i == last, begins=i == 0) for i, (seed, x) in enumerate(used))
        length = math.sqrt(math.fsum(number * number for number in self.sums))
        return StepRecord(self.step, updates, self.loss, length / lr, lr)

    @property
    def note(self) -> dict[str, Any]:
        """What the journal notes of a mean."""
        return {"round": {"clients": self.clients, "rows": self.rows, "local_steps": self.local_steps}}


def check_client(name: str) -> None:
    if not (isinstance(name, str) and 1 <= len(name) <= LONGEST_NAME and name.isprintable()):
        raise ConfigError(f"client={name!r}: expected a name of 1 to {LONGEST_NAME} printable characters")


def check_round(found: Round, header: Mapping[str, Any], step: int, history: str) -> None:
    """Raise JournalError, naming the difference, unless a round began at these weights. header: a journal's, or a
    round's `run`."""
    for key in _SAME:
        if differ := differences(key, header.get(key), found.run.get(key)):
            told = "; ".join(differ).replace("this engine", "the round")
            raise JournalError(f"{found}: it is of another run; {told}")
    if found.step != step:
        again = "it was merged already, or its client must train again" if found.step < step else "merge those before"
        raise JournalError(f"{found}: the run has {step} steps now; {again}")
    if found.history != history:
        raise JournalError(
            f"{found}: it began at other weights (history {found.history}, the run's is {history}): its journal is "
            "not a copy of this run's"
        )


def belongs_to(header: Mapping[str, Any]) -> dict[str, Any]:
    """`Round.run` from a journal's header."""
    return {key: header.get(key) for key in _SAME}


def next_step(journal: Journal, rounds: Sequence[Round]) -> tuple[Round, StepRecord]:
    """The mean of rounds, and the journal's next step that it is. Raises as `Round.merge`."""
    header, version = journal.header, len(journal.steps)
    method = run_directory.make_method(header["method"])
    pool = pooled(method)
    for each in rounds:
        check_round(each, header, version, f"{journal.history(version):016x}")
    mean = Round.mean(rounds)
    return mean, mean.record(pool, method.lr, int(header["seed"]))


def _typed(about: Mapping[str, Any]) -> dict[str, Any]:
    """The text's fields, each of its type."""
    kinds = {"run": dict, "history": str, "client": (str, type(None)), "loss": float}
    found = {part.name: about[part.name] for part in fields(Round) if part.name != "sums"}
    for name, value in found.items():
        kind = kinds.get(name, int)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):  # type: ignore[arg-type]
            raise JournalError(f"not a round: its {name} is {value!r}")
    return found


def _sums(data: bytes, pool: int) -> tuple[float, ...]:
    of_bits = -(-pool // 8)
    used = np.unpackbits(np.frombuffer(data[:of_bits], dtype=np.uint8), bitorder="little")
    numbers = np.frombuffer(data[of_bits:], dtype="<f4")
    if len(used) != 8 * of_bits or used[pool:].any() or int(used.sum()) != len(numbers):
        raise JournalError(f"its bits and {len(numbers)} numbers are not those of a pool of {pool} seeds")
    sums = np.zeros(pool, dtype=np.float32)
    sums[used[:pool].astype(bool)] = numbers
    return tuple(sums.tolist())
