"""MeZO in a few lines, as the paper has it: whole model in memory, weights changed in place, float64 if asked.

Independent of the engine: it shares only the noise function. `run` is Algorithm 1 of Malladi et al. 2023.
"""

from __future__ import annotations

import torch

from zo_offload.numerics.noise import NoiseSpec, assign_param_ids, noise, step_seed


def perturb(model, ids, seed, scale, spec):
    for name, p in model.named_parameters():
        p.data.add_(scale * noise(spec, seed, ids[name], p.numel()).view(p.shape).to(p.dtype))


def run(model, batches, *, lr, eps, weight_decay=0.0, run_seed=0, spec=None, trainable=lambda name: True):
    """Train in place; returns the list of (loss at +eps, loss at -eps)."""
    spec = spec or NoiseSpec()
    ids = assign_param_ids([name for name, _ in model.named_parameters()])
    losses = []
    with torch.no_grad():
        for step, batch in enumerate(batches):
            seed = step_seed(run_seed, step)
            stored = {name: p.data.clone() for name, p in model.named_parameters()}
            pair = []
            for scale in (eps, -eps):
                for name, p in model.named_parameters():
                    if trainable(name):
                        z = noise(spec, seed, ids[name], p.numel()).view(p.shape).to(p.dtype)
                        p.data = stored[name] + scale * z
                pair.append(float(model(**batch).loss))
            grad = (pair[0] - pair[1]) / (2 * eps)
            for name, p in model.named_parameters():
                z = noise(spec, seed, ids[name], p.numel()).view(p.shape).to(p.dtype)
                decay = 1 - lr * weight_decay if p.ndim > 1 else 1.0
                p.data = stored[name] * decay - lr * grad * z if trainable(name) else stored[name]
            losses.append(tuple(pair))
    return losses
