"""A tail: a few trained parameters used last in the forward, trained by their exact gradient; the rest by lanes.

When a visit of the weights ends, its last blocks and the head are still there, and so is everything that autograd needs
for the parameters used last: a class head, an adapter's coefficients in the last layers. Their gradient then costs no
further visit. One lane records it (`lanes/recording.py`): the step's unperturbed lane where the method has one (FZOO),
else its first lane, whose other weights are perturbed. The tail itself is not perturbed in any lane.

    g        the gradient of that lane's loss by the tail, at the weights before the step, float32
    adam     m += (1 - b1) (g - m), v = b2 v + (1 - b2) g^2,  w -= rate m' / (sqrt(v') + 1e-8), with m' = m / (1 - b1^t)
             and v' = v / (1 - b2^t), b1 = 0.9, b2 = 0.999, t the steps that changed the tail: torch.optim.Adam
    sgd      w -= rate g: torch.optim.SGD
    rate     `tail_lr` times the step's rate over the method's peak rate: it follows the method's schedule and brake.
             For a method that trains a tail alone, the step's rate

No journal of scalars can rebuild these numbers, so a run keeps them as tensors in its directory
(`journal/tail_files.py` says in which order). They live in float32 on the device and replace what blocks hold of these
parameters, which stays as in the base. A step that is not finite changes nothing, the tail included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DivergenceError
from ..journal import tail_files
from ..journal.format import StepRecord, history_after
from ..journal.journal import Journal
from ..journal.tail_files import TailFile
from ..kernels.records import Perturbation
from .opening import Opened

BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class State:
    """A tail after some steps, `taken` of which changed it: float32 on the device. No moments: sgd."""

    taken: int
    values: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]

    def after(self, gradient: Mapping[str, Tensor], rate: float) -> State:
        """The state after one more step; this one stays as it is."""
        if not self.first:
            return State(self.taken + 1, {n: w.add(gradient[n], alpha=-rate) for n, w in self.values.items()}, {}, {})
        taken = self.taken + 1
        of_first, of_second = (1 - beta**taken for beta in BETAS)
        values, first, second = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for name, w in self.values.items():
            g = gradient[name]
            first[name] = self.first[name].lerp(g, 1 - BETAS[0])
            second[name] = (self.second[name] * BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            away = (second[name].sqrt() / math.sqrt(of_second)).add_(ADAM_EPS)
            values[name] = w.addcdiv(first[name], away, value=-rate / of_first)
        return State(taken, values, first, second)


class Tail:
    """The tail of one run, by number of steps. state: after `version` steps. peak: the method's learning rate.

    A step's gradient is offered by the pass that computed it, and taken when the step is. The state before a step is
    kept until the next one, so an interrupted step leaves nothing behind.
    """

    def __init__(self, state: State, version: int, *, lr: float, peak: float) -> None:
        self.names = tuple(state.values)
        self._states = {version: state}
        self._lr, self._peak = lr, peak
        self._offered: tuple[int, dict[str, Tensor]] = (-1, {})

    def values(self, version: int) -> Mapping[str, Tensor]:
        """The parameters' values after `version` steps."""
        return self._states[version].values

    def offer(self, step: int, gradient: Sequence[Tensor]) -> None:
        """Give a step its gradient, in the order of `names`."""
        self._offered = step, dict(zip(self.names, gradient, strict=True))

    def check(self, step: int) -> None:
        """Raise DivergenceError if a step's gradient is not finite."""
        odd = [name for name, grad in self._gradient(step).items() if not bool(torch.isfinite(grad).all())]
        if odd:
            raise DivergenceError(
                f"step {step}: the exact gradient of the tail is not finite ({len(odd)} of {len(self.names)} "
                f"parameters, such as {odd[0]!r}). The weights are as after step {step - 1}. Lower tail_lr or lr"
            )

    def advance(self, record: StepRecord, journal: Journal | None) -> None:
        """Take a step: its state, and its file. Call before the journal gets the record. Raises StorageError."""
        step, state = record.step, self._states[record.step]
        if not record.skipped:
            state = state.after(self._gradient(step), self._lr * (record.lr / self._peak))
        if journal is not None:
            journal.make_durable(step)
            history = history_after(journal.history(step), record)
            tensors = {
                **state.values,
                **{f"first.{name}": tensor for name, tensor in state.first.items()},
                **{f"second.{name}": tensor for name, tensor in state.second.items()},
            }
            path = tail_files.path_of(journal.path.parent, step + 1)
            tail_files.write(path, TailFile(step + 1, state.taken, history, tensors))
        self._states = {step: self._states[step], step + 1: state}

    def _gradient(self, step: int) -> dict[str, Tensor]:
        assert self._offered[0] == step, f"the gradient of step {self._offered[0]} was offered for step {step}"
        return self._offered[1]


def recording_lane(lanes: Sequence[Perturbation]) -> int:
    """The lane that records the tail's gradient: the first unperturbed one, else the first."""
    return next((i for i, lane in enumerate(lanes) if lane.scale == 0), 0)


def tail_of(opened: Opened, version: int, journal: Journal | None) -> Tail | None:
    """The tail of a run after `version` steps: from the base, or from the run's directory. None: the run has none.

    Raises JournalError if the file of that step is not there.
    """
    if not opened.prepared.tail:
        return None
    if version == 0:
        return _made(opened, version, None)
    assert journal is not None
    paths = tail_files.paths_of(journal.path.parent, version)
    return _made(opened, version, tail_files.read_at(paths, version, journal.history(version), str(journal.path)))


def tail_at(opened: Opened, version: int, history: int, where: str, paths: Sequence[Path]) -> Tail | None:
    """The tail of a replayed run, from one of these files; see `tail_of`."""
    if not opened.prepared.tail:
        return None
    return _made(opened, version, tail_files.read_at(list(paths), version, history, where) if version else None)


def _made(opened: Opened, version: int, found: TailFile | None) -> Tail:
    prepared, device = opened.prepared, opened.device.torch_device
    about, names = prepared.config.about_tail, prepared.tail
    adam = about["optimizer"] == "adam"
    if found is None:
        values = {name: _of_base(opened, name).to(device) for name in names}
        moments = [{name: torch.zeros_like(w) for name, w in values.items()} if adam else {} for _ in range(2)]
        state = State(0, values, moments[0], moments[1])
    else:
        held = {name: tensor.to(device) for name, tensor in found.tensors.items()}
        first, second = ({n: held[f"{of}.{n}"] for n in names} if adam else {} for of in ("first", "second"))
        state = State(found.taken, {name: held[name] for name in names}, first, second)
    peak = prepared.method.lr
    return Tail(state, version, lr=peak if prepared.method.tail_alone else about["lr"], peak=peak)


def _of_base(opened: Opened, name: str) -> Tensor:
    base = opened.base
    value = torch.empty(base.shape_of(name), dtype=base.dtype_of(name), device="cpu")
    base.read_into(name, 0, value.view(-1))
    return value.float()
