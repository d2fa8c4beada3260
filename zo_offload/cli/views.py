"""`zo-offload plot` and `report`: charts and pages of runs. Only `report --examples` opens a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_OURS = b"zo_offload"
"""Both kinds of file name this package in their first bytes."""


def add_commands(commands: Any) -> None:
    for name, run, what in (
        ("plot", _plot, "runs' curves as an SVG file: the loss or another evaluated value, against its cost"),
        ("report", _report, "runs as one HTML page: curves, cost and settings"),
    ):
        view = commands.add_parser(name, help=what)
        view.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
        file = f"{name}.{'svg' if name == 'plot' else 'html'}"
        view.add_argument("--out", help=f"the file to write ({file} in the first run's directory)")
        view.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
        if name == "report":
            answers = "also show this many evaluation rows with the model's answers before and after; opens the model"
            view.add_argument("--examples", type=int, metavar="N", help=answers)
        if name == "plot":
            axes = ["steps", "forwards", "bytes", "seconds"]
            view.add_argument("--y", default="loss", help="loss, accuracy, or another evaluated value (%(default)s)")
            view.add_argument("--x", default="steps", choices=axes, help="the x axis (%(default)s)")
        view.set_defaults(run=run)


def _plot(args: argparse.Namespace) -> int:
    from .history import read_history
    from .page import charts

    found = charts([read_history(run) for run in args.runs], args.x)
    if args.y not in found:
        raise ConfigError(f"--y {args.y}: these runs have {', '.join(found)}")
    return _write(args, "plot.svg", found[args.y])


def _report(args: argparse.Namespace) -> int:
    from .history import read_history
    from .page import report

    runs = [read_history(run) for run in args.runs]
    shown = {}
    if args.examples is not None:
        from .before_after import examples

        shown = {run.name: examples(run.path, args.examples) for run in runs}
    return _write(args, "report.html", report(runs, shown))


def _write(args: argparse.Namespace, name: str, text: str) -> int:
    """Write to --out, or next to the first run's journal, where only a file that this command wrote is replaced."""
    out = Path(args.out or Path(args.runs[0], name))
    ours = not args.out and out.is_file() and _OURS in out.read_bytes()[:400]
    if out.exists() and not (args.overwrite or ours):
        raise ConfigError(f"{out} exists; give another file as --out, or --overwrite")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: {out.parent} is not a directory")
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}")
    return 0
