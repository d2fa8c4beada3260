"""A run whole in memory: no engine, no blocks, no lanes; each parameter through the slow reference of the fused pass.

What `benchmarks.draws` compares engines with, for any method, storage and schedule of folds. An engine is asked for the
formats, ids, gains and base that a run begins with, and for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_offload import Engine
from zo_offload.errors import DivergenceError
from zo_offload.formats import Format, get_format
from zo_offload.formats.codec import encode_values
from zo_offload.journal.masks import decide_masks
from zo_offload.kernels.float32 import scaled
from zo_offload.kernels.records import ONE, STILL, Mask, Perturbation, Update, sums_of, with_coefficients
from zo_offload.methods import Method
from zo_offload.methods.outcome import Told
from zo_offload.numerics.noise import NoiseSpec
from zo_offload.numerics.reference import fused_pass
from zo_offload.numerics.updates import left_out, with_folds


class Stored:
    """One parameter as it is stored: bytes of the last fold, and the updates since."""

    def __init__(self, name: str, value: Tensor, engine: Engine, mask: Mask | None) -> None:
        spec = engine.plan.params[name]
        self.fmt: Format = engine.layout.formats[name]
        self.shape, self.numel, self.id, self.dtype = spec.shape, value.numel(), spec.param_id, spec.dtype
        self.trains, self.decays = spec.trainable, len(spec.shape) > 1
        self.gain = (engine.gains or {}).get(name, ONE)
        self.noise: NoiseSpec = engine.method.noise
        self.stochastic = engine.config.rounding == "stochastic"
        self.target = engine.layout.target if spec.trainable else "values"
        self.mask = mask if spec.trainable else None
        self.stored, self.residual = encode_values(value, self.fmt)
        self.pending: list[Update] = []

    def take(self, updates: tuple[Update, ...], leaves_out: bool) -> None:
        """A step's updates, or what one does that leaves the parameter out; at a fold the bytes are made anew."""
        if not self.trains:
            return
        updates = left_out(updates, bool(self.pending)) if leaves_out else updates
        for update in updates:
            coeff = update.coeff if self.gain.update == 1 else scaled(update.coeff, self.gain.update)
            self.pending.append(replace(update, coeff=coeff, decay=update.decay if self.decays else 1.0))
        if any(update.fold for update in updates):
            self._pass(write_back=True)
            self.pending = []

    def lane(self, perturbation: Perturbation, leaves_out: bool) -> Tensor:
        """What a lane computes with, in a step that trains the parameter or leaves it out."""
        scale = scaled(perturbation.scale, self.gain.lane) if self.gain.lane != 1 else perturbation.scale
        lane = replace(perturbation, scale=scale) if self.trains and not leaves_out else STILL
        out = torch.empty(self.numel, dtype=self.dtype)
        self._pass(write_back=False, lane=lane, out=out)
        return out.view(self.shape)

    def value(self) -> Tensor:
        """What `Engine.weights` gives: both parts of a split format, less what is pending."""
        if self.residual is None:
            out = torch.empty(self.numel, dtype=self.fmt.torch_dtype)
            self._pass(write_back=False, lane=STILL, out=out)
            return out.view(self.shape)
        master = self.fmt.join(self.stored, self.residual, self.numel).view(torch.uint8)
        out = torch.empty(self.numel, dtype=self.fmt.torch_dtype)
        fused_pass(
            master, get_format("fp32"), param_id=self.id, numel=self.numel, offset=0, updates=self.pending,
            write_back=False, stochastic=False, noise=self.noise, perturbations=[STILL], outs=[out], mask=self.mask,
        )  # fmt: skip
        return out.view(self.shape)

    def _pass(self, *, write_back: bool, lane: Perturbation | None = None, out: Tensor | None = None) -> None:
        fused_pass(
            self.stored, self.fmt, param_id=self.id, numel=self.numel, offset=0, updates=self.pending,
            write_back=write_back, stochastic=self.stochastic, noise=self.noise, residual=self.residual,
            perturbations=[] if lane is None else [lane], outs=[] if out is None else [out], target=self.target,
            mask=self.mask,
        )  # fmt: skip


class _Call(nn.Module):
    """The objective as a module's forward, for functional_call."""

    def __init__(self, model: nn.Module, objective: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, data: dict[str, Tensor]) -> Any:
        return self.objective(self.model, data)


def plain_run(
    engine: Engine,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    rates: list[float],
    *,
    objective: Callable[[Any, Any], Any],
    micro_batches: int,
    counts: Callable[[dict[str, Tensor]], float],
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """(losses, weights after 0, 1, ... steps). engine: of this model, never used. counts: what a part's loss weighs."""
    planned, named = engine.plan.params, dict(model.named_parameters())
    masks = decide_masks(engine.plan, engine.method, engine.base, engine.config.seed)
    params = {name: Stored(name, p, engine, masks.get(name)) for name, p in named.items() if name in planned}
    for name, p in named.items():
        p.data = p.data.to(planned[name].dtype if name in planned else p.dtype)
    method: Method = engine.method
    seed, call = engine.config.seed, _Call(model, objective)
    parts_of = method.parts(seed, [name for name, p in params.items() if p.trains])

    def out(name: str) -> bool:
        return not parts_of.trains(parts_of.of.get(name), step)

    def bound(lanes: Sequence[Perturbation]) -> list[Perturbation]:
        """With the coefficients of the sums that they are along."""
        sums = sums_of(lanes)
        known = dict(zip(sums, with_coefficients(sums, method.term_values(memory)), strict=True))
        return [replace(lane, terms=known[lane.terms]) if lane.terms else lane for lane in lanes]

    def loss_of(lane: Perturbation, batch: dict[str, Tensor]) -> float:
        weights = {f"model.{name}": p.lane(lane, out(name)) for name, p in params.items()}
        rows = len(batch["input_ids"]) // micro_batches
        parts = [{k: v[i * rows : (i + 1) * rows] for k, v in batch.items()} for i in range(micro_batches)]
        with torch.no_grad():
            found = [float(torch.func.functional_call(call, weights, (part,))) for part in parts]
        if micro_batches == 1:
            return found[0]
        held = [counts(part) for part in parts]
        return sum(w * loss for w, loss in zip(held, found, strict=True)) / sum(held)

    losses: list[float] = []
    after = [{name: p.value() for name, p in params.items()}]
    memory = torch.tensor(method.first_memory(), dtype=torch.float64)
    for step, (batch, lr) in enumerate(zip(batches, rates, strict=True)):
        found = [loss_of(lane, batch) for lane in bound(method.perturbations(seed, step))]
        while method.comes_back and (more := method.next_lanes(seed, step, found, lr)):
            found += [loss_of(lane, batch) for lane in bound(more)]
        try:
            outcome = method.update(seed, step, found, lr, memory)
        except DivergenceError:
            losses.append(math.nan)
            memory = method.pass_over(memory)
            if method.on_nonfinite == "halve_eps":
                method = method.with_options(eps=method.eps / 2)
        else:
            losses.append(outcome.loss)
            loss, grad, scalars = (
                torch.tensor(x, dtype=torch.float64) for x in (outcome.loss, outcome.grad, outcome.scalars)
            )
            memory = method.remember(memory, Told(loss, grad, scalars, lr))
            for name, stored in params.items():
                stored.take(with_folds(outcome.updates, step, engine.fold_every), out(name))
        after.append({name: p.value() for name, p in params.items()})
    return losses, after
