"""A run of a few steps, and what it gives: losses and stored weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zo_offload import Engine, MeZO

from .zoo.small import VOCAB

STEPS = 20
METHOD = MeZO(lr=1e-3, eps=1e-3, weight_decay=0.1, batch_size=4)
ADAPTED = dict(method=MeZO(lr=1e-2, batch_size=4), trainable="requires_grad", fold_every=4)
"""How models `with_adapters` are trained."""


def batches(n=STEPS, rows=4, length=12, vocab=VOCAB):
    g = torch.Generator().manual_seed(5)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, vocab, (n, rows, length), generator=g)]


def stored_weights(engine):
    return dict(engine.weights())


def train(model, steps=STEPS, data=None, micro_batches=1, method=METHOD, **settings):
    """Losses and stored weights after `steps` steps."""
    with Engine(model, method=method, **settings) as engine:
        result = engine.fit(data or batches(), steps=steps, micro_batches=micro_batches)
        return result.losses, stored_weights(engine)


@functools.cache
def resident(make, steps, **settings):
    """`train` with everything in memory; once for all the ways that must equal it."""
    losses, weights = train(make(), steps, offload="none", **settings)
    assert len(set(losses)) == steps, "the losses must move, or nothing is compared"
    return losses, weights


def in_words(way):
    """A test's id from its settings."""
    return " ".join([way["offload"], *(f"{name}={x}" for name, x in way.items() if name != "offload")])


def placed(way, folder):
    """The settings, with a run directory where blocks are on disk."""
    return {**way, "run_dir": folder / "run"} if way["offload"] == "disk" else way


ROWS = [
    {"input_ids": ids.tolist()} for ids in torch.randint(3, VOCAB, (18, 9), generator=torch.Generator().manual_seed(3))
]


def fit_rows(engine, steps=9, **options):
    return engine.fit(ROWS, steps=steps, batch_size=4, **options)


def squares(model, batch) -> Tensor:
    """A loss for whatever a model returns: the mean squares of all its floating point tensors."""
    found = [leaf for leaf in tree_leaves(model(**batch)) if torch.is_tensor(leaf) and leaf.is_floating_point()]
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()
