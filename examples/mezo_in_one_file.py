"""MeZO in one file: what the engine computes, with nothing streamed: the whole model in memory, and a plain loop.

    python examples/mezo_in_one_file.py path/to/checkpoint some_text.txt

Algorithm 1 of Malladi et al. 2023, with two differences. The weights are never perturbed in place: each loss is that of
a perturbed copy, so nothing drifts. And noise is a function of (seed, parameter, element) instead of a generator's
state, the one thing that is taken from zo_offload. tests/methods/test_one_file.py trains the engine beside this, from
disk and in memory, and finds the same losses and weights, bit for bit.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_offload.numerics.noise import NoiseSpec, assign_param_ids, noise, step_seed


def float32(x):
    return torch.tensor(x, dtype=torch.float32)


def fma(a, x, y):
    """a * x + y in float32, rounded once, as a processor's fma instruction has it; torch has no such operation.

    The product is exact in float64. The sum is rounded to odd there: where it lost something and its last bit is even,
    it takes the neighbour towards what was lost. Rounding that to float32 equals rounding the exact sum.
    """
    product, y = a.double() * x.double(), y.double()
    total = product + y
    part = total - product
    lost = (product - (total - part)) + (y - part)
    bits = total.view(torch.int64)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    return torch.where((lost != 0) & (bits % 2 == 0), bits + step, bits).view(torch.float64).float()


@torch.no_grad()
def mezo(model, batches, *, lr, eps, weight_decay=0.0, run_seed=0):
    """Train a float32 model in place, a step a batch; returns the loss of each step, the mean of its two."""
    spec = NoiseSpec("gaussian")
    parameters = dict(model.named_parameters())  # a tied weight once, by its first name
    ids = assign_param_ids(list(parameters))
    eps = float32(eps)
    told = []
    for step, batch in enumerate(batches):
        seed = step_seed(run_seed, step)
        weights = {name: p.data for name, p in parameters.items()}
        z = {name: noise(spec, seed, ids[name], p.numel()).view(p.shape) for name, p in parameters.items()}

        losses = []
        for scale in (eps, -eps):
            for name, p in parameters.items():
                p.data = fma(scale, z[name], weights[name])
            losses.append(model(**batch).loss.item())

        grad = (losses[0] - losses[1]) / (2 * eps.item())  # the slope of the loss along z
        coefficient = float32(lr * grad)
        for name, p in parameters.items():
            decay = float32(1 - lr * weight_decay) if p.ndim > 1 else float32(1.0)  # norms and biases do not decay
            p.data = fma(-coefficient, z[name], weights[name] * decay)
        told.append((losses[0] + losses[1]) / 2)
    return told


def main(checkpoint, text_file, steps=20, rows=4, tokens=64):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with open(text_file) as file:
        ids = AutoTokenizer.from_pretrained(checkpoint)(file.read(), return_tensors="pt").input_ids[0]
    width = rows * tokens
    starts = [i * width % max(1, len(ids) - width) for i in range(steps)]
    chunks = [ids[start : start + width].view(rows, tokens) for start in starts]
    for loss in mezo(model, [{"input_ids": chunk, "labels": chunk} for chunk in chunks], lr=1e-6, eps=1e-3):
        print(f"{loss:.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
