"""FedKSeed's pool of seeds: MeZO with K fixed noises, one of which each step draws at random.

    z_t = noise of seed k_t of K          g = (L(w + eps z_t) - L(w - eps z_t)) / (2 eps)          w <- w - lr g z_t

A whole run of any length is then K numbers, the sum of lr g for each seed, and several machines agree by exchanging
them (`journal/rounds.py`). So the rate must be constant between exchanges, and weight decay, which would give earlier
steps less weight, is refused. A step whose |L+ - L-| is above `grad_clip` changes nothing. Applying a seed's sum is not
bit-equal to applying its steps one by one: the journal keeps the steps, and a round's sums as one step. Source: Qin et
al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes",
arXiv 2312.06353.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.records import Perturbation
from ..numerics.noise import step_seed
from .mezo import MeZO
from .pooled import Pooled

_POOL, _CHOICE = 1 << 20, 1 << 21  # indices of noises that no method's own noises reach


@dataclass(frozen=True, kw_only=True)
class SeedPool(MeZO, Pooled, name="seed-pool"):
    """MeZO along K fixed directions, one random one per step."""

    lr: float = 3e-7
    """Peak learning rate."""
    pool: int = 4096
    """Number of seeds, K: the paper has 1024 to 4096."""
    grad_clip: float = 100.0
    """A step whose two losses differ by more changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.pool <= _POOL or not self.grad_clip > 0:
            raise ConfigError(
                f"pool={self.pool}, grad_clip={self.grad_clip}: expected 1 to {_POOL} seeds, and a limit above 0"
            )
        if self.weight_decay:
            raise ConfigError(f"weight_decay={self.weight_decay}: a pool of seeds has no order of steps to decay by")

    def chosen(self, run_seed: int, step: int) -> int:
        """The index of the step's seed in the pool, 0 .. pool - 1."""
        return step_seed(run_seed, step, _CHOICE) % self.pool

    def seed_of(self, run_seed: int, index: int) -> int:
        """The pool's seed with this index."""
        return step_seed(run_seed, index, _POOL)

    def draw(self, client: str, begin: int, step: int) -> int:
        """The index of a client's local step: see `Pooled`."""
        seed = hashlib.blake2b(f"{client}\n{begin}".encode(), digest_size=8).digest()
        return step_seed(int.from_bytes(seed, "little"), step, _CHOICE) % self.pool

    def of_client(self, client: str, begin: int) -> SeedPool:
        """This method for the local steps of a client: see `Pooled`."""
        own = {part.name: getattr(self, part.name) for part in fields(self)}
        return _OfClient(**own, client=client, begin=begin)

    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The chosen noise, added and subtracted."""
        seed = self.seed_of(run_seed, self.chosen(run_seed, step))
        return Perturbation(seed, self.eps32), Perturbation(seed, -self.eps32)

    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        apart = (losses[:1] - losses[1:]).abs()
        return torch.where(apart > self.grad_clip, 0.0 * apart, lr * self.projected(losses))


@dataclass(frozen=True, kw_only=True)
class _OfClient(SeedPool):
    """`SeedPool.of_client`."""

    client: str
    begin: int

    def chosen(self, run_seed: int, step: int) -> int:
        return self.draw(self.client, self.begin, step)
