"""From a model as it is given to one that a run can begin with: what it is, where its weights come from, how it is cut.

    opened = open_model("path/to/checkpoint", MeZO(), EngineConfig(storage="bf16"))
    opened.prepared.plan, opened.prepared.layout          # blocks, bytes
    session = Maker(opened).start()                       # only now are weights read and files written: session.py

A checkpoint is opened and its model is made on meta; a module in memory is taken out of its wrapper, and what it shares
is noted. Every error that a setting can cause is raised here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import adapter_configs, merging
from ..checkpoint.adapted import Built, adapt
from ..checkpoint.adapters import beside_adapter
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.weights import Weights, kept_of
from ..config import DTYPES, EngineConfig
from ..data.losses import Batch
from ..devices import Device, make_device
from ..errors import ConfigError
from ..journal import run_directory
from ..journal.gains import decide_gains
from ..kernels.records import Gains
from ..methods import Method
from ..modules.compiled import without_wrapper
from ..modules.kind import ModelKind, kind_of
from ..modules.parameters import Tied, tie
from ..ranks.alone import Alone
from ..stream.ingest import Base, ModuleBase
from ..system.host_memory import process_bytes
from ..system.plain import user_path
from .prepare import Prepared, prepare

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model, its base, the device it computes on and how it is cut and stored. No weight has been read."""

    model: nn.Module
    """What runs: on meta for a checkpoint; a module in memory without its wrapper."""
    base: Base
    kind: ModelKind
    device: Device
    prepared: Prepared
    gains: Gains | None = None
    """The gains that a new run begins with: see `gains.py`. None: the run is resumed and takes its journal's."""
    checkpoint: Checkpoint | None = None
    adapter: Mapping[str, Any] | None = None
    """The settings of the adapter that was put on a checkpoint, as far as numbers depend on them."""
    given: nn.Module | None = None
    """A module in memory as it was passed."""
    ties: tuple[Tied, ...] = ()
    """The module's names that were made one parameter, to be parted again when it gets its weights back."""
    name: str | None = None
    """The checkpoint's: an absolute path, or a hub id."""
    model_class: str | None = None
    process_bytes: int = 0
    """What the process took before the model was opened."""
    ranks: Alone = field(default_factory=Alone)
    """The processes that train this run together, as this one sees them."""
    header: Mapping[str, Any] | None = None
    """Of the journal that goes on, where another rank opens it."""

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
        """Where this process keeps its blocks: the run directory, or of another rank than 0 its folder there. A
        member of a pool has a directory of its own."""
        if self.run_dir is None or self.ranks.leads or self.ranks.elastic:
            return self.run_dir
        return self.run_dir / run_directory.RANKS / str(self.ranks.rank)

    def merged(self, weights: Weights) -> merging.Merged:
        """The model with its adapter in its weights, a layer at a time. Raises ConfigError where peft cannot."""
        shadow = self.prepared.shadow
        if isinstance(shadow, str):
            raise ConfigError(f"merge=True needs a copy of the modules: {shadow}")
        return merging.Merged(self.model, shadow, weights, set(self.prepared.plan.params))

    def cannot_be_saved(self, merge: bool = False) -> str | None:
        """Why `save_pretrained` refuses this model, in words. merge: with its adapter in its weights."""
        if merge:
            return merging.why_not(self.model)
        trained = {name for name, spec in self.prepared.plan.params.items() if spec.trainable}
        return beside_adapter(self.model, trained)


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
) -> Opened:
    """Open a checkpoint or take a module, and prepare it. See `Engine` for model, model_class, example and base.

    fresh: a run is to begin, so its run_dir must hold none. offload: a tier that is known already, as `prepare` has it.
    ranks: that all open it now; what "auto" leaves open is decided for all of them.
    """
    ranks = Alone() if ranks is None else ranks
    if config.run_dir is not None:  # absolute once and for all: the process may change its directory
        run_dir = user_path(config.run_dir).absolute()
        config = replace(config, run_dir=run_dir)
        if fresh:
            run_directory.check_fresh(run_dir)
    before = process_bytes()
    one_each = config.device == "cuda" and ranks.world > 1
    device = make_device(f"cuda:{ranks.local_rank}" if one_each else config.device)
    model, config = with_adapter(model, config, fresh)
    checkpoint, given, adapted = None, None, None
    ties: tuple[Tied, ...] = ()
    if isinstance(model, nn.Module):
        if config.config_overrides:
            raise ConfigError("config_overrides are of a checkpoint's config.json: change the module's own config")
        given, module = model, without_wrapper(model)
        ties = tie(module)
        base = base if base is not None else ModuleBase(module)
    else:
        checkpoint = Checkpoint.open(
            model, trust_remote_code=config.trust_remote_code, overrides=config.config_overrides
        )
        own = device.default_compute(checkpoint.dtype)
        compute = DTYPES[config.compute] if config.compute is not None else own
        adapted = built(checkpoint, compute, model_class, config, _absolute(model))
        base, module = adapted.base, adapted.model
    kind = kind_of(module)
    make = partial(
        prepare, module, base.dtype_of, method=method, device=device, example=example,
        notes=() if adapted is None else adapted.notes, sharers=ranks.local_world, kept_of=kept_of(base),
    )  # fmt: skip
    prepared = make(config, offload=offload)
    agreed = _agreed(config, prepared, ranks)
    if agreed != (prepared.config.storage, prepared.offload):
        prepared = make(replace(config, storage=agreed[0]), offload=agreed[1])
    opened = Opened(
        module, base, kind, device, prepared, None, checkpoint, given=given, ties=ties,
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
    """Model and settings with the adapter as a run keeps it, and an adapter's directory given as the model as what it
    is: its base, with that adapter. fresh: not for a run that has decided it. Raises ConfigError, CheckpointError."""
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
            f"{model} holds a model and an adapter ({adapter_configs.CONFIG_NAME}). For the adapter on that model give "
            f"adapter={str(model)!r} (--adapter {model}); for the model alone, move the adapter's files elsewhere"
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
    """Storage and tier for all ranks: of "auto" the storage that rank 0 found, and the tier that takes least memory.

    Both decide how often updates are folded, and so the numbers. What was named stays as it was; that it is the same
    everywhere is looked at when the ranks begin to train.
    """
    mine = {"storage": prepared.config.storage, "offload": prepared.offload}
    rows = ranks.gather("opening", mine)
    storage, offload = prepared.config.storage, prepared.offload
    if config.storage == "auto":
        storage = rows[0]["storage"]
    if config.offload == "auto":
        offload = max((str(row["offload"]) for row in rows), key=("none", "host", "disk").index)
    return storage, offload
