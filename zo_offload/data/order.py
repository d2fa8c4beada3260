"""The order of rows in an epoch: a permutation, and batches of rows of similar length made of it."""

from __future__ import annotations

import torch
from torch import Tensor

_BATCHES = 64  # batches that are sorted together: enough for similar neighbours, few enough for a random order


def bucketed(order: Tensor, sizes: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """The order with rows of similar size in one batch; the batches are in random order. Rows that do not fill a batch
    stay last, as in the given order."""
    whole = len(order) // batch_size * batch_size
    parts = [part[sizes[part].argsort(stable=True)] for part in torch.split(order[:whole], _BATCHES * batch_size)]
    batches = torch.cat(parts).view(-1, batch_size) if parts else order[:0].view(0, batch_size)
    shuffled = batches[torch.randperm(len(batches), generator=generator, device="cpu")]
    return torch.cat([shuffled.reshape(-1), order[whole:]])
