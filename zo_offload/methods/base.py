"""What every method is: fields that all share, its lanes, and how their losses become updates.

    class Mine(Method):                                   one file, here or the user's own; see docs/extending.md
        perturbations(run_seed, step) -> lanes            what each forward of a step sees: w + scale * z(seed)
        coefficients(losses, lr)      -> one a noise      w <- w - coefficient * z, float64 tensors
        summary(losses)               -> (loss, grad)     what the journal and people are told of the step

The arithmetic is written once, on tensors: on the host they are float64 on the CPU; where losses are read a step late
(`late.py`) the same operations run on the GPU, and the host checks a step later that both came to the same bits.
`scalars.py` has the operations that torch does not do alike on both. Everything else is derived: the noises of a step
are those of its lanes, the journal has one update a noise, replay needs only the journal.

A method may also
    remember           a few float64 numbers, a function of what the journal has of the steps before: `first_memory`,
                       `remember`, and `coefficients_from` in place of `coefficients`
    use more noises    than its lanes have, those of earlier steps say: `seeds`
    use sums of noises as what its lanes are perturbed along, by coefficients that it remembers: `term_coefficients`
    come back          to the weights in the same step, with lanes that depend on the losses so far: `next_lanes`
    leave elements out of its lanes and updates, by their magnitude or by chance: `mask`
    leave parts out    of a model, other ones in each step: `part` and `trained_parts`

A class registers itself in METHODS by its name: `class MeZO(Method, name="mezo")`, or the class's own name. A class
whose name begins with an underscore is a part for others and is not registered.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self, final

import numpy as np
import torch
from torch import Tensor

from .. import hf
from ..errors import ConfigError, DivergenceError
from ..kernels.distributions import DISTRIBUTIONS
from ..kernels.records import ONE, Gain, Mask, Perturbation, Smallest, Trains, Update, noises_of, seeds_of
from ..numerics.noise import LAYOUT_VERSION, Layout, NoiseSpec
from ..numerics.updates import Parts
from .outcome import Outcome, Step, Told
from .presets import recipe

METHODS: dict[str, type[Method]] = {}
"""Every method by its name, also those of a user's own classes once they are defined."""

COEFF_LIMIT = 3e38  # what float32 holds, and a little less
_PACKAGE = __name__.rpartition(".")[0]
_TOLD = 9  # losses that an error names one by one


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. Subclasses are frozen, keyword-only dataclasses; their fields are the run's identity."""

    lr: float
    """Peak learning rate."""
    eps: float = 1e-3
    """Perturbation scale."""
    weight_decay: float = 0.0
    """Decoupled: w is multiplied by 1 - lr * weight_decay. Biases and norms (1-D parameters) are left out."""
    schedule: str = "constant"
    """Any of transformers' schedule names that is a function of the step (linear, cosine, ...)."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0, with schedules that have that."""
    distribution: str = field(default="gaussian", metadata={"choices": tuple(DISTRIBUTIONS)})
    """The noise's distribution: a name of `distributions.DISTRIBUTIONS`."""
    rounds: Literal[7, 10] = 10
    """Philox rounds of the noise. Part of the run's identity."""
    noise_layout: Layout = LAYOUT_VERSION
    """Layout of the noise: 1 has the Gaussian of runs before version 2 of it, half as fast. A run keeps the one it was
    begun with, whatever is given when it is resumed."""
    on_nonfinite: Literal["stop", "skip", "halve_eps"] = "stop"
    """A NaN or infinite loss or update ends the run with an error; or skips the step; or skips it and halves eps from
    the next step on, ten times at most. Recorded in the journal, so a resumed run goes on with the same eps."""
    batch_size: int = field(default=16, metadata={"option": False})
    """Default batch size of `fit`."""
    steps: int = field(default=1000, metadata={"option": False})
    """Default number of steps of `fit`."""
    tunes: Literal["all", "lora", "prefix"] | None = field(default=None, metadata={"option": False})
    """What a preset's rates are for; checked against what trains."""

    name: ClassVar[str] = ""
    """What it goes by in a run's records and on the command line. Set by the class statement."""
    target: ClassVar[Trains] = "values"
    """Which part of the stored weights is perturbed and updated."""
    unit_scales: ClassVar[bool] = False
    """Whether scales are moved in units of the weights they scale: see `gains.py`."""
    comes_back: ClassVar[bool] = False
    """Whether `next_lanes` may give some. On a GPU the host then waits for each visit's losses."""

    def __init_subclass__(cls, *, name: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.name = cls.__name__ if name is None else name
        if "update" in vars(cls):
            raise TypeError(
                f"{cls.__qualname__}.update: what becomes of losses is said once, in `coefficients` and `summary`, "
                "which a GPU can follow too"
            )
        there = METHODS.get(cls.name)
        if there is not None and there.own() and not cls.own():
            raise ConfigError(
                f"class {cls.__qualname__}: a method named {cls.name!r} is there already; give another, "
                f"class {cls.__name__}(..., name='...')"
            )
        if not cls.__name__.startswith("_"):
            METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_fields()
        for what in ("lr", "eps"):
            value = getattr(self, what)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{what}={value}: expected a positive number")
        if not 2.0**-126 <= self.eps <= 2.0**64:
            raise ConfigError(
                f"eps={self.eps}: no float32 between 1.2e-38 and 1.8e19; published recipes have 1e-4 to 0.1"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay={self.weight_decay}: expected zero or a positive number")
        if self.lr * self.weight_decay >= 1:
            product = self.lr * self.weight_decay
            raise ConfigError(f"lr * weight_decay = {product:g} would erase the weights; keep it below 1")
        if self.warmup_steps < 0 or self.steps < 1 or self.batch_size < 1:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}, steps={self.steps}, batch_size={self.batch_size}: "
                "expected >= 0, >= 1, >= 1"
            )
        if self.on_nonfinite not in ("stop", "skip", "halve_eps"):
            raise ConfigError(f"on_nonfinite={self.on_nonfinite!r}: expected 'stop', 'skip' or 'halve_eps'")
        if self.target != "values" and type(self).mask is not Method.mask:
            raise ConfigError(
                f"method {self.name!r} trains {self.target}: a mask is of the values, which it leaves alone"
            )
        NoiseSpec(self.distribution, self.rounds, self.noise_layout)  # checks them
        lr_schedule(self.schedule, self.warmup_steps, max(self.steps, self.warmup_steps))

    def _check_kinds(self) -> None:
        for what in ("warmup_steps", "steps", "batch_size"):
            if not isinstance(getattr(self, what), int):
                raise ConfigError(f"{what}={getattr(self, what)!r}: expected a whole number")
        for what in ("lr", "eps", "weight_decay"):
            if not isinstance(getattr(self, what), (int, float)):
                raise ConfigError(f"{what}={getattr(self, what)!r}: expected a number")
        if self.tunes not in (None, "all", "lora", "prefix"):
            raise ConfigError(f"tunes={self.tunes!r}: expected None, 'all', 'lora' or 'prefix'")

    def _check_fields(self) -> None:
        """A field that is not one, or that a run's records cannot hold, would not be part of the run's identity."""
        cls = type(self)
        known = {part.name for part in dataclasses.fields(self)}
        own = {name for name, kind in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(kind)}
        if missing := sorted(own - known):
            raise ConfigError(
                f"class {cls.__qualname__}: {', '.join(missing)} is no field. Decorate the class with "
                "@dataclass(frozen=True, kw_only=True)"
            )
        try:
            json.dumps(dataclasses.asdict(self))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method {self.name!r}: its fields must be numbers, strings or lists ({error})") from None

    @classmethod
    def own(cls) -> bool:
        """Whether the class is the package's own, which a run's records name without saying where it lies."""
        return cls.__module__.startswith(f"{_PACKAGE}.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published recipe of this method by name (`presets.py`), with any field changed."""
        return cls(**{**recipe(cls.name, name), **changes})

    def with_options(self, **changes: Any) -> Self:
        return replace(self, **changes)

    # ---- what a method says --------------------------------------------------------------------------------------

    @abstractmethod
    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The step's lanes. A function of these two alone: `noise.step_seed(run_seed, step, i)` is noise i's seed. What
        a lane has from steps before, it has by `term_coefficients`."""

    @abstractmethod
    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """Each noise's coefficient, the learning rate in it: w <- w - coefficient * z.

        losses: float64 [lanes], on the CPU or on a GPU, in the order of the lanes; returns float64 [noises] there. Must
        not read values (no `float`, no `if` on a tensor), and use operations that `scalars.py` names or has.
        """

    @abstractmethod
    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, grad) of a step for its record, 0-d float64. As `coefficients`. grad: 0 iff the step changed nothing
        but weight decay; a slope or a length of the gradient by choice."""

    def scalars(self, losses: Tensor) -> Tensor:
        """What the journal keeps of a step beside loss and grad, for `remember`: float64 [any], as `coefficients`."""
        return losses[:0]

    def first_memory(self) -> tuple[float, ...]:
        """What is remembered before step 0. Empty: nothing ever is."""
        return ()

    def remember(self, memory: Tensor, told: Told) -> Tensor:
        """What is remembered after a step. memory: float64, as before it. As `coefficients`, and of any eps."""
        return memory

    def pass_over(self, memory: Tensor) -> Tensor:
        """What is remembered after a step that was skipped."""
        return memory

    def coefficients_from(self, memory: Tensor, losses: Tensor, lr: float) -> Tensor:
        """`coefficients` of a method that remembers: memory is what it was before the step."""
        return self.coefficients(losses, lr)

    def term_coefficients(self, memory: Tensor) -> Tensor:
        """Coefficients of the sums that lanes are perturbed along (`Perturbation.along(Terms(seeds), scale)`), where
        those do not have them: float64, of one sum after another in the order in which a visit's lanes first use them.
        memory: before the step. As `coefficients`; each is rounded to float32, and is 0 where that does not hold it."""
        return memory[:0]

    def next_lanes(self, run_seed: int, step: int, losses: Sequence[float], lr: float) -> tuple[Perturbation, ...]:
        """Lanes of a further visit of the step, on the same rows; empty: it has no more. See `comes_back`.

        losses: of all lanes so far, in order. Those of all visits together are given to `coefficients`.
        """
        return ()

    def gain(self, name: str, shape: torch.Size) -> Gain:
        """What a parameter gets of eps and of the update, for rates a layer. A function of these two alone.

        The lanes perturb it by gain.lane times as much, and w <- w - gain.update * coefficient * z. Kept in the run's
        journal (`gains.py`, which adds what 16-bit lanes and trained scales need). Gain(0, 0): it does not train, as if
        `trainable` had left it out.
        """
        return ONE

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask | Smallest | None:
        """The elements of a parameter that its lanes perturb and its updates change; None: all. Asked once, when a run
        begins, and kept in its journal (`journal/masks.py`); of `Mask.listed` its digest is, and the list in the run
        directory. Of values: a method that trains scales has none."""
        return None

    def part(self, name: str) -> str | None:
        """The part of the model that a parameter is in; None: it trains in every step. Of the parts a step trains those
        that `trained_parts` says."""
        return None

    def trained_parts(self, run_seed: int, step: int, parts: Sequence[str]) -> Collection[str]:
        """The parts that a step trains; the others are neither perturbed nor updated in it, nor written back. A
        function of these alone. parts: those that what trains is in, in alphabetical order; may raise ConfigError."""
        return parts

    # ---- what follows --------------------------------------------------------------------------------------------

    @final
    def parts(self, run_seed: int, names: Iterable[str]) -> Parts:
        """What single steps leave out of a model whose trained parameters are these. Raises what `trained_parts`
        raises."""
        of = {name: part for name in names if (part := self.part(name)) is not None}
        if type(self).part is Method.part:
            return Parts()
        there = sorted(set(of.values()))

        @lru_cache(maxsize=1 << 12)
        def chosen(step: int) -> frozenset[str]:
            return frozenset(self.trained_parts(run_seed, step, there))

        chosen(0)
        return Parts(of, chosen)

    @property
    def noise(self) -> NoiseSpec:
        return NoiseSpec(self.distribution, self.rounds, self.noise_layout)

    @property
    def eps32(self) -> float:
        """eps as the lanes have it."""
        return float(np.float32(self.eps))

    def seeds(self, run_seed: int, step: int) -> tuple[int, ...]:
        """The seeds of the noises that the step's update is made of: those of its lanes, in the order of first use."""
        return seeds_of(self.perturbations(run_seed, step))

    @property
    def noises(self) -> int:
        """Different noises of one step."""
        return len(self.seeds(0, 0))

    @property
    def lane_noises(self) -> int:
        """How many noises a pass makes for the lanes of a step's first visit."""
        return noises_of(self.perturbations(0, 0))

    @property
    def forwards(self) -> int:
        """Lanes of a step, of all its visits."""
        lanes = len(self.perturbations(0, 0))
        more = self.next_lanes(0, 0, [0.0] * lanes, self.lr) if self.comes_back else ()
        return lanes + len(more)

    @property
    def most_lanes(self) -> int:
        """How many lanes the largest visit of a step has: memory is planned for them."""
        return len(self.perturbations(0, 0))

    @final
    def term_values(self, memory: Tensor) -> Tensor:
        """`term_coefficients` as lanes have them: float32."""
        found = self.term_coefficients(memory)
        return torch.where(found.abs() < COEFF_LIMIT, found, 0.0).to(torch.float32)

    @final
    def outcome(self, losses: Tensor, lr: float, memory: Tensor | None = None) -> Outcome:
        """Losses of the lanes, float64 on any device -> coefficients as they are applied, and whether they may be.

        memory: before the step, there too; None: that before step 0.
        """
        memory = losses.new_tensor(self.first_memory()) if memory is None else memory
        found = self.coefficients_from(memory, losses, lr)
        loss, grad = self.summary(losses)
        scalars = self.scalars(losses)
        small = found.abs() < COEFF_LIMIT
        told = torch.isfinite(torch.stack([loss, grad])).all()
        sound = torch.isfinite(losses).all() & small.all() & told
        return Outcome(
            torch.where(small, found, 0.0).to(torch.float32), loss, grad, scalars, sound,
            self.remember(memory, Told(loss, grad, scalars, lr)), self.pass_over(memory),
        )  # fmt: skip

    @final
    def updates(self, run_seed: int, step: int, coefficients: Sequence[float], lr: float) -> tuple[Update, ...]:
        """A step's updates: a coefficient a noise, and weight decay with the first."""
        decay = float(np.float32(1 - lr * self.weight_decay))
        pairs = zip(self.seeds(run_seed, step), coefficients, strict=True)
        return tuple(Update(seed, coeff, 1.0 if i else decay, begins=not i) for i, (seed, coeff) in enumerate(pairs))

    @final
    def update(
        self, run_seed: int, step: int, losses: Sequence[float], lr: float, memory: Tensor | None = None
    ) -> Step:
        """Losses of the lanes -> the step's updates. Raises DivergenceError if one or a loss is not finite.

        memory: see `outcome`.
        """
        values = torch.tensor(losses, dtype=torch.float64, device="cpu")
        memory = torch.tensor(self.first_memory(), dtype=torch.float64, device="cpu") if memory is None else memory
        found = self.outcome(values, lr, memory)
        if not found.sound:
            largest = float(self.coefficients_from(memory, values, lr).abs().max())
            raise DivergenceError(
                f"step {step}: losses {_listed(losses)} give an update of {largest:g} "
                f"(seed {self.seeds(run_seed, step)[0]}, lr {lr:g}, eps {self.eps:g}). The weights are "
                f"as after step {step - 1}. Lower lr or eps, or set on_nonfinite='skip' or 'halve_eps'"
            )
        updates = self.updates(run_seed, step, found.coefficients.tolist(), lr)
        return Step(updates, float(found.loss), float(found.grad), tuple(found.scalars.tolist()))


def _listed(losses: Sequence[float]) -> str:
    """ "1, 2 and nan"; of many, the first."""
    words = [f"{loss:g}" for loss in losses[:_TOLD]] + ["others"] * (len(losses) > _TOLD)
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def lr_schedule(name: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """transformers' schedule of that name as a function: step -> factor of the peak learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True, device="cpu")], lr=1.0)
    try:
        scheduler = hf.get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"schedule {name!r} with {warmup_steps} warm-up steps: {error}") from None
    lambdas: list[Callable[[int], float]] | None = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        raise ConfigError(f"schedule {name!r} depends on more than the step; use linear, cosine, constant, ...")
    return lambdas[0]
