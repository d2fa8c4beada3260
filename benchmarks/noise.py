"""The noise as a source of directions: what it is exactly, what samples of it show, and what an estimate gets from it.

    python -m benchmarks.noise [--quick] [--only exact|samples|quadratic|net] > noise.jsonl

One JSON line a result on standard output, the same as lines on standard error. Layouts 1 and 2 of the Gaussian, 10 and
7 rounds, and Rademacher beside them.

exact      the Gaussian of layout 2 by enumeration of its 65,536 inputs, against N(0, 1): moments, tails, the largest
           error of a quantile, Kolmogorov's distance and how many samples show it.
samples    moments and tails of `numel` values, `largest_z`: how many standard errors the worst of them is from its law
           (enumerated for layout 2, N(0, 1) for layout 1). Correlations of z, and of z^2 - 1, with itself at other
           elements, seeds and parameters: how many, and the largest, in standard errors. Bits: chi-square of the
           half-words, of neighbouring bytes and of neighbouring blocks, each as a normal deviate.
quadratic  the two-point estimate g = (z' grad) z on a quadratic of 1000 dimensions, eigenvalues over four decades: mean
           of (z' grad)^2 / |grad|^2 (1), of |g|^2 / |grad|^2 (d + 2; d for signs), squared bias times draws / (d + 1)
           (1: none), mean and deviation of z'Hz (tr H; sqrt(2 tr H^2), 0 for signs of a diagonal H).
net        a tanh net of 2,762 parameters: the same ratio, and the loss after SPSA from several seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import about
from zo_offload.kernels import philox
from zo_offload.kernels.distributions import gaussian_table
from zo_offload.numerics.noise import NoiseSpec, noise, step_seed

GAUSSIANS = [NoiseSpec("gaussian", rounds, layout) for layout in (2, 1) for rounds in (10, 7)]
ALL = [*GAUSSIANS, NoiseSpec("rademacher")]
NORMAL_MOMENTS = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0, 7: 0.0, 8: 105.0}
TAILS = (1.0, 2.0, 3.0, 3.5, 4.0)
LAGS = (1, 2, 3, 4, 5, 7, 8, 16, 64, 127, 128, 256, 512, 1000, 1024)
SEED, PARAM = 0x1234_5678_9ABC_DEF0, 0xC0FFEE


def named(spec: NoiseSpec) -> dict[str, Any]:
    return {"noise": spec.distribution, "layout": spec.layout, "rounds": spec.rounds}


def tail(x: float) -> float:
    """P(|N(0, 1)| > x)"""
    return math.erfc(x / math.sqrt(2))


# ---- the law itself


def exact(_: bool) -> Iterator[dict[str, Any]]:
    z = np.sort(gaussian_table().astype(np.float64))
    count = len(z)
    middle = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).numpy()
    below = 0.5 * torch.special.erfc(torch.from_numpy(-z / math.sqrt(2))).numpy()
    at = np.arange(count) / count
    distance = float(max(np.abs(below - at).max(), np.abs(below - at - 1 / count).max()))
    yield {
        "case": "exact", "inputs": count, "distinct": len(np.unique(z)), "largest": float(z[-1]),
        "least": float(np.abs(z).min()), "symmetric": bool((z == -z[::-1]).all()),
        "moments": {str(k): float(np.mean(z**k)) for k in NORMAL_MOMENTS},
        "tails": {str(x): [float(np.mean(np.abs(z) > x)), tail(x)] for x in TAILS},
        "quantile_error": float(np.abs(z - middle)[1:-1].max()),
        "quantile_error_below_2": float(np.abs(z - middle)[np.abs(middle) < 2].max()),
        "kolmogorov": distance, "samples_to_see_it": round((1.358 / distance) ** 2),
    }  # fmt: skip


# ---- samples


def law(spec: NoiseSpec) -> tuple[dict[int, float], dict[float, float]]:
    """Moments and tails: exact where there are few values, N(0, 1)'s for Box-Muller."""
    if spec.distribution == "rademacher":
        return {k: float(k % 2 == 0) for k in range(1, 17)}, dict.fromkeys(TAILS, 0.0)
    if spec.layout == 1:
        even = {2 * k: math.prod(range(1, 2 * k, 2)) * 1.0 for k in range(1, 9)}
        return {k: even.get(k, 0.0) for k in range(1, 17)}, {x: tail(x) for x in TAILS}
    z = gaussian_table().astype(np.float64)
    return {k: float(np.mean(z**k)) for k in range(1, 17)}, {x: float(np.mean(np.abs(z) > x)) for x in TAILS}


def deviations(spec: NoiseSpec, numel: int) -> tuple[dict[str, float], float]:
    """Of sampled moments and tails: what they are, and how many standard errors the worst is off."""
    moments, tails = law(spec)
    sums, above, chunk = dict.fromkeys(NORMAL_MOMENTS, 0.0), dict.fromkeys(TAILS, 0), 1 << 22
    for start in range(0, numel, chunk):
        z = noise(spec, SEED, PARAM, chunk, start).double()
        power = torch.ones_like(z)
        for k in sums:
            power *= z
            sums[k] += float(power.sum())
        for x in above:
            above[x] += int((z.abs() > x).sum())
    total = -(-numel // chunk) * chunk
    worst = 0.0
    for k in sums:
        error = math.sqrt((moments[2 * k] - moments[k] ** 2) / total)
        worst = max(worst, abs(sums[k] / total - moments[k]) / error if error else 0.0)
    for x, p in tails.items():
        if 0 < p < 1:
            worst = max(worst, abs(above[x] / total - p) / math.sqrt(p * (1 - p) / total))
    return {str(k): value / total for k, value in sums.items()}, worst


def correlations(spec: NoiseSpec, numel: int) -> tuple[int, float]:
    """How many, and the largest in standard errors, of z and of z^2 - 1 with other elements, seeds and parameters."""
    z = noise(spec, SEED, PARAM, numel + max(LAGS)).double()
    here = z[:numel]
    others = [z[lag : lag + numel] for lag in LAGS]
    for seed, param, element in (
        (SEED + 1, PARAM, 0), (SEED ^ 1 << 32, PARAM, 0), (SEED ^ 1 << 63, PARAM, 0), (SEED, PARAM + 1, 0),
        (SEED, PARAM ^ 1 << 31, 0), (SEED, PARAM, 1 << 20), (SEED, PARAM, 1 << 35),
    ):  # fmt: skip
        others.append(noise(spec, seed, param, numel, element).double())
    found = []
    for other in others:
        found.append(abs(float((here * other).mean())) * math.sqrt(numel))
        if spec.distribution != "rademacher":
            a, b = here**2 - 1, other**2 - 1
            found.append(abs(float((a * b).mean() / a.var())) * math.sqrt(numel))
    return len(found), max(found)


def chi_square(counts: NDArray[np.int64]) -> float:
    """Of counts that should be equal, as a normal deviate (Wilson and Hilferty 1931)."""
    expected, free = counts.sum() / len(counts), len(counts) - 1
    x = float(((counts - expected) ** 2).sum() / expected)
    return float(((x / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free)))


def bits(rounds: int, numel: int) -> dict[str, float]:
    """Deviates of the half-words that the Gaussian is made of."""
    cells = {
        name: np.zeros(1 << 16, np.int64) for name in ("half-words", "bytes of neighbours", "same word, next block")
    }
    for start in range(0, numel // 8, 1 << 16):
        w = philox.words(SEED, PARAM, philox.TAG_GAUSSIAN, rounds, start, 1 << 16)
        halves = np.ascontiguousarray(w).view(np.uint16).reshape(-1)
        across = (halves[:-1] & 0xFF).astype(np.uint32) << 8 | halves[1:] >> 8
        down = (w[:-1] >> 24 << 8 | w[1:] >> 24).reshape(-1)
        for name, values in zip(cells, (halves, across, down), strict=True):
            cells[name] += np.bincount(values, minlength=1 << 16)
    return {name: chi_square(counts) for name, counts in cells.items()}


def samples(quick: bool) -> Iterator[dict[str, Any]]:
    numel, short = (1 << 22, 1 << 20) if quick else (1 << 26, 1 << 23)
    for spec in ALL:
        moments, worst = deviations(spec, numel)
        count, largest = correlations(spec, short)
        result = {
            "case": "samples", **named(spec), "numel": numel, "moments": moments, "largest_z": worst,
            "correlations": count, "correlated_over": short, "largest_correlation_z": largest,
        }  # fmt: skip
        if spec.layout == 2 and spec.distribution == "gaussian":
            result["bits"] = bits(spec.rounds, numel // 8)
        yield result


# ---- estimates


def directions(spec: NoiseSpec, run: int, count: int, numel: int) -> Tensor:
    """[count, numel], a seed each, as the steps of a run have them."""
    return torch.stack([noise(spec, step_seed(run, step), PARAM, numel) for step in range(count)]).double()


def quadratic(quick: bool) -> Iterator[dict[str, Any]]:
    dims, draws = 1000, 2_000 if quick else 100_000
    spectrum = torch.logspace(-2, 2, dims, dtype=torch.float64)
    grad = torch.randn(dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * spectrum
    unit = grad / grad.norm()
    for spec in ALL:
        slopes, squares, curvature, mean = [], [], [], torch.zeros(dims, dtype=torch.float64)
        for first in range(0, draws, 1000):
            z = directions(spec, first, min(1000, draws - first), dims)
            p = z @ unit
            slopes.append(p**2)
            squares.append(p**2 * (z**2).sum(1))
            curvature.append(z**2 @ spectrum)
            mean += p @ z
        bias = ((mean / draws - unit) ** 2).sum()
        joined = [torch.cat(parts) for parts in (slopes, squares, curvature)]
        yield {
            "case": "quadratic", **named(spec), "dimensions": dims, "draws": draws,
            "slope_squared": float(joined[0].mean()), "slope_squared_error": float(joined[0].std() / draws**0.5),
            "estimate_squared": float(joined[1].mean()), "bias_squared_over_expected": float(bias * draws / (dims + 1)),
            "curvature": float(joined[2].mean()), "curvature_deviation": float(joined[2].std()),
            "trace": float(spectrum.sum()), "deviation_of_gaussian": float((2 * (spectrum**2).sum()).sqrt()),
        }  # fmt: skip


SHAPES = ((32, 64), (64, 10))


def net_loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    first, at = SHAPES[0][0] * SHAPES[0][1], 0
    hidden = torch.tanh(x @ w[:first].view(SHAPES[0]) + w[first : first + 64])
    at = first + 64
    logits = hidden @ w[at : at + 640].view(SHAPES[1]) + w[at + 640 :]
    return torch.nn.functional.cross_entropy(logits, y)


def net(quick: bool) -> Iterator[dict[str, Any]]:
    numel = sum(a * b + b for a, b in SHAPES)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=g).double()
    y = (x @ torch.randn(32, 10, generator=g).double()).argmax(1)
    start = torch.randn(numel, generator=g).double() * 0.15
    at = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net_loss(at, x, y), at)
    draws, runs, steps = (500, 2, 200) if quick else (10_000, 24, 1500)
    for spec in ALL:
        slopes = torch.cat([(directions(spec, k, 500, numel) @ grad / grad.norm()) ** 2 for k in range(draws // 500)])
        losses = [train(spec, run, steps, start, x, y) for run in range(runs)]
        spread = torch.tensor(losses, dtype=torch.float64)
        yield {
            "case": "net", **named(spec), "parameters": numel, "draws": draws, "slope_squared": float(slopes.mean()),
            "slope_squared_error": float(slopes.std() / draws**0.5), "runs": runs, "steps": steps,
            "first_loss": float(net_loss(start, x, y)), "last_loss": float(spread.mean()),
            "last_loss_error": float(spread.std() / runs**0.5),
        }  # fmt: skip


@torch.no_grad()
def train(spec: NoiseSpec, run: int, steps: int, w: Tensor, x: Tensor, y: Tensor) -> float:
    """The loss after so many steps of two-point SPSA at a constant rate."""
    w, eps, lr = w.clone(), 1e-3, 4e-4
    for step in range(steps):
        z = noise(spec, step_seed(1000 + run, step), PARAM, w.numel()).double()
        slope = (net_loss(w + eps * z, x, y) - net_loss(w - eps * z, x, y)) / (2 * eps)
        w -= lr * slope * z
    return float(net_loss(w, x, y))


CASES = {"exact": exact, "samples": samples, "quadratic": quadratic, "net": net}


def told(result: dict[str, Any]) -> str:
    """A line for people."""
    if result["case"] == "exact":
        return (
            f"exact: E z^2 = 1 {result['moments']['2'] - 1:+.1e}, E z^4 = 3 {result['moments']['4'] - 3:+.1e}, |z| <= "
            f"{result['largest']:.4f}, quantiles to {result['quantile_error_below_2']:.1e} below 2, Kolmogorov "
            f"{result['kolmogorov']:.2e}: {result['samples_to_see_it']:.1e} samples to see it"
        )
    about = f"{result['case']:9} {result['noise']:10} layout {result['layout']} rounds {result['rounds']:2}: "
    if result["case"] == "samples":
        deviates = " ".join(f"{name} {z:+.1f}" for name, z in result.get("bits", {}).items())
        return about + (
            f"moments and tails within {result['largest_z']:.1f} standard errors, {result['correlations']} correlations"
            f" within {result['largest_correlation_z']:.1f}  {deviates}"
        )
    slope = f"slope^2 {result['slope_squared']:.4f} +- {result['slope_squared_error']:.4f}, "
    if result["case"] == "quadratic":
        return (
            about
            + slope
            + (
                f"|g|^2 {result['estimate_squared']:.1f}, bias {result['bias_squared_over_expected']:.3f}, z'Hz "
                f"{result['curvature']:.0f} +- {result['curvature_deviation']:.0f} (tr H {result['trace']:.0f})"
            )
        )
    return about + slope + f"loss {result['last_loss']:.4f} +- {result['last_loss_error']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small samples, some seconds")
    parser.add_argument("--only", choices=tuple(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = about("noise")
    for name, case in CASES.items():
        if options.only in (None, name):
            for result in case(options.quick):
                print(json.dumps({**common, **result}), flush=True)
                print(told(result), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
