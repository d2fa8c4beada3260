"""Peak memory and speed of the ways in and out: from a checkpoint into blocks, and back into one.

    python -m benchmarks.ingest [--cases vocabulary experts] [--storage bf16 ...] [--mib 1024]
                                [--block-numel N] [--only PHASE ...] [--as LAYOUT ...] [--lora R]

A synthetic checkpoint whose largest parameter has `--mib` MiB in bf16, written in the names that transformers saves:

    vocabulary   an embedding of that size, one plain tensor in the file
    experts      one layer's gate and up projections of that size, in the file a tensor for each expert and projection,
                 which transformers merges when it loads
    layer        a Llama layer whose three MLP matrices have that size each
    gptq, ...    one layer's gate and up projections of that size, in one weight as Phi-3's, and the down projection
                 beside it, in a quantization scheme or in GGUF (`ingest_schemes.py`), for --storage kept; gpt-oss: its
                 experts. The norms train

Each case runs in a process of its own, one phase after another:

    digest    the checkpoint's identity, read from its files     make      Engine(path, offload="disk"), nothing read
    ingest    first weights into block files                     step      one step
    export    save_pretrained                                    resume    Engine.resume and its first evaluation
    replay    base and journal into another checkpoint

--as adds an export in each of these layouts ("export gguf-q8_0"), and --lora R an adapter on a frozen base, which
"peft" and "merged" are for.

For each, `peak_bytes` is the most anonymous memory (RssAnon of /proc/self/status, every millisecond) during the phase,
above that of the process before the first: pages of files that are mapped or cached are not ours and not in it, copies
are. `high_water_bytes` is the kernel's own mark (VmHWM, reset before the phase) above the resident bytes before the
first phase, which misses no moment, and counts mapped pages too. The goal is three blocks of `--block-numel` float32
and 64 MiB, whatever the largest parameter, and for the schemes 0.3 GB; a step holds what its plan says besides, and
what it leaves in the scratch pool is in the export after it. `mb_per_s` is the checkpoint's bytes over the phase's
seconds; files are in the system's cache. `share_of_memcpy` is the CPU time of a memory copy of as many bytes, measured
just before, over the phase's.
--only leaves phases out that are not named, and that those do not need.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, about, emit
from benchmarks.ingest_schemes import GGUF, SCHEMES, Part, plain, repeat, write_gguf

CONSTANT_BYTES = 64 << 20
MOST_BYTES = 300_000_000
"""The goal for quantized checkpoints."""
CASES = ("vocabulary", "experts", "layer", *SCHEMES, *GGUF)
PHASES = ("digest", "make", "ingest", "step", "export", "resume", "replay")


def config_of(case: str, mib: int) -> Any:
    from transformers import GptOssConfig, LlamaConfig, MixtralConfig, Phi3Config

    small: dict[str, Any] = dict(
        hidden_size=1024, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
        use_cache=False, dtype="bfloat16",
    )  # fmt: skip
    if case == "vocabulary":
        return LlamaConfig(
            **small, vocab_size=mib << 9, intermediate_size=1024, tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    if case == "layer":
        wide = small | dict(hidden_size=8192, num_attention_heads=64)
        return LlamaConfig(**wide, vocab_size=1024, intermediate_size=mib << 6, architectures=["LlamaForCausalLM"])
    if case == "gpt-oss":
        return GptOssConfig(
            **small, head_dim=128, vocab_size=1024, intermediate_size=1024, num_local_experts=mib >> 2,
            num_experts_per_tok=2, architectures=["GptOssForCausalLM"],
        )  # fmt: skip
    if case in SCHEMES or case in GGUF:
        return Phi3Config(
            **small, vocab_size=1024, intermediate_size=mib << 8, pad_token_id=0, eos_token_id=0,
            architectures=["Phi3ForCausalLM"],
        )  # fmt: skip
    return MixtralConfig(
        **small, vocab_size=1024, intermediate_size=1024, num_local_experts=mib >> 2, num_experts_per_tok=2,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip


def write_checkpoint(folder: Path, case: str, mib: int) -> int:
    """The case's checkpoint, a tile of noise again and again; its bytes. No tensor is ever in memory."""
    import transformers

    from zo_offload.checkpoint.conversion import names_to_save, saving_groups

    config = config_of(case, mib)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    model.tie_weights()
    metas = {name: tensor.detach() for name, tensor in names_to_save(model).items()}
    shapes = {name: meta.shape for group in saving_groups(model, metas) for name, meta in group.outputs.items()}
    parts: dict[str, Part] = {}
    config.save_pretrained(folder)
    if case in GGUF:
        return write_gguf(folder / "model.gguf", case, {name: tuple(shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        if case in SCHEMES and "mlp." in name and len(shape) == (3 if case == "gpt-oss" else 2):
            parts |= SCHEMES[case][0](name, *shape)
        else:
            parts[name] = plain(tuple(shape))
    if case in SCHEMES:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": SCHEMES[case][1]}))
    return write_tensors(folder / "model.safetensors", parts)


def write_tensors(path: Path, parts: dict[str, Part]) -> int:
    """A safetensors file, each tensor its tile again and again; the tensors' bytes."""
    header: dict[str, Any] = {}
    at = 0
    for name, part in parts.items():
        size = math.prod(part.shape) * part.tile.element_size()
        header[name] = {"dtype": _DTYPES[part.tile.dtype], "shape": part.shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for part in parts.values():
            repeat(file, part.tile, math.prod(part.shape) * part.tile.element_size())
    return at


_DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


class Meter:
    """Peaks and seconds of phases, above what the process had when this was made."""

    def __init__(self) -> None:
        self._anon, self._resident = _status("RssAnon"), _status("VmRSS")
        self.rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
        done, most = threading.Event(), [_status("RssAnon")]

        def watch() -> None:
            while not done.wait(0.001):
                most[0] = max(most[0], _status("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, began = time.perf_counter(), time.process_time()
        yield
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - began
        done.set()
        watcher.join()
        self.rows.append({
            "phase": name, "peak_bytes": max(most[0], _status("RssAnon")) - self._anon,
            "high_water_bytes": _status("VmHWM") - self._resident, "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "mb_per_s": round(nbytes / seconds / 1e6, 1),
        })  # fmt: skip


def run(
    folder: Path, storage: str, block_numel: int, only: list[str], nbytes: int, layouts: list[str], lora: int | None
) -> list[dict[str, Any]]:
    """All phases in this process."""
    from zo_offload import Engine, MeZO
    from zo_offload.checkpoint.checkpoint import Checkpoint
    from zo_offload.replay import replay
    from zo_offload.system.host_memory import process_bytes

    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "labels": ids}
    base, run_dir = folder / "base", Path(tempfile.mkdtemp(dir=folder)) / "run"
    process_bytes()  # libraries that load at their first use
    meter = Meter()
    if "digest" in only:
        with meter.phase("digest", nbytes):
            checkpoint = Checkpoint.open(base)
            checkpoint.build_model()
            checkpoint.digest()
            checkpoint.close()
            del checkpoint
    with meter.phase("make", nbytes):
        engine = Engine(base, method=MeZO(lr=1e-6), offload="disk", run_dir=run_dir, storage=storage,
                        block_numel=block_numel, example=batch,
                        trainable="*norm*" if storage == "kept" and not lora else None,
                        adapter=f"r={lora}" if lora else None)  # fmt: skip
    with meter.phase("ingest", nbytes):
        engine.active.start(batch)
    if "step" in only:
        with meter.phase("step", nbytes):
            engine.step(batch)
    if "export" in only:
        with meter.phase("export", nbytes):
            engine.save_pretrained(run_dir.parent / "out")
    for layout in layouts:
        with meter.phase(f"export {layout}", nbytes):
            engine.save_pretrained(run_dir.parent / layout, scheme=layout)
        shutil.rmtree(run_dir.parent / layout)
    engine.close()
    del engine
    if "resume" in only:
        with meter.phase("resume", nbytes), Engine.resume(run_dir) as engine:
            engine.run(batch)
        del engine
    if "replay" in only:
        with meter.phase("replay", nbytes):
            replay(base, run_dir, run_dir.parent / "replayed")
    return [row for row in meter.rows if row["phase"] in only or row["phase"].removeprefix("export ") in layouts]


def copied_per_cpu_second() -> float:
    """Bytes of a memory copy, by CPU time: other work on the cores does not count."""
    source, target, best = torch.zeros(1 << 26, dtype=torch.uint8), torch.zeros(1 << 26, dtype=torch.uint8), 0.0
    for _ in range(7):
        start = time.process_time()
        target.copy_(source)
        best = max(best, source.numel() / (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES[:2], choices=CASES)
    parser.add_argument("--storage", nargs="+", default=["bf16"])
    parser.add_argument("--mib", type=int, default=1024, help="of the largest parameter in the checkpoint")
    parser.add_argument("--block-numel", type=int, default=64 << 20)
    parser.add_argument("--only", nargs="+", default=list(PHASES), choices=PHASES, metavar="PHASE")
    parser.add_argument("--as", nargs="+", default=[], dest="layouts", metavar="LAYOUT", help="layouts to export in")
    parser.add_argument("--lora", type=int, help="rank of an adapter on the frozen base")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "BYTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = run(
            Path(options.one[0]), options.storage[0], options.block_numel, options.only, int(options.one[1]),
            options.layouts, options.lora,
        )  # fmt: skip
        print(json.dumps(found))
        return
    common = about("ingest")
    goal = 3 * 4 * options.block_numel + CONSTANT_BYTES
    for case in options.cases:
        copied = copied_per_cpu_second()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "base").mkdir()
            nbytes = write_checkpoint(Path(folder) / "base", case, options.mib)
            for storage in options.storage * options.repeat:
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    (Path(own) / "base").symlink_to(Path(folder) / "base")
                    command = [
                        sys.executable,
                        "-m",
                        "benchmarks.ingest",
                        "--one",
                        own,
                        str(nbytes),
                        "--storage",
                        storage,
                    ]
                    command += ["--block-numel", str(options.block_numel), "--only", *options.only]
                    command += ["--as", *options.layouts] if options.layouts else []
                    command += ["--lora", str(options.lora)] if options.lora else []
                    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                for row in json.loads(done.stdout.splitlines()[-1]):
                    about_case = {
                        "case": case,
                        "storage": storage,
                        "lora": options.lora,
                        "largest_bytes": options.mib << 20,
                        "bytes": nbytes,
                    }
                    row["share_of_memcpy"] = round(nbytes / copied / row["cpu_seconds"], 4)
                    emit(
                        about_case | row | {"goal_bytes": MOST_BYTES if case in SCHEMES or case in GGUF else goal},
                        common,
                    )


if __name__ == "__main__":
    main()
