"""A tail is trained by its exact gradient: as a plain loop of torch computes it, wherever blocks live, and whatever
stops a run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from support.compare import assert_same
from support.fake_cuda import DelayedCpuDevice, FakeBackend, FakeCudaDevice
from support.training import stored_weights
from support.zoo.small import VOCAB, tiny_llama, tiny_opt, with_adapters
from zo_offload import FZOO, ConfigError, DivergenceError, Engine, JournalError, MeZO, PlanError, TailAlone
from zo_offload.cli import main
from zo_offload.cli.journal_tools import cut
from zo_offload.config import EngineConfig
from zo_offload.journal import tail_files
from zo_offload.numerics.noise import noise, step_seed
from zo_offload.plan.plan import make_plan
from zo_offload.ranks.alone import Alone
from zo_offload.replay import load_journal, replay, replayed
from zo_offload.run.opening import open_model

SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB)
STEPS, RATE = 5, 2e-2
FEW = FZOO(lr=1e-2, eps=1e-3, directions=3, batch_size=4)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3, max_position_embeddings=40)).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, num_labels=3, pad_token_id=0, num_key_value_heads=2, max_position_embeddings=40)
    return LlamaForSequenceClassification(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_labels=3, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForSequenceClassification(config).eval()


def adapted():
    return with_adapters(tiny_llama())


MODELS = {
    "bert": (bert, dict(tail="classifier")),
    "llama": (llama, dict(tail="score")),
    "t5": (t5, dict(tail="classification_head.out_proj")),
    "adapters": (adapted, dict(tail=["layers.1", "layers.2"], trainable="requires_grad")),
}


def data(kind, steps=STEPS):
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (steps, 4, 9), generator=g)
    if kind == "adapters":
        return [{"input_ids": x, "labels": x} for x in ids]
    labels = torch.randint(0, 3, (steps, 4), generator=g)
    ids[:, :, -1] = 1  # T5 reads the state at the end token
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def fit(kind, steps=STEPS, method=FEW, micro_batches=1, **settings):
    make, of_tail = MODELS[kind]
    with Engine(make(), method=method, **{"tail_lr": RATE, **of_tail, **settings}) as engine:
        losses = engine.fit(data(kind)[:steps], steps=steps, micro_batches=micro_batches).losses
        return losses, stored_weights(engine)


def chosen(model, globs):
    wanted = [globs] if isinstance(globs, str) else globs
    return {n for n, p in model.named_parameters() if p.requires_grad and any(f".{g}." in f".{n}" for g in wanted)}


def plain(kind, optimizer="adam", method=FEW):
    """Lanes one after another by hand, the tail by autograd on the loss of the lane at the weights, and torch's own
    optimizers."""
    make, settings = MODELS[kind]
    model = make()
    tail = chosen(model, settings["tail"])
    params = dict(model.named_parameters())
    lanes = {n for n, p in params.items() if p.requires_grad} - tail
    ids = {name: spec.param_id for name, spec in make_plan(model, data(kind)[0]).params.items()}
    for name, p in params.items():
        p.requires_grad_(name in tail)
    kept = [p for name, p in params.items() if name in tail]
    own = torch.optim.SGD(kept, lr=RATE) if optimizer == "sgd" else torch.optim.Adam(kept, lr=RATE, foreach=False)
    told = []
    for step, batch in enumerate(data(kind)):
        seeds = [step_seed(0, step, i) for i in range(method.directions)]
        w = {name: params[name].detach().clone() for name in lanes}
        z = {(s, n): noise(method.noise, s, ids[n], w[n].numel()).view(w[n].shape) for s in seeds for n in lanes}
        loss = model(**batch).loss
        own.zero_grad()
        loss.backward()
        others = []
        for s in seeds:
            for n in lanes:
                params[n].data = w[n] + method.eps * z[s, n]
            with torch.no_grad():
                others.append(float(model(**batch).loss))
        mean = sum(others) / len(others)
        spread = math.sqrt(sum((x - mean) ** 2 for x in others) / (len(others) - 1))
        for n in lanes:
            value = w[n]
            for s, other in zip(seeds, others, strict=True):
                value = (
                    value - torch.tensor(method.lr * (other - float(loss.detach())) / (len(others) * spread)) * z[s, n]
                )
            params[n].data = value
        own.step()
        told.append(float(loss.detach()))
    return told, {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_is_a_plain_loop_of_lanes_and_autograd(kind):
    want = plain(kind)
    assert len(set(want[0])) == STEPS
    assert_same(want, fit(kind))
    moved = {n: not torch.equal(w, dict(MODELS[kind][0]().named_parameters())[n]) for n, w in want[1].items()}
    assert any(moved[n] for n in chosen(MODELS[kind][0](), MODELS[kind][1]["tail"]))


def test_plain_sgd_and_a_rate_that_follows_the_schedule():
    assert_same(plain("bert", "sgd"), fit("bert", tail_optimizer="sgd"))
    falling = FEW.with_options(schedule="linear")
    bias = {s: fit("bert", 1, falling.with_options(steps=s), tail_optimizer="sgd")[1]["classifier.bias"] for s in (1,)}
    with Engine(bert(), method=falling, tail="classifier", tail_lr=RATE, tail_optimizer="sgd") as engine:
        engine.fit(data("bert"), steps=2)
        two = stored_weights(engine)["classifier.bias"]
    with Engine(bert(), method=falling, tail="classifier", tail_lr=RATE, tail_optimizer="sgd") as engine:
        engine.step(data("bert")[0])
        assert torch.equal(stored_weights(engine)["classifier.bias"], bias[1])
        engine.step(data("bert")[1], lr=falling.lr / 2)  # the second of two steps
        assert torch.equal(stored_weights(engine)["classifier.bias"], two)


@pytest.mark.parametrize("way", [
    dict(offload="host", num_slots=2), dict(offload="host", num_slots=3, fold_every=3), dict(offload="disk"),
    dict(offload="host", num_slots=2, order="block"), dict(offload="none", order="lane"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["bert", "adapters"])
def test_where_blocks_live_and_how_lanes_are_served_changes_nothing(kind, way, tmp_path):
    assert_same(fit(kind, 3), fit(kind, 3, **way, **(dict(run_dir=tmp_path) if way["offload"] == "disk" else {})))


@pytest.mark.parametrize("kind, storage", [("llama", "bf16"), ("bert", "bf16+16"), ("t5", "int8+8")])
def test_every_storage_has_the_tail_in_float32(kind, storage):
    fixed = dict(storage=storage, fold_every=2, micro_batches=2, steps=3)
    in_memory = fit(kind, offload="none", **fixed)
    assert_same(in_memory, fit(kind, offload="host", num_slots=2, **fixed))
    (name,) = {n for n, _ in MODELS[kind][0]().named_parameters() if f"{MODELS[kind][1]['tail']}.weight" in n}
    value = in_memory[1][name]
    assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float())


def test_an_adapter_on_a_frozen_int4_base():
    way = dict(storage="int4", keep=["q_proj.a", "q_proj.b"])
    assert_same(fit("adapters", 3, **way), fit("adapters", 3, offload="host", num_slots=2, **way))


@pytest.mark.parametrize("make", [lambda: DelayedCpuDevice(1), lambda: FakeCudaDevice(FakeBackend())])
def test_on_a_device_whose_losses_are_late_it_waits_for_them(use, make):
    want = fit("bert", 3)
    use(make())
    assert_same(want, fit("bert", 3, device="cuda", offload="host"))


def test_micro_batches_give_the_mean_of_their_gradients():
    whole, parts = fit("bert", 1, tail_optimizer="sgd"), fit("bert", 1, tail_optimizer="sgd", micro_batches=2)
    start = dict(bert().named_parameters())["classifier.weight"]
    one, other = ((w["classifier.weight"] - start) for _, w in (whole, parts))
    # sums of 4 and of 2 + 2 rows round differently
    assert one.abs().max() > 1e-3 and torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_without_an_unperturbed_lane_the_first_one_gives_the_gradient():
    method = MeZO(lr=1e-3, eps=1e-1, batch_size=4)
    found = fit("bert", 1, method, tail_optimizer="sgd")[1]["classifier.weight"]
    model, batch = bert(), data("bert")[0]
    ids = {name: spec.param_id for name, spec in make_plan(model, batch).params.items()}
    for name, p in model.named_parameters():
        p.requires_grad_("classifier" in name)
        if "classifier" not in name:
            z = noise(method.noise, step_seed(0, 0), ids[name], p.numel()).view(p.shape)
            p.data = (p.data.double() + method.eps32 * z.double()).float()  # rounded once, as in a lane
    model(**batch).loss.backward()
    want = model.classifier.weight.detach().add(model.classifier.weight.grad, alpha=-RATE)
    assert torch.equal(found, want)


# ---- the run's directory ---------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


SETTINGS = dict(method=FEW, tail="classifier", tail_lr=RATE, model_class="AutoModelForSequenceClassification")


def begun(base, run_dir, steps=3, **settings):
    with Engine(base, run_dir=run_dir, **{**SETTINGS, **settings}) as engine:
        engine.fit(data("bert", 8), steps=steps)
        return stored_weights(engine)


def gone_on(run_dir, steps=6):
    with Engine.resume(run_dir) as engine:
        engine.fit(data("bert", 8), steps=steps)
        return stored_weights(engine)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_resumed_run_is_one_that_never_stopped(base, tmp_path, offload):
    want = begun(base, tmp_path / "whole", 6, offload=offload)
    begun(base, tmp_path / "run", 3, offload=offload)
    assert_same(want, gone_on(tmp_path / "run"))


class Killed(BaseException):
    """Ends the run as a kill would."""


@pytest.mark.parametrize("where", ["before the file", "after the file"])
def test_a_step_cut_off_anywhere_loses_nothing(base, tmp_path, monkeypatch, where):
    want = begun(base, tmp_path / "whole", 6)
    real = tail_files.write

    def write(path, tail):
        if tail.step == 4:
            if where == "after the file":
                real(path, tail)
            raise Killed
        real(path, tail)

    monkeypatch.setattr(tail_files, "write", write)
    engine = Engine(base, run_dir=tmp_path / "run", **SETTINGS)
    with pytest.raises(Killed):
        engine.fit(data("bert", 8), steps=6)
    monkeypatch.undo()
    assert len(load_journal(tmp_path / "run").steps) == 3
    engine.fit(data("bert", 8), steps=6)  # the same engine goes on
    assert_same(want, stored_weights(engine))
    engine.close()
    assert_same(want, gone_on(tmp_path / "run"))


def test_without_its_file_a_run_is_refused_by_its_name(base, tmp_path):
    begun(base, tmp_path / "run", 3)
    file = tmp_path / "run" / "tail" / "1.safetensors"
    data_was = file.read_bytes()
    flipped = data_was[:-1] + bytes([data_was[-1] ^ 1])
    for wrong, why in ((flipped, "is damaged"), (b"12", "does not hold"), (None, "cannot")):
        file.unlink() if wrong is None else file.write_bytes(wrong)
        with pytest.raises(JournalError, match=rf"its numbers after 3 steps are needed.*1\.safetensors.*{why}"):
            gone_on(tmp_path / "run")
    file.write_bytes((tmp_path / "run" / "tail" / "0.safetensors").read_bytes())
    with pytest.raises(JournalError, match="is after 2 steps"):
        gone_on(tmp_path / "run")
    begun(base, tmp_path / "other", 3, seed=1)
    file.write_bytes((tmp_path / "other" / "tail" / "1.safetensors").read_bytes())
    with pytest.raises(JournalError, match="is after 3 steps of another run"):
        gone_on(tmp_path / "run")


def test_other_settings_of_the_tail_are_another_run(base, tmp_path):
    begun(base, tmp_path / "run", 1)
    with (
        pytest.raises(JournalError, match=r"tail\.lr: the journal has 0\.02, this engine 0\.5"),
        Engine.resume(tmp_path / "run", tail_lr=0.5) as engine,
    ):
        engine.fit(data("bert", 8), steps=2)


def test_replay_needs_the_steps_file(base, tmp_path):
    want, run = begun(base, tmp_path / "run", 3), tmp_path / "run"
    replay(base, run, tmp_path / "out")
    found = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_same(want, {n: p.detach() for n, p in found.named_parameters()})
    with replayed(base, run, to=2) as engine:  # the generation before
        two = stored_weights(engine)
    assert_same(two, begun(base, tmp_path / "two", 2))
    alone = tmp_path / "alone.zoj"
    alone.write_bytes((run / "journal.zoj").read_bytes())
    with pytest.raises(JournalError, match="which the journal's scalars cannot rebuild: its numbers after 3 steps"):
        replayed(base, alone)
    with replayed(base, alone, tail_file=run / "tail" / "1.safetensors") as engine:
        assert_same(want, stored_weights(engine))
    with pytest.raises(JournalError, match="its numbers after 1 steps are needed"):
        replayed(base, run, to=1)
    with replayed(base, alone, to=0) as engine:
        assert_same({n: p.detach() for n, p in bert().named_parameters()}, stored_weights(engine))


def test_the_command_line_has_it(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"input_ids": x.tolist(), "label": int(y)}) + "\n"
        for batch in data("bert") for x, y in zip(batch["input_ids"], batch["labels"], strict=True)
    ))  # fmt: skip
    fit_it = ["fit", str(base), "--data", str(rows), "--steps", "2", "--batch-size", "4", "--quiet", "--method", "fzoo",
              "--tail", "classifier", "--tail-lr", "0.02", "--model-class", "AutoModelForSequenceClassification",
              "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "tuned")]  # fmt: skip
    assert main(fit_it) == 0
    file = str(tmp_path / "run" / "tail" / "0.safetensors")
    journal = tmp_path / "alone.zoj"
    journal.write_bytes((tmp_path / "run" / "journal.zoj").read_bytes())
    again = ["replay", str(base), str(journal), "--out", str(tmp_path / "again")]
    assert main(again) != 0
    assert main([*again, "--tail-file", file]) == 0
    one, other = (BertForSequenceClassification.from_pretrained(tmp_path / n) for n in ("tuned", "again"))
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert not torch.equal(one.classifier.weight, bert().classifier.weight)


def test_the_journals_commands_know_of_it(base, tmp_path, capsys):
    want, run = begun(base, tmp_path / "whole", 6), tmp_path / "run"
    begun(base, run, 3)
    assert main(["journal", "check", str(run)]) == 0
    assert "tail: its numbers after 3 steps are sound" in capsys.readouterr().out
    with pytest.raises(JournalError, match="numbers after 1 steps are needed"):
        cut(run, 1)
    cut(run, 2)
    assert_same(want, gone_on(run))
    (run / "tail" / "0.safetensors").write_bytes(b"")
    assert main(["journal", "check", str(run)]) != 0


def test_several_ranks_are_refused():
    class Two(Alone):
        world = 2

    with pytest.raises(ConfigError, match=r"tail='classifier': a tail's exact gradient is of one process"):
        open_model(bert(), FEW, EngineConfig(tail="classifier"), ranks=Two())


# ---- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, settings, error", [
    (bert, dict(tail="clasifier"), "tail='clasifier' selects none"),
    (bert, dict(tail="classifier", trainable="encoder"), "and none of them trains"),
    (bert, dict(tail="*"), "is an embedding|selects all that trains"),
    (bert, dict(tail="classifier", trainable="classifier"), "selects all that trains"),
    (tiny_opt, dict(tail="embed_tokens"), "is also 'lm_head.weight'"),
    (bert, dict(tail="word_embeddings"), "is an embedding"),
    (bert, dict(tail="bert.pooler", block_numel=300), "is cut into pieces"),
    (bert, dict(tail_lr=0.1), "tail_lr=0.1 without a tail"),
    (bert, dict(tail="classifier", tail_lr=-1.0), "expected a positive number"),
    (bert, dict(tail="classifier", tail_optimizer="lion"), "choose one of adam, sgd"),
])  # fmt: skip
def test_what_cannot_be_a_tail_is_refused(make, settings, error):
    with pytest.raises(Exception, match=error) as found:
        Engine(make(), method=FEW, **settings)
    assert "Error" in found.type.__name__ and found.type.__module__.startswith("zo_offload")


def no_gradient(model, batch):
    return float(model(**batch).loss.detach())


def cut_off(model, batch):
    return model(**batch).loss.detach().clone()


def another(model, batch):
    return model.bert(input_ids=batch["input_ids"]).pooler_output.square().mean()


@pytest.mark.parametrize("objective, error", [
    (no_gradient, "which has no gradient"), (cut_off, "by anything that torch differentiates"),
    (another, "does not depend"),
])  # fmt: skip
def test_an_objective_without_a_gradient_is_refused(objective, error):
    with Engine(bert(), method=FEW, tail="classifier", objective=objective) as engine:
        with pytest.raises(ConfigError, match=error):
            engine.fit(data("bert"), steps=2)
        assert engine.log.version == 0
        assert_same({n: p.detach() for n, p in bert().named_parameters()}, stored_weights(engine))


class Scaled(torch.nn.Module):
    """Changes what the gradient of its layer needs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

    def forward(self, x):
        h = self.body(x).tanh()
        out = self.head(h)
        h.mul_(2.0)
        return {"loss": out.square().mean()}


def test_a_tensor_changed_behind_the_graphs_back_is_an_error():
    error = pytest.raises(PlanError, match="changes a tensor of shape .* in place that its gradient needs")
    with Engine(Scaled(), method=FEW, tail="head", example={"x": torch.ones(4, 6)}) as engine, error:
        engine.step({"x": torch.ones(4, 6)})


def test_a_gradient_that_is_not_finite_is_a_step_that_is_not():
    def odd(model, batch):
        loss = model(**batch).loss
        loss.register_hook(lambda grad: grad * math.inf) if loss.requires_grad else None
        return loss

    error = pytest.raises(DivergenceError, match="the exact gradient of the tail is not finite")
    with Engine(bert(), method=FEW, tail="classifier", objective=odd) as engine, error:
        engine.step(data("bert")[0])
    skips = FEW.with_options(on_nonfinite="skip")
    with Engine(bert(), method=skips, tail="classifier", objective=odd) as engine:
        assert engine.step(data("bert")[0]).skipped
        assert_same({n: p.detach() for n, p in bert().named_parameters()}, stored_weights(engine))


def test_parameters_require_a_gradient_afterwards_as_before():
    model = adapted()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with Engine(model, method=FEW, tail=["layers.2"], trainable="requires_grad") as engine:
        engine.step(data("adapters")[0])
        want = stored_weights(engine)
    assert_same(want, {n: p.detach() for n, p in model.named_parameters()})  # given back
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


def test_the_memory_plan_has_a_term_for_it():
    engines = {}
    for tail in (None, "classifier", "layer.2"):
        with Engine(bert(), method=FEW, tail=tail) as engine:
            engine.step(data("bert")[0])
            engines[tail] = engine.memory.terms["tail"]
    assert engines[None] == 0 < engines["classifier"] < engines["layer.2"]


def test_evaluated_steps_are_kept_for_replay_and_for_the_best(base, tmp_path):
    with Engine(base, run_dir=tmp_path / "run", **SETTINGS) as engine:
        result = engine.fit(data("bert", 8), steps=6, eval_data=data("bert")[:1], eval_every=2)
        assert sorted(p.name for p in (tmp_path / "run" / "tail").iterdir()) == [
            "0.safetensors", "1.safetensors", "step-2.safetensors", "step-4.safetensors", "step-6.safetensors"
        ]  # fmt: skip
        with engine.at(2) as then:
            two = stored_weights(then)
        with engine.at("best") as then:
            then.run(data("bert")[0])
            assert then.log.version == result.best["step"]
    assert_same(two, begun(base, tmp_path / "two", 2))


# ---- the tail alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, dict(offload="host", num_slots=2), dict(storage="int4", offload="disk")], ids=str)
@pytest.mark.parametrize("kind", ["t5", "adapters"])
def test_alone_it_is_plain_backpropagation(kind, way, tmp_path):
    more = {**way, **(dict(run_dir=tmp_path / "run") if way.get("offload") == "disk" else {})}
    method, more = TailAlone(lr=RATE, batch_size=4), {"tail_lr": None, **more}
    losses, weights = fit(kind, method=method, **more)
    make, settings = MODELS[kind]
    tail = chosen(make(), settings["tail"])
    if "storage" in way:  # the frozen base is rounded: resumed in the middle it is the same
        fit(kind, 2, method, **{**more, "run_dir": tmp_path / "again"})
        with Engine.resume(tmp_path / "again", make()) as engine:
            engine.fit(data(kind), steps=STEPS, new_data=True)
            assert_same(weights, stored_weights(engine))
        return
    model = make()
    for name, p in model.named_parameters():
        p.requires_grad_(name in tail)
    kept = [p for p in model.parameters() if p.requires_grad]
    own, want = torch.optim.Adam(kept, lr=RATE, foreach=False), []
    for batch in data(kind):
        own.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        own.step()
        want.append(float(loss.detach()))
    assert_same((want, {n: p.detach() for n, p in model.named_parameters()}), (losses, weights))


def test_alone_it_needs_a_tail_and_has_a_rate_of_its_own():
    with pytest.raises(ConfigError, match="tail_lr=0.1: this method has a rate of its own"):
        Engine(bert(), method=TailAlone(), tail="classifier", tail_lr=0.1)
    with pytest.raises(ConfigError, match="trains a tail alone, and none is named"):
        Engine(bert(), method=TailAlone())
