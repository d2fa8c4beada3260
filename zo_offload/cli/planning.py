"""`zo-offload plan`: the answer for named hardware, the details, and at the end the planned `fit` command."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..journal import run_directory
from ..methods import Method, method_from
from ..run.auto import rates
from ..system.units import parse_bytes, show_bytes
from . import scaling, timeline
from .answer import Answer, Machine, answer, command, compare, lines, machines, named_rates
from .hardware import find_drive, find_gpu, find_link
from .method_options import make_method
from .option_groups import IDENTITY
from .plan_details import Planned, details, plan_step

USUAL_STEPS = 20_000
"""The paper's recipe, used without --steps."""


def plan_lines(args: argparse.Namespace, settings: dict[str, Any]) -> Iterator[str]:
    """Lines of the report. settings: the engine's, as they were given."""
    method = make_method(args)
    if (Path(args.model) / run_directory.JOURNAL).exists():
        method, settings = _of_run(Path(args.model), args, settings)
    options: dict[str, Any] = dict(
        tokens=args.tokens, batch_size=args.batch_size or method.batch_size, micro_batches=args.micro_batches,
        model_class=args.model_class, **settings,
    )  # fmt: skip
    _check(args)
    if args.gpu is None and args.compare != "gpus":
        yield from _here(args, method, options)
        return
    options.pop("device", None)
    machine = _machine(args)
    found = answer(args.model, machine, method=method, **options)
    steps = args.steps or USUAL_STEPS
    if args.compare is not None:
        made = found.planned
        yield from compare(
            "GPU" if args.compare == "gpus" else "drive", machines(args.compare, machine), steps,
            lambda other: answer(args.model, other, method=method, made=made, **options),
        )  # fmt: skip
        yield "public rates, nothing was measured: docs/planning.md"
        return
    yield from lines(found, args.steps, USUAL_STEPS)
    yield ""
    if args.ranks:
        yield from scaling.lines(found, args.ranks, args.nvlink)
        yield ""
    yield from details(found.planned, lambda: named_rates(found))
    if args.timeline:
        yield _write_timeline(found, Path(args.timeline))
    yield _command(args, found.planned)


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that do not go together: none is ignored."""
    machine = {"host-memory": args.machine_memory, "host-bandwidth": args.host_bandwidth, "disk": args.disk,
               "disk-size": args.disk_size}  # fmt: skip
    pictures = {"timeline": args.timeline, "ranks": args.ranks, "nvlink": args.nvlink}
    if args.compare is not None:
        if args.compare == "gpus":
            pictures |= {"gpu": args.gpu, "link": args.link}  # every GPU has its own link
        if given := _given(pictures):
            raise ConfigError(f"--compare {args.compare} has no use for --{given[0]}: leave one of them out")
    if args.gpu is None and args.compare != "gpus":
        if given := _given(machine | pictures | {"compare": args.compare}):
            raise ConfigError(f"--{given[0]} plans for a GPU: name it, --gpu rtx-4090")
    elif args.device not in (None, "cuda"):
        raise ConfigError(f"--device {args.device} is a device of this machine: leave it out, or --gpu")
    if args.nvlink is not None and args.ranks is None:
        raise ConfigError("--nvlink is the rate between several GPUs: give --ranks N, too")
    if args.ranks is not None and args.ranks > scaling.MOST:
        raise ConfigError(f"--ranks {args.ranks}: at most {scaling.MOST} GPUs are planned for")
    if args.timeline is not None and not Path(args.timeline).absolute().parent.is_dir():
        raise ConfigError(f"--timeline {args.timeline}: there is no directory {Path(args.timeline).parent}")


def _given(flags: dict[str, Any]) -> list[str]:
    return [flag for flag, value in flags.items() if value is not None]


def _here(args: argparse.Namespace, method: Method, options: dict[str, Any]) -> Iterator[str]:
    """The report for the device in `settings`, with measured rates if it is present."""
    rate = None if args.link is None else find_link(args.link).gb_per_s
    made = plan_step(args.model, method=method, **options)
    yield from details(made, lambda: rates(made.prepared.config.device, rate))
    yield _command(args, made, made.prepared.config.device)


def _machine(args: argparse.Namespace) -> Machine:
    gpu = find_gpu("rtx-4090" if args.gpu is None else args.gpu)
    link = gpu.link if args.link is None else find_link(args.link, gpu.link)
    host = None if args.machine_memory is None else parse_bytes(args.machine_memory, "--host-memory")
    if host is not None and host < 1e9:
        raise ConfigError(f"--host-memory {args.machine_memory}: that is {show_bytes(host)}; give it as 64GB")
    drive = None if args.disk is None else find_drive(args.disk)
    return Machine(gpu, link, host, args.host_bandwidth, drive, args.disk_size or 2.0)


def _of_run(path: Path, args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
    """A run's method and settings, overridden by given ones."""
    record = run_directory.load_config(path)
    known = {
        name: value
        for name, value in record["settings"].items()
        if value is not None and name not in ("run_dir", "trust_remote_code")
    }
    method = make_method(args) if args.method or args.preset else method_from(record["method"])
    return method, {**known, **settings}


def _command(args: argparse.Namespace, made: Planned, device: str = "cuda") -> str:
    """The planned `fit`. Of a run: its resume, or a new run on its base where options differ that a run keeps."""
    words, path = _method_words(args), Path(args.model)
    if not (path / run_directory.JOURNAL).exists():
        return command(made, args.steps, words, device)
    if words or any(getattr(args, name, None) is not None for name in (*IDENTITY, "batch_size", "tokens")):
        base = run_directory.load_config(path)["model"] or "BASE"
        return command(replace(made, model=base), args.steps, words, device)
    config = made.prepared.config
    again = ["zo-offload", "fit", str(path), "--resume", "--device", device, "--offload", made.prepared.offload]
    again += ["--steps", str(args.steps)] if args.steps else []
    again += ["--device-memory", str(config.device_memory)] if config.device_memory is not None else []
    return shlex.join(again)


def _method_words(args: argparse.Namespace) -> list[str]:
    """Options of the method, and what of the model trains, as they were given."""
    words: list[str] = []
    trained = ("lora", "adapter", "trainable")
    for name in ("method", "preset", *args.method_options, *trained, "fold_every", "compute", "seed"):
        value = getattr(args, name, None)
        if value is None or value is False:
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def _write_timeline(found: Answer, path: Path) -> str:
    made = found.planned
    trace = timeline.simulate(
        made.prepared.plan, made.prepared.layout, made.memory.window, found.work, found.step, found.machine.link,
        offload=made.prepared.offload, drive=found.machine.drive,
    )  # fmt: skip
    trace.write(path)
    return f"timeline: {path}, one step of {trace.step_s:.2f} s: open it in ui.perfetto.dev"
