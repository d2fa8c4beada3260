"""Every error a caller can cause.

All derive from `ZOError`, which is a `ValueError`. The messages say what was asked, what was found, and what to do.
They are raised before memory is taken or anything is written, if the cause can be known by then.
"""

from __future__ import annotations


class ZOError(ValueError):
    """Base of the errors this package raises on purpose."""


class ConfigError(ZOError):
    """An option has a value that cannot work, alone or together with another."""


class CheckpointError(ZOError):
    """A path is not a checkpoint, or a checkpoint is incomplete or damaged."""


class PlanError(ZOError):
    """The model uses its parameters in a way the plan cannot follow."""


class BudgetError(ZOError):
    """A request does not fit the given memory; the message names one that would."""


class DataError(ZOError):
    """Training or evaluation data is unusable: empty, too long for the model, wrong columns."""


class JournalError(ZOError):
    """A journal is damaged or belongs to another run."""


class DivergenceError(ZOError):
    """A loss or an update is NaN or infinite; the weights are as after the last good step."""


class StorageError(OSError, ZOError):
    """A file of a run cannot be written or read: disk full, read-only, gone. Journaled steps are not lost."""

    def __str__(self) -> str:
        return str(self.strerror or super().__str__())


class TornError(ZOError):
    """An interruption left weights in memory half written. The engine must be reopened; the run is intact."""


class RankError(ZOError):
    """Another rank of this run failed, ended or does not come, or ranks differ; journaled steps are not lost."""
