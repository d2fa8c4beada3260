"""What is read off the lines of `learning.py` that have a curve: the bytes that a loss takes, and a chart.

    python -m benchmarks.learning_table FILE [--plot FILE.svg --task sms]

For each seed of `mezo`, the first evaluation of each other way whose loss is not above MeZO's at its end, and how many
times fewer bytes had been moved by then; held-out rows only. --plot: held-out loss against MB moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from math import log10
from pathlib import Path
from typing import Any

from zo_offload.cli.chart import Curve, line_chart

Line = dict[str, Any]


def reached(lines: list[Line]) -> Iterator[str]:
    """A row for each run of MeZO and each other way with the same task and seed that has a curve."""
    yield "| task | seed | MeZO: visits, loss | MB | way | visits | loss | MB | fewer bytes |"
    yield "|---|---|---|---|---|---|---|---|---|"
    held = [line for line in lines if line["rows_of"] == "held out" and "curve" in line]
    for mezo in (line for line in held if line["way"] == "mezo"):
        head = f"| {mezo['task']} | {mezo['seed']} | {mezo['visits']}, {mezo['loss']:.3f} | {mezo['moved_mb']:.0f} |"
        for other in held:
            if other["way"] == "mezo" or (other["task"], other["seed"]) != (mezo["task"], mezo["seed"]):
                continue
            way = f"{other['way']}, {other['directions']}, rate {other['lr']:g}"
            first = next((at for at in other["curve"] if at[2] <= mezo["loss"]), None)
            if first is None:
                yield f"{head} {way} | not in {other['visits']} | {other['loss']:.3f} | {other['moved_mb']:.0f} | - |"
                continue
            visits, moved, loss, _ = first
            yield f"{head} {way} | {visits} | {loss:.3f} | {moved:.0f} | {mezo['moved_mb'] / moved:.0f} |"


def chart(lines: list[Line], task: str) -> str:
    curves = [
        Curve(f"{line['way']}, seed {line['seed']}", [(log10(at[1]), at[2]) for at in line["curve"]], dots=True)
        for line in lines if line["task"] == task and line["rows_of"] == "held out" and "curve" in line
    ]  # fmt: skip
    return line_chart(curves, f"MiniLM on {task}", "MB moved, as a power of ten", "held-out loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--task", default="sms", help="of the plot")
    options = parser.parse_args()
    lines = [json.loads(line) for path in options.files for line in path.read_text().splitlines()]
    if options.plot:
        options.plot.write_text(chart(lines, options.task))
        return
    print("\n".join(reached(lines)))


if __name__ == "__main__":
    main()
