"""Data as it is given, as batches for one model: with its tokenizer, for its objective, encoded as its run began."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint.tokenizers import check_saves, has_tokenizer, load_tokenizer
from ..data.batches import Batches, StreamBatches, make_batches
from ..data.losses import Objective, model_loss
from ..data.measures import OptionsLoss
from ..data.sources import as_given
from ..errors import ConfigError
from .opening import Opened


class Batching:
    """Makes batches of what a caller gives. tokenizer: None for the checkpoint's own; encoding(): number of the
    encoding of rows that the run has."""

    def __init__(self, opened: Opened, objective: Objective, tokenizer: Any, encoding: Callable[[], int]) -> None:
        self._opened, self._objective, self._encoding = opened, objective, encoding
        self.given = tokenizer
        """The tokenizer that was passed; `tokenizer` falls back on the checkpoint's."""
        self._own: Any = None
        if tokenizer is not None:
            check_saves(tokenizer)

    def batches(self, data: Any, batch_size: int, options: dict[str, Any], shuffle: bool = True) -> Batches:
        """Data as batches; options: of `make_batches`. Text without a tokenizer given uses the checkpoint's."""
        options = {"tokenizer": self.tokenizer(), **options}
        own_objective = self._objective is not model_loss
        batches = make_batches(
            data, batch_size=batch_size, kind=self._opened.kind, own_objective=own_objective, version=self._encoding(),
            seed=self._opened.prepared.config.seed, shuffle=shuffle, **options,
        )  # fmt: skip
        if own_objective and isinstance(batches, StreamBatches):  # it may give tuples
            batches.objective = as_given(self._objective)
        return batches

    def objective_of(self, batches: Batches) -> Objective:
        """The objective that the data asks for, else the run's; both would be one too many."""
        if batches.objective is None:
            return self._objective
        if self._objective is not model_loss and isinstance(batches.objective, OptionsLoss):
            raise ConfigError("loss='options' and objective= are two losses: leave one of them out")
        return batches.objective

    def to_export(self) -> Any:
        """The tokenizer that is to be written with the model; None: the checkpoint's files are, as they are."""
        checkpoint = self._opened.checkpoint
        in_file = checkpoint is not None and checkpoint.gguf is not None and not has_tokenizer(checkpoint.gguf.parent)
        return self.tokenizer() if in_file else self.given

    def tokenizer(self) -> Any:
        """The one that was given, else the checkpoint's own, if it has one."""
        path, checkpoint = self._opened.directory, self._opened.checkpoint
        if self.given is None and path is not None and not has_tokenizer(path) and checkpoint is not None:
            path = checkpoint.gguf
        if self.given is not None or path is None or (path.is_dir() and not has_tokenizer(path)):
            return self.given
        if self._own is None:
            trusted = self._opened.prepared.config.trust_remote_code
            self._own = load_tokenizer(path, trust_remote_code=trusted)
        return self._own
