"""`make demo`: fine-tune a real language model on real text, its weights streamed from disk.

    python examples/demo.py --out demo [--steps 40]

SmolLM2-135M learns to answer whether a film review is positive (sentences of Pang and Lee 2005), every parameter
trained by forward passes only. The model is read from a safetensors checkpoint into blocks on disk; three blocks at a
time are in memory. Held-out loss falls clearly within some minutes; accuracy, which starts well above chance, need
not move in so few steps: MeZO takes thousands.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from demo_assets import TEMPLATE, VERBALIZERS, write_assets

from zo_offload import Engine, MeZO
from zo_offload.data.batches import open_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo", help="where model, data, run and export go")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dev-rows", type=int, default=200, help="held-out rows that are scored")
    options = parser.parse_args()
    print("preparing the model and the data ...", flush=True)
    folder = write_assets(options.out)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir, tuned = folder / f"run-{stamp}", folder / f"tuned-{stamp}"
    dev = open_rows(folder / "dev.jsonl")[: options.dev_rows]
    task = dict(template=TEMPLATE, verbalizers=list(VERBALIZERS))
    with Engine(
        folder / "model", method=MeZO(lr=3e-5, eps=1e-3, batch_size=16), storage="fp32", offload="disk", num_slots=2,
        run_dir=run_dir,
    ) as engine:  # fmt: skip
        before = engine.evaluate(dev, **task)
        show("before", before, len(dev))
        result = engine.fit(folder / "train.jsonl", steps=options.steps, progress=True, **task)
        show("after", engine.evaluate(dev, **task), len(dev))
        engine.save_pretrained(tuned)
    resident, whole = result.resident_bytes, result.model_bytes
    print(
        f"weights in memory: {resident / 1e6:.0f} MB of {whole / 1e6:.0f} MB ({100 * resident / whole:.0f} %)   "
        f"{result.tokens_per_s:.0f} tokens/s   compute waited for blocks {100 * result.wait_share:.1f} % of the time"
    )
    journal = Path(run_dir) / "journal.zoj"
    print(f"run:      {run_dir}   (journal: {journal.stat().st_size} bytes hold the whole fine-tune)")
    print(f"exported: {tuned}   (AutoModelForCausalLM.from_pretrained loads it)")


def show(when: str, values: dict[str, float], rows: int) -> None:
    print(f"{when:<7} held-out loss {values['loss']:.3f}   accuracy {100 * values['accuracy']:.1f} %   ({rows} rows)")


if __name__ == "__main__":
    main()
