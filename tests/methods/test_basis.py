"""An adapter in a basis of a model's own inputs: found in one pass, trained on a base that is only read, exported."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from support.compare import assert_same
from support.training import batches
from support.zoo.small import VOCAB, tiny_llama, tiny_opt
from zo_offload import FZOO, QZO, ConfigError, Engine
from zo_offload.cli import main
from zo_offload.replay import replayed

METHOD = FZOO(lr=0.05, eps=1e-3, directions=4, batch_size=4)
STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "llama"
    tiny_llama(2).save_pretrained(path)
    rows = [{"input_ids": row} for batch in batches(6) for row in batch["input_ids"].tolist()]
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def basis(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("basis") / "basis"
    with Engine(str(base)) as engine:
        engine.activation_basis(batches(1)[0], rank=3).save(path)
    return path


def inputs_of(model, batch):
    """What each linear layer is given, by plain hooks."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found.update({name: inputs[0].detach().reshape(-1, inputs[0].shape[-1])})
            )
    with torch.no_grad():
        model(**batch)
    return found


@pytest.mark.parametrize("way", [{}, dict(offload="host", num_slots=2, block_numel=512), dict(order="block")], ids=str)
def test_its_rows_are_the_top_right_singular_vectors_of_the_inputs(base, way):
    batch = batches(1)[0]
    with Engine(str(base), **way) as engine:
        engine.run(batch)
        hooks = [len(module._forward_pre_hooks) for module in engine.model.modules()]
        found = engine.activation_basis(batch, rank=3).vectors
        assert hooks == [len(module._forward_pre_hooks) for module in engine.model.modules()]
    want = inputs_of(tiny_llama(2), batch)
    assert found.keys() == want.keys()
    for name, rows in found.items():
        _, _, right = torch.linalg.svd(want[name].double(), full_matrices=False)
        overlap = (rows.double() @ right[:3].T).abs()
        # float32 inputs, and the square of them in between: the last digits of a double are gone
        assert torch.allclose(overlap, torch.eye(3, dtype=torch.float64), atol=1e-4), name


def test_padding_is_left_out_and_layers_may_be_chosen(base):
    batch = {key: value.clone() for key, value in batches(1)[0].items() if key != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, -3:] = 0
    with Engine(str(base)) as engine:
        one = engine.activation_basis(batch, 2, layers="model.layers.1.mlp").vectors
        batch["input_ids"][:, -3:] = 5
        other = engine.activation_basis(batch, 2, layers=["model.layers.1.mlp"]).vectors
        with pytest.raises(ConfigError, match="too few for a basis of rank"):
            engine.activation_basis({"input_ids": batch["input_ids"][:1, :2]}, 4)
    assert sorted(one) == [f"model.layers.1.mlp.{which}_proj" for which in ("down", "gate", "up")]
    for name in one:
        assert torch.allclose((one[name] @ other[name].T).abs(), torch.eye(2), atol=1e-4)


def run(model, **settings):
    with Engine(model, method=METHOD, **settings) as engine:
        losses = engine.fit(batches(STEPS), steps=STEPS, batch_size=4).losses
        return losses, {name: tensor.clone() for name, tensor in engine.weights() if "lora_B" in name}


WAYS = {
    "none": dict(offload="none"),
    "host": dict(offload="host", num_slots=2, block_numel=1024),
    "disk": dict(offload="disk", num_slots=2, order="block"),
}
IN_IT = dict(trainable=["lora_B"], keep=["lora_A"])


@pytest.mark.parametrize("storage", [None, "int4"])
def test_a_checkpoint_with_a_basis_trains_as_the_adapted_module_wherever_it_lives(base, basis, tmp_path, storage):
    with Engine(str(base)) as engine:
        found = engine.activation_basis(batches(1)[0], rank=3)
    whole = run(found.put_on(tiny_llama(2)), storage=storage, **IN_IT)
    assert len(set(whole[0])) == STEPS and all(tensor.any() for tensor in whole[1].values())
    for name, way in WAYS.items():
        more = dict(run_dir=tmp_path / name) if name == "disk" else {}
        assert_same(whole, run(str(base), adapter=basis, storage=storage, **IN_IT, **way, **more))


def test_before_a_step_it_is_the_base_and_only_c_trains(base, basis):
    batch = batches(1)[0]
    with Engine(str(base), adapter=basis, method=METHOD, **IN_IT) as engine, torch.no_grad():
        plain, adapted = tiny_llama(2)(**batch).loss, engine.run(batch).loss
        trained = {name for name, spec in engine.plan.params.items() if spec.trainable}
        assert all("lora_B" in name for name in trained) and len(trained) == 2 * 7
        assert engine.layout.written <= engine.plan.resident, "nothing is flushed during the run"
    assert plain == adapted


def test_layers_that_have_biases_train_theirs_too(tmp_path):
    """C and c: a rank and one more numbers an output."""
    with Engine(tiny_opt()) as engine:
        basis = engine.activation_basis(batches(1)[0], 2)
    trained = [n for n, p in basis.put_on(tiny_opt()).named_parameters() if p.requires_grad]
    assert sum(name.endswith("lora_B.default.bias") for name in trained) == len(basis.vectors) == len(trained) / 2
    basis.save(tmp_path / "basis")
    loaded = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "basis")
    want = dict(basis.put_on(tiny_opt()).named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in loaded.named_parameters())


def test_a_classifier_keeps_its_own_head(tmp_path):
    """peft copies the head into what it makes for a classifier; a basis has no head, and loads as it is."""
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=32)  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    batch = batches(1)[0] | {"labels": torch.tensor([0, 1, 1, 0])}
    options = dict(model_class="AutoModelForSequenceClassification", method=METHOD)
    with Engine(str(tmp_path / "base"), **options) as engine:
        engine.activation_basis(batch, 2, layers="bert.encoder").save(tmp_path / "basis")
    with Engine(str(tmp_path / "base"), adapter=tmp_path / "basis", **IN_IT, **options) as engine:
        assert not [name for name in engine.plan.params if "modules_to_save" in name]
        engine.step(batch)
        found = engine.evaluate([batch])["loss"]
        engine.save_pretrained(tmp_path / "tuned")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "tuned").eval()
    with torch.no_grad():
        assert float(loaded(**batch).loss) == found


def test_a_run_in_it_resumes_replays_and_is_exported_as_an_adapter(base, basis, tmp_path):
    whole = run(str(base), adapter=basis, offload="host", run_dir=tmp_path / "a", **IN_IT)
    with Engine(str(base), adapter=basis, method=METHOD, offload="disk", run_dir=tmp_path / "b", **IN_IT) as engine:
        engine.step(batches(1)[0])
    with Engine.resume(tmp_path / "b", offload="disk") as engine:
        engine.fit(batches(STEPS), steps=STEPS, batch_size=4, new_data=True)
        found = {name: tensor.clone() for name, tensor in engine.weights() if "lora_B" in name}
        assert_same(([], whole[1]), ([], found))
        loss = engine.evaluate(batches(1))["loss"]
        engine.save_pretrained(tmp_path / "tuned")
    with replayed(base, tmp_path / "a") as engine:
        replayed_weights = {name: tensor.clone() for name, tensor in engine.weights() if "lora_B" in name}
    assert_same(([], whole[1]), ([], replayed_weights))
    plain = peft.PeftModel.from_pretrained(tiny_llama(2), tmp_path / "tuned").eval()
    with torch.no_grad():
        assert float(plain(**batches(1)[0]).loss) == loss


def test_the_command_line_makes_one_and_trains_in_it(base, tmp_path, capsys):
    def call(*args):
        return main([str(arg) for arg in args])

    data, path = base.parent / "rows.jsonl", tmp_path / "basis"
    make = ("basis", base, "--data", data, "--rank", 2, "--batch-size", 4, "--storage", "int4", "--out", path)
    assert call(*make) == 0
    assert "rank 2" in capsys.readouterr().out
    assert call(*make) == 2 and "is there already" in capsys.readouterr().err
    first = load_file(path / "adapter_model.safetensors")
    assert {len(rows) for name, rows in first.items() if "lora_A" in name} == {2}
    fit = ("--data", data, "--batch-size", 4, "--storage", "int4", "--method", "fzoo", "--lr", 0.05, "--quiet",
           "--adapter", path, "--trainable", "lora_B", "--keep", "lora_A")  # fmt: skip
    assert call("fit", base, *fit, "--steps", 4, "--run-dir", tmp_path / "a", "--out", tmp_path / "tuned") == 0
    tuned = load_file(tmp_path / "tuned" / "adapter_model.safetensors")
    assert tuned.keys() == first.keys()
    for name, tensor in tuned.items():
        assert torch.equal(tensor, first[name]) == ("lora_A" in name), "the basis stays, all else is trained"


def test_it_is_found_on_a_base_in_four_bits(base):
    """Its directions are those of the inputs that training will see: of the quantized model."""
    with Engine(str(base), storage="int4", method=QZO()) as engine:
        found = engine.activation_basis(batches(1)[0], 2).vectors
        weights = {name: tensor.float() for name, tensor in engine.weights()}
    model = tiny_llama(2)
    model.load_state_dict(weights, strict=False)
    for name, x in inputs_of(model, batches(1)[0]).items():
        _, _, right = torch.linalg.svd(x.double(), full_matrices=False)
        # what the engine tells of them is rounded to the base's dtype
        assert torch.allclose((found[name].double() @ right[:2].T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-2)
