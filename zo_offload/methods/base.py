"""The base class of methods: shared fields, lanes, and the way from losses to updates.

    class Mine(Method):                                   one file, here or the user's own; see docs/extending.md
        perturbations(run_seed, step) -> lanes            each lane's forward sees w + scale * z(seed)
        coefficients(losses, lr)      -> one per noise    w <- w - coefficient * z, float64 tensors
        summary(losses)               -> (loss, grad)     for the journal and for people

The arithmetic is written once, on tensors: float64 on the CPU. If losses are read a step late (`late.py`), the same
operations run on the GPU, and one step later the host checks that both gave the same bits. `scalars.py` has the
operations that torch computes differently on the two. Everything else is derived: the noises of a step are those of its
lanes, the journal has one update per noise, replay needs only the journal.

A method may also
    remember           a few float64 numbers, a function of what the journal has of the steps before: `first_memory`,
                       `remember`, and `coefficients_from` in place of `coefficients`
    use more noises    than its lanes have, those of earlier steps say: `seeds`
    use sums of noises as what its lanes are perturbed along, by coefficients that it remembers: `term_coefficients`
    come back          to the weights in the same step, with lanes that depend on the losses so far: `next_lanes`
    leave elements out of its lanes and updates, by their magnitude or by chance: `mask`
    leave parts out    of a model, different ones in each step: `part` and `trained_parts`

A class registers itself in METHODS by its name: `class MeZO(Method, name="mezo")`, or the class's own name. A class
whose name begins with an underscore is only a base of others and is not registered.
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
"""Every method by its name, including a user's own classes once they are defined."""

COEFF_LIMIT = 3e38  # a little less than float32's maximum
_PACKAGE = __name__.rpartition(".")[0]
LOOK_FOR_NAN = (
    "Look for NaN in the base and in the batch; try a smaller eps, or compute= with a wider range than fp16; and see "
    "whether the forward or the objective reads a weight where its module does not run and torch does not see it "
    "(.numpy(), .tolist(), numpy.asarray): there it is NaN (docs/limits.md)"
)
"""What to do when all losses were NaN before any weight changed."""
_TOLD = 9  # number of losses that an error lists


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
    """A transformers schedule that is a function of the step (linear, cosine, ...)."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0, in schedules with a warm-up."""
    distribution: str = field(default="gaussian", metadata={"choices": tuple(DISTRIBUTIONS)})
    """The noise's distribution: a name of `distributions.DISTRIBUTIONS`."""
    rounds: Literal[7, 10] = 10
    """Philox rounds of the noise. Part of the run's identity."""
    noise_layout: Layout = LAYOUT_VERSION
    """Layout of the noise: 1 is the older Gaussian, half as fast. A resumed run keeps the layout that it began with."""
    on_nonfinite: Literal["stop", "skip", "halve_eps"] = "stop"
    """What a NaN or infinite loss or update does: it ends the run with an error; or skips the step; or skips it and
    halves eps from the next step on, ten times at most. The journal records it, so a resumed run has the same eps."""
    batch_size: int = field(default=16, metadata={"option": False})
    """Default batch size of `fit`."""
    steps: int = field(default=1000, metadata={"option": False})
    """Default number of steps of `fit`."""
    tunes: Literal["all", "lora", "prefix"] | None = field(default=None, metadata={"option": False})
    """What a preset's rates are for; checked against the trained parameters."""

    name: ClassVar[str] = ""
    """Its name in a run's records and on the command line. Set by the class statement."""
    target: ClassVar[Trains] = "values"
    """Which part of the stored weights is perturbed and updated."""
    unit_scales: ClassVar[bool] = False
    """Whether scales are trained in units of the weights that they scale: see `gains.py`."""
    tail_alone: ClassVar[bool] = False
    """Whether nothing but a tail trains (`run/tail.py`): lanes learn nothing."""
    comes_back: ClassVar[bool] = False
    """Whether `next_lanes` may return lanes. On a GPU the host then waits for each visit's losses."""

    def __init_subclass__(cls, *, name: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.name = cls.__name__ if name is None else name
        if "update" in vars(cls):
            raise TypeError(
                f"{cls.__qualname__}.update: the way from losses to updates is written once, in `coefficients` and "
                "`summary`, which run on a GPU too"
            )
        there = METHODS.get(cls.name)
        if there is not None and there.own() and not cls.own():
            raise ConfigError(
                f"class {cls.__qualname__}: a method named {cls.name!r} exists already; give another name, "
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
                f"eps={self.eps}: expected a float32 between 1.2e-38 and 1.8e19; published recipes have 1e-4 to 0.1"
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
                f"method {self.name!r} trains {self.target}: a mask selects values, which it does not train"
            )
        _ = self.noise  # checks the fields that it is made of
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
        """Raise for an attribute that is no field, or that a record cannot hold: the identity would lack it."""
        cls = type(self)
        known = {part.name for part in dataclasses.fields(self)}
        own = {name for name, kind in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(kind)}
        if missing := sorted(own - known):
            raise ConfigError(
                f"class {cls.__qualname__}: {', '.join(missing)} is not a field. Decorate the class with "
                "@dataclass(frozen=True, kw_only=True)"
            )
        try:
            json.dumps(dataclasses.asdict(self))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"method {self.name!r}: its fields must be numbers, strings or lists ({error})") from None

    @classmethod
    def own(cls) -> bool:
        """Whether the class is the package's own, so that its name suffices to find it."""
        return cls.__module__.startswith(f"{_PACKAGE}.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published recipe of this method by name (`presets.py`); `changes` override its fields."""
        return cls(**{**recipe(cls.name, name), **changes})

    def with_options(self, **changes: Any) -> Self:
        return replace(self, **changes)

    # ---- a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def perturbations(self, run_seed: int, step: int) -> tuple[Perturbation, ...]:
        """The step's lanes. A function of these two alone: `noise.step_seed(run_seed, step, i)` is noise i's seed. What
        a lane has from steps before, it has by `term_coefficients`."""

    @abstractmethod
    def coefficients(self, losses: Tensor, lr: float) -> Tensor:
        """Each noise's coefficient, with the learning rate included: w <- w - coefficient * z.

        losses: float64 [lanes], on the CPU or on a GPU, in the order of the lanes; returns float64 [noises] on the same
        device. Must not read values (no `float`, no `if` on a tensor), and may only use operations that `scalars.py`
        lists or has.
        """

    @abstractmethod
    def summary(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, grad) of a step for its record, 0-d float64. Same rules as `coefficients`. grad: 0 iff the step
        changed nothing but weight decay; otherwise a slope or a length of the gradient, by choice."""

    def scalars(self, losses: Tensor) -> Tensor:
        """Further numbers of a step for the journal and `remember`: float64 [any]. Same rules as `coefficients`."""
        return losses[:0]

    def first_memory(self) -> tuple[float, ...]:
        """The memory before step 0. Empty: the method has no memory."""
        return ()

    def remember(self, memory: Tensor, told: Told) -> Tensor:
        """The memory after a step. memory: float64, before the step. Rules as `coefficients`; independent of eps."""
        return memory

    def pass_over(self, memory: Tensor) -> Tensor:
        """The memory after a skipped step."""
        return memory

    def coefficients_from(self, memory: Tensor, losses: Tensor, lr: float) -> Tensor:
        """`coefficients` for a method with memory; memory: before the step."""
        return self.coefficients(losses, lr)

    def term_coefficients(self, memory: Tensor) -> Tensor:
        """Coefficients of the sums that lanes are perturbed along (`Perturbation.along(Terms(seeds), scale)`), where
        those do not have them: float64, of one sum after another in the order in which a visit's lanes first use them.
        memory: before the step. As `coefficients`; each is rounded to float32, and is 0 where that does not hold it."""
        return memory[:0]

    def next_lanes(self, run_seed: int, step: int, losses: Sequence[float], lr: float) -> tuple[Perturbation, ...]:
        """Lanes of a further visit in the same step, on the same rows; empty: no more visits. See `comes_back`.

        losses: those of all lanes so far, in order. `coefficients` gets the losses of all visits together.
        """
        return ()

    def gain(self, name: str, shape: torch.Size) -> Gain:
        """A parameter's factors of eps and of the update, for rates per layer. A function of the two arguments alone.

        The lanes' perturbation is multiplied by gain.lane, and w <- w - gain.update * coefficient * z. Kept in the
        run's journal (`gains.py`, which adds the gains of 16-bit lanes and trained scales). Gain(0, 0): the parameter
        does not train, as if `trainable` had left it out.
        """
        return ONE

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask | Smallest | None:
        """The elements of a parameter that lanes perturb and updates change; None: all. Called once, when a run begins,
        and kept in its journal (`journal/masks.py`); of a `Mask.listed` the journal keeps the digest, and the run
        directory the list. Masks are for values: a method that trains scales has none."""
        return None

    def part(self, name: str) -> str | None:
        """The parameter's part of the model; None: it trains in every step. `trained_parts` chooses a step's parts."""
        return None

    def trained_parts(self, run_seed: int, step: int, parts: Sequence[str]) -> Collection[str]:
        """The parts that a step trains; the others are neither perturbed nor updated in it, nor written back. A
        function of the arguments alone. parts: the parts of all trained parameters, in alphabetical order. May raise
        ConfigError."""
        return parts

    # ---- derived -------------------------------------------------------------------------------------------------

    @final
    def parts(self, run_seed: int, names: Iterable[str]) -> Parts:
        """The parts of a model with the trained parameters `names`. Raises what `trained_parts` raises."""
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
        """eps rounded to float32, as the lanes use it."""
        return float(np.float32(self.eps))

    def seeds(self, run_seed: int, step: int) -> tuple[int, ...]:
        """The seeds of the noises in the step's update: those of its lanes, in the order of first use."""
        return seeds_of(self.perturbations(run_seed, step))

    @property
    def noises(self) -> int:
        """Number of different noises in one step."""
        return len(self.seeds(0, 0))

    @property
    def lane_noises(self) -> int:
        """How many noises a pass makes for the lanes of a step's first visit."""
        return noises_of(self.perturbations(0, 0))

    @property
    def forwards(self) -> int:
        """Number of lanes of a step, over all its visits."""
        lanes = len(self.perturbations(0, 0))
        more = self.next_lanes(0, 0, [0.0] * lanes, self.lr) if self.comes_back else ()
        return lanes + len(more)

    @property
    def most_lanes(self) -> int:
        """Number of lanes in a step's largest visit: memory is planned for them."""
        return len(self.perturbations(0, 0))

    @final
    def term_values(self, memory: Tensor) -> Tensor:
        """`term_coefficients` as lanes have them: float32."""
        found = self.term_coefficients(memory)
        return torch.where(found.abs() < COEFF_LIMIT, found, 0.0).to(torch.float32)

    @final
    def outcome(self, losses: Tensor, lr: float, memory: Tensor | None = None) -> Outcome:
        """Losses of the lanes, float64 on any device -> the coefficients to apply, and whether the step is valid.

        memory: before the step, on the same device; None: the memory before step 0.
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
        """A step's updates: one coefficient per noise, and weight decay with the first."""
        decay = float(np.float32(1 - lr * self.weight_decay))
        pairs = zip(self.seeds(run_seed, step), coefficients, strict=True)
        return tuple(Update(seed, coeff, 1.0 if i else decay, begins=not i) for i, (seed, coeff) in enumerate(pairs))

    @final
    def update(
        self, run_seed: int, step: int, losses: Sequence[float], lr: float, memory: Tensor | None = None
    ) -> Step:
        """Losses of the lanes -> the step's updates. Raises DivergenceError if an update or a loss is not finite.

        memory: see `outcome`.
        """
        values = torch.tensor(losses, dtype=torch.float64, device="cpu")
        memory = torch.tensor(self.first_memory(), dtype=torch.float64, device="cpu") if memory is None else memory
        found = self.outcome(values, lr, memory)
        if not found.sound:
            largest = float(self.coefficients_from(memory, values, lr).abs().max())
            raise DivergenceError(
                f"step {step}: losses {_listed(losses)} give an update of {largest:g} "
                f"(seed {self.seeds(run_seed, step)[0]}, lr {lr:g}, eps {self.eps:g}). {_advice(step, losses)}"
            )
        updates = self.updates(run_seed, step, found.coefficients.tolist(), lr)
        return Step(updates, float(found.loss), float(found.grad), tuple(found.scalars.tolist()))


def _advice(step: int, losses: Sequence[float]) -> str:
    """What became of the weights, and what to do, after losses or an update that are not finite."""
    if step == 0 and all(map(math.isnan, losses)):
        return f"The weights are the base's, so lr is not the cause. {LOOK_FOR_NAN}"
    weights = f"as after step {step - 1}" if step else "the base's"
    return f"The weights are {weights}. Lower lr or eps, or set on_nonfinite='skip' or 'halve_eps'"


def _listed(losses: Sequence[float]) -> str:
    """The losses as text, such as "1, 2 and nan"; of many only the first ones."""
    words = [f"{loss:g}" for loss in losses[:_TOLD]] + ["others"] * (len(losses) > _TOLD)
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def lr_schedule(name: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """The transformers schedule of that name as a function: step -> factor of the peak learning rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True, device="cpu")], lr=1.0)
    try:
        scheduler = hf.get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"schedule {name!r} with {warmup_steps} warm-up steps: {error}") from None
    lambdas: list[Callable[[int], float]] | None = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        raise ConfigError(f"schedule {name!r} depends on more than the step; use linear, cosine, constant, ...")
    return lambdas[0]
