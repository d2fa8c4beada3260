"""examples/mezo_in_one_file.py is what the engine computes: the same losses and weights, wherever the blocks live."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from zo_offload import Engine, MeZO
from zo_offload.kernels import float32

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mezo_in_one_file.py"
SHAPE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32)
MODELS = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)),  # its head is tied
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2)),
}
STEPS, SETTINGS = 6, dict(lr=1e-2, eps=1e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("mezo_in_one_file", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batches():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": x, "labels": x} for x in torch.randint(0, 97, (STEPS, 4, 10), generator=generator)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_the_engine_computes_what_one_file_says(one_file, kind, offload, tmp_path):
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    losses = one_file.mezo(plain, batches(), **SETTINGS)
    assert len(set(losses)) == STEPS, "the losses must move, or nothing is compared"

    with Engine(
        tmp_path / "base", method=MeZO(batch_size=4, **SETTINGS), offload=offload, run_dir=tmp_path / "run"
    ) as engine:
        assert engine.fit(batches(), steps=STEPS).losses == losses
        found = dict(engine.weights())
    want = dict(plain.named_parameters())
    assert found.keys() == want.keys()
    for name, p in want.items():
        assert torch.equal(found[name], p.data), f"{name}: {(found[name] != p.data).sum()} values differ"


def test_its_fma_is_the_fma(one_file):
    rng = np.random.default_rng(0)
    scales = np.float32([1e-3, -1.0, 3e-7])
    for scale in scales:
        x, y = (rng.standard_normal(200_000).astype(np.float32) for _ in range(2))
        y *= np.exp2(rng.integers(-30, 30, y.size)).astype(np.float32)
        found = one_file.fma(torch.tensor(scale), torch.from_numpy(x), torch.from_numpy(y))
        assert np.array_equal(found.numpy(), float32.fma(scale, x, y))
