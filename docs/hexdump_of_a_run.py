"""Makes the hexdumps of docs/file_formats.md: trains a model of ten weights for two steps and shows the files' bytes.

    python docs/hexdump_of_a_run.py            prints the page's section
    python docs/hexdump_of_a_run.py --write    puts it into the page

The journal's header is shortened to the keys that name its history: the others hold the date and versions of libraries.
All else is as the engine wrote it. The loss is rounded to 1/64, so that every processor has the same one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from zo_offload import Engine, MeZO
from zo_offload.journal.format import HISTORY, load_journal, pack_header, pack_note, pack_step

PAGE = Path(__file__).with_name("file_formats.md")
BEGIN, END = "<!-- made by docs/hexdump_of_a_run.py -->", "<!-- end of what it made -->"
STEPS = 2


def rounded_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(batch["x"]).square().mean() * 64).round() / 64


def make_run(run_dir: Path) -> None:
    """Two steps from disk, a fold each: the matrix trains, the bias is frozen."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).view(2, 4) / 8)
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    data = [{"x": torch.ones(1, 4)}, {"x": torch.eye(4)[:1]}]
    with Engine(
        model, method=MeZO(lr=0.125, eps=0.5), objective=rounded_loss, trainable=["weight"], example=data[0],
        offload="disk", run_dir=run_dir, fold_every=1,
    ) as engine:  # fmt: skip
        engine.fit(data, steps=STEPS)


def shortened(path: Path) -> bytes:
    """A journal with the keys of its header that name its history, and the same notes and steps."""
    contents = load_journal(path)
    assert all(note.step == 0 for note in contents.notes)
    data = pack_header({key: contents.header[key] for key in HISTORY})
    chain = int.from_bytes(data[-4:], "little")
    for lag, item in enumerate([*contents.notes, *contents.steps], -len(contents.notes)):
        pack = pack_note if lag < 0 else pack_step
        packed, chain = pack(item, chain, max(lag, 0))
        data += packed
    return data


def hexdump(data: bytes) -> Iterator[str]:
    """As `hexdump -C` has it: 16 bytes a line, "*" for lines that repeat the one before."""
    before = b""
    for at in range(0, len(data), 16):
        line = data[at : at + 16]
        if line != before:
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
            yield f"{at:08x}  {line.hex(' '):<47}  |{text}|"
        elif data[at - 32 : at - 16] != line or at == 16:
            yield "*"
        before = line
    yield f"{len(data):08x}"


def section() -> str:
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        make_run(run_dir)
        files = {
            "journal.zoj": shortened(run_dir / "journal.zoj"),
            "blocks/00000.zob": (run_dir / "blocks" / "00000.zob").read_bytes(),
        }
        shapes = (run_dir / "blocks" / "shapes.json").read_text()
    parts = [f"`blocks/shapes.json`: `{shapes}`"]
    parts += [
        f"`{name}`, {len(data)} bytes:\n\n```\n" + "\n".join(hexdump(data)) + "\n```" for name, data in files.items()
    ]
    return f"{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}"


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(section())
        return
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    PAGE.write_text(before + section() + after)


if __name__ == "__main__":
    main()
