"""An adapter of peft's on a checkpoint's path: what peft would make in memory, trained on a streamed base, saved as
peft saves it, and refused by name where it does not fit."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.errors import CheckpointError, ConfigError, JournalError
from zo_offload.replay import replay

pytestmark = [pytest.mark.usefixtures("quiet_transformers"), pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}
METHOD = MeZO(lr=1e-2, eps=1e-2, batch_size=2)
SEED = 7
CAUSAL = dict(task_type="CAUSAL_LM")
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear", **CAUSAL),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", lora_bias=False, **CAUSAL),
    "whole-head": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **CAUSAL),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], **CAUSAL),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], **CAUSAL),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], **CAUSAL),
}


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def in_memory(config):
    """The model with a new adapter, as peft makes it of the seed."""
    model = ZOO["llama"].build()
    torch.manual_seed(SEED)
    return peft.get_peft_model(model, config).eval()


def losses_and_logits(engine, steps=3):
    losses = [engine.step(BATCH).loss for _ in range(steps)]
    return losses, engine.run(BATCH).logits.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_makes_in_memory_and_trains_to_the_same_bits(base, tmp_path, kind):
    with Engine(
        in_memory(KINDS[kind]()), method=METHOD, offload="none", trainable="requires_grad", seed=SEED
    ) as engine:
        want = losses_and_logits(engine)
        engine.save_pretrained(tmp_path / "theirs")
    with Engine(
        base, adapter=KINDS[kind](), method=METHOD, offload="disk", run_dir=tmp_path / "run", seed=SEED
    ) as engine:
        assert all(p.is_meta or p.numel() < 4096 for p in engine.model.parameters())
        got = losses_and_logits(engine)
        engine.save_pretrained(tmp_path / "ours")
    assert_same(got, want, kind)
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs)]
    assert_same(weights[0], weights[1], kind)
    again = peft.PeftModel.from_pretrained(ZOO["llama"].build(), ours).eval()
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, got[1])
    with Engine(base, adapter=ours, method=METHOD, offload="none") as engine:
        assert torch.equal(engine.run(BATCH).logits, got[1]), "an adapter that was saved is gone on with"


# ---- a run with an adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["int4", "nf4", "int8", "bf16", "fp8_e4m3"])
def test_the_base_is_frozen_in_any_storage_and_the_adapter_is_in_float32_on_the_device(base, tmp_path, storage):
    with Engine(
        base, adapter="r=2", method=METHOD, storage=storage, offload="disk", run_dir=tmp_path / "run"
    ) as engine:
        formats = {name: fmt.name for name, fmt in engine.layout.formats.items()}
        trained = {name for name, spec in engine.plan.params.items() if spec.trainable}
        assert trained and all("lora_" in name and formats[name] == "fp32" for name in trained)
        assert {formats[name] for name in formats if name.endswith("q_proj.base_layer.weight")} == {storage}
        (resident,) = engine.plan.resident
        assert set(engine.plan.blocks[resident].params) == trained
        losses = [engine.step(BATCH).loss for _ in range(4)]
        want = engine.run(BATCH).logits.clone()
        assert engine.active.streamer.traffic.flush_bytes == 0
    assert len(set(losses)) == 4
    with Engine.resume(tmp_path / "run") as engine:
        assert torch.equal(engine.run(BATCH).logits, want) and engine.step(BATCH).step == 4


def test_a_run_is_resumed_replayed_evaluated_and_exported(base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in (IDS % 90).tolist() * 4))
    made = ["--lora", 4, "--lr", "1e-2", "--eps", "1e-2", "--seed", SEED, "--batch-size", 2, "--quiet"]

    def call(*args):
        assert main([str(arg) for arg in args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    call("fit", base, "--data", rows, *made, "--offload", "disk", "--run-dir", tmp_path / "whole", "--steps", 6,
         "--out", tmp_path / "out")  # fmt: skip
    run = tmp_path / "run"
    call("fit", base, "--data", rows, *made, "--offload", "disk", "--run-dir", run, "--steps", 3)
    call("fit", run, "--resume", "--steps", 6, "--quiet", "--out", tmp_path / "resumed")
    call("replay", base, run / "journal.zoj", "--out", tmp_path / "replayed")
    call("export", run, "--out", tmp_path / "exported")
    want = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("lora_B" in name and t.any() for name, t in want.items())
    for name in ("resumed", "replayed", "exported"):
        assert_same(load_file(tmp_path / name / "adapter_model.safetensors"), want, name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    losses = [
        json.loads(call("eval", *which, "--data", rows, "--batch-size", 2))["loss"]
        for which in ([run], [base, "--adapter", tmp_path / "out"], [tmp_path / "out"], [base])
    ]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    with Engine.resume(run) as engine:
        got = engine.generate({"input_ids": IDS}, max_new_tokens=3, do_sample=False)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.equal(got, model.eval().generate(input_ids=IDS, max_new_tokens=3, do_sample=False))
    planned = call("plan", base, "--lora", 4)
    assert "LORA adapter of " in planned and planned.splitlines()[-1].endswith(" --lora 4")  # the command to fit it


def test_a_run_from_an_adapters_directory_knows_it_wherever_it_is(base, tmp_path):
    first = tmp_path / "first"
    with Engine(base, adapter="r=2", method=METHOD, offload="none") as engine:
        engine.step(BATCH)
        engine.save_pretrained(first)
    run = tmp_path / "run"
    with Engine(base, adapter=first, method=METHOD, offload="disk", run_dir=run) as engine:
        for _ in range(3):
            engine.step(BATCH)
        engine.save_pretrained(tmp_path / "out")
    shutil.move(first, tmp_path / "moved")
    with pytest.raises(CheckpointError, match="there is no such directory.*moved: where it is now"):
        Engine.resume(run)
    with Engine.resume(run, adapter=tmp_path / "moved") as engine:
        assert engine.step(BATCH).step == 3
    replay(base, run, tmp_path / "replayed", to=3, adapter=tmp_path / "moved")
    both = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "replayed")]
    assert_same(both[0], both[1], "replayed")
    weights = tmp_path / "moved" / "adapter_model.safetensors"
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights)
    with pytest.raises(JournalError):
        replay(base, run, tmp_path / "other", adapter=tmp_path / "moved")
    with pytest.raises(JournalError, match="adapter.lora_alpha|base"):
        replay(base, run, tmp_path / "other", adapter={"r": 2, "lora_alpha": 3})


def test_an_adapters_directory_in_the_place_of_a_model_finds_its_base(base, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    with Engine(base, adapter="r=2", method=METHOD, offload="none") as engine:
        engine.step(BATCH)
        want = engine.run(BATCH).logits.clone()
        engine.save_pretrained(adapter)
    with Engine(adapter, method=METHOD, offload="none") as engine:
        assert torch.equal(engine.run(BATCH).logits, want)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/gone"}))
    with pytest.raises(CheckpointError, match="its base, 'org/gone', is not a local folder.*--adapter"):
        Engine(adapter)
    assert main(["plan", str(adapter)]) == 2 and "org/gone" in capsys.readouterr().err
    with Engine(base, adapter=adapter, method=METHOD, offload="none") as engine:
        assert torch.equal(engine.run(BATCH).logits, want)
    with pytest.raises(ConfigError, match="is an adapter itself"):
        Engine(adapter, adapter="r=2")


def test_a_folder_with_a_model_and_an_adapter_is_not_taken_for_one_of_them(base, tmp_path, capsys):
    with Engine(base, adapter="r=2", method=METHOD, offload="none") as engine:
        engine.save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, base)
    with pytest.raises(ConfigError, match="holds a model and an adapter"):
        Engine(base, method=METHOD)
    assert main(["plan", str(base)]) == 2 and "--adapter" in capsys.readouterr().err
    with Engine(base, adapter=base, method=METHOD, offload="none") as engine:
        assert any("lora_" in name for name, _ in engine.weights())


def test_a_preset_for_adapters_refuses_the_whole_model(base, capsys, tmp_path):
    with pytest.raises(ConfigError, match=r"rates for LoRA adapters.*--lora 8"):
        Engine(base, method=MeZO.preset("opt-lora"))
    Engine(base, method=MeZO.preset("opt-lora"), adapter="r=1,target_modules=q_proj").close()


# ---- merged ----------------------------------------------------------------------------------------------------------

MERGED = ("lora", "rslora", "bias", "whole-head", "embedding", "ia3", "loha", "vera")


@pytest.mark.parametrize("kind", MERGED)
def test_merged_it_is_the_model_that_peft_merges(base, tmp_path, kind):
    torch.manual_seed(3)
    model = in_memory(KINDS[kind]())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    want = model.merge_and_unload()
    with Engine(base, adapter=tmp_path / "adapter", offload="disk", run_dir=tmp_path / "run") as engine:
        engine.save_pretrained(tmp_path / "merged", merge=True, max_shard_bytes=9000)
        assert engine.step(BATCH).step == 0, "the engine goes on"
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(dict(got.named_parameters()), dict(want.named_parameters()), kind)


def test_a_run_is_exported_merged_and_a_bf16_one_rounded_once(tmp_path, capsys):
    ZOO["llama"].build(torch.bfloat16).save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS.tolist()))
    made = ["--lora", "4", "--lr", "1e-1", "--batch-size", "2", "--quiet", "--steps", "2", "--run-dir"]
    assert main(["fit", str(tmp_path / "base"), "--data", str(rows), *made, str(tmp_path / "run")]) == 0
    for name, more in (("adapter", []), ("merged", ["--merge"])):
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / name), *more]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert got.dtype == torch.bfloat16
    assert_same(dict(got.named_parameters()), {n: p.bfloat16() for n, p in want.named_parameters()}, "merged")


def test_a_peft_model_in_memory_is_merged_too(tmp_path):
    model = in_memory(KINDS["lora"]())
    with Engine(model, method=METHOD, offload="none", trainable="requires_grad") as engine:
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "merged", merge=True)
        want = engine.restore().merge_and_unload()
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(dict(got.named_parameters()), dict(want.named_parameters()), "merged")


def test_the_usual_layouts_have_names(base, tmp_path):
    def saved(name, **how):
        engine.save_pretrained(tmp_path / name, **how)
        return {file.name for file in (tmp_path / name).iterdir()}

    with Engine(base, adapter="r=2", offload="none") as engine:
        assert saved("peft", scheme="peft") == saved("safetensors", scheme="safetensors") == saved("plain")
        merged = saved("merged", scheme="merged")
        assert merged == saved("by flag", merge=True) >= {"model.safetensors"} and "adapter_config.json" not in merged
        with pytest.raises(ConfigError, match="'peft' is the adapter alone"):
            saved("both", scheme="peft", merge=True)
    with Engine(base, offload="none") as engine:
        assert saved("whole", scheme="safetensors") >= {"model.safetensors", "config.json"}
    for scheme in ("peft", "merged"):
        assert main(["export", str(base), "--as", scheme, "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists() and not (tmp_path / "both").exists()


@pytest.mark.parametrize("adapter, said", [(None, "has none"), ("prefix=3", "PREFIX_TUNING is no change of weights")])
def test_what_cannot_be_merged_is_refused_before_anything_is_written(base, tmp_path, adapter, said):
    with Engine(base, adapter=adapter, offload="none") as engine, pytest.raises(ConfigError, match=said):
        engine.save_pretrained(tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


# ---- what does not fit -----------------------------------------------------------------------------------------------

WRONG = {
    "rank-0": ("r=0", "r=0; a rank is a whole number from 1"),
    "huge-rank": ("r=99999999", "a rank is a whole number from 1"),
    "no-such-module": ("r=2,target_modules=kw_proj+nothing", "peft cannot put it on LlamaForCausalLM.*not found"),
    "no-such-field": ("r=2,rank=3", "LoraConfig of peft .* has no field 'rank'"),
    "no-such-type": ({"peft_type": "HOLOGRAM"}, "peft_type 'HOLOGRAM' is not known to peft"),
    "no-such-place": ("nowhere", "there is no such directory"),
    "no-sense": ("r=", "as a text it is read as name=value"),
    "number": (16, "expected an adapter's directory, a config of peft's"),
    "pissa": ({"r": 2, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' begins from the base's weights"),
    "dora": ({"r": 2, "use_dora": True}, "would make .*lora_magnitude_vector.* use_dora=True"),
    "text-prompt": (
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}, "SAMPLE_VOCAB"
    ),
    "tokens": ({"r": 2, "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_peft_cannot_make_is_told_before_anything_is_written(base, tmp_path, what):
    adapter, said = WRONG[what]
    state = torch.default_generator.get_state()
    with pytest.raises((ConfigError, CheckpointError), match=said):
        Engine(base, adapter=adapter, offload="disk", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists() and torch.equal(state, torch.default_generator.get_state())


def test_adapters_of_another_base_or_not_whole_are_refused_by_name(base, tmp_path):
    adapter = tmp_path / "adapter"
    with Engine(base, adapter="r=2", offload="none") as engine:
        engine.save_pretrained(adapter)
    ZOO["opt"].build().save_pretrained(tmp_path / "opt")
    with pytest.raises(CheckpointError, match="of this|of another base"):
        Engine(tmp_path / "opt", adapter=adapter)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    for change, said in (
        ({n: t for n, t in tensors.items() if n != name}, "they lack 1"),
        ({**tensors, "base_model.model.more": torch.zeros(2)}, "1 have no place, such as 'base_model.model.more'"),
        ({**tensors, name: torch.zeros(3, 5)}, r"is \[3, 5\], and"),
    ):
        save_file(change, weights)
        with pytest.raises(CheckpointError, match=said):
            Engine(base, adapter=adapter)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors in it, and no adapter_model.bin"):
        Engine(base, adapter=adapter)
    torch.save(tensors, adapter / "adapter_model.bin")
    Engine(base, adapter=adapter).close()
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON list"):
        Engine(base, adapter=adapter)


def test_a_module_in_memory_takes_its_adapter_from_peft():
    with pytest.raises(ConfigError, match="peft.get_peft_model"):
        Engine(ZOO["llama"].build(), adapter="r=2")


def test_a_new_head_is_saved_with_the_adapter(tmp_path):
    ZOO["bert"].build().base_model.save_pretrained(tmp_path / "base")
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    settings = dict(
        model_class="AutoModelForSequenceClassification", config_overrides={"num_labels": 3}, adapter="r=2", seed=SEED
    )
    with Engine(tmp_path / "base", method=METHOD, offload="none", **settings) as engine:
        engine.step(batch)
        want = engine.run(batch).logits.clone()
        engine.save_pretrained(tmp_path / "out")
        trained = {n for n, s in engine.plan.params.items() if s.trainable}
        assert any("classifier.modules_to_save" in name for name in trained)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    with torch.no_grad():
        assert torch.equal(peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()(**batch).logits, want)


def test_dora_from_a_directory_trains_and_is_exported(base, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, **CAUSAL)
    peft.get_peft_model(ZOO["llama"].build(), config).save_pretrained(tmp_path / "dora")
    with Engine(base, adapter=tmp_path / "dora", method=METHOD, offload="disk", run_dir=tmp_path / "run") as engine:
        _, want = losses_and_logits(engine)
        engine.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "out").eval()
        assert torch.equal(model(**BATCH).logits, want)


def lora(**more):
    return peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL, **more))


def merged_in_part(model):
    next(module for module in model.modules() if hasattr(module, "lora_A")).merge()


def another_active(model):
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL))
    model.set_adapter("b")
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name)


@pytest.mark.parametrize(
    ("make", "change", "said"),
    [
        (lora, lambda m: m.merge_adapter(), "'default' is merged into the base's weights: 4 of 4 .*unmerge_adapter"),
        (lora, merged_in_part, "'default' is merged into the base's weights: 2 of 4 "),
        (lora, another_active, r"'default' is not the active one: 4 of 4 .*set_adapter\('default'\)"),
        (lora, lambda m: m.base_model.disable_adapter_layers(), "no parameter of this PeftModel requires a gradient"),
        (lambda: lora(inference_mode=True), lambda m: None, "opened for inference.*is_trainable=True"),
        (
            lambda: peft.get_peft_model(ZOO["llama"].build(), KINDS["ia3"]()),
            lambda m: m.merge_adapter(),
            "'default' is merged",
        ),
        (
            lambda: peft.get_peft_model(ZOO["llama"].build(), KINDS["prompt"]()),
            lambda m: setattr(m, "_adapters_disabled", True),
            "'default' is disabled: 1 of 1 ",
        ),
    ],
    ids=["merged", "in-part", "another", "disabled", "inference", "ia3", "prompt"],
)
def test_an_adapter_that_is_not_in_the_forward_is_refused_before_weights_are_read(make, change, said):
    model = make()
    change(model)
    with Engine(model, method=METHOD, offload="none") as engine:
        with pytest.raises(ConfigError, match=said):
            engine.step(BATCH)
        assert engine.active.parts is None, "no weight was read"
        if "inference" in said:  # it may be evaluated all the same
            assert torch.equal(engine.run({"input_ids": IDS}).logits, lora().eval()(input_ids=IDS).logits)


def test_an_objective_may_switch_adapters_itself():
    model = lora()
    model.base_model.disable_adapter_layers()

    def objective(model, batch):
        model.base_model.enable_adapter_layers()
        return model(**batch).loss

    with Engine(model, method=METHOD, trainable=["lora_A", "lora_B"], objective=objective, offload="none") as engine:
        assert engine.step(BATCH).grad != 0


@pytest.mark.parametrize(
    "config",
    [
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], **CAUSAL),
        peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"], **CAUSAL),
        peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, target_modules=["q_proj"], **CAUSAL),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, **CAUSAL),
        peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", **CAUSAL),
    ],
    ids=["adalora", "oft", "vblora", "rank-pattern", "one-layer"],
)
def test_plain_peft_loads_what_was_trained_of_rarer_adapters(base, tmp_path, config):
    with Engine(base, adapter=config, method=METHOD, offload="none") as engine:
        assert engine.step(BATCH).grad != 0 != engine.step(BATCH).grad
        want = engine.run({"input_ids": IDS}).logits.clone()
        engine.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "out").eval()
        assert torch.equal(model(input_ids=IDS).logits, want)
