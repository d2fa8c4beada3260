"""PTX of our kernels as C, so that what the CUDA compiler made of them runs, and is compared bit for bit, on a CPU.

PTX is the last form whose meaning NVIDIA documents: every instruction here is integer arithmetic or IEEE rounding to
nearest even. What this cannot show is ptxas, the hardware and timing.

A kernel becomes one C function a thread. Threads of a warp run as coroutines and meet at each shuffle, which aborts if
they do not all arrive at the same one: divergence is an error here, not a hang. Every access of global memory is
checked for alignment and against the ranges the caller declared and the module's own tables, so a stray read or write
aborts too. A block's warps run one after the other: a barrier is where a warp waits for its own threads, and what a
block shares is what the warps before left there. So a kernel may only hand things to later warps; ours fill a table in
the first one.

Instructions we have not met are an error that names them; nothing is guessed.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

_SHARED = """
static u64 at_shared(u64 a, u64 size, int line) {
  if (a % size) die("misaligned access of shared memory", a, line);
  if (a + size > sizeof shared) die("access outside of shared memory", a, line);
  return (u64)shared + a;
}
"""
_PRELUDE = Path(__file__).with_name("ptx_runtime.c").read_text()

_C_TYPE = {
    "pred": "u8",
    "b16": "u16",
    "u16": "u16",
    "s16": "u16",
    "b32": "u32",
    "u32": "u32",
    "f32": "u32",
    "b64": "u64",
}
_COMPARE = {
    "gt": ">",
    "lt": "<",
    "ge": ">=",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "hi": ">",
    "lo": "<",
    "hs": ">=",
    "ls": "<=",
}
_WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}


class UnknownInstruction(ValueError):
    """The translator has not met this instruction."""


def _split(text: str) -> list[str]:
    """Operands: commas that are not inside {} or []."""
    parts, depth, now = [], 0, ""
    for ch in text:
        depth += (ch in "{[") - (ch in "}]")
        if ch == "," and depth == 0:
            parts.append(now.strip())
            now = ""
        else:
            now += ch
    return [*parts, now.strip()]


def _bits(kind: str) -> str:
    return re.sub(r"\D", "", kind)


_ARRAY = re.compile(r"^\.(global|shared) \.align (\d+) \.b8 (\w+)\[(\d+)\](?: = \{([\d, ]*)\})?;", re.M)


class _Arrays:
    """The module's tables in global memory, and what a block shares: 32-bit addresses that begin at 0."""

    def __init__(self, ptx: str) -> None:
        self.address: dict[str, str] = {}
        self.code, shared = [], 0
        for space, align, name, size, values in _ARRAY.findall(ptx):
            if space == "global":
                self.code.append(
                    f"static const u8 t_{name}[{size}] __attribute__((aligned({align}))) = {{{values or 0}}};\n"
                    f"__attribute__((constructor)) static void at_{name}(void) {{ own((u64)t_{name}, {size}); }}"
                )
                self.address[name] = f"(u64)t_{name}"
            else:
                shared += -shared % int(align)
                self.address[name] = f"{shared}u"
                shared += int(size)
        self.code.append(f"static u8 shared[{max(shared, 1)}] __attribute__((aligned(16)));")


class _Kernel:
    def __init__(self, name: str, params: list[str], text: str, arrays: _Arrays, first_line: int | None) -> None:
        """first_line: of the text in the module's, to count how often threads come to each of its lines; None: no."""
        self.name, self.params, self.text, self.arrays, self.first_line = name, params, text, arrays, first_line
        self.registers: list[str] = []
        self.code: list[str] = []
        self.shuffles = False
        assert len(params) == 1, f"{name} has {len(params)} parameters; ours have one struct"

    def value(self, x: str) -> str:
        """An operand as an unsigned C expression."""
        x = x.strip()
        special = {"%tid.x": "tid", "%ntid.x": "ntid", "%ctaid.x": "ctaid", "%nctaid.x": "nctaid"}
        if x in special:
            return special[x]
        if x.startswith("%"):
            return f"_{x[1:]}"
        if x in self.params:
            return "(u64)args"
        if x in self.arrays.address:
            return self.arrays.address[x]
        if x[:2] in ("0f", "0F"):
            return f"0x{x[2:]}u"
        return f"((u64)({x}ll))" if x.startswith("-") else f"({x}ull)"

    def address(self, x: str) -> str:
        m = re.fullmatch(r"\[(%?[\w$]+)(?:\+(-?\d+))?\]", x)
        assert m, x
        return f"({self.value(m[1])} + ({m[2] or 0}ll))"

    def translate(self) -> str:
        for number, line in enumerate(self.text.split("\n")):
            line = line.split("//")[0].strip()
            if not line or line.startswith((".pragma", ".loc", ".maxntid", ".minnctapersm", ".reqntid")):
                continue
            m = re.match(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", line)
            if m:
                names = ", ".join(f"_{m[2]}{i} = 0" for i in range(int(m[3])))
                self.registers.append(f"{_C_TYPE[m[1]]} {names};")
                continue
            m = re.match(r"(\$\w+):", line)
            if m:
                self.code.append(m[1].replace("$", "L") + ":;")
                continue
            if line in "{}":
                continue
            m = re.fullmatch(r"\{ \.reg \.b32 tmp; mov\.b64 \{(tmp|%\w+), *(tmp|%\w+)\}, (%\w+); \}", line)
            if m:  # one half of a 64-bit register, as the compiler writes it for sm_120
                line = f"mov.b64 {{{m[1]}, {m[2]}}}, {m[3]};".replace("tmp", "_")
            guard = ""
            m = re.match(r"@(!?)%(p\d+)\s+(.*)", line)
            if m:
                guard, line = f"if ({m[1]}_{m[2]}) ", m[3]
            if self.first_line is not None:
                self.code.append(f"line_times[{self.first_line + number}]++;")
            self.code.append(guard + "{" + self.instruction(line.rstrip(";").strip(), number) + ";}")
        body = "\n".join(self.registers + self.code)
        return (
            f"static void k_{self.name}(const char* args, u32 tid, u32 ntid, u32 ctaid, u32 nctaid) {{\n{body}\n}}\n"
            f"void {self.name}(const char* args, u32 threads, u32 grid) "
            f"{{ launch(k_{self.name}, {int(self.shuffles)}, args, threads, grid); }}\n"
        )

    def instruction(self, line: str, number: int) -> str:
        op, *rests = line.split(None, 1)
        rest = "".join(rests)
        if op == "ret":
            return "return"
        a = _split(rest)
        parts = op.split(".")
        found = getattr(self, f"_{parts[0]}", None)
        result = found(parts, a, number) if found else None
        if result is None:
            raise UnknownInstruction(f"{self.name}: {line}")
        return str(result)

    def _int(self, kind: str, x: str) -> str:
        """An operand read as the integer type of an instruction."""
        return f"(({kind[0] if kind[0] == 's' else 'u'}{_bits(kind)})({self.value(x)}))"

    def _bra(self, p: list[str], a: list[str], n: int) -> str:
        return f"goto {a[0].replace('$', 'L')}"

    def _mov(self, p: list[str], a: list[str], n: int) -> str:
        half = int(_bits(p[-1]) or 32) // 2
        if a[1].startswith("{"):
            low, high = (self.value(x) for x in a[1].strip("{}").split(","))
            return f"{self.value(a[0])} = (u64)(u{half}){low} | (u64)(u{half}){high} << {half}"
        if a[0].startswith("{"):
            names = [x.strip() for x in a[0].strip("{}").split(",")]
            sets = [f"{self.value(x)} = (u{half})(t >> {half * i})" for i, x in enumerate(names) if x != "_"]
            return f"u64 t = {self.value(a[1])}; {'; '.join(sets)}"
        return f"{self.value(a[0])} = {self.value(a[1])}"

    def _cvta(self, p: list[str], a: list[str], n: int) -> str:
        return f"{self.value(a[0])} = {self.value(a[1])}"

    def _ld(self, p: list[str], a: list[str], n: int) -> str:
        width = _WIDTH[_bits(p[-1])]
        names = a[0].strip("{}").split(",")
        checked = "" if "param" in p else f"{self._checked(p)}(a, {width * len(names)}, {n}); "
        sign = f"s{width * 8}" if p[-1][0] == "s" else f"u{width * 8}"
        loads = [
            f"{{ u{width * 8} t; memcpy(&t, (char*)a + {i * width}, {width}); {self.value(x)} = ({sign})t; }}"
            for i, x in enumerate(names)
        ]
        return f"u64 a = {self.address(a[1])}; {checked}{' '.join(loads)}"

    def _st(self, p: list[str], a: list[str], n: int) -> str:
        width = _WIDTH[_bits(p[-1])]
        names = a[1].strip("{}").split(",")
        stores = [
            f"{{ u{width * 8} t = (u{width * 8}){self.value(x)}; memcpy((char*)a + {i * width}, &t, {width}); }}"
            for i, x in enumerate(names)
        ]
        checked = f"{self._checked(p)}(a, {width * len(names)}, {n})"
        return f"u64 a = {self.address(a[0])}; {checked}; {' '.join(stores)}"

    @staticmethod
    def _checked(p: list[str]) -> str:
        return "a = at_shared" if "shared" in p else "check"

    def _mul(self, p: list[str], a: list[str], n: int) -> str | None:
        out, t = self.value(a[0]), p[-1]
        if t == "f32":
            return self._float2("*", p, a)
        x, y = self._int(t, a[1]), self._int(t, a[2])
        if p[1] == "wide":
            wide = {"u32": "u64", "s32": "s64", "u16": "u32", "s16": "s32"}[t]
            return f"{out} = ({wide}){x} * ({wide}){y}"
        if p[1] == "hi" and t == "u32":
            return f"{out} = (u32)((u64){x} * {y} >> 32)"
        return (
            f"{out} = ({self._int('u' + _bits(t), a[1])} * (u64){self._int('u' + _bits(t), a[2])})"
            if p[1] == "lo"
            else None
        )

    def _mad(self, p: list[str], a: list[str], n: int) -> str | None:
        t = p[-1]
        if p[1] == "wide":
            wide = {"u32": "u64", "s32": "s64", "u16": "u32", "s16": "s32"}[t]
            return (
                f"{self.value(a[0])} = ({wide}){self._int(t, a[1])} * ({wide}){self._int(t, a[2])} + {self.value(a[3])}"
            )
        return (
            f"{self.value(a[0])} = {self.value(a[1])} * {self.value(a[2])} + {self.value(a[3])}"
            if p[1] == "lo"
            else None
        )

    def _float2(self, sign: str, p: list[str], a: list[str]) -> str | None:
        if p[1:] != ["rn", "f32"]:
            return None
        return f"{self.value(a[0])} = U(F({self.value(a[1])}) {sign} F({self.value(a[2])}))"

    def _fma(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[1:] != ["rn", "f32"]:
            return None
        x, y, z = (f"F({self.value(v)})" for v in a[1:])
        return f"{self.value(a[0])} = U(fmaf({x}, {y}, {z}))"

    def _add(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[-1] == "f32":
            return self._float2("+", p, a)
        return f"{self.value(a[0])} = {self.value(a[1])} + {self.value(a[2])}"

    def _sub(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[-1] == "f32":
            return self._float2("-", p, a)
        return f"{self.value(a[0])} = {self.value(a[1])} - {self.value(a[2])}"

    def _div(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[-1] == "f32":
            return self._float2("/", p, a)
        return f"{self.value(a[0])} = {self._int(p[-1], a[1])} / {self._int(p[-1], a[2])}"

    def _rcp(self, p: list[str], a: list[str], n: int) -> str | None:
        return f"{self.value(a[0])} = U(1.0f / F({self.value(a[1])}))" if p[1:] == ["rn", "f32"] else None

    def _rem(self, p: list[str], a: list[str], n: int) -> str:
        return f"{self.value(a[0])} = {self._int(p[-1], a[1])} % {self._int(p[-1], a[2])}"

    def _sqrt(self, p: list[str], a: list[str], n: int) -> str | None:
        return f"{self.value(a[0])} = U(sqrtf(F({self.value(a[1])})))" if p[1:] == ["rn", "f32"] else None

    def _neg(self, p: list[str], a: list[str], n: int) -> str:
        if p[-1] == "f32":
            return f"{self.value(a[0])} = {self.value(a[1])} ^ 0x80000000u"
        return f"{self.value(a[0])} = 0 - {self.value(a[1])}"

    def _abs(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[-1] == "f32":
            return f"{self.value(a[0])} = {self.value(a[1])} & 0x7fffffffu"
        return f"s32 t = {self._int('s32', a[1])}; {self.value(a[0])} = t < 0 ? -(u32)t : t" if p[-1] == "s32" else None

    def _logic(self, sign: str, p: list[str], a: list[str]) -> str:
        return f"{self.value(a[0])} = {self.value(a[1])} {sign} {self.value(a[2])}"

    def _and(self, p: list[str], a: list[str], n: int) -> str:
        return self._logic("&", p, a)

    def _or(self, p: list[str], a: list[str], n: int) -> str:
        return self._logic("|", p, a)

    def _xor(self, p: list[str], a: list[str], n: int) -> str:
        return self._logic("^", p, a)

    def _not(self, p: list[str], a: list[str], n: int) -> str:
        return f"{self.value(a[0])} = {'!' if p[-1] == 'pred' else '~'}{self.value(a[1])}"

    def _lop3(self, p: list[str], a: list[str], n: int) -> str:
        x, y, z, table = self.value(a[1]), self.value(a[2]), self.value(a[3]), int(a[4], 0)
        terms = [
            f"({'' if i & 4 else '~'}(u32){x} & {'' if i & 2 else '~'}(u32){y} & {'' if i & 1 else '~'}(u32){z})"
            for i in range(8)
            if table >> i & 1
        ]
        return f"{self.value(a[0])} = {' | '.join(terms) or '0'}"

    def _shl(self, p: list[str], a: list[str], n: int) -> str:
        bits = int(_bits(p[-1]))
        x, by = self.value(a[1]), f"(u32){self.value(a[2])}"
        return f"{self.value(a[0])} = {by} < {bits} ? (u{bits}){x} << ({by} & {bits - 1}) : 0"

    def _shr(self, p: list[str], a: list[str], n: int) -> str:
        bits = int(_bits(p[-1]))
        x, by = self._int(p[-1], a[1]), f"(u32){self.value(a[2])}"
        if p[-1][0] == "s":
            return f"{self.value(a[0])} = {x} >> ({by} < {bits} ? {by} : {bits - 1})"
        return f"{self.value(a[0])} = {by} < {bits} ? {x} >> ({by} & {bits - 1}) : 0"

    def _shf(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[2] != "wrap":
            return None
        low, high, by = self.value(a[1]), self.value(a[2]), f"((u32){self.value(a[3])} & 31)"
        both = f"((u64)(u32){high} << 32 | (u32){low})"
        return (
            f"{self.value(a[0])} = (u32)({both} {'<<' if p[1] == 'l' else '>>'} {by}{' >> 32' if p[1] == 'l' else ''})"
        )

    def _bfe(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[-1] != "u32":
            return None
        x, start, length = (self.value(v) for v in a[1:])
        return f"{self.value(a[0])} = (u32)((u64)(u32){x} >> {start} & ((1ull << {length}) - 1))"

    def _clz(self, p: list[str], a: list[str], n: int) -> str | None:
        return f"u32 t = {self.value(a[1])}; {self.value(a[0])} = t ? __builtin_clz(t) : 32" if p[-1] == "b32" else None

    def _prmt(self, p: list[str], a: list[str], n: int) -> str:
        return f"{self.value(a[0])} = prmt({self.value(a[1])}, {self.value(a[2])}, {self.value(a[3])})"

    def _min(self, p: list[str], a: list[str], n: int, sign: str = "<") -> str | None:
        if p[-1] == "f32":  # a NaN loses, as in PTX
            x, y = (f"F({self.value(v)})" for v in a[1:3])
            if p[1:] != ["f32"]:
                return None
            return f"{self.value(a[0])} = {x} != {x} ? U({y}) : {y} != {y} ? U({x}) : U({x} {sign} {y} ? {x} : {y})"
        x, y = self._int(p[-1], a[1]), self._int(p[-1], a[2])
        return f"{self.value(a[0])} = {x} {sign} {y} ? {x} : {y}"

    def _max(self, p: list[str], a: list[str], n: int) -> str | None:
        return self._min(p, a, n, ">")

    def _setp(self, p: list[str], a: list[str], n: int) -> str | None:
        out, t = self.value(a[0]), p[-1]
        if len(a) != 3 or "|" in a[0]:
            return None
        if t == "f32":
            x, y = (f"F({self.value(v)})" for v in a[1:])
            if p[1] in ("num", "nan"):
                test = f"({x} == {x} && {y} == {y})"
                return f"{out} = {'' if p[1] == 'num' else '!'}{test}"
            if p[1].endswith("u") and p[1][:-1] in _COMPARE:  # or unordered
                return f"{out} = {x} != {x} || {y} != {y} || {x} {_COMPARE[p[1][:-1]]} {y}"
            if p[1] == "ne":  # C's != is true for NaN, PTX's is not
                return f"{out} = {x} == {x} && {y} == {y} && {x} != {y}"
            return f"{out} = {x} {_COMPARE[p[1]]} {y}"
        return f"{out} = {self._int(t, a[1])} {_COMPARE[p[1]]} {self._int(t, a[2])}"

    def _selp(self, p: list[str], a: list[str], n: int) -> str:
        return f"{self.value(a[0])} = {self.value(a[3])} ? {self.value(a[1])} : {self.value(a[2])}"

    def _cvt(self, p: list[str], a: list[str], n: int) -> str | None:
        out, kinds, to, x = self.value(a[0]), p[1:], p[-2], self.value(a[1])
        if kinds == ["rn", "bf16x2", "f32"] or kinds == ["rn", "f16x2", "f32"]:
            fn = to[:-2]
            return f"{out} = (u32){fn}(F({x})) << 16 | {fn}(F({self.value(a[2])}))"
        if kinds == ["f32", "f16"]:
            return f"{out} = U(from_f16({x}))"
        if kinds == ["rn", "f16", "f32"]:
            return f"{out} = f16(F({x}))"
        if kinds[0] in ("rzi", "rni") and kinds[1:] == ["s32", "f32"]:
            return f"{out} = (u32){kinds[0]}(F({x}))"
        if kinds[0] == "rn" and to == "f32" and p[-1] in ("s32", "u32", "u16", "s16", "s8", "u8", "s64", "u64"):
            return f"{out} = U((float){self._int(p[-1], a[1])})"
        if all(k[0] in "us" for k in kinds) and len(kinds) == 2:
            return f"{out} = ({to[0]}{_bits(to)}){self._int(p[-1], a[1])}"
        return None

    def _bar(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[1:] not in (["warp", "sync"], ["sync"]):
            return None
        self.shuffles = True
        return f"shfl(0, 0, 0, {n})"  # a shuffle nobody reads: all threads arrive before any goes on

    def _shfl(self, p: list[str], a: list[str], n: int) -> str | None:
        if p[1] != "sync" or p[2] not in ("idx", "bfly") or p[3] != "b32":
            return None
        self.shuffles = True
        out, _, flag = a[0].partition("|")
        sets = f"; {self.value(flag)} = 1" if flag else ""
        assert self.value(a[4]) in ("(0xffffffffull)", "(-1ull)", "((u64)(-1ll))") or a[4].startswith("%"), a
        return f"{self.value(out)} = shfl({int(p[2] == 'bfly')}, {self.value(a[1])}, {self.value(a[2])}, {n}){sets}"


def translate(ptx: str, kernels: Iterable[str], *, counts: bool = False) -> str:
    """C source with a function `NAME(args, threads, grid)` for each kernel; UnknownInstruction names what it lacks.

    counts: also an array `line_times` of u64: for each line of the PTX, from 0, how often threads came to it."""
    arrays = _Arrays(ptx)
    out = [_PRELUDE, *arrays.code, _SHARED, f"u64 line_times[{ptx.count(chr(10)) + 1}];" if counts else ""]
    for name in kernels:
        m = re.search(rf"\.entry {name}\((.*?)\)(.*?)\n\}}", ptx, re.S)
        if not m:
            raise ValueError(f"no kernel {name} in this PTX")
        first = ptx.count("\n", 0, m.start(2)) if counts else None
        out.append(_Kernel(name, re.findall(rf"({name}_param_\d+)", m[1]), m[2], arrays, first).translate())
    return "\n".join(out)


class Simulated:
    """Kernels from PTX, compiled as C; `launch` runs one with struct bytes as its parameter."""

    def __init__(self, ptx: str, kernels: Iterable[str], folder: Path, *, counts: bool = False) -> None:
        self._lines = ptx.count("\n") + 1
        names = list(kernels)
        jobs = []
        for name in names:  # a file each: two compile side by side
            source, library = folder / f"{name}.c", folder / f"{name}.so"
            source.write_text(translate(ptx, [name], counts=counts))
            flags = "-O0 -mfma -ffp-contract=off -w -shared -fPIC".split()
            jobs.append((name, library, ["gcc", *flags, str(source), "-o", str(library), "-lm"]))
        running: list[subprocess.Popen[bytes]] = []
        for _, _, command in jobs:
            if len(running) >= 2:
                assert running.pop(0).wait() == 0
            running.append(subprocess.Popen(command))
        assert all(process.wait() == 0 for process in running)
        self._libraries = {name: ctypes.CDLL(str(library)) for name, library, _ in jobs}

    def times(self, name: str) -> list[int]:
        """For each line of the PTX, how often threads of a kernel came to it so far; with `counts`."""
        return list((ctypes.c_uint64 * self._lines).in_dll(self._libraries[name], "line_times"))

    def launch(
        self, name: str, args: bytes, ranges: Iterable[tuple[int, int]], *, threads: int = 256, grid: int = 3
    ) -> None:
        """ranges: (address, bytes) the kernel may touch; anything else aborts the process."""
        library = self._libraries[name]
        listed = list(ranges)
        at = (ctypes.c_uint64 * len(listed))(*(a for a, _ in listed))
        size = (ctypes.c_uint64 * len(listed))(*(s for _, s in listed))
        library.zo_ranges(len(listed), at, size)
        getattr(library, name)(args, threads, grid)
