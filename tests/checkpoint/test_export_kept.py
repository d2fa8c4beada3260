"""Exports of quantized checkpoints in the layout that they came in: codes as the bytes that were read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from support.quantized_models import WRITERS, quantize_checkpoint
from support.zoo.models import ZOO
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.errors import ConfigError

NORMS = dict(trainable="*norm*", method=MeZO(lr=0.5, batch_size=2), offload="none")
IDS = torch.tensor([[5, 17, 3, 60, 8], [9, 2, 44, 31, 7]])
BATCH = dict(input_ids=IDS, labels=IDS)
CASES = [(scheme, "llama") for scheme in WRITERS if scheme != "mxfp4"]
CASES += [("fp8", "mixtral"), ("awq", "mixtral"), ("mxfp4", "gpt-oss")]


def quantized(folder, scheme, model="llama"):
    tiny = ZOO[model]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 32}
    options = tiny.options | {name: size for name, size in sizes.items() if name in tiny.options}
    replace(tiny, options=options).build(torch.bfloat16).save_pretrained(folder / "source")
    quantize_checkpoint(folder / "source", folder / "quantized", scheme, folder / "plain")
    return folder / "quantized"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("scheme", "model"), CASES)
def test_codes_leave_as_they_came_and_the_rest_as_it_trained(tmp_path, scheme, model):
    path = quantized(tmp_path, scheme, model)
    storage = None if scheme == "gptq" else "kept"  # in act-order; decoded exactly, in the library's dtype
    with Engine(path, storage=storage, **NORMS) as engine:
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "out", scheme="kept")
        logits = engine.run(dict(input_ids=IDS)).logits
    came, left = load_file(path / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(left) == set(came)
    changed = [
        name
        for name, tensor in came.items()
        if left[name].dtype != tensor.dtype
        or not torch.equal(left[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    ]
    assert changed and all("norm" in name for name in changed)
    assert config_of(tmp_path / "out")["quantization_config"] == config_of(path)["quantization_config"]
    with Engine(tmp_path / "out", storage=storage, **NORMS) as engine:
        assert torch.equal(engine.run(dict(input_ids=IDS)).logits, logits)


def test_settings_in_a_file_of_their_own_stay_there_and_scales_of_activations_too(tmp_path):
    from safetensors.torch import save_file

    path = quantized(tmp_path, "gptq")
    config, tensors = config_of(path), load_file(path / "model.safetensors")
    (path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (path / "config.json").write_text(json.dumps(config))
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.25)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with Engine(path, **NORMS) as engine:
        engine.save_pretrained(tmp_path / "out", scheme="kept", max_shard_bytes=1 << 17)
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert (tmp_path / "out/quantize_config.json").read_bytes() == (path / "quantize_config.json").read_bytes()
    left = [load_file(file) for file in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(left) > 1 and {name for part in left for name in part} == set(tensors)


def test_what_cannot_leave_as_it_came_is_refused_by_name(tmp_path, capsys):
    path, run = quantized(tmp_path, "awq"), tmp_path / "run"
    with Engine(path, run_dir=run, method=MeZO(lr=1e-2), offload="none", storage="bf16") as engine:
        engine.step(BATCH)
        with pytest.raises(ConfigError, match=r"down_proj.weight' is no longer what '.*qweight' holds"):
            engine.save_pretrained(tmp_path / "out", scheme="kept")
    with (
        Engine(path, storage="int8", **NORMS) as engine,
        pytest.raises(ConfigError, match="in a format that rounds it. storage='kept'"),
    ):
        engine.save_pretrained(tmp_path / "out", scheme="kept")
    with Engine(tmp_path / "plain", **NORMS) as engine, pytest.raises(ConfigError, match="not read from one"):
        engine.save_pretrained(tmp_path / "out", scheme="kept")
    with (
        Engine(path, adapter="r=2", storage="kept", offload="none") as engine,
        pytest.raises(ConfigError, match="the adapter alone is written"),
    ):
        engine.save_pretrained(tmp_path / "out", scheme="kept")
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), "--as", "kept", "--out", str(tmp_path / "out")]) == 2
    assert "was trained" in capsys.readouterr().err
    assert main(["export", str(path), "--as", "kept", "--out", str(tmp_path / "out")]) == 0
    came, left = load_file(path / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(left[name], tensor) for name, tensor in came.items())
