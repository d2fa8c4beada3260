"""Engine settings: one frozen dataclass, checked at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch

from .errors import ConfigError
from .formats import FORMATS
from .kernels.records import Rounding
from .plan.blocks import BLOCK_NUMEL
from .system.nearest import did_you_mean
from .system.units import parse_bytes

Offload = Literal["auto", "none", "host", "disk"]
Order = Literal["auto", "module", "block", "lane"]
HostMemory = Literal["auto", "pinned", "staged"]
Mode = Literal["eval", "train", "as_is"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
}
MAX_THREADS = 1024
TAIL_LR = 1e-3


def _are_names(value: Any) -> bool:
    several = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
    return several and all(isinstance(name, str) for name in value)


def _check_overrides(overrides: Any) -> None:
    try:
        sound = overrides is None or (
            isinstance(overrides, Mapping) and json.loads(json.dumps({**overrides})) == overrides
        )
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ConfigError(
            f"config_overrides={overrides!r}: expected a dict of plain values, such as {{'num_labels': 5}}"
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs. No setting here changes the numbers of a run except storage, compute, rounding, fold_every,
    block_numel, seed and trainable; those are part of its identity and are checked on resume. A setting that has no
    effect on a new run is refused or told by a warning (docs/limits.md)."""

    offload: Offload = "auto"
    """Where blocks live: "none" in the device's memory, "host" in host memory behind a window, "disk" in files.
    On a CPU "host" is "none" unless a window is asked for (device_memory, num_slots, prefetch, overlap=False).
    "auto": none if the stored model fits in half of the free memory, else disk."""
    storage: str | None = None
    """Format that weights are stored and updated in, a name of `formats.FORMATS`: fp32, bf16, fp16, int8+8, int4, ...
    Default: the checkpoint's (or module's) own dtype. "auto": the one that moves the least and keeps its updates
    (`auto.py`). "kept": a quantized checkpoint's own codes, where a format holds them.
    `storage.py` has the rule for norms, biases and the like."""
    keep: Any = None
    """Glob or globs of parameters that a quantized storage leaves in 16 or 32 bits, such as "embed_tokens"."""
    compute: str | None = None
    """Dtype of the perturbed weights and so of the forward. Default: fp32 on the CPU for a checkpoint (16-bit matmuls
    are slow on most CPUs), the checkpoint's own on a GPU. "auto": on a CPU bf16 where that is measured to be faster
    when the run begins, and part of its record (`run/compute.py`); its coarser forwards may teach less per step.
    "tf32" (GPU): float32 weights and activations, products on the matrix units. A module in memory is computed in
    its own dtypes. In 16 bits a parameter whose weights are too large for eps to move (norms, mostly) is perturbed
    with more than eps: `gains.py`."""
    mode: Mode = "eval"
    """The mode of the model's modules while the engine runs them: "eval" (no dropout, batch norm by its running
    statistics), "train", or "as_is", each in the mode it is given in. Afterwards each has its own mode again. In every
    mode a forward leaves the modules as it found them: buffers such as running statistics keep the base's values."""
    rounding: Rounding = "nearest"
    """How an update is rounded into 16-bit storage. "stochastic" keeps small updates on average; its random bits are a
    function of the update's seed, so it is reproducible."""
    fold_every: int | str | None = None
    """Steps between two write-backs of a block: updates in between are applied in float32 registers at each visit, and
    flushes and roundings drop by this factor. Default 4 with Gaussian, 8 with Rademacher noise; 1 for float32 weights
    that are never flushed (`storage.choose_fold_every` says why). "auto": on a CPU the least costly number by what
    noise and writing cost when the run begins, and part of its record (`run/folding.py`)."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N". The CUDA path is complete but has not run on a GPU yet (README, status table)."""
    host_memory: HostMemory = "auto"
    """How offload="host" keeps blocks for a GPU: "pinned" page-locks all of them, an error where the system refuses;
    "staged" copies through a small pinned ring; "auto" tries the first and falls back to the second."""
    device_memory: int | float | str | None = None
    """Budget for window, scratch and activations together, e.g. "3GB". What the smallest window leaves
    of it keeps blocks in memory for the whole run.
    Default: on the CPU the smallest window that overlaps (num_slots=3); on a GPU four fifths of what is free, or that
    same window where num_slots is given."""
    block_numel: int = BLOCK_NUMEL
    """Most elements of a block. Larger layers are several blocks, larger parameters are cut into pieces of whole rows
    (`blocks.py`), so the window takes num_slots times this whatever the model."""
    num_slots: int | None = None
    """Blocks in the window; 2 overlap the fetch, 3 the flush too. Default 3, or what device_memory allows."""
    prefetch: int | None = None
    """Blocks fetched ahead, < num_slots. Default num_slots - 1."""
    overlap: bool = True
    """False runs the same ops one after the other on the calling thread."""
    io_threads: int = 1
    """Threads that fetch blocks."""
    scrub_every: int = 16
    """offload="disk" on a CPU: blocks that lie in the system's page cache are used there, and summed again at every so
    many visits; before anything is folded into them, and after a resume, in any case (`tiers/lending.py`). 1: every
    visit is a copy that was summed, as it is of blocks that are not in the page cache."""
    threads: int | None = None
    """Threads of the native kernels. Default: torch.get_num_threads()."""
    order: Order = "auto"
    """Service order: "module" makes noise once for all lanes, "block" holds one lane's scratch and activations at a
    time, "lane" runs one lane after another (models whose modules keep tensors between calls). "auto": module if it
    fits the budget, else block."""
    whole: Collection[str] | None = None
    """Names of entries in a ready-made batch that go whole to every micro-batch, such as ("class_weights",); all other
    entries that are as long as the batch are then cut along its rows. None: an entry that may be either is an error."""
    trainable: Any = None
    """The trained parameters: a glob on module paths, a list of them, a predicate (name, parameter), "requires_grad",
    or None for all."""
    tail: Any = None
    """Of what trains, the parameters that their exact gradient trains, not lanes: a glob or globs such as "classifier".
    They are used last in the forward (a class head, an adapter's coefficients in the last layers) and kept in float32
    on the device; autograd gives their gradient from one lane, without a further visit of the weights. The run's
    directory then holds them as tensors, since no journal of scalars rebuilds them (`run/tail.py`)."""
    tail_lr: float | None = None
    """The tail's peak learning rate, which follows the method's schedule and brake. Default 1e-3."""
    tail_optimizer: Literal["adam", "sgd"] | None = None
    """How the tail's gradient changes it. Default adam."""
    seed: int = 0
    """Run seed: noise and data order are functions of it and the step."""
    run_dir: str | Path | None = None
    """Journal, metrics and (for disk) blocks. Needed by offload="disk" and by resume."""
    snapshot_minutes: float | None = 10.0
    """With a run_dir: every trained block is written to the disk once per this many minutes, in the background, so that
    a resumed run replays at most the steps of that time. None: never (the journal alone rebuilds the run from its
    base)."""
    snapshot_steps: int | None = None
    """The same interval in steps; replaces snapshot_minutes."""
    trust_remote_code: bool = False
    """Whether a checkpoint's own code may run, for its classes of config, model and tokenizer. A run keeps this
    setting; a journal does not, so pass it to `replay` again."""
    adapter: Any = None
    """A peft adapter to train on a checkpoint whose own weights stay frozen: its directory, a config such as
    LoraConfig(r=16), its fields as a dict, or "r=16", "prefix=5" (`checkpoint/adapter_configs.py`). A new adapter is
    initialised as peft does it after torch.manual_seed(seed). It is kept in float32 on the device."""
    config_overrides: Mapping[str, Any] | None = None
    """Settings of a checkpoint's config.json to replace, such as {"num_labels": 5, "attn_implementation": "eager"}."""

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, choices in (
            ("offload", Offload), ("order", Order), ("rounding", Rounding), ("host_memory", HostMemory),
            ("mode", Mode),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}")
        if self.storage is not None and self.storage not in ("auto", "kept", *FORMATS):
            raise ConfigError(f"storage={self.storage!r}: choose one of auto, kept, {', '.join(FORMATS)}")
        if self.compute is not None and self.compute not in ("auto", *DTYPES):
            raise ConfigError(f"compute={self.compute!r}: choose one of auto, {', '.join(DTYPES)}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device={self.device!r}: expected 'cpu', 'cuda' or 'cuda:N'")
        if self.compute == "tf32" and self.device == "cpu":
            raise ConfigError("compute='tf32' is a mode of NVIDIA's matrix units; on the CPU choose fp32 or bf16")
        if self.device_memory is not None:
            parse_bytes(self.device_memory, "device_memory")
        if self.num_slots is not None and self.num_slots < (2 if self.overlap else 1):
            raise ConfigError(
                f"num_slots={self.num_slots}: streaming needs a slot to compute in and one to fetch into (>= 2), "
                "or overlap=False (>= 1)"
            )
        slots = self.num_slots or 3
        if self.block_numel < 1:
            raise ConfigError(f"block_numel={self.block_numel}: expected at least 1 element")
        if self.prefetch is not None and not 0 <= self.prefetch < slots:
            raise ConfigError(f"prefetch={self.prefetch} with num_slots={slots}: expected 0..{slots - 1}")
        if not self.overlap and self.prefetch:
            raise ConfigError(f"prefetch={self.prefetch} with overlap=False: nothing is fetched ahead; leave it out")
        if isinstance(self.fold_every, str) and self.fold_every != "auto":
            raise ConfigError(f"fold_every={self.fold_every!r}: expected a whole number or 'auto'")
        if isinstance(self.fold_every, int) and self.fold_every < 1:
            raise ConfigError(f"fold_every={self.fold_every}: expected at least 1 (fold after every step)")
        if self.scrub_every < 1:
            raise ConfigError(f"scrub_every={self.scrub_every}: expected at least 1 (sum at every visit)")
        if self.snapshot_minutes is not None and not self.snapshot_minutes > 0:
            raise ConfigError(f"snapshot_minutes={self.snapshot_minutes}: expected more than 0, or None for none")
        if self.snapshot_steps is not None and self.snapshot_steps < 1:
            raise ConfigError(f"snapshot_steps={self.snapshot_steps}: expected at least 1")
        for name in ("io_threads", "threads"):
            count = getattr(self, name)
            if count is not None and not 1 <= count <= MAX_THREADS:
                raise ConfigError(f"{name}={count}: expected 1 .. {MAX_THREADS}")
        if self.whole is not None and not _are_names(self.whole):
            raise ConfigError(f"whole={self.whole!r}: expected names, such as ('class_weights',)")
        if self.whole is not None:
            object.__setattr__(self, "whole", tuple(self.whole))  # as it is written into a run's configuration
        self._check_tail()
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed}: expected 0 .. 2**64 - 1")
        if not isinstance(self.trust_remote_code, bool):
            raise ConfigError(f"trust_remote_code={self.trust_remote_code!r}: expected True or False")
        _check_overrides(self.config_overrides)
        if self.offload == "disk" and self.run_dir is None:
            raise ConfigError("offload='disk' needs run_dir=...: the blocks are written there")

    def _check_tail(self) -> None:
        if self.tail_optimizer not in (None, "adam", "sgd"):
            raise ConfigError(f"tail_optimizer={self.tail_optimizer!r}: choose one of adam, sgd")
        if self.tail_lr is not None and not (math.isfinite(self.tail_lr) and self.tail_lr > 0):
            raise ConfigError(f"tail_lr={self.tail_lr}: expected a positive number")
        for name in ("tail_lr", "tail_optimizer") if self.tail is None else ():
            if getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)!r} without a tail: name its parameters, tail=GLOB")

    def _check_kinds(self) -> None:
        """Raise ConfigError, with the name, for a setting of a wrong type: it may come from an edited file."""
        always = ("block_numel", "io_threads", "scrub_every", "seed", "device", "overlap")
        numbers = ("num_slots", "prefetch", "threads", "snapshot_steps")
        for names, kind, what in (
            (("block_numel", "io_threads", "scrub_every", "seed", *numbers), int, "a whole number"),
            (("snapshot_minutes", "tail_lr"), (int, float), "a number"),
            (("fold_every",), (int, str), "a whole number or 'auto'"),
            (("storage", "compute", "device"), str, "a name"),
            (("run_dir",), (str, Path), "a path"),
            (("overlap",), bool, "True or False"),
            (("device_memory",), (int, float, str), "a number of bytes such as '6GB'"),
        ):  # fmt: skip
            for name in names:
                value = getattr(self, name)
                wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
                if wrong and (value is not None or name in always):
                    raise ConfigError(f"{name}={value!r}: expected {what}")
        for name in ("trainable", "keep", "tail"):
            globs, may_choose = getattr(self, name), name == "trainable"
            if not (globs is None or isinstance(globs, str) or _are_names(globs) or (may_choose and callable(globs))):
                or_function = ", or a function (name, parameter)" if may_choose else ""
                raise ConfigError(f"{name}={globs!r}: expected a glob, or a list of globs{or_function}")

    @property
    def about_tail(self) -> dict[str, Any]:
        """How the tail is trained, with the defaults."""
        return {"lr": TAIL_LR if self.tail_lr is None else self.tail_lr, "optimizer": self.tail_optimizer or "adam"}

    @property
    def ahead(self) -> int:
        """Stays fetched before they are needed."""
        if not self.overlap:
            return 0
        return self.prefetch if self.prefetch is not None else (self.num_slots or 3) - 1


class EngineSettings(TypedDict, total=False):
    """The fields of `EngineConfig` as keywords, for type checkers and completion; and arguments of from_pretrained that
    `checkpoint/load_options.py` turns into fields."""

    offload: Offload
    storage: str | None
    keep: Any
    compute: str | None
    mode: Mode
    rounding: Rounding
    fold_every: int | str | None
    device: str
    host_memory: HostMemory
    device_memory: int | float | str | None
    block_numel: int
    num_slots: int | None
    prefetch: int | None
    overlap: bool
    io_threads: int
    scrub_every: int
    threads: int | None
    order: Order
    whole: Collection[str] | None
    trainable: Any
    tail: Any
    tail_lr: float | None
    tail_optimizer: Literal["adam", "sgd"] | None
    seed: int
    run_dir: str | Path | None
    snapshot_minutes: float | None
    snapshot_steps: int | None
    trust_remote_code: bool
    adapter: Any
    config_overrides: Mapping[str, Any] | None
    num_labels: int
    attn_implementation: str
    dtype: Any
    torch_dtype: Any
    revision: str


def as_config(config: Any, given: Mapping[str, Any]) -> EngineConfig:
    """An engine's settings, from `config=` or by their names. ConfigError: both, or a config of something else."""
    if config is None:
        check_settings(given)
        return EngineConfig(**given)
    if not isinstance(config, EngineConfig):
        raise ConfigError(
            f"config= takes an EngineConfig, and this is a {type(config).__name__}. Settings of a checkpoint's "
            "config.json are replaced by config_overrides={...}; a model made of a config is given itself, as the model"
        )
    if given:
        name = next(iter(given))
        raise ConfigError(f"{name}= is given beside config=, which has it: dataclasses.replace(config, {name}=...)")
    return config


def check_settings(given: Iterable[str]) -> None:
    """Raise ConfigError for a name that is not a setting of an engine."""
    known = [field.name for field in fields(EngineConfig)]
    own = ["method", "objective", "tokenizer", "model_class", "example", "base", "config"]  # Engine's own arguments
    for name in given:
        if name not in known:
            hint = did_you_mean(name, [*known, *own], "{}=") or f" There are {', '.join(sorted(known))}."
            hint += f" A setting of the model's config.json goes into config_overrides={{{name!r}: ...}}."
            raise ConfigError(f"{name}= is no setting of Engine.{hint}")
