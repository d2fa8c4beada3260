"""What a loss is a mean over: parts of a batch and batches of a data set weigh what counts in them."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from support.zoo.models import BART, BERT, VOCAB, ZOO
from zo_offload import ConfigError, DataError, Engine, MeZO
from zo_offload.cli import main
from zo_offload.data.micro_batches import check_whole

LENGTHS = (12, 3, 7, 2)
STEP = MeZO(lr=1e-9, eps=1e-3)


def seeded(make, strength=3.0):
    """A model whose losses differ from row to row."""
    torch.manual_seed(3)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(strength)
    return model


def ragged(first_counts=True):
    """Four rows of very different lengths, labels as the usual collators make them."""
    ids = torch.randint(3, VOCAB, (4, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def masked():
    batch = ragged()
    chosen = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1)) < 0.4
    chosen[:, 0] = torch.tensor([True, False, True, True])  # nothing is special about the first place
    return {**batch, "labels": batch["labels"].masked_fill(~chosen, -100)}


def tagged():
    batch = ragged()
    return {**batch, "labels": (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)}


def one_a_row(*labels):
    return {**ragged(), "labels": torch.tensor(labels)}


def answered():
    batch = {k: v for k, v in ragged().items() if k != "labels"}
    return {**batch, "start_positions": torch.tensor([1, 2, 40, 0]), "end_positions": torch.tensor([3, 2, 40, 1])}


def spoken():
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, -100, -100], [9, -100, -100, -100], [7, 5, 6, -100]])
    return {"input_values": torch.randn(4, 800, generator=torch.Generator().manual_seed(2)), "labels": labels}


def wav2vec2(reduction):
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, pad_token_id=0, ctc_zero_infinity=True, ctc_loss_reduction=reduction,
    ))  # fmt: skip


def with_prompt(kind):
    base = seeded(lambda: ZOO["llama"].build())
    config = {
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }[kind]()
    return peft.get_peft_model(base, config)


def bert(head, **options):
    return getattr(tf, f"BertFor{head}")(tf.BertConfig(**BERT, **options))


CASES = {
    "a causal LM, labels as its inputs": (lambda: ZOO["llama"].build(), ragged),
    "a causal LM with learned positions": (lambda: ZOO["gpt2"].build(), ragged),
    "a decoder of an encoder-decoder alone, which shifts nothing": (
        lambda: tf.BartForCausalLM(tf.BartConfig(**{**BART, "encoder_layers": 2, "is_encoder_decoder": False})), ragged,
    ),
    "prompt tuning, where the first label is predicted": (lambda: with_prompt("prompt"), ragged),
    "prefix tuning, where it is not": (lambda: with_prompt("prefix"), ragged),
    "a masked LM": (lambda: bert("MaskedLM"), masked),
    "an encoder-decoder": (lambda: ZOO["t5"].build(), ragged),
    "classes of tokens": (lambda: bert("TokenClassification", num_labels=3), tagged),
    "classes of rows, one without": (lambda: bert("SequenceClassification"), lambda: one_a_row(0, 1, -100, 1)),
    "numbers of rows": (lambda: bert("SequenceClassification", num_labels=1), lambda: one_a_row(0.5, -100.0, 2.0, 1.0)),
    "whole numbers of rows": (lambda: bert("SequenceClassification", num_labels=1), lambda: one_a_row(1, -100, 3, 2)),
    "places in rows, one cut off": (lambda: bert("QuestionAnswering"), answered),
    "a sum over rows": (lambda: wav2vec2("sum"), spoken),
    "a mean over rows of means over labels": (lambda: wav2vec2("mean"), spoken),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_add_up_to_it_and_so_do_batches_of_a_data_set(name):
    make, batch = CASES[name][0], CASES[name][1]()
    model = seeded(make)
    with torch.no_grad():
        whole = float(model(**batch).loss)
    losses, evaluated = {}, {}
    for parts in (1, 2, 4):
        with Engine(copy.deepcopy(model), method=STEP, offload="none", trainable="requires_grad") as engine:
            losses[parts] = engine.step(batch, micro_batches=parts).loss
            of_parts = [{k: v[i : i + 4 // parts] for k, v in batch.items()} for i in range(0, 4, 4 // parts)]
            evaluated[parts] = engine.evaluate(of_parts)["loss"]
    assert [losses[2], losses[4]] == pytest.approx([losses[1]] * 2, rel=2e-6)
    assert [evaluated[2], evaluated[4]] == pytest.approx([evaluated[1]] * 2, rel=2e-6)
    rows = 4 if name == "a sum over rows" else 1
    assert evaluated[1] == pytest.approx(whole / rows, rel=1e-5)


def test_two_means_in_one_loss_cannot_be_cut_and_that_is_said():
    batch = {**masked(), "next_sentence_label": torch.tensor([0, 1, 0, 1])}
    with (
        Engine(bert("PreTraining"), method=STEP, offload="none") as engine,
        pytest.raises(DataError, match=r"micro_batches=2.*labels: \[.*next_sentence_label: \[2, 2\].*weight"),
    ):
        engine.step(batch, micro_batches=2)


class Tagger(nn.Module):
    """A module of one's own. shift: as a language model does it."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.embed, self.head = shift, nn.Embedding(VOCAB, 8), nn.Linear(8, 3)

    def forward(self, input_ids, labels, **_):
        logits = self.head(self.embed(input_ids))
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("shift", [False, True])
def test_a_module_of_ones_own_is_not_guessed_at_but_may_say(shift):
    model, batch = Tagger(shift), tagged()

    def objective(model, batch):
        return model(**batch)["loss"]

    with Engine(copy.deepcopy(model), method=STEP, offload="none", example=batch) as engine:
        whole = engine.step(batch).loss
        with pytest.raises(DataError, match="may be a mean over one of several things"):
            engine.step(batch, micro_batches=2)
        with pytest.warns(UserWarning, match="depends a little on batch_size"):
            engine.evaluate([{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)])
    objective.weight = lambda batch: (batch["labels"][:, int(shift) :] != -100).sum()
    with Engine(copy.deepcopy(model), method=STEP, offload="none", example=batch, objective=objective) as engine:
        assert engine.step(batch, micro_batches=4).loss == pytest.approx(whole, rel=1e-6)
    even = {**batch, "labels": batch["input_ids"] % 3}  # as many in each row: nothing to guess
    with Engine(copy.deepcopy(model), method=STEP, offload="none", example=batch) as engine:
        losses = [engine.step(even, micro_batches=parts).loss for parts in (1, 2)]
        # products of two rows and of four are summed in different orders: some units in the last place of float32
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("weight", [float("nan"), -1.0, float("inf")])
def test_a_weight_that_is_none_is_named(weight):
    objective = lambda model, batch: model(**batch)["loss"]  # noqa: E731
    objective.weight = lambda batch: weight
    with (
        Engine(Tagger(False), method=STEP, offload="none", example=tagged(), objective=objective) as engine,
        pytest.raises(ConfigError, match="weight of a batch is"),
    ):
        engine.step(tagged(), micro_batches=2)


def test_an_objective_is_a_mean_over_rows_whatever_labels_there_are():
    seen = []

    def objective(model, batch):  # a mean over rows of something that is no loss over labels
        seen.append(len(batch["labels"]))
        return model(input_ids=batch["input_ids"]).logits[:, 0, :4].mean()

    batch = ragged()
    losses = []
    for parts in (1, 4):
        with Engine(ZOO["llama"].build(), method=STEP, offload="none", objective=objective) as engine:
            losses.append(engine.step(batch, micro_batches=parts).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and set(seen) == {4, 1}


# ---- where nothing counts ----------------------------------------------------------------------------------------


def emptied(*rows):
    batch = ragged()
    batch["labels"][list(rows)] = -100
    return batch


@pytest.mark.parametrize("row", range(4))
def test_a_part_without_labels_is_left_out(row):
    batch, losses = emptied(row), []
    for parts in (1, 2, 4):
        with Engine(ZOO["llama"].build(), method=STEP, offload="none") as engine:
            losses.append(engine.step(batch, micro_batches=parts).loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_a_label_that_no_logits_predict_does_not_count():
    batch = emptied(0, 1, 2)
    batch["labels"][0, 0] = 5  # the first of a row
    losses = []
    for parts in (1, 4):
        with Engine(ZOO["llama"].build(), method=STEP, offload="none") as engine:
            losses.append(engine.step(batch, micro_batches=parts).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_batches_without_labels_are_left_out_of_an_evaluation():
    with Engine(ZOO["llama"].build(), method=STEP, offload="none") as engine:
        want = engine.evaluate([ragged()])
        assert engine.evaluate([emptied(0, 1, 2, 3), ragged(), emptied(0, 1, 2, 3)]) == want
        with pytest.raises(DataError, match="nothing to evaluate: no label of the batch counts"):
            engine.evaluate([emptied(0, 1, 2, 3)])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_without_labels_is_named_before_anything_is_written(tmp_path, parts):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 4
    with (
        Engine(ZOO["llama"].build(), method=STEP, offload="disk", run_dir=tmp_path / "run") as engine,
        pytest.raises(DataError, match="no label .*counts|labels"),
    ):
        engine.fit(rows, steps=2, batch_size=4, micro_batches=parts)
    assert not (tmp_path / "run").exists()


def test_steps_without_labels_are_skipped_where_that_is_asked_for():
    data = [ragged(), emptied(0, 1, 2, 3), ragged()]
    with Engine(ZOO["llama"].build(), method=MeZO(lr=1e-3, on_nonfinite="skip"), offload="none") as engine:
        losses = engine.fit(data, steps=3).losses
    assert [loss == loss for loss in losses] == [True, False, True]


def test_nan_of_real_labels_is_nan():
    model = ZOO["llama"].build()
    with Engine(model, method=STEP, offload="none", objective=lambda m, b: m(**b).loss * float("nan")) as engine:
        assert str(engine.evaluate([ragged(), ragged()])["loss"]) == "nan"


# ---- what is cut -------------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """Four classes, and their weights in the batch; a batch of four rows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x, labels, class_weights=None, **_):
        return F.cross_entropy(self.head(x), labels, weight=class_weights, reduction="sum") / len(x)


def weighted_batch(**more):
    torch.manual_seed(0)
    return {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 2, 3]), **more}


def test_weights_of_classes_as_long_as_the_batch_are_named_and_go_whole_if_asked():
    batch = weighted_batch(class_weights=torch.tensor([1.0, 2.0, 0.5, 3.0]))
    with (
        Engine(Weighted(), method=STEP, offload="none", example=batch) as engine,
        pytest.raises(DataError, match=r"'class_weights' holds 4 numbers.*whole=\('class_weights',\)"),
    ):
        engine.step(batch, micro_batches=2)
    losses = []
    for parts in (1, 2, 4):
        torch.manual_seed(1)
        with Engine(Weighted(), method=STEP, offload="none", example=batch, whole=("class_weights",)) as engine:
            losses.append(engine.step(batch, micro_batches=parts).loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    with pytest.raises(ConfigError, match="expected names"):
        Engine(Weighted(), example=batch, whole="class_weights")
    with (
        Engine(Weighted(), method=STEP, offload="none", example=batch, whole=["class_weigths"]) as engine,
        pytest.raises(ConfigError, match=r"whole=\['class_weigths'\]: the batch has no 'class_weigths', but x, labels, "
                                         r"class_weights. Did you mean 'class_weights'\?"),
    ):  # fmt: skip
        engine.step(batch)
    check_whole({"x": 1, "graph": {"edges": 2}}, ["graph.edges", "x"])


def cut(batch, **settings):
    """The first entries of the parts that a module is called with."""
    seen = []

    def objective(model, part):
        seen.append(part)
        return model(part["x"], part["labels"])

    with Engine(
        Weighted(), method=STEP, offload="none", example=weighted_batch(), objective=objective, **settings
    ) as e:
        seen.clear()
        e.step(batch, micro_batches=2)
    return seen[-4:-2]


def test_what_is_of_rows_is_cut_and_what_is_shared_is_not():
    batch = weighted_batch(
        names=["a", "b", "c", "d"], targets=[{"box": torch.ones(1)} for _ in range(4)], flag=True, nothing=None,
        scale=torch.tensor(2.0), three=torch.tensor([1.0, 2.0, 3.0]), position_ids=torch.arange(60).view(3, 4, 5),
        graph={"node": torch.arange(8).view(4, 2), "level": torch.tensor(1)}, bias=torch.ones(1, 2, 5, 5),
        ids=torch.arange(4),
    )  # fmt: skip
    first, second = cut(batch)
    assert first["names"] == ["a", "b"] and second["names"] == ["c", "d"] and len(second["targets"]) == 2
    assert first["flag"] is True and first["nothing"] is None and first["scale"] == 2
    assert torch.equal(first["three"], batch["three"]) and torch.equal(second["bias"], batch["bias"])
    assert torch.equal(second["position_ids"], batch["position_ids"][:, 2:])
    assert torch.equal(second["graph"]["node"], batch["graph"]["node"][2:]) and second["graph"]["level"] == 1
    assert second["ids"].tolist() == [2, 3]


@pytest.mark.parametrize(
    "more, match",
    [
        ({"alpha": torch.rand(4)}, "'alpha' holds 4 numbers"),
        ({"alpha": [0.1, 0.2, 0.3, 0.4]}, "'alpha' holds 4 numbers"),
        (
            {"pixel_values": torch.rand(64, 12), "image_grid_thw": torch.ones(4, 3).long()},
            r"'pixel_values' has shape \[64",
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 5, 9, 12])}, r"'cu_seqlens' has shape \[5\]"),
        ({"graph": {"edges": torch.ones(2, 9)}}, r"'graph.edges' has shape \[2, 9\]"),
        ({"images": [torch.ones(1)] * 3}, "'images' holds 3 tensors"),
        ({"cache": object()}, "'cache' is a object"),
        ({"num_items_in_batch": torch.tensor(7)}, "num_items_in_batch is in the batch"),
        ({"return_loss": True}, "compares its 4 rows with one another"),
    ],
)
def test_what_may_or_may_not_be_of_rows_is_refused_by_name(more, match):
    with pytest.raises(DataError, match=match):
        cut(weighted_batch(**more))
    if "alpha" in more:
        assert all(len(part["alpha"]) == 2 for part in cut(weighted_batch(**more), whole=()))


def test_columns_of_rows_are_all_cut(tmp_path):
    rows = [{"x": torch.randn(8), "labels": i % 4, "alpha": float(i)} for i in range(8)]
    seen = []

    def objective(model, part):
        seen.append(tuple(part["alpha"].shape))
        return model(part["x"], part["labels"])

    with Engine(Weighted(), method=STEP, offload="none", example=weighted_batch(), objective=objective) as engine:
        engine.fit(rows, steps=2, batch_size=4, micro_batches=2)
    assert set(seen[-4:]) == {(2,)}


def test_the_command_line_names_rows_without_labels(tmp_path, capsys):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}\n' * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["eval", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--batch-size", "2"]) == 2
    assert "label" in capsys.readouterr().err
