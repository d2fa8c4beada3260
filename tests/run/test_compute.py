"""compute="auto": bf16 where this CPU is measured to be faster with it; decided once, and part of the run's record."""

import copy
import json
import warnings

import pytest
import torch
import transformers

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import Engine, MeZO
from zo_offload.cli import main
from zo_offload.errors import ConfigError
from zo_offload.journal.format import load_header
from zo_offload.modules.class_heads import class_heads
from zo_offload.run import compute, session

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def measured(monkeypatch, *gains):
    monkeypatch.setattr(compute, "bf16_gains", lambda threads: dict(zip(("32", "256"), gains, strict=True)))


def never(threads):
    raise AssertionError("measured again")


def test_the_faster_dtype_is_named_in_the_record_and_not_measured_again(base, tmp_path, monkeypatch):
    measured(monkeypatch, 1.9, 3.2)
    kept = tmp_path / "run"
    with Engine(base, method=MeZO(lr=1e-3), compute="auto", storage="fp32", run_dir=kept) as engine:
        assert engine.config.compute == "bf16" and "3.2 times as fast at 256 tokens" in engine.decided[0]
        losses = engine.step(BATCH).loss
    monkeypatch.setattr(compute, "bf16_gains", never)
    with Engine(base, method=MeZO(lr=1e-3), compute="bf16", storage="fp32") as engine:
        assert_same(engine.step(BATCH).loss, losses)
        after = engine.step(BATCH).loss
        assert not engine.decided
    with Engine.resume(kept) as engine:
        assert engine.config.compute == "bf16"
        assert_same(engine.step(BATCH).loss, after)


@pytest.mark.parametrize("gains", [(0.3, 0.4), (0.9, 3.0), (1.1, 1.1)], ids=["emulated", "short batches", "noise"])
def test_what_is_not_clearly_faster_at_each_length_is_not_taken(base, monkeypatch, capsys, gains):
    measured(monkeypatch, *gains)
    assert main(["plan", str(base), "--compute", "auto"]) == 0
    assert "compute auto takes fp32: a layer in bf16 is" in capsys.readouterr().out


def test_fit_prints_what_was_taken(base, tmp_path, monkeypatch, capsys):
    measured(monkeypatch, 2.0, 2.0)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [3, 4, 5], "labels": [3, 4, 5]}) + "\n")
    words = ["--data", str(tmp_path / "rows.jsonl"), "--steps", "1", "--compute", "auto", "--quiet"]
    assert main(["fit", str(base), *words]) == 0
    assert "compute auto takes bf16" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_a_module_in_memory_has_its_own_dtypes(dtype):
    with pytest.raises(ConfigError, match=r"checkpoint's directory.*here float32.*module\.to"):
        Engine(ZOO["llama"].build(), compute=dtype)
    Engine(ZOO["llama"].build(), compute="fp32").close()


def in_16_bits(model, batch):
    """An objective that leaves its loss in the forward's dtype."""
    return model(**batch).logits.to(next(model.parameters()).dtype).mean()


def test_a_loss_of_16_bits_is_told_once(base):
    """transformers' heads compute theirs in float32, or do so here."""
    for dtype, count in (("bf16", 1), ("fp16", 1), ("fp32", 0)):
        with warnings.catch_warnings(record=True) as told, Engine(base, compute=dtype, objective=in_16_bits) as engine:
            warnings.simplefilter("always")
            for _ in range(2):
                engine.step(BATCH)
        assert len([w for w in told if "digits: lanes differ by less" in str(w.message)]) == count
    with warnings.catch_warnings(), Engine(base, compute="bf16") as engine:
        warnings.simplefilter("error")
        engine.step(BATCH)


# ---- heads on classes ------------------------------------------------------------------------------------------------

CLASSES = {"input_ids": IDS, "labels": torch.tensor([0, 1])}


def wide_head(model, batch):
    """The loss in plain torch: the model in 16 bits, the last layer of its head and the loss in float32."""
    inputs = {}
    handle = model.classifier.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0]))
    model(**batch)
    handle.remove()
    head = copy.deepcopy(model.classifier).float()
    return torch.nn.functional.cross_entropy(head(inputs["x"].float()), batch["labels"])


@pytest.mark.parametrize("block_numel", [1 << 20, 8], ids=["whole", "cut into rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_on_classes_computes_in_float32(dtype, block_numel):
    model = ZOO["bert"].build().to(dtype)
    with torch.no_grad():
        wanted, narrow = wide_head(model, CLASSES), model(**CLASSES).loss
    assert wanted != narrow
    with Engine(model, example=CLASSES, block_numel=block_numel) as engine:
        output = engine.run(CLASSES)
        assert output.logits.dtype == torch.float32
        assert_same(float(output.loss), float(wanted))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.step(CLASSES)
    assert "forward" not in vars(model.classifier) and model(**CLASSES).loss.dtype == dtype


@pytest.mark.parametrize(
    "name, head",
    [
        ("BertForSequenceClassification", "classifier"), ("BertForTokenClassification", "classifier"),
        ("BertForQuestionAnswering", "qa_outputs"), ("BertForMultipleChoice", "classifier"),
        ("RobertaForSequenceClassification", "classifier.out_proj"), ("LlamaForSequenceClassification", "score"),
        ("T5ForSequenceClassification", "classification_head.out_proj"), ("LlamaForCausalLM", None),
        ("BertForMaskedLM", None), ("BertModel", None),
    ],
)  # fmt: skip
def test_the_last_layer_of_a_head_on_classes_is_found(name, head):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(num_hidden_layers=1))
    assert class_heads(model) == ()
    assert class_heads(model.bfloat16()) == (() if head is None else (head,))


@pytest.mark.filterwarnings("ignore:the loss of")
def test_a_run_of_an_earlier_version_goes_on_with_its_head_in_16_bits(tmp_path, monkeypatch):
    ZOO["bert"].build().save_pretrained(tmp_path / "bert")
    losses = {}
    for name in ("new", "old"):
        with monkeypatch.context() as patch:
            if name == "old":
                patch.setattr(session, "class_heads", lambda model: ())
            with Engine(tmp_path / "bert", compute="bf16", storage="fp32", run_dir=tmp_path / name) as engine:
                engine.step(CLASSES)
                losses[name] = engine.run(CLASSES).loss
        assert ("wide" in load_header(tmp_path / name / "journal.zoj")) == (name == "new")
        with Engine.resume(tmp_path / name) as engine:
            assert_same(float(engine.run(CLASSES).loss), float(losses[name]))
    assert (losses["old"].dtype, losses["new"].dtype) == (torch.bfloat16, torch.float32)


def test_a_layer_is_measured_in_both():
    gains = compute.bf16_gains(torch.get_num_threads())
    assert gains.keys() == {"32", "256"} and all(0 < gain < 100 for gain in gains.values())
