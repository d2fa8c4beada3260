"""The table of the Gaussian of sixteen bits, fitted anew: python -m benchmarks.noise_table

|z| of a half-word's lower 15 bits m is a cubic in a = (2 m + 1) * 2**15, one for each octave of a. Wanted is the mean
of |N(0, 1)| within each of the 32,768 intervals of equal chance; a is small where |z| is large, so the tail has fine
octaves. Each cubic is a minimax fit (Lawson 1961), its coefficients rounded to float32 from the highest down, the rest
fitted again each time. Then all values are scaled, and the outermost moved, until the exact second and fourth moments
over the 65,536 inputs are 1 and 3: these are what an estimate by perturbations depends on.

Prints the sixteen rows by the lower four bits of a's exponent, as csrc/noise.h and kernels/distributions.py have them,
and says whether those have the same. Fitting again on another machine may end an ulp aside: the rows in the sources are
the definition, this is how they were found.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from zo_offload.kernels.distributions import GAUSSIAN_ROWS
from zo_offload.kernels.float32 import fma

F64 = NDArray[np.float64]
HALF = 1 << 15
LARGEST = 40.0  # in place of infinity
POWERS = 4


def quantile(p: F64) -> F64:
    found: F64 = torch.special.ndtri(torch.from_numpy(p)).numpy()
    return found


def centroids() -> F64:
    """Mean of |N(0, 1)| between its quantiles, from the outermost interval inwards."""
    edges = np.append(LARGEST, -quantile(np.arange(1, HALF + 1) / (2 * HALF)))
    density = np.exp(-edges * edges / 2) / np.sqrt(2 * np.pi)
    return (density[1:] - density[:-1]) * 2 * HALF


A32 = ((2 * np.arange(HALF) + 1) << 15).astype(np.float32)
A: F64 = A32.astype(np.float64)
OCTAVE = A32.view(np.uint32) >> np.uint32(23) & np.uint32(15)


def magnitudes(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """|z| of every m, as the kernels compute it."""
    c = rows[OCTAVE].T
    return fma(fma(fma(c[3], A32, c[2]), A32, c[1]), A32, c[0])


def fit_octave(a: F64, wanted: F64, last: bool) -> F64:
    """Rounded coefficients of one octave. last: its end is m = 32,767, whose |z| must stay the least, and above 0."""
    x, count = a / a.max(), min(POWERS, len(a))
    powers = np.stack([x**k for k in range(count)], axis=1)
    weights, best, least = np.ones(len(a)) / len(a), np.zeros(count), np.inf
    for _ in range(200 if len(a) > 2 * count else 1):
        root = np.sqrt(weights + last * 1e6 * (x >= 1))
        found = np.linalg.lstsq(powers * root[:, None], wanted * root, rcond=None)[0]
        error = np.abs(powers @ found - wanted)
        if error.max() < least:
            best, least = found, error.max()
        weights = weights * (error / max(error.max(), 1e-300) + 1e-6)
        weights /= weights.sum()
    rest, rounded = powers @ best, np.zeros(POWERS)
    for k in range(count - 1, -1, -1):
        found = np.linalg.lstsq(powers[:, : k + 1], rest, rcond=None)[0]
        rounded[k] = np.float32(found[k] / a.max() ** k)
        rest = rest - rounded[k] * a**k
    return rounded


def fit(wanted: F64) -> NDArray[np.float32]:
    rows = np.zeros((16, POWERS), np.float32)
    for octave in range(16):
        inside = np.equal(OCTAVE, octave)
        if inside.any():
            rows[octave] = fit_octave(A[inside], wanted[inside], last=bool(inside[-1]))
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    wanted = centroids()
    outermost, scale = float(wanted[0]), 1.0
    for _ in range(12):
        rows = fit(np.append(outermost, wanted[1:]) * scale)
        z = magnitudes(rows).astype(np.float64)
        second, fourth = float(np.mean(z**2)), float(np.mean(z**4))
        scale /= second**0.5
        outermost += (3 - fourth / second**2) * HALF / (4 * float(z[0]) ** 3)
    print(f"E z^2 = 1 {second - 1:+.1e}, E z^4 = 3 {fourth - 3:+.1e}, |z| from {z[-1]:.3g} to {z[0]:.6f}")
    for row in rows:
        print("    (" + ", ".join(f"0x{word:08X}" for word in row.view(np.uint32)) + "),")
    same = np.array_equal(rows.view(np.uint32), np.array(GAUSSIAN_ROWS, np.uint32))
    print("the sources have these rows" if same else "the sources have other rows")


if __name__ == "__main__":
    main()
