"""Opens a given model for a run: finds its kind, the source of its weights, and how it is cut.

    opened = open_model("path/to/checkpoint", MeZO(), EngineConfig(storage="bf16"))
    opened.prepared.plan, opened.prepared.layout          # blocks, bytes
    session = Maker(opened).start()                       # weights are read and files written only here: session.py

A checkpoint is opened and its model is made on meta; a module in memory is taken out of its wrapper, and its shared
parameters are noted. Every error that a setting can cause is raised here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import adapter_configs, load_options, merging
from ..checkpoint.adapted import Built, adapt
from ..checkpoint.adapters import beside_adapter, beside_forward
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.weights import Weights, kept_of
from ..config import DTYPES, EngineConfig
from ..data.losses import Batch, Objective, is_ours
from ..devices import Device, make_device
from ..errors import ConfigError
from ..journal import run_directory
from ..journal.gains import decide_gains
from ..kernels.records import Gains
from ..methods import Method
from ..modules.compiled import without_wrapper
from ..modules.kind import ModelKind, kind_of
from ..modules.offloaded import Offloaded
from ..modules.parameters import Tied, tie
from ..ranks.alone import Alone
from ..stream.ingest import Base, ModuleBase
from ..system.host_memory import process_bytes
from ..system.plain import user_path
from .compute import check_module, decide_compute
from .folding import decide_folds
from .idle import check_idle
from .prepare import Prepared, prepare

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model, its base, its device, and how it is cut and stored. No weight has been read."""

    model: nn.Module
    """The model that runs: on meta for a checkpoint; a module in memory without its wrapper."""
    base: Base
    kind: ModelKind
    device: Device
    prepared: Prepared
    gains: Gains | None = None
    """A new run's initial gains: see `gains.py`. None: the run is resumed and takes its journal's gains."""
    checkpoint: Checkpoint | None = None
    adapter: Mapping[str, Any] | None = None
    """The settings that numbers depend on, of the adapter that was put on a checkpoint."""
    given: nn.Module | None = None
    """A module in memory as it was passed."""
    offloaded: Offloaded | None = None
    """What hooks of accelerate hold of the module; they are set aside while the engine runs it."""
    ties: tuple[Tied, ...] = ()
    """The module's names that were made one parameter; they are separated again when it gets its weights back."""
    name: str | None = None
    """The checkpoint's absolute path or hub id."""
    model_class: str | None = None
    process_bytes: int = 0
    """The process's memory before the model was opened."""
    ranks: Alone = field(default_factory=Alone)
    """The processes that train this run together, as this one sees them."""
    header: Mapping[str, Any] | None = None
    """The header of the journal that goes on, if another rank opens it."""

    @property
    def directory(self) -> Path | None:
        """The checkpoint's directory; None for a module in memory."""
        return None if self.checkpoint is None else self.checkpoint.path

    @property
    def run_dir(self) -> Path | None:
        run_dir = self.prepared.config.run_dir
        return None if run_dir is None else Path(run_dir)

    @property
    def home(self) -> Path | None:
        """Where this process keeps its blocks: the run directory, or on ranks other than 0 a folder in it. A member of
        a pool has a directory of its own."""
        if self.run_dir is None or self.ranks.leads or self.ranks.elastic:
            return self.run_dir
        return self.run_dir / run_directory.RANKS / str(self.ranks.rank)

    @property
    def trained(self) -> set[str]:
        """The parameters that train, by lanes or as the tail."""
        prepared = self.prepared
        return {name for name, spec in prepared.plan.params.items() if spec.trainable} | {*prepared.tail}

    def merged(self, weights: Weights) -> merging.Merged:
        """The model with its adapter merged into its weights, a layer at a time. Raises ConfigError if peft cannot."""
        shadow = self.prepared.shadow
        if isinstance(shadow, str):
            raise ConfigError(f"merge=True needs a copy of the modules: {shadow}")
        return merging.Merged(self.model, shadow, weights, set(self.prepared.plan.params))

    def check_trains(self, objective: Objective) -> None:
        """Raise ConfigError where steps would train what the forward does not use: an adapter that is merged, say."""
        trained = sorted(self.trained)
        switches = not is_ours(objective)
        if wrong := beside_forward(self.model, trained, self.prepared.config.trainable, switches=switches):
            raise ConfigError(wrong)

    def cannot_be_saved(self, merge: bool = False) -> str | None:
        """Why `save_pretrained` refuses this model, in words. merge: with its adapter merged into its weights."""
        if merge:
            return merging.why_not(self.model)
        return beside_adapter(self.model, self.trained)


def open_model(
    model: str | Path | nn.Module,
    method: Method,
    config: EngineConfig,
    *,
    model_class: Any = None,
    example: Batch | None = None,
    base: Base | None = None,
    fresh: bool = True,
    offload: str | None = None,
    ranks: Alone | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Opened:
    """Open a checkpoint or take a module, and prepare it. See `Engine` for model, model_class, example and base.

    fresh: a new run begins, so its run_dir must hold no run. offload: a tier that is already decided, as in `prepare`.
    ranks: all open it now; settings of "auto" are decided once for all of them. recorded: as in `prepare`.
    """
    ranks = Alone() if ranks is None else ranks
    module = without_wrapper(model) if isinstance(model, nn.Module) else None
    offloaded = Offloaded.of(module) if module is not None and base is None else None
    with contextlib.nullcontext() if offloaded is None else offloaded.aside():
        return _open(
            model, method, config, model_class=model_class, example=example, base=base, fresh=fresh, offload=offload,
            ranks=ranks, recorded=recorded, offloaded=offloaded,
        )  # fmt: skip


def _open(
    model: str | Path | nn.Module,
    method: Method,
    config: EngineConfig,
    *,
    model_class: Any,
    example: Batch | None,
    base: Base | None,
    fresh: bool,
    offload: str | None,
    ranks: Alone,
    recorded: Mapping[str, Any] | None,
    offloaded: Offloaded | None,
) -> Opened:
    """`open_model`, of a model without accelerate's hooks."""
    if config.run_dir is not None:  # absolute: the process may change its directory
        run_dir = user_path(config.run_dir).absolute()
        config = replace(config, run_dir=run_dir)
        if fresh:
            run_directory.check_fresh(run_dir)
    if config.tail is not None and (ranks.world > 1 or ranks.elastic):
        raise ConfigError(
            f"tail={config.tail!r}: a tail's exact gradient is of one process, and several share this run's lanes. "
            "Train on one (ranks=None), or leave out the tail"
        )
    before = process_bytes()
    one_each = config.device == "cuda" and ranks.world > 1
    device = make_device(f"cuda:{ranks.local_rank}" if one_each else config.device)
    model, config = with_adapter(model, config, fresh)
    checkpoint, given, adapted = None, None, None
    decided: tuple[str, ...] = ()
    ties: tuple[Tied, ...] = ()
    if isinstance(model, nn.Module):
        if config.config_overrides:
            raise ConfigError("config_overrides change a checkpoint's config.json: for a module, change its own config")
        if fresh:
            check_module(config, model)
            if model_class is not None:
                raise ConfigError("model_class= is for a checkpoint: a module in memory has a class, leave it out")
        given, module = model, without_wrapper(model)
        ties = tie(module)
        base = base if base is not None else ModuleBase(module, offloaded)
    else:
        if fresh and base is not None:
            raise ConfigError("base= is of a module on meta; a checkpoint has its weights itself: leave it out")
        checkpoint = Checkpoint.open(
            model, trust_remote_code=config.trust_remote_code, overrides=config.config_overrides
        )
        config, decided = decide_compute(config, device, checkpoint.dtype, ranks)
        compute = DTYPES[config.compute] if config.compute is not None else device.default_compute(checkpoint.dtype)
        adapted = built(checkpoint, compute, model_class, config, _absolute(model))
        base, module = adapted.base, adapted.model
    kind = kind_of(module)
    if fresh:
        load_options.check_overrides(kind, config.config_overrides)
    make = partial(
        prepare, module, base.dtype_of, method=method, device=device, example=example,
        notes=() if adapted is None else adapted.notes, sharers=ranks.local_world, kept_of=kept_of(base),
        decided=decided, recorded=recorded,
    )  # fmt: skip
    prepared = make(config, offload=offload)
    agreed = _agreed(config, prepared, ranks)
    if agreed != (prepared.config.storage, prepared.offload):
        prepared = make(replace(config, storage=agreed[0]), offload=agreed[1])
    prepared = decide_folds(prepared, ranks)
    if fresh:
        check_idle(config, prepared, base, tells=ranks.leads)
    opened = Opened(
        module, base, kind, device, prepared, None, checkpoint, given=given, offloaded=offloaded,
        ties=ties,
        adapter=None if adapted is None else adapted.config,
        name=None if isinstance(model, nn.Module) else _absolute(model),
        model_class=model_class if isinstance(model_class, str) else getattr(model_class, "__name__", None),
        process_bytes=before, ranks=ranks,
    )  # fmt: skip
    if wrong := opened.cannot_be_saved():
        _log.warning("%s; save_pretrained will refuse", wrong)
    return replace(opened, gains=decide_gains(prepared.plan, prepared.layout, method, base)) if fresh else opened


def with_adapter(
    model: str | Path | nn.Module, config: EngineConfig, fresh: bool = True
) -> tuple[str | Path | nn.Module, EngineConfig]:
    """Model and settings with the adapter in the form that a run keeps. If the model is an adapter's directory, returns
    its base, with that adapter. fresh: False for a run that has decided it. Raises ConfigError, CheckpointError."""
    adapter = adapter_configs.plain(config.adapter)
    if isinstance(model, nn.Module):
        if adapter is not None:
            raise ConfigError(
                "adapter= is for a checkpoint's directory: a module in memory takes one by peft.get_peft_model(module, "
                "config), and trainable='requires_grad'"
            )
        return model, config
    directory = user_path(model)
    if directory.is_dir() and adapter_configs.is_adapter(directory):
        if adapter is not None:
            raise ConfigError(
                f"{model} is an adapter itself, and adapter= names another: give one of them, and the base as the model"
            )
        adapter, model = str(directory), adapter_configs.base_of(directory)
    elif fresh and adapter is None and (directory / adapter_configs.CONFIG_NAME).is_file():
        raise ConfigError(
            f"{model} holds a model and an adapter ({adapter_configs.CONFIG_NAME}). For that adapter, "
            f"pass adapter={str(model)!r} (--adapter {model}); for the model alone, move the adapter's files elsewhere"
        )
    if isinstance(adapter, str):
        adapter = str(user_path(adapter).absolute())
    return model, replace(config, adapter=adapter)


def built(
    checkpoint: Checkpoint, compute: torch.dtype, model_class: Any, config: EngineConfig, name: str | None
) -> Built:
    """A checkpoint's model on meta, with the adapter that the settings ask for."""
    model = checkpoint.build_model(compute, model_class, seed=config.seed)
    if config.adapter is None:
        return Built(model, checkpoint, checkpoint.notes)
    return adapt(checkpoint, model, config.adapter, seed=config.seed, named=name)


def _absolute(model: str | Path) -> str:
    """A directory as an absolute path, so that a run can be resumed from elsewhere; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def _agreed(config: EngineConfig, prepared: Prepared, ranks: Alone) -> tuple[str | None, str]:
    """Storage and tier for all ranks: for "auto", rank 0's storage, and the tier that takes the least memory.

    Both decide how often updates are folded, and so the numbers. A setting other than "auto" stays as it is; the ranks
    compare such settings when they begin to train.
    """
    mine = {"storage": prepared.config.storage, "offload": prepared.offload}
    rows = ranks.gather("opening", mine)
    storage, offload = prepared.config.storage, prepared.offload
    if config.storage == "auto":
        storage = rows[0]["storage"]
    if config.offload == "auto":
        offload = max((str(row["offload"]) for row in rows), key=("none", "host", "disk").index)
    return storage, offload
