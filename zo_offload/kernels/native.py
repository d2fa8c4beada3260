"""Finds, checks and calls the native library.

`_zo_cpu.so` is next to this file if setup.py found a compiler. It is plain C (csrc/api.h) called through ctypes, which
releases the GIL. Before its first use it must reproduce known bits of noise and of a few fused passes: a library built
with -ffast-math, or from other sources, would train another model and is refused. Without a library, callers use
`reference.py`: same bits, slowly.

It computes on the threads of torch's OpenMP runtime if that is found (csrc/cpu_threads.h says why), else on its own.

Environment: ZO_NATIVE=0 disables the library; ZO_ISA=scalar|avx2|avx512|neon selects a variant; ZO_THREADS=own does
not use torch's threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, ZOError
from .distributions import all_kinds, row
from .records import LANE, MASKS, UPDATE, Mask

LIBRARY = Path(__file__).parent.with_name("_zo_cpu.so")
ABI_VERSION, LAYOUT_VERSION = 11, 2
ISAS = ("scalar", "avx2", "avx512", "neon")

_ERRORS = {
    1: "a storage format it does not know, or cannot use this way",
    2: "a distribution or number of rounds it does not know",
    3: "an instruction set this CPU or build does not have",
    4: "no memory",
    5: "a mask it does not know, or cannot use this way",
    6: "a sum of noises whose terms are not there",
}
# struct zo_pass of csrc/api.h
_PASS = struct.Struct("<13Q14I")
PASS_BYTES = _PASS.size
UPDATES_AT = 40  # of the address of the updates, then that of the terms, in struct zo_pass
_FACTS = struct.Struct("<6I")
_MOST_FORMATS = 256  # a library is asked for codes below this

# SHA-256: the result of `fingerprint` with reference.py; a test checks that they agree
FINGERPRINT = "444205b3f3397237575827f057667f7fcc15c2fadf23ec91f13a29f832c64f47"


def pack_pass(
    *,
    stored: int,
    rows: int,
    numel: int,
    offset: int,
    num_rows: int,
    num_updates: int,
    num_lanes: int,
    format: int,
    param_id: int,
    distribution: str,
    rounds: int,
    write_back: bool,
    stochastic: bool,
    updates: int = 0,
    terms: int = 0,
    num_terms: int = 0,
    scales: int = 0,
    minima: int = 0,
    residual: int = 0,
    total: int | None = None,
    group: int = 0,
    across: int = 0,
    target_scales: bool = False,
    master: bool = False,
    centred: bool = False,
    mask: Mask | None = None,
    rank: int = 0,
    columns: int = 0,
) -> bytes:
    """struct zo_pass. updates, terms: their addresses, or 0 if they follow the struct in this order. total: default
    `numel`. distribution: the name of a row of `distributions.all_kinds`."""
    return _PASS.pack(
        stored, scales, minima, residual, rows, updates, terms, 0, numel, offset, num_rows,
        numel if total is None else total,
        0 if mask is None else mask.words[0], num_updates, num_lanes, format, group, param_id, row(distribution).code,
        rounds,
        write_back | stochastic << 1 | target_scales << 2 | master << 3 | centred << 4,
        0 if mask is None else MASKS[mask.kind],
        0 if mask is None else mask.words[1], num_terms, across, rank, columns,
    )  # fmt: skip


class FormatFacts(NamedTuple):
    """A storage format in csrc/formats.h; the fields are those of `formats.base.Format`."""

    value_bits: int
    scale_bytes: int
    minimum_bytes: int
    residual_bytes: int
    trains: bool
    trains_scales: bool


class NativeError(ZOError):
    """A native library cannot be used; tells why and what to do."""


class Library:
    """One loaded library with one instruction set; every call blocks until its work is done."""

    def __init__(self, path: Path, isa: str | None = None) -> None:
        """Loads and checks; NativeError if there is no such library, or it is not the one this package needs."""
        self.path = path
        try:
            lib = ctypes.CDLL(str(path))
            found = (lib.zo_abi_version(), lib.zo_layout_version())
        except (OSError, AttributeError) as error:
            raise NativeError(
                f"{path} cannot be loaded ({error}); build it: python setup.py build_ext --inplace"
            ) from None
        if found != (ABI_VERSION, LAYOUT_VERSION):
            raise NativeError(
                f"{path} has interface and layout versions {found}, this package needs "
                f"{(ABI_VERSION, LAYOUT_VERSION)}; rebuild it: python setup.py build_ext --inplace"
            )
        mask = lib.zo_cpu_isas()
        self.isas = tuple(name for code, name in enumerate(ISAS) if mask >> code & 1)
        self.isa = self.isas[-1] if isa is None else isa
        if self.isa not in self.isas:
            raise NativeError(f"instruction set {isa!r}: this CPU and {path.name} have {list(self.isas)}")
        self._isa_code = ISAS.index(self.isa)
        self._pass = lib.zo_cpu_pass
        self._pass.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
        self._passes = lib.zo_cpu_passes
        self._passes.argtypes = [ctypes.c_char_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_int]
        self._noise = lib.zo_cpu_noise
        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        self._encode = lib.zo_cpu_encode
        self._encode.argtypes = [ctypes.c_char_p, ctypes.c_void_p, u32, ctypes.POINTER(u64), ctypes.c_int, ctypes.c_int]
        self._noise.argtypes = [ctypes.c_void_p, u64, u64, u64, u32, u32, u32, ctypes.c_int, ctypes.c_int]
        self._gaussian_table = lib.zo_cpu_gaussian_table
        self._gaussian_table.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._philox = lib.zo_cpu_philox
        self._philox.argtypes = [ctypes.c_char_p, ctypes.c_char_p, u32, ctypes.c_char_p]
        self._format = lib.zo_cpu_format
        self._format.argtypes = [u32, ctypes.c_char_p]
        self.formats = frozenset(code for code in range(_MOST_FORMATS) if self.format(code) is not None)
        """Codes of the storage formats of these kernels."""
        self.threads = share_threads(lib)
        """The threads that it computes on: "torch's" or "its own"."""
        if fingerprint(self) != FINGERPRINT:
            raise NativeError(
                f"{path} ({self.isa}) does not reproduce the known noise and weights: was it built with -ffast-math or "
                "-Ofast? Rebuild it: python setup.py build_ext --inplace"
            )

    def run_pass(self, codes: list[int] | None = None, /, *, tail: bytes, threads: int, **fields: Any) -> None:
        """zo_cpu_pass. `tail`: packed updates, then terms, then lanes; `fields`: of `pack_pass`, with host addresses.

        codes: the library's return code is appended, 0 for a completed pass, in one move of the interpreter with the
        pass: an exception that a signal handler raises comes before both or after both. Only the library's own checks
        are made here: `fused.py` has checked sizes.
        """
        codes = [] if codes is None else codes
        codes.extend(map(self._pass, (pack_pass(**fields) + tail,), (self._isa_code,), (threads,)))
        self._check(codes[-1])

    def run_passes(self, codes: list[int], packed: bytes, count: int, threads: int) -> None:
        """zo_cpu_passes: `count` passes, each `pack_pass` and its tail, as one call. codes: see `run_pass`."""
        codes.extend(map(self._passes, (packed,), (count,), (self._isa_code,), (threads,)))
        self._check(codes[-1])

    def _check(self, code: int) -> None:
        if code:
            raise NativeError(f"{self.path.name}: the pass asks for {_ERRORS.get(code, f'error {code}')}")

    def encode(self, values: int, values_format: int, threads: int, **planes: Any) -> tuple[int, int]:
        """zo_cpu_encode from address `values`; returns how many values are not finite before and after rounding."""
        head = pack_pass(
            rows=0, offset=0, num_rows=0, num_updates=0, num_lanes=0, param_id=0, distribution="gaussian", rounds=10,
            write_back=True, stochastic=False, **planes,
        )  # fmt: skip
        counts = (ctypes.c_uint64 * 2)()
        error = self._encode(head, values, values_format, counts, self._isa_code, threads)
        if error:
            raise NativeError(f"{self.path.name}: encoding asks for {_ERRORS.get(error, f'error {error}')}")
        return counts[0], counts[1]

    def noise(
        self, out: int, distribution: str, rounds: int, seed: int, param_id: int, numel: int, offset: int, threads: int
    ) -> None:
        """zo_cpu_noise into `numel` floats at address `out`."""
        code = row(distribution).code
        error = self._noise(out, numel, offset, seed, param_id, code, rounds, self._isa_code, threads)
        if error:
            raise NativeError(f"{self.path.name}: the noise asks for {_ERRORS.get(error, f'error {error}')}")

    def gaussian_table(self, out: int) -> None:
        """zo_cpu_gaussian_table: `distributions.gaussian_table` as these instructions compute it, at address `out`."""
        if error := self._gaussian_table(out, self._isa_code):
            raise NativeError(f"{self.path.name}: the Gaussian's table asks for {_ERRORS.get(error, f'error {error}')}")

    def philox(self, counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
        """One Philox4x32 block, for known answers."""
        out = ctypes.create_string_buffer(16)
        error = self._philox(struct.pack("<4I", *counter), struct.pack("<2I", *key), rounds, out)
        if error:
            raise NativeError(f"{self.path.name}: Philox with {rounds} rounds; it has 7 and 10")
        return struct.unpack("<4I", out.raw)

    def format(self, code: int) -> FormatFacts | None:
        """The library's description of a storage format; None if it has none with that code."""
        facts = ctypes.create_string_buffer(_FACTS.size)
        if self._format(code, facts):
            return None
        value, scale, minimum, residual, trains, trains_scales = _FACTS.unpack(facts.raw)
        return FormatFacts(value, scale, minimum, residual, bool(trains), bool(trains_scales))


def share_threads(lib: ctypes.CDLL) -> str:
    """Let the library compute on the threads of the OpenMP runtime that torch is linked with, if there is one."""
    found: list[Any] = []
    if os.environ.get("ZO_THREADS") != "own" and torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        linked = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # finds its dependencies' symbols, too
        runtime = ctypes.CDLL(str(linked)) if linked.exists() else None
        found = [getattr(runtime, name, None) for name in ("GOMP_parallel", "omp_get_max_threads")]
    shared = bool(found) and None not in found
    lib.zo_cpu_share_threads(
        *([ctypes.cast(function, ctypes.c_void_p) for function in found] if shared else (None, None))
    )
    return "torch's" if shared else "its own"


def fingerprint(library: Any) -> str:
    """SHA-256 over the Gaussian of every half-word, noise of each kind, and weights and lanes of a few fused passes,
    across tile and block borders."""
    digest = hashlib.sha256()
    table = ctypes.create_string_buffer(4 << 16)
    library.gaussian_table(ctypes.addressof(table))
    digest.update(table.raw)
    count, offset, seed, param_id = 333, (1 << 34) - 77, 0x0123456789ABCDEF, 0xDEADBEEF
    for distribution in (kind.name for kind in all_kinds() if kind.code is not None):
        for rounds in (7, 10):
            z = ctypes.create_string_buffer(4 * count)
            library.noise(ctypes.addressof(z), distribution, rounds, seed, param_id, count, offset, 1)
            digest.update(z.raw)
    values = [(-1.0) ** i * 2.0 ** -(i % 30) * (1 + i / 512) for i in range(count)]
    for code, kind in ((0, "f"), (1, "f"), (2, "e")):
        data = struct.pack(f"<{count}{kind}", *values)
        if code == 1:  # bfloat16: the upper halves of float32
            data = b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))
        stored = ctypes.create_string_buffer(data, len(data))
        outs = [ctypes.create_string_buffer((4, 2, 2)[lane] * count) for lane in range(3)]
        updates = [UPDATE.pack(seed + k, 2.0**-7, 1 - 2.0**-9, 1, 0) for k in range(2)]
        scales = (2.0**-6, -(2.0**-6), 0.0)
        lanes = [LANE.pack(seed + 9, ctypes.addressof(out), scales[j], j) for j, out in enumerate(outs)]
        library.run_pass(
            stored=ctypes.addressof(stored), rows=0, numel=count, offset=offset, num_rows=0, num_updates=2,
            num_lanes=3, format=code, param_id=param_id, distribution="gaussian", rounds=10, write_back=True,
            stochastic=True, tail=b"".join(updates + lanes), threads=1,
        )  # fmt: skip
        for buffer in (stored, *outs):
            digest.update(buffer.raw)
    return digest.hexdigest()


@functools.cache
def _load() -> tuple[Library | None, str]:
    if os.environ.get("ZO_NATIVE", "1") == "0":
        return None, "switched off by ZO_NATIVE=0"
    isa = os.environ.get("ZO_ISA")
    if isa is not None and isa not in ISAS:
        raise ConfigError(f"ZO_ISA={isa!r}: choose one of {ISAS}, or leave it unset for the best this CPU has")
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} was not built (no C++ compiler?); build it: python setup.py build_ext --inplace"
    try:
        return Library(LIBRARY, isa), ""
    except NativeError as error:
        if isa is not None:
            raise  # asked for by name: another variant would silently falsify a test or a benchmark
        return None, str(error)


def library() -> Library | None:
    """The checked library, or None: then `describe` says why. Loaded once."""
    return _load()[0]


def describe() -> str:
    """One line for a doctor or a log."""
    found, reason = _load()
    if found is None:
        return f"native kernels: none, the slow reference runs instead; {reason}"
    return f"native kernels: {found.path.name}, {found.isa} (has {', '.join(found.isas)}), on {found.threads} threads"
