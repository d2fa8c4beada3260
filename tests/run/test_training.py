"""What a user of transformers' Trainer expects: best step, early stopping, metrics, callbacks, epochs, logs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    EarlyStoppingCallback,
    TrainerCallback,
)  # fmt: skip

from support.compare import assert_same
from support.training import METHOD, ROWS
from support.zoo.small import tiny_llama
from zo_offload import ConfigError, Engine, MeZO, replay
from zo_offload.cli import main
from zo_offload.run.saving import known_evals

DEV = ROWS[:6]
FIT = dict(batch_size=4, eval_data=DEV, eval_every=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_llama().save_pretrained(folder / "base")
    return folder / "base"


def engine_on(base, run_dir=None, **settings):
    return Engine(base, method=METHOD, run_dir=run_dir, **settings)


def weights(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").state_dict()


class Scripted:
    """compute_metrics that gives one score after another, so that a test says which evaluation is best."""

    def __init__(self, *scores):
        self.scores, self.seen = list(scores), []

    def __call__(self, prediction):
        self.seen.append(prediction)
        return {"score": self.scores[len(self.seen) - 1]}


def test_the_best_step_is_kept_and_exported_though_the_run_goes_on(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        scores = Scripted(0.1, 0.7, 0.3, 0.7)
        result = engine.fit(ROWS, steps=8, compute_metrics=scores, metric="score", keep_best=True, **FIT)
        assert [values["score"] for values in result.evals] == [0.1, 0.7, 0.3, 0.7]
        assert result.best["step"] == 4, "of equal ones the first"
        assert "best score 0.7000 at step 4" in repr(result) and "8 steps to step 8" in repr(result)
        engine.save_pretrained(tmp_path / "best", step="best")
        engine.save_pretrained(tmp_path / "last")
        with engine.at(4) as then:
            assert then.evaluate(DEV, batch_size=4)["loss"] == result.evals[1]["loss"]
    replay.replay(base, tmp_path / "run", tmp_path / "at-4", to=4)
    assert_same(weights(tmp_path / "best"), weights(tmp_path / "at-4"))
    assert any(not torch.equal(a, b) for a, b in zip(weights(tmp_path / "best").values(),
                                                     weights(tmp_path / "last").values(), strict=True))  # fmt: skip


def test_a_resumed_run_knows_its_best_step_and_its_metric(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=4, compute_metrics=Scripted(5.0, 7.0), metric="score", keep_best=True, **FIT)
    with Engine.resume(tmp_path / "run") as engine, engine.at("best") as best:
        assert repr(engine).startswith("Engine(LlamaForCausalLM, ") and "mezo, offload='none', " in repr(engine)
        assert best.evaluate(DEV, batch_size=4)["loss"] == known_evals(engine.active)[1]["loss"]


def test_the_best_step_of_a_model_in_memory_is_exported_when_it_is_there(tmp_path):
    with Engine(tiny_llama(), method=METHOD) as engine:
        engine.fit(ROWS, steps=6, compute_metrics=Scripted(2.0, 3.0, 1.0), metric="score", keep_best=True,
                   save_dir=tmp_path / "saved", **FIT)  # fmt: skip
    with Engine(tiny_llama(), method=METHOD) as other:
        other.fit(ROWS, steps=4, batch_size=4)
        other.save_pretrained(tmp_path / "four")
    assert_same(weights(tmp_path / "saved" / "best"), weights(tmp_path / "four"))


def test_early_stopping_ends_where_nothing_gets_better_and_a_resumed_run_stops_there_too(base, tmp_path):
    call = dict(metric="score", early_stopping=2, **FIT)
    with engine_on(base, tmp_path / "whole") as engine:
        result = engine.fit(ROWS, steps=20, compute_metrics=Scripted(1.0, 2.0, 1.5, 2.0), **call)
    assert result.last_step == 8 and len(result.evals) == 4
    assert result.stopped == "no score better than 2, of step 4, in 2 evaluations" and result.stopped in repr(result)
    with engine_on(base, tmp_path / "parts") as engine:
        engine.fit(ROWS, steps=6, compute_metrics=Scripted(1.0, 2.0, 1.5), **call)
    with Engine.resume(tmp_path / "parts") as engine:
        resumed = engine.fit(ROWS, eval_data=DEV, steps=20, compute_metrics=Scripted(2.0))
        assert resumed.last_step == 8 and resumed.stopped == result.stopped and engine.log.version == 8
    with Engine.resume(tmp_path / "parts") as engine:
        assert engine.fit(ROWS, eval_data=DEV, steps=20).steps == 0
        assert engine.fit(ROWS, eval_data=False, steps=9, early_stopping=0, keep_best=False).last_step == 9


def test_an_evaluation_where_fit_was_ended_early_does_not_count_towards_early_stopping(base, tmp_path):
    call = dict(metric="score", early_stopping=2, eval_data=DEV, eval_every=2, batch_size=4)
    with engine_on(base, tmp_path / "parts") as engine:
        engine.fit(ROWS, steps=20, compute_metrics=Scripted(3.0, 1.0), **call,
                   callback=lambda record: record.step == 2 and engine.stop())  # fmt: skip
        assert [values["step"] for values in engine.evals] == [2, 3]
        assert engine.fit(ROWS, steps=20, compute_metrics=Scripted(2.0, 2.0), **call).last_step == 6


def test_evaluation_data_in_memory_is_to_be_given_again_or_it_is_said(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=2, batch_size=4, eval_data=DEV)
    with Engine.resume(tmp_path / "run") as engine:
        with pytest.warns(UserWarning, match="eval_data was in memory.*Pass eval_data= again, or eval_data=False"):
            engine.fit(ROWS, steps=4)
        engine.fit(ROWS, steps=6, eval_data=False)
        engine.fit(ROWS, steps=8)  # it was said once that there are none
        assert [values["step"] for values in engine.evals] == [2]


def test_the_loss_is_compared_by_its_smallest_and_nan_is_never_best(base):
    with engine_on(base) as engine:
        result = engine.fit(ROWS, steps=6, compute_metrics=lambda p: {"my_loss": next(values)}, metric="my_loss",
                            **FIT) if (values := iter([3.0, math.nan, 2.0])) else None  # fmt: skip
    assert result.best["my_loss"] == 2.0
    with engine_on(base) as engine, pytest.raises(ConfigError, match=r"metric='los'.*Did you mean 'loss'"):
        engine.fit(ROWS, steps=2, metric="los", **FIT)


def test_compute_metrics_sees_logits_and_labels_of_every_row_padded(base):
    seen = Scripted(1.0)
    rows = [{"input_ids": [5, 6, 7, 8][: 2 + i % 3]} for i in range(5)]
    with engine_on(base) as engine:
        values = engine.evaluate(rows, batch_size=2, compute_metrics=seen)
    assert values["score"] == 1.0 and "loss" in values
    predictions, labels = seen.seen[0]
    assert predictions.shape[:2] == labels.shape == (5, 4) and (labels[0][2:] == -100).all()
    kept = Scripted(1.0)
    with engine_on(base) as engine:
        engine.evaluate(rows, batch_size=2, compute_metrics=kept,
                        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))  # fmt: skip
    assert (kept.seen[0].predictions[:, :2] == np.argmax(predictions, -1)[:, :2]).all()


def test_what_compute_metrics_may_return(base):
    with engine_on(base) as engine, pytest.raises(ConfigError, match="expected a dict of numbers"):
        engine.evaluate(DEV, compute_metrics=lambda p: 3)


class Notes(TrainerCallback):
    """A callback as written for Trainer."""

    def __init__(self, stop_at=None):
        self.events, self.logs, self.stop_at = [], [], stop_at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.events.append(("begin", state.global_step, state.max_steps, args.max_steps, model.config.model_type))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step == self.stop_at
        control.should_evaluate = state.global_step == 3

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(("evaluate", state.global_step, "eval_loss" in metrics))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step, round(state.epoch, 2)))


def test_callbacks_written_for_trainer_run_as_they_are(base):
    notes = Notes(stop_at=5)
    with engine_on(base) as engine:
        result = engine.fit(ROWS, steps=10, callbacks=[notes], log_every=2, **FIT)
    assert notes.events == [
        ("begin", 0, 10, 10, "llama"), ("step", 1), ("step", 2), ("evaluate", 2, True), ("step", 3),
        ("evaluate", 3, True), ("step", 4), ("evaluate", 4, True), ("step", 5), ("evaluate", 5, True), ("end", 5, 1.25),
    ]  # fmt: skip
    assert result.stopped == "a callback asked for it" and result.steps == 5
    losses = dict(notes.logs)[4] if "loss" in dict(notes.logs)[4] else notes.logs[-3][1]
    assert {"eval_loss", "epoch"} <= set(losses) or {"loss", "grad_norm", "learning_rate", "epoch"} <= set(losses)


def test_transformers_early_stopping_stops_a_run(base):
    with engine_on(base) as engine:
        result = engine.fit(ROWS, steps=20, metric="score", compute_metrics=Scripted(1.0, 0.5, 0.4, 0.3),
                            callbacks=[EarlyStoppingCallback(2)], **FIT)  # fmt: skip
    assert result.last_step == 6 and result.stopped == "a callback asked for it"


def test_a_function_can_stop_and_save(base, tmp_path):
    with engine_on(base) as engine:

        def watch(record):
            if record.step == 2:
                engine.save_pretrained(tmp_path / "three")
                engine.stop("seen enough")

        result = engine.fit(ROWS, steps=9, batch_size=4, callback=watch)
    assert (result.steps, result.stopped) == (3, "seen enough")
    with engine_on(base) as engine:
        engine.fit(ROWS, steps=3, batch_size=4)
        engine.save_pretrained(tmp_path / "same")
    assert_same(weights(tmp_path / "three"), weights(tmp_path / "same"))


def test_what_is_no_callback_and_no_tracker_is_said(base):
    with engine_on(base) as engine, pytest.raises(ConfigError, match="'loud' is no callback"):
        engine.fit(ROWS, steps=1, batch_size=4, callbacks=["loud"])
    with engine_on(base) as engine, pytest.raises(ConfigError, match="report_to='tensorbord'.*tensorboard"):
        engine.fit(ROWS, steps=1, batch_size=4, report_to="tensorbord")


def test_tensorboard_gets_losses_and_metrics(base, tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    with engine_on(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=4, report_to="tensorboard", log_every=1, **FIT)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run" / "runs").rglob("events.*"))
    assert b"train/loss" in written and b"eval/loss" in written and b"train/learning_rate" in written


def test_exports_on_the_way_are_of_their_steps(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=5, batch_size=4, save_every=2)
    saved = tmp_path / "run" / "saved"
    assert sorted(path.name for path in saved.iterdir()) == ["step-2", "step-4"]
    replay.replay(base, tmp_path / "run", tmp_path / "at-2", to=2)
    assert_same(weights(saved / "step-2"), weights(tmp_path / "at-2"))
    with engine_on(base) as engine, pytest.raises(ConfigError, match="save_every exports: pass save_dir="):
        engine.fit(ROWS, steps=5, batch_size=4, save_every=2)


def test_epochs_are_steps_of_that_many_passes(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        assert engine.fit(ROWS, epochs=2, batch_size=4).last_step == 2 * (len(ROWS) // 4)
    with Engine.resume(tmp_path / "run") as engine:
        assert engine.fit(ROWS).steps == 0
        assert engine.fit(ROWS, epochs=2.5).last_step == 10
    with engine_on(base) as engine:
        with pytest.raises(ConfigError, match="give one of them"):
            engine.fit(ROWS, epochs=1, steps=3)
        with pytest.raises(ConfigError, match="steps in an epoch of this data are not known"):
            engine.fit((row for row in ROWS), epochs=1)
        with pytest.raises(ConfigError, match="epochs=0: expected more than 0"):
            engine.fit(ROWS, epochs=0)


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(keep_best=True), "keep_best compares evaluations: pass eval_data="),
        (dict(early_stopping=2), "early_stopping compares evaluations"),
        (dict(early_stopping=2, eval_data=DEV), "pass eval_every="),
        (dict(early_stopping=-1), "early_stopping=-1: expected a whole number of at least 0"),
        (dict(log_every=0), "log_every=0: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(base, asked, message):
    with engine_on(base) as engine, pytest.raises(ConfigError, match=message):
        engine.fit(ROWS, steps=4, batch_size=4, **asked)


def test_a_log_has_lines_with_time_and_what_is_left(base, capsys):
    with engine_on(base) as engine:
        engine.fit(ROWS, steps=6, progress=True, log_every=3, **FIT)
    found, *lines = capsys.readouterr().err.splitlines()
    assert found.endswith("list: 18 rows, 4 steps of 4 an epoch; 9 tokens a row, 9 at most; 8.0 of them learned")
    assert [line[11:].partition(" ")[2].split(",")[0] for line in lines] == [
        "step 2/6", "step 3/6", "step 4/6", "step 6/6", "step 6/6",
    ]  # fmt: skip
    assert "evaluation: loss" in lines[0] and "(best so far)" in lines[0]
    assert all(word in lines[1] for word in ("tok/s", "s a step", "left", "lr 0.001"))


def test_without_log_every_a_log_has_its_first_and_last_step(base, capsys):
    with engine_on(base) as engine:
        engine.fit(ROWS, steps=6, batch_size=4, progress=True)
    _, *lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "step 1/6" in lines[0] and "step 6/6" in lines[1] and "\r" not in "".join(lines)


def test_the_history_is_a_table_of_steps_and_evaluations(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        result = engine.fit(ROWS, steps=3, **FIT)
    assert [row.get("loss") for row in result.history if "grad" in row] == result.losses
    assert [row["eval_loss"] for row in result.history if "eval_loss" in row] == [e["loss"] for e in result.evals]
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == [row["step"] for row in result.history]


def test_a_method_of_other_steps_is_repeated_too(base, tmp_path):
    """All that `fit` was told is told again by a resume that says nothing."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with Engine(base, method=MeZO(lr=1e-3, steps=7), run_dir=tmp_path / "run") as engine:
        engine.fit(
            path, steps=3, batch_size=4, eval_data=path, eval_every=2, metric="loss", keep_best=True, log_every=9
        )
    with Engine.resume(tmp_path / "run") as engine:
        result = engine.fit(steps=5)
    assert [values["step"] for values in result.evals] == [2, 3, 4, 5] and result.metric == "loss"
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["fit"]
    assert kept["keep_best"] is True and kept["log_every"] == 9 and kept["steps"] == 5


def test_the_command_line_exports_the_best_step(base, tmp_path, capsys):
    path, run = tmp_path / "train.jsonl", tmp_path / "a run"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def said(*args):
        assert main([str(arg) for arg in args]) == 0
        return capsys.readouterr().out.splitlines()

    call = ("--data", path, "--eval-data", path, "--steps", 4, "--eval-every", 1, "--batch-size", 4, "--lr", "1e-2")
    keep = ("--keep-best", "--metric", "loss", "--quiet", "--run-dir", run, "--out", tmp_path / "tuned")
    out = said("fit", base, *call, *keep)
    evals = [json.loads(line) for line in out if line.startswith("{")]
    best = min(evals, key=lambda values: values["loss"])
    assert out[-1] == f"exported to {tmp_path / 'tuned'}, step {best['step']}, its best"
    assert f"zo-offload fit '{run}' --resume goes on" in out[-2]
    for step in ("best", best["step"]):
        said("export", run, "--step", step, "--out", tmp_path / f"at-{step}")
        assert_same(weights(tmp_path / f"at-{step}"), weights(tmp_path / "tuned"))
    assert json.loads(said("eval", run, "--step", "best")[0])["loss"] == best["loss"], (
        "data and batch size are the run's"
    )
    assert said("fit", run, "--resume", "--quiet")[0] == "no step was left: the run has 4; --steps gives the total"
    assert main(["fit", str(base), "--data", str(path), "--keep-best", "--out", str(tmp_path / "x")]) == 2
    assert "give --run-dir" in capsys.readouterr().err
    assert main(["export", str(base), "--step", "best", "--out", str(tmp_path / "x")]) == 2
    assert "--step best is for runs" in capsys.readouterr().err


def test_evaluations_on_other_rows_are_not_compared(base, tmp_path, caplog):
    """A dev file that was edited between two calls, or another one: what is best of both would be nothing."""
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps(ROWS[:6]))
    call = dict(batch_size=4, eval_every=1, metric="score", keep_best=True)
    with engine_on(base, tmp_path / "run") as engine:
        engine.fit(ROWS, eval_data=dev, steps=2, compute_metrics=Scripted(0.9, 0.5), **call)
    dev.write_text(json.dumps(ROWS[2:6]))
    with Engine.resume(tmp_path / "run") as engine:
        result = engine.fit(ROWS, steps=4, compute_metrics=Scripted(0.1, 0.3, 0.2))
        assert "its 2 evaluations so far stay in metrics.jsonl and are not compared" in caplog.text
        assert result.best["step"] == 3 and [values["step"] for values in result.evals] == [2, 3, 4]
    with Engine.resume(tmp_path / "run") as engine:
        assert engine.fit(ROWS, steps=5, compute_metrics=Scripted(0.1)).best["step"] == 3
        assert [values["step"] for values in known_evals(engine.active)] == [2, 3, 4, 5]


def test_old_evaluations_that_do_not_say_their_rows_count(base, tmp_path):
    with engine_on(base, tmp_path / "run") as engine:
        engine.fit(ROWS, steps=2, compute_metrics=Scripted(0.9), metric="score", keep_best=True, **FIT)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name != "data"} for line in lines]
    assert old != lines
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    with Engine.resume(tmp_path / "run") as engine:
        result = engine.fit(ROWS, eval_data=DEV, steps=4, compute_metrics=Scripted(0.3))
    assert result.best["step"] == 2 and len(result.evals) == 2


def test_compute_metrics_of_a_model_that_finds_answers_sees_what_trainer_gives():
    config = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForQuestionAnswering(BertConfig(**config)).eval()
    rows = [{"input_ids": [*range(3, 9 + i)], "start_positions": 1, "end_positions": 2 + i} for i in range(3)]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])) for row in rows]
    seen = []
    with Engine(model) as engine:
        values = engine.evaluate(rows, batch_size=2, compute_metrics=lambda p: seen.append(p) or {"em": 0.5})
    assert values["em"] == 0.5 and set(values) == {"loss", "em"}
    ((starts, ends), right), pads = seen[0], -100
    assert [x.tolist() for x in right] == [[1, 1, 1], [2, 3, 4]]
    assert starts.shape == ends.shape == (3, 8) and (starts[:2, 7] == pads).all()
    for i, output in enumerate(alone):
        width = len(rows[i]["input_ids"])
        assert abs(starts[i, :width] - output.start_logits[0].numpy()).max() < 1e-6  # beside a longer row
        assert abs(ends[i, :width] - output.end_logits[0].numpy()).max() < 1e-6
