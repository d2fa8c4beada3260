"""lm-eval-harness with streamed weights: its tasks evaluate a checkpoint or a run under offload.

    python -m zo_offload.cli.harness --model zo_offload --model_args pretrained=runs/a,offload=disk --tasks arc_easy
    lm_eval.simple_evaluate(model=StreamedLM("runs/a"), tasks=[...])

lm-eval's own HFLM makes the requests, truncates, batches, caches and scores; only the model that it calls is an engine.
A batch of requests is one pass over the weights, and so is each generated token, so a large batch_size costs little if
the weights stream. Needs lm-eval (pip install lm-eval), which this package does not depend on.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.adapter_configs import is_adapter
from ..checkpoint.tokenizers import load_tokenizer
from ..config import EngineConfig
from ..engine import Engine
from ..errors import ConfigError
from ..formats import FORMATS
from ..journal import run_directory
from ..methods import method_training
from ..system.nearest import did_you_mean

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ConfigError(f"evaluating with lm-eval needs it: pip install lm-eval ({error})") from error

_ENGINE = {field.name for field in dataclasses.fields(EngineConfig)} - {"device"}
_HFLM = (
    "truncation", "logits_cache", "softmax_dtype", "add_bos_token", "prefix_token_id", "think_end_token",
    "enable_thinking", "chat_template_args",
)  # fmt: skip
"""HFLM's arguments, except those for a model's source and placement."""


class _Streamed:
    """The object that HFLM calls as its model."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.config = engine, engine.model.config
        self.device: torch.device = engine.device.torch_device
        self.name_or_path = str(engine.checkpoint.path if engine.checkpoint is not None else "")
        self.dtype = next(iter(engine.plan.params.values())).dtype

    def __call__(self, input_ids: Tensor, **more: Tensor) -> Any:
        """Logits of every position."""
        return self.engine.run({"input_ids": input_ids, **more}, lambda model, batch: model(**batch))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.engine.generate({"input_ids": input_ids, **mask}, **options)

    def num_parameters(self) -> int:
        return self.engine.plan.numel


@register_model("zo_offload")
class StreamedLM(HFLM):  # type: ignore[misc]
    """lm-eval's model class over an engine. pretrained: a run directory, a checkpoint or an Engine, which stays open.

    step: a run's earlier step or "best" (default: the last). base: the present path of a run's base. settings: fields
    of `EngineConfig` (storage, offload, device_memory, adapter, ...) and HFLM's arguments for making requests. Raises
    ConfigError for any other.
    """

    def __init__(
        self, pretrained: str | Path | Engine, *, batch_size: int | str = 1, max_batch_size: int | None = None,
        max_length: int | None = None, device: str | None = None, tokenizer: Any = None, step: int | str | None = None,
        base: str | None = None, backend: str = "default", **settings: Any,
    ) -> None:  # fmt: skip
        known = {*_ENGINE, *_HFLM}
        for name, value in settings.items():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"{name}={value!r} is not a setting of the engine or of requests.{hint}")
        if not str(batch_size).isdigit():
            raise ConfigError(f"batch_size={batch_size!r}: give a number; each size that is tried streams all weights")
        given = {name: value for name, value in settings.items() if name in _ENGINE}
        given |= {} if device is None else {"device": device}
        if isinstance(pretrained, Engine):
            if given or step is not None or base is not None:
                raise ConfigError(f"{', '.join([*given, 'step', 'base'])}: the engine that was given has its own")
            self.engine = pretrained
        else:
            self.engine = _opened(str(pretrained), step, base, given, tokenizer)
        super().__init__(
            _Streamed(self.engine), backend=backend, tokenizer=self.engine.batching.tokenizer(), max_length=max_length,
            batch_size=int(batch_size), max_batch_size=max_batch_size,
            **{name: value for name, value in settings.items() if name in _HFLM},
        )  # fmt: skip


def _opened(model: str, step: int | str | None, base: str | None, settings: dict[str, Any], tokenizer: Any) -> Engine:
    """An engine on a run or a checkpoint, for evaluation only."""
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=bool(settings.get("trust_remote_code")))
    if (Path(model) / run_directory.JOURNAL).exists():
        engine = Engine.resume(model, base, tokenizer=tokenizer, ranks=None, **settings)
        return engine if step is None else engine.at(step)  # type: ignore[arg-type]
    if step is not None or base is not None:
        raise ConfigError(f"step={step!r}, base={base!r} are for runs, but {model} is not a run")
    storage = settings.get("storage")
    adapts = settings.get("adapter") is not None or is_adapter(Path(model))
    frozen = storage in FORMATS and not FORMATS[storage].trains and not adapts
    method = method_training("shifts") if frozen else None  # nothing is trained: the format's plain values
    return Engine(model, method=method, tokenizer=tokenizer, ranks=None, **settings)


def main() -> None:
    """lm-eval's own command line, extended by --model zo_offload."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
