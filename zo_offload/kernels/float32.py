"""IEEE-754 binary32 arithmetic on the host, each operation rounded once, as in csrc/noise.h.

numpy has no fma. A product of two float32 is exact in float64, and the sum is rounded *to odd* there; the final
rounding to float32 then gives the correctly rounded result (Boldo and Melquiond 2008).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def fma(a: F32 | np.float32, b: F32 | np.float32, c: F32 | np.float32) -> F32:
    """a * b + c with one rounding, as IEEE-754 binary32 fma."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # 24 x 24 bits: exact
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        # Knuth's TwoSum: what the float64 sum lost
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        # round to odd: if anything was lost and the last bit is even, step to the neighbour on the lost side
        bits = total.view(np.int64)
        step = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
        bits = bits + np.where(step, np.where((lost > 0) == (total > 0), 1, -1), 0)
        return bits.view(np.float64).astype(np.float32)


def polynomial(x: F32, *coefficients: float) -> F32:
    """Horner in fma, highest power first."""
    value: F32 | np.float32 = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, np.float32(coefficient))
    return np.asarray(value)


def scaled(x: float, gain: float) -> float:
    """The product of two float32, as float32."""
    return float(np.float32(x) * np.float32(gain))
