"""A client's part in a round: local steps from the run's weights, which are then taken back (`journal/rounds.py`).

Local steps fold nothing: they are pending updates, applied in float32 wherever the weights are used, and no stored
weight changes. So they are taken back by cutting the log of updates, and the weights are those from before, bit for
bit. Each visit makes the noise of all local steps so far again, so the cost of a local step grows with their number;
signs (`distribution="rademacher"`) are several times cheaper than normal numbers here.

Local step i of a round after t steps uses the batch number t * local steps + i of the client's data, and draws its seed
from the client's name, t and i. So a client that fails can train the round again, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.batches import Batches
from ..data.losses import Objective
from ..data.made import as_made
from ..errors import ConfigError, DivergenceError
from ..journal.journal import StepRecord
from ..journal.rounds import Round, belongs_to, check_client, next_step
from ..methods.pooled import pooled
from ..system.plain import is_whole, plain_value
from .active import Run
from .batching import Batching


def train_round(
    run: Run,
    batching: Batching,
    data: Any,
    *,
    client: str,
    steps: int,
    batch_size: int | None,
    micro_batches: int,
    rows: int | None,
    options: Mapping[str, Any],
    callback: Callable[[StepRecord], Any] | None,
) -> Round:
    """Local steps, taken back at the end, and their sums. See `Engine.train_round`."""
    pooled(run.method)
    _check_tail(run)
    check_client(client)
    if not is_whole(steps := plain_value(steps), 1) or not is_whole(micro_batches := plain_value(micro_batches), 1):
        raise ConfigError(f"steps={steps!r}, micro_batches={micro_batches!r}: expected whole numbers of at least 1")
    if run.run_dir is None or run.ranks.world > 1 or run.ranks.elastic:
        raise ConfigError("a round needs a run_dir, whose journal gets the mean, and a single process per client")
    batches = batching.batches(data, batch_size or run.method.batch_size, options)
    objective = batching.objective_of(batches)
    weight = rows if rows is not None else (batches.identity() or {}).get("rows")
    if not is_whole(weight := plain_value(weight), 1):
        raise ConfigError(f"the client's number of rows, its weight in the mean, is {weight!r}: give it, rows=")
    run.start_steps(batches.batch(0), micro_batches, objective, largest=batches.largest())
    run.check_objective(run.journal)
    assert run.journal is not None
    version = run.log.version
    history = f"{run.journal.history(version):016x}"
    sums, losses = _local_steps(run, client, batches, objective, steps, micro_batches, callback)
    if not losses:
        raise DivergenceError(f"client {client!r}: none of {steps} local steps had finite losses. Lower lr or eps")
    return Round(
        belongs_to(run.journal.header), version, history, client, 1, weight, steps, math.fsum(losses) / len(losses),
        tuple(sums.astype(np.float32).tolist()),
    )  # fmt: skip


def _local_steps(
    run: Run, client: str, batches: Batches, objective: Objective, steps: int, micro_batches: int,
    callback: Callable[[StepRecord], Any] | None,
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[float]]:  # fmt: skip
    """(sum of coefficients for each seed, in float64; losses of the steps that were not skipped)."""
    begin, pool, losses = run.log.version, pooled(run.method), list[float]()
    sums, lr = np.zeros(pool.pool), run.method.lr
    with run.work() as parts:
        local = parts.stepper.apart(pool.of_client(client, begin))
        try:
            for step in range(begin, begin + steps):
                batch = as_made(batches.batch(begin * steps + step - begin))
                run.keep_budget(parts, batch, micro_batches, objective)
                found = parts.passes.of_step(
                    batch, local.current, local.bound, lr, micro_batches, step=step, late=local.late,
                    objective=objective,
                )  # fmt: skip
                record = local.settle(local.launch(found, lr, batch.fingerprint))
                if not record.skipped:
                    losses.append(record.loss)
                    sums[pool.draw(client, begin, step)] += record.updates[0].coeff
                if callback is not None:
                    callback(record)
        finally:
            parts.stepper.take_back()
    return sums, losses


def take_rounds(run: Run, rounds: Sequence[Round]) -> StepRecord:
    """Take the mean of rounds as the run's next step. See `Engine.take_rounds`."""
    pooled(run.method)
    _check_tail(run)
    if run.ranks.world > 1 or run.ranks.elastic:
        raise ConfigError("rounds are taken by a single process: open the run without ranks")
    run.start()
    if run.journal is None:
        raise ConfigError("a round needs a run_dir, whose journal gets the mean")
    with run.work() as parts:
        parts.stepper.settle_before(run.log.version)
        mean, record = next_step(run.journal, rounds)
        run.journal.note(mean.note)
        parts.stepper.take(record)
    return record


def _check_tail(run: Run) -> None:
    if run.prepared.tail:
        raise ConfigError(
            f"tail={run.config.tail!r}: a round's file has sums of coefficients, from which nobody rebuilds a tail's "
            "numbers. Begin the run without a tail"
        )
