"""The command line, in process: what each command prints and writes, and one line for what a user gets wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from support.texts import write_text_model
from zo_offload.cli import command, doctor, main
from zo_offload.kernels import native

POSITIONS = 64
FIT = ["--batch-size", "4", "--lr", "1e-3", "--offload", "disk", "--quiet"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with base/ (a checkpoint), train.jsonl, dev.jsonl and long.jsonl (beyond the model's positions)."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=211, hidden_size=32, num_hidden_layers=4, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=32,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 211, (5 + i % 7,), generator=generator).tolist() for i in range(24)]
    write_rows(folder / "train.jsonl", rows[:18])
    write_rows(folder / "dev.jsonl", rows[18:])
    write_rows(folder / "long.jsonl", [[5] * (POSITIONS + 6)] * 4)
    return folder


@pytest.fixture(scope="module")
def trained(files):
    """run/ and tuned/: seven steps that were never stopped."""
    run, out = files / "run", files / "tuned"
    assert fit(files, "--steps", 7, "--run-dir", run, "--out", out) == 0
    return files


def call(*args):
    return main([str(arg) for arg in args])


def fit(files, *args):
    return call("fit", files / "base", "--data", files / "train.jsonl", *FIT, *args)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").state_dict()


def assert_equal(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fit_writes_a_run_and_a_checkpoint(files, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert fit(files, "--steps", 4, "--run-dir", run, "--out", out, "--eval-data", files / "dev.jsonl",
               "--eval-every", 2) == 0  # fmt: skip
    summary, *evals, _, last = capsys.readouterr().out.splitlines()
    assert summary.startswith("4 steps, ") and last == f"exported to {out}"
    evals = [json.loads(line) for line in evals]
    assert [values["step"] for values in evals] == [2, 4]
    assert [line["step"] for line in metrics(run) if "loss" in line] == [0, 1, 2, 3]
    assert [line["eval_loss"] for line in metrics(run) if "eval_loss" in line] == [e["loss"] for e in evals]
    assert (run / "journal.zoj").is_file() and (run / "blocks").is_dir()
    before, after = weights(files / "base"), weights(out)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)


def test_fit_by_another_method_is_resumed_by_it(files, tmp_path):
    run = tmp_path / "run"
    assert fit(files, "--steps", 2, "--run-dir", run, "--method", "fzoo", "--directions", 3) == 0
    assert (
        call("fit", run, "--resume", "--data", files / "train.jsonl", "--batch-size", 4, "--steps", 3, "--quiet") == 0
    )
    assert (run / "journal.zoj").stat().st_size > 9 * 64, "a record a direction"
    assert len(losses(run)) == 3


def test_resumed_is_never_stopped(trained, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    assert fit(trained, "--steps", 3, "--run-dir", run) == 0
    assert call("fit", run, "--resume", "--data", trained / "train.jsonl", "--batch-size", 4, "--steps", 7,
                "--offload", "host", "--quiet", "--out", out) == 0  # fmt: skip
    assert losses(run) == losses(trained / "run") and len(set(losses(run))) == 7
    assert_equal(out, trained / "tuned")


def test_eval_of_a_run_is_that_of_its_export(trained, tmp_path, capsys):
    def loss(model, *args):
        assert call("eval", model, "--data", trained / "dev.jsonl", "--batch-size", 4, *args) == 0
        return json.loads(capsys.readouterr().out)["loss"]

    run, tuned = loss(trained / "run"), loss(trained / "tuned")
    assert run == tuned != loss(trained / "base")
    assert tuned == loss(trained / "tuned", "--offload", "disk", "--run-dir", tmp_path / "blocks")


def test_export_of_a_run_and_of_a_checkpoint(trained, tmp_path, capsys):
    assert call("export", trained / "run", "--out", tmp_path / "whole", "--max-shard", "50KB") == 0
    written = list((tmp_path / "whole").iterdir())
    assert capsys.readouterr().out == f"wrote {len(written)} files to {tmp_path / 'whole'}\n"
    assert len([path for path in written if path.suffix == ".safetensors"]) > 1
    assert_equal(tmp_path / "whole", trained / "tuned")
    assert call("export", trained / "base", "--out", tmp_path / "bf16", "--storage", "bf16") == 0
    base = weights(trained / "base")
    assert all(torch.equal(value, base[name].bfloat16()) for name, value in weights(tmp_path / "bf16").items())


@pytest.mark.parametrize("name", ["base", "base/config.json"])
def test_plan_of_a_directory_and_of_a_config(name, files, capsys):
    assert call("plan", files / name, "--batch-size", 2) == 0
    text = capsys.readouterr().out
    parameters = sum(p.numel() for p in OPTForCausalLM.from_pretrained(files / "base").parameters())
    assert f"OPTForCausalLM: {parameters / 1e3:.3f} k parameters" in text
    assert "stored as fp32: " in text and " in 7 blocks" in text
    assert f"memory, 2 x {POSITIONS} tokens" in text  # not the usual 512, which this model does not take
    (layers,) = [line.split() for line in text.splitlines() if line.startswith("model.decoder.layers.0 .. 3 ")]
    assert layers[3:] == ["8,544", "1", "0.04", "1", "x", "4"]
    assert "tied, stored and perturbed once: model.decoder.embed_tokens.weight = lm_head.weight" in text


def test_plan_of_a_size(capsys):
    assert call("plan", "opt-175b", "--storage", "bf16", "--tokens", 256, "--batch-size", 1) == 0
    text = capsys.readouterr().out
    assert "174.604 G parameters" in text and "stored as bf16: 349.21 GB in 3084 blocks" in text
    (layers,) = [line.split() for line in text.splitlines() if line.startswith("model.decoder.layers.0 .. 95 ")]
    assert layers[3:] == ["1,812,099,072", "32", "3624.20", "1", "x", "96"]
    assert "memory, 1 x 256 tokens" in text
    (window,) = [line.split() for line in text.splitlines() if line.startswith("  window ")]
    assert window[1:] == ["377.6", "MB", "3", "slots,", "2", "fetched", "ahead"]
    # the tied embedding is fetched twice, but for the piece that the pass before ended with
    assert "fetches 350.34 GB and flushes 87.30 GB (updates folded every 4 steps)" in text


def activations_in(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("  activations ")]
    return line.split(maxsplit=1)[1].strip()


def test_plan_for_a_gpu_that_is_not_there(capsys):
    """16-bit activations, half of the CPU's, and the context by its name."""
    texts = {}
    for device in ("cpu", "cuda"):
        assert (
            call("plan", "opt-1.3b", "--storage", "bf16", "--tokens", 2048, "--batch-size", 1, "--device", device) == 0
        )
        texts[device] = capsys.readouterr().out
    on_cpu, on_gpu = (activations_in(texts[device]) for device in ("cpu", "cuda"))
    assert on_cpu.endswith("MB") and on_gpu.endswith("MB") and 1.4 < float(on_cpu[:-3]) / float(on_gpu[:-3]) < 2.1
    assert "context           500.0 MB" in texts["cuda"] and "context" not in texts["cpu"]


@pytest.mark.parametrize("storage", ["int4", "int4_g64", "nf4"])
def test_a_checkpoint_is_evaluated_and_converted_in_four_bits(files, tmp_path, capsys, storage):
    assert call("eval", files / "base", "--data", files / "dev.jsonl", "--storage", storage) == 0
    rounded = json.loads(capsys.readouterr().out)["loss"]
    assert call("export", files / "base", "--storage", storage, "--out", tmp_path / "out") == 0
    assert call("eval", tmp_path / "out", "--data", files / "dev.jsonl", "--storage", "fp32") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == pytest.approx(rounded, rel=1e-3)
    assert call("eval", files / "base", "--data", files / "dev.jsonl", "--storage", "fp32") == 0
    assert json.loads(capsys.readouterr().out)["loss"] != rounded


def test_generate_says_what_plain_transformers_says(files, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(files / "base", base)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(211)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w1", eos_token="w2")
    tokenizer.save_pretrained(base)
    assert call("generate", base, "--prompt", "w7 w8 w9", "w5", "--max-new-tokens", 5, "--offload", "host") == 0
    lines = capsys.readouterr().out.splitlines()
    model = AutoModelForCausalLM.from_pretrained(base)
    for prompt, line in zip(("w7 w8 w9", "w5"), lines, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert line == prompt + tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


BASE, DATA = ["fit", "{}/base"], ["--data", "{}/train.jsonl", "--batch-size", "4", "--steps", "1"]
DISK = ["--offload", "disk", "--run-dir", "{}/never"]
WRONG = {
    "no model": (["fit", "{}/nowhere", *DATA], "{}/nowhere does not exist"),
    "no model to plan": (["plan", "opt-176b"], "opt-176b"),
    "no model to eval": (["eval", "{}/nowhere", "--data", "{}/train.jsonl"], "{}/nowhere does not exist"),
    "no run": (["fit", "{}/base", "--resume", *DATA], "{}/base/config.json is not a run"),
    "used run dir": ([*BASE, *DATA, "--run-dir", "{}/run"], "{}/run' holds a run"),
    "used run dir, same run": ([*BASE, *DATA[:4], *FIT, "--steps", "9", "--run-dir", "{}/run"], "holds a run"),
    "run dir a file": ([*BASE, *DATA, "--run-dir", "{}/dev.jsonl"], "{}/dev.jsonl' is a file"),
    "no data": ([*BASE, "--data", "{}/no.jsonl", "--steps", "1"], "{}/no.jsonl does not exist"),
    "no eval data": ([*BASE, *DATA, "--eval-data", "{}/no.jsonl"], "{}/no.jsonl does not exist"),
    "long rows": ([*BASE, "--data", "{}/long.jsonl", "--batch-size", "4"], "long.jsonl row 0 has 70 tokens"),
    "long rows to plan": (["plan", "{}/base", "--tokens", "65"], "tokens=65"),
    "little memory": ([*BASE, *DATA, *DISK, "--device-memory", "10KB"], "device_memory=10.0 kB is too small"),
    "little memory to plan": (["plan", "{}/base", "--device-memory", "10KB"], "device_memory=10.0 kB is too small"),
    "size": (["export", "{}/run", "--out", "{}/never", "--max-shard", "big"], "max_shard_bytes='big'"),
    "directions of mezo": ([*BASE, *DATA, "--directions", "4"], "4 is an option of --method fzoo, "),
    "preset": ([*BASE, *DATA, "--preset", "opus"], "preset 'opus' is not known to mezo: there are opt"),
    "out in use": ([*BASE, *DATA, *DISK, "--out", "{}/tuned"], "{}/tuned is not empty"),
    "out under a file": (["export", "{}/run", "--out", "{}/dev.jsonl/x"], "{}/dev.jsonl is a file"),
    "resume with lr": (["fit", "{}/run", "--resume", *DATA, "--lr", "1", "--seed", "2"], "leave out --lr, --seed"),
    "no tokenizer": (["generate", "{}/run", "--prompt", "a"], "generating text needs a tokenizer"),
    "export in bf16": (["export", "{}/run", "--out", "{}/never", "--storage", "bf16"], "leave out --storage"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(case, trained, capsys):
    args, message = WRONG[case]
    check_error(capsys, [arg.format(trained) for arg in args], message.format(trained))
    assert not (trained / "never").exists(), "an error that can be known before must leave nothing behind"
    assert len(losses(trained / "run")) == 7


def check_error(capsys, args, message):
    capsys.readouterr()
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("zo-offload: ") and err.count("\n") == 1 and message in err, err


def test_missing_shard(files, tmp_path, capsys):
    OPTForCausalLM.from_pretrained(files / "base").save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shutil.move(shard, tmp_path)
    check_error(capsys, ["eval", tmp_path / "sharded", "--data", files / "dev.jsonl"], f"{shard} is missing")


def test_numbers_below_one_are_refused(files, capsys):
    with pytest.raises(SystemExit, match="2"):
        fit(files, "--steps", 0)
    assert "--steps: 0 is less than 1" in capsys.readouterr().err


def test_a_small_gpu_is_told_which_allocator_does_not_fragment():
    """8 and 16 GB are; where it is set, under either name, it is shown."""
    for set_to in ({}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}):
        for total in (8 << 30, 16 << 30):
            assert doctor.allocator(total, set_to).startswith("set PYTORCH_ALLOC_CONF=expandable_segments:True before")
        assert doctor.allocator(24 << 30, set_to).startswith("torch's allocator as it is")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert doctor.allocator(8 << 30, {name: "expandable_segments:True"}).startswith("expandable segments (")


def test_doctor(capsys):
    assert doctor.examine() == 0
    text = capsys.readouterr().out
    assert f"native       {native.describe()}\n" in text and "one step     ok" in text


def test_presets_belong_to_their_method_and_to_what_they_train(files, tmp_path, capsys):
    args = ("fit", files / "base", "--data", files / "train.jsonl", "--batch-size", 4, "--quiet", "--steps", 2)
    more = ("--run-dir", tmp_path / "run", "--preset", "opt", "--method", "fzoo", "--directions", 2)
    assert call(*args, *more) == 0
    method = json.loads((tmp_path / "run/config.json").read_text())["method"]
    assert (method["name"], method["lr"], method["eps"], method["directions"]) == ("fzoo", 5e-5, 1e-4, 2)
    capsys.readouterr()
    assert call(*args, "--preset", "opt-lora", "--run-dir", tmp_path / "lora") == 2
    assert "rates for LoRA adapters, but" in capsys.readouterr().err and not (tmp_path / "lora").exists()


def test_group_shifts_are_a_method_of_their_own(files, tmp_path):
    args = ("--data", files / "train.jsonl", "--batch-size", 4, "--quiet")
    runs = {}
    for name in ("qzo", "qzo-shift"):
        rates = ("--method", name, "--storage", "int4", "--lr", 1e-5, "--eps", 1e-3, "--clip", 50)
        assert call("fit", files / "base", *args, *rates, "--run-dir", tmp_path / name, "--steps", 2) == 0
        assert call("fit", tmp_path / name, "--resume", *args, "--steps", 3) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["method"]["name"] == name
        runs[name] = losses(tmp_path / name)
    assert len(runs["qzo"]) == 3 and runs["qzo"] != runs["qzo-shift"]


def test_scales_of_a_quantized_checkpoint_are_trained(files, tmp_path, capsys):
    run = tmp_path / "run"
    args = ("fit", files / "base", "--data", files / "train.jsonl", "--batch-size", 4, "--quiet", "--steps", 3)
    assert call(*args, "--method", "qzo", "--storage", "int4", "--clip", 50, "--run-dir", run, "--device", "cpu") == 0
    config = json.loads((run / "config.json").read_text())
    assert config["method"]["name"] == "qzo" and config["method"]["clip"] == 50
    assert (
        call("fit", run, "--resume", "--data", files / "train.jsonl", "--batch-size", 4, "--quiet", "--steps", 5) == 0
    )
    assert len(losses(run)) == 5
    capsys.readouterr()
    assert call(*args, "--clip", 50) == 2 and "--method qzo" in capsys.readouterr().err
    assert call(*args, "--preset", "opt", "--method", "qzo") == 2
    assert "not known to qzo: there are llama" in capsys.readouterr().err
    assert call("fit", run, "--resume", "--data", files / "train.jsonl", "--method", "qzo") == 2
    assert "leave out --method" in capsys.readouterr().err


def test_torchrun_starts_ranks_that_write_what_one_process_writes(files, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "zo_offload", "fit", files / "base"]
    options = ["--data", files / "train.jsonl", *FIT, "--steps", 2, "--run-dir", tmp_path / "run", "--out"]
    done = subprocess.run(
        [sys.executable, *map(str, [*command, *options, tmp_path / "tuned"])], capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps,") == 1, "one rank prints"
    assert fit(files, "--steps", 2, "--run-dir", tmp_path / "one", "--out", tmp_path / "of one") == 0
    two, one = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("tuned", "of one"))
    assert two == one


@pytest.mark.parametrize("rank,printed", [(0, "loss"), (1, "")])
def test_what_is_not_training_is_done_by_rank_0_alone(rank, printed, trained, capsys, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert call("eval", trained / "run", "--data", trained / "dev.jsonl") == 0
    assert printed in capsys.readouterr().out if printed else not capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fit", "{base}", "--data", "x", "--merge"], "--merge says how --out is written"),
        (
            ["fit", "{base}", "--data", "x", "--merge", "--out", "{base}-out"],
            "merge=True is for a model with an adapter",
        ),
        (["fit", "{base}", "--data", "x", "--new-data"], "give it with --resume"),
        (["fit", "{base}", "--data", "x", "--num-labels", "3"], "LlamaForCausalLM has no head of classes"),
        (["fit", "{base}", "--data", "x", "--patience", "3"], "is for other ranks, and there are none"),
        (["eval", "{base}", "--data", "x", "--demonstrations", "y"], "are what --shots N takes"),
        (["journal", "show", "x", "--to", "3"], "--to is of journal cut, not of show"),
        (["journal", "check", "x", "--last", "3"], "--last is of journal show, not of check"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_before_anything_is_read(tmp_path, capsys, argv, said):
    write_text_model(tmp_path / "base")
    assert main([arg.replace("{base}", str(tmp_path / "base")) for arg in argv]) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_second_interrupt_while_the_first_is_told_ends_it_all_the_same(monkeypatch):
    def stopped(args):
        raise KeyboardInterrupt

    class Interrupted:
        def write(self, text):
            raise KeyboardInterrupt

    monkeypatch.setitem(command.RUN, "methods", stopped)
    monkeypatch.setattr(sys, "stderr", Interrupted())
    assert main(["methods"]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a caller's process keeps its handler"
    monkeypatch.setattr(sys, "argv", ["zo-offload", "methods"])
    try:
        assert main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "the program hears no more while it goes"
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
