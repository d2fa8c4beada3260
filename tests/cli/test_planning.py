"""`zo-offload plan` for hardware that is not here: what people ask before they buy, rent or begin."""

from __future__ import annotations

import itertools
import json
import re
import shlex

import pytest

from support import training
from support.training import METHOD
from support.zoo.small import tiny_opt
from zo_offload import FZOO, ConMeZO, Engine, MeZO
from zo_offload.checkpoint.checkpoint import Checkpoint
from zo_offload.cli import hardware
from zo_offload.cli import named_models as models
from zo_offload.cli.answer import Machine, answer, command, lines
from zo_offload.cli.command import RUN, main
from zo_offload.cli.costs import NOISE, Work, pass_seconds, step_seconds
from zo_offload.cli.hardware import Link, backprop_gb, find_drive, find_gpu, find_link
from zo_offload.cli.parser import parse
from zo_offload.cli.scaling import ONE_HOST, SHARDS, SLICES, fits, shared
from zo_offload.cli.timeline import simulate
from zo_offload.errors import ConfigError
from zo_offload.formats import FORMATS
from zo_offload.plan.layout import make_layout
from zo_offload.plan.plan import make_plan
from zo_offload.stream.slots import WindowSize
from zo_offload.system.units import parse_bytes


def plan(capsys, *words):
    code = main(["plan", *map(str, words)])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out.splitlines()


def one(lines, start):
    (found,) = [line for line in lines if line.startswith(start)]
    return found


SMALL = ("--tokens", 64, "--batch-size", 2)


def test_the_answer_comes_first_and_the_command_last(capsys):
    lines = plan(capsys, "smollm2-360m", "--gpu", "RTX 4060", "--host-memory", "16GB", "--steps", 5000, *SMALL)
    assert lines[0].startswith(
        "smollm2-360m, 0.36 billion parameters, on rtx-4060 (8 GB, pcie4-x8 at 12.5 GB/s each way)"
    )
    assert lines[1].startswith("5000 steps of 2 x 64 tokens: about ") and lines[1].endswith(" binds")
    assert "fit in half of the GPU's memory" in one(lines, "--offload none")
    assert "FITS this GPU" in one(lines, "better: ")
    words = shlex.split(lines[-1])
    assert words[:3] == ["zo-offload", "fit", "checkpoints/smollm2-360m"]
    args = parse(words[1:], RUN)  # `fit` takes every option of it
    assert (args.steps, args.batch_size, args.max_length, args.offload) == (5000, 2, 64, "none")


def test_the_tier_follows_from_host_memory_and_the_storage_from_what_binds(capsys):
    words = ("opt-2.7b", "--gpu", "rtx-4060", "--host-memory", "8GB", "--disk", "nvme-gen4", "--num-slots", 3, *SMALL)
    scarce = plan(capsys, *words)
    assert one(scarce, "--offload").startswith(
        "--offload disk --storage int8+8: of 8.00 GB host memory 1.36 GB may hold"
    )
    assert "of the rated life of a 2 TB nvme-gen4 (1200 TB written)" in one(scarce, "wear: ")
    assert not any("the host takes" in line for line in scarce), "files take longer"
    assert "the drive binds" in scarce[1] and "idles" in one(scarce, "rows: ")
    options = dict(tokens=64, batch_size=2, num_slots=3)
    gpu = find_gpu("rtx-4060")
    ample = answer("opt-2.7b", Machine(gpu, gpu.link, 64 * 10**9), method=METHOD, **options)
    assert ample.planned.prepared.offload == "host" and ample.step.binds == "the link"
    assert ample.planned.prepared.config.storage == "int8+8" and "keeps small updates" in ample.why
    made = ample.planned
    large = answer("opt-2.7b", Machine(find_gpu("h200"), gpu.link), method=METHOD, made=made, **options)
    assert large.planned.prepared.offload == "none" and large.step.binds == "the GPU"
    options |= dict(offload="disk", storage="fp16")
    kept = answer("opt-2.7b", Machine(gpu, gpu.link, 64 * 10**9), method=METHOD, made=made, **options)
    assert kept.why == "--offload disk was asked for" and kept.planned.prepared.config.storage == "fp16"


def test_what_is_slow_or_cannot_be_is_warned_of(capsys):
    lines = plan(capsys, "smollm2-135m", "--gpu", "t4", "--host-memory", "16GB", *SMALL)
    text = "\n".join(lines)
    assert "t4 has no bf16" in text and "can leave x4" in text and "the host takes about" in text
    assert main(["plan", "smollm2-135m", "--gpu", "voodoo-2"]) == 2
    assert "known are rtx-3060" in capsys.readouterr().err
    assert main(["plan", "llama-3-71b"]) == 2
    assert "names like it are llama-3-70b" in capsys.readouterr().err
    assert main(["plan", "nobody/Meta-Llama-3-8B"]) == 2
    assert "A plan needs no files: it knows llama-3-8b" in capsys.readouterr().err
    assert main(["plan", "smollm2-135m", "--disk", "nvme-gen4"]) == 2
    assert "name it, --gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch-size 100000000 --tokens 64", "6,400 million tokens in a step"),
        ("--host-memory 128", "that is 128 B; give it as 64GB"),
        ("--device-memory 100GB", "rtx-4090 has 24 GB"),
        ("--timeline /no/where/step.json", "there is no directory /no/where"),
        ("--device cpu", "a device of this machine"),
        ("--compare disks --ranks 4", "has no use for --ranks"),
    ],
)
def test_nonsense_is_refused_by_name(words, said, capsys):
    assert main(["plan", "smollm2-135m", "--gpu", "rtx-4090", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--disk-size 0", "--disk-size nan", "--host-bandwidth 0", "--host-bandwidth -3"])
def test_numbers_of_hardware_are_above_zero(words, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "smollm2-135m", "--gpu", "rtx-4090", *words.split()])
    assert "is not a finite number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "every"), [("smollm2-135m", 1), ("opt-1.3b", 4), ("deepseek-v2-lite", 7)])
def test_fit_takes_the_command_of_every_plan_and_no_figure_is_nonsense(model, every):
    """On all GPUs, with little and much host memory: what `fit` is given, times, bytes, and what is said of LoRA."""
    made = None
    for name, host in itertools.product(hardware.gpu_names()[::every], (8, 2000)):
        gpu = find_gpu(name)
        found = answer(model, Machine(gpu, gpu.link, host * 10**9), method=METHOD, made=made, tokens=64, batch_size=2)
        made = found.planned
        told = "\n".join(lines(found, 100, 100))
        assert not re.search(r"\bnan\b|\binf\b|(?<![\w.])-\d|\b0\.0+ (ms|s|minutes)\b", told), told
        args = parse(shlex.split(command(made, 100, []))[1:], RUN)
        assert (args.steps, args.offload) == (100, made.prepared.offload)
        assert ("has no bf16" in told) == (not gpu.bf16 and model != "opt-1.3b")
        assert "FITS this GPU" in told or "nothing with gradients fits this GPU" in told


def test_a_config_of_any_name_and_a_run(capsys, tmp_path):
    model = tiny_opt(2, vocab=97, hidden=16)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").rename(tmp_path / "mine.json")
    text = "\n".join(plan(capsys, tmp_path / "mine.json", "--tokens", 8))
    assert "memory, 16 x 8 tokens" in text  # 16 rows, as fit
    model.save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    with Engine(tmp_path / "base", method=METHOD, run_dir=run, storage="int8+8", offload="disk") as engine:
        engine.fit(training.batches(1, length=9, vocab=97), steps=1, batch_size=4)
    lines = plan(capsys, run, "--tokens", 8)
    assert one(lines, "stored as int8+8") and "--storage int8+8" in lines[-1]
    assert lines[-1].startswith(f"zo-offload fit {tmp_path / 'base'} --data"), "a new run, on the run's base"
    resumes = plan(capsys, run)[-1]
    assert resumes == f"zo-offload fit {run} --resume --device cpu --offload disk"
    again = shlex.split(resumes)[1:]
    assert main([*again, "--steps", "1", "--quiet"]) == 2 and "train_data" in capsys.readouterr().err, (
        "options are taken"
    )
    odd = ("{}", "[1]", '{"model_type": "none"}', '{"model_type": "llama", "hidden_size": "big"}',
           '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}')  # fmt: skip
    for text in odd:
        (tmp_path / "no.json").write_text(text)
        assert main(["plan", str(tmp_path / "no.json")]) == 2
        assert "is not a config.json of a model" in capsys.readouterr().err


def test_tables_over_gpus_and_drives(capsys):
    lines = plan(capsys, "smollm2-135m", "--compare", "gpus", "--host-memory", "32GB", *SMALL)
    assert {line.split()[0] for line in lines[1:-1]} == set(hardware.gpu_names())
    words = ("smollm2-135m", "--gpu", "rtx-4060", "--offload", "disk", "--storage", "bf16", "--num-slots", 3)
    lines = plan(capsys, *words, "--compare", "disks", *SMALL)
    seconds = {line.split()[0]: float(line.split()[3]) for line in lines[1:-1]}
    assert seconds["nvme-gen3"] > seconds["nvme-gen4"] > seconds["nvme-gen5"]


@pytest.mark.parametrize(
    "name", ["opt-350m", "llama-3.2-1b", "qwen3-0.6b", "gemma-3-270m", "phi-4-mini", "gpt-oss-20b"]
)
def test_named_models_have_the_parameters_that_are_published(name):
    published = {
        "opt-350m": 0.331, "llama-3.2-1b": 1.236, "qwen3-0.6b": 0.596, "gemma-3-270m": 0.268, "phi-4-mini": 3.836,
        "gpt-oss-20b": 20.9,
    }  # fmt: skip
    model = Checkpoint.open(models.named_config(name)).build_model(FORMATS["bf16"].torch_dtype)
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert count == pytest.approx(published[name], rel=4e-3)


def test_what_several_gpus_make_of_a_step(capsys):
    """The GPU's part shrinks with the lanes, the link's does not, and one host's memory is read by all of them."""
    base = ["opt-13b", "--gpu", "rtx-4090", "--host-memory", "256GB", "--tokens", "128", "--micro-batches", "4"]
    lines = plan(capsys, *base, "--ranks", "6", "--host-bandwidth", "100")
    table = [line.split() for line in lines if re.match(r" +[1246]  (one|hosts)", line)]
    assert [row[0] for row in table] == ["1", "2", "2", "4", "4", "6", "6"]
    machine = Machine(find_gpu("rtx-4090"), find_gpu("rtx-4090").link, 256 * 10**9, 100.0)
    found = answer("opt-13b", machine, method=MeZO(), tokens=128, batch_size=16, micro_batches=4)
    one, two, eight = (shared(found, n) for n in (1, 2, 8))
    assert one.seconds == found.step.seconds and one.binds == found.step.binds == "the GPU"
    assert 0.5 * one.seconds <= two.seconds < 0.6 * one.seconds and eight.idle == 0
    assert shared(found, 9).idle == 1, "two perturbations of four micro-batches"
    assert eight.binds == "the link" and eight.seconds == found.step.parts["the link"]
    together = shared(found, 8, ONE_HOST)
    assert together.binds == "host memory" and together.seconds == 8 * found.step.parts["host memory"]
    more = shared(found, 2, rows=2)
    assert more.tokens == 2 * one.tokens and more.seconds <= one.seconds * 1.0000001


def test_slices_and_shards_are_the_formulas_and_are_said_not_to_be_built(capsys):
    """Of a model whose shards fit two GPUs, but not one."""
    base = ["opt-66b", "--gpu", "a100", "--host-memory", "2TB", "--tokens", "64", "--batch-size", "4", "--link", "24"]
    lines = plan(capsys, *base, "--ranks", "8", "--nvlink", "230", "--host-bandwidth", "150", "--micro-batches", "4")
    table = {
        tuple(found.groups()) for line in lines if (found := re.match(r" +([1248])  (one host, \w+|one|hosts)", line))
    }
    assert table >= {("8", "one host, slices"), ("8", "one host, shards"), ("2", "one host, slices"), ("1", "one")}
    assert not {found for found in table if found[0] == "1"} - {("1", "one")}
    assert any("slices and shards are NOT BUILT: predicted for 230 GB/s" in line for line in lines)
    machine = Machine(find_gpu("a100"), find_link("24", find_gpu("a100").link), 2 * 10**12, 150.0)
    found = answer("opt-66b", machine, method=MeZO(), tokens=64, batch_size=4, micro_batches=4, storage="bf16")
    assert fits(found, 2) and not fits(found, 1)
    whole, slices, shards = (shared(found, 8, way, nvlink=23.0) for way in (ONE_HOST, SLICES, SHARDS))
    work, parts = found.work, found.step.parts
    assert whole.seconds == 8 * parts["host memory"] > parts["the link"]
    assert slices.seconds == 7 / 8 * work.fetched / 23e9 and slices.binds == shards.binds == "nvlink"
    prepared = found.planned.prepared
    moved = sum(prepared.layout.stream_bytes[block] for block in prepared.plan.visits[1:])  # the head is the embedding
    assert shards.seconds == 7 / 8 * moved / 23e9 > slices.seconds
    assert shared(found, 8, SLICES, nvlink=1e9).seconds == max(parts["the link"] / 8, parts["host memory"])
    assert shared(found, 8, SHARDS, nvlink=1e9).binds == "the GPU"


@pytest.mark.parametrize("what, words", [
    ("--nvlink is the rate between several GPUs", ["--nvlink", "230"]),
    ("--ranks 1000000: at most 65536", ["--ranks", "1000000"]),
    ("--compare disks has no use for --ranks", ["--ranks", "2", "--nvlink", "3", "--compare", "disks"]),
])  # fmt: skip
def test_numbers_of_several_gpus_that_make_no_sense_are_refused(what, words, capsys):
    assert main(["plan", "opt-125m", "--gpu", "a100", *words]) == 2
    assert what in capsys.readouterr().err


def test_names_numbers_and_what_is_between_them():
    assert all(find_gpu(t).memory_gb == 24 for t in ("NVIDIA GeForce RTX 4090", "RTX4090", "4090"))
    assert find_gpu("NVIDIA A100-SXM4-80GB").name == "a100" and find_gpu("Tesla T4").name == "t4"
    with pytest.raises(ConfigError, match="known are"):
        find_gpu("RTX 4090 Laptop GPU")
    assert parse_bytes("3TB") == 3 * 10**12 and find_gpu("h200").link.gb_per_s > 50
    assert find_link("pcie4-x8").gb_per_s == 12.5 and find_link("20", find_link("pcie5-x16")).flush_cost == 0.1
    assert find_drive("7").read_gb_per_s == 7.0
    assert backprop_gb("qlora", 8) == 6 and 35 < backprop_gb("qlora", 60) < 41 and backprop_gb("lora", 1) < 8


def work(**more):
    base = dict(
        fetched=24e9, flushed=6e9, forward_flops=1e12, elements=12e9, streamed_bytes=24e9, lanes=2, fold_every=4,
        distribution="gaussian", noises=1, lane_noises=1, tokens=2048,
    )  # fmt: skip
    return Work(**(base | more))


def test_the_formula_of_a_step():
    gpu = find_gpu("rtx-4090")
    step = step_seconds(work(), gpu, Link("x", 24.0, 0.5))
    assert step.binds == "the link" and step.seconds == pytest.approx(24 / 24 + 0.5 * 6 / 24)
    files = step_seconds(work(), gpu, gpu.link, drive=find_drive("nvme-gen4"), host_gb_per_s=10)
    assert files.parts["the drive"] == pytest.approx(24 / 6.5 + 6 / 1.5) and files.binds == "the drive"
    assert files.parts["host memory"] == pytest.approx(3.0)
    long = step_seconds(work(forward_flops=1e16), gpu, gpu.link)
    assert long.binds == "the GPU" and long.forwards == pytest.approx(1e16 / (0.65 * 165.2e12))


def test_lanes_along_sums_cost_their_noises():
    gpu = find_gpu("rtx-4090")
    found = [pass_seconds(work(lane_noises=count), gpu) for count in (1, 33, 65)]
    assert found[1] > 3 * found[0] and found[2] - found[1] == pytest.approx(
        12e9 * 32 * NOISE["gaussian"] / (0.65 * gpu.instructions_per_ns * 1e9)
    )
    assert ConMeZO(window=33).lane_noises == 33 and FZOO(directions=8).lane_noises == 8 and MeZO().lane_noises == 1


def test_a_timeline_is_of_the_ops_that_run(capsys, tmp_path):
    """No slot is fetched into while it is computed with or flushed, and a block is computed with once it is there."""
    model = tiny_opt(6, vocab=97, hidden=16)
    made = make_plan(model, None)
    layout = make_layout(made, lambda spec: FORMATS["bf16"])
    window = WindowSize(3, 2, frozenset())
    fetched = sum(layout.stream_bytes)
    link = Link("x", fetched / 1e9, 0.5)  # a second a pass
    step = step_seconds(work(fetched=fetched, flushed=fetched / 4, forward_flops=0.0), find_gpu("rtx-4090"), link)
    found = simulate(made, layout, window, work(fetched=fetched), step, link, offload="host")
    assert step.seconds == pytest.approx(1 + 0.5 / 4) and found.step_s == pytest.approx(step.seconds, rel=0.1)
    for stream in ("fetch", "flush", "compute"):
        spans = [s for s in found.spans if s.stream == stream]
        assert spans and all(a.start + a.seconds <= b.start + 1e-9 for a, b in itertools.pairwise(spans))
    busy = work(fetched=fetched, flushed=fetched / 4, forward_flops=1e15)
    slow = step_seconds(busy, find_gpu("rtx-4090"), link)
    bound = simulate(made, layout, window, busy, slow, link, offload="host")
    assert bound.step_s == pytest.approx(slow.seconds, rel=0.02)  # the copies hide behind the compute
    path = tmp_path / "step.json"
    lines = plan(
        capsys,
        "smollm2-360m",
        "--gpu",
        "rtx-4060",
        "--offload",
        "host",
        "--storage",
        "bf16",
        "--timeline",
        path,
        *SMALL,
    )
    assert one(lines, "timeline: ")
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"} and all(e.get("dur", 1) > 0 for e in events)


MODELS = {
    "deepseek-v3": (
        dict(
            model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], vocab_size=129280, hidden_size=7168,
            intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=2, first_k_dense_replace=1,
            num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, num_experts_per_tok=8, n_group=8,
            topk_group=4, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
            torch_dtype="bfloat16",
            quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        ),
        2 * (1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128)
        + 3 * 7168 * (18432 + 2048 + 256 * 2048), 1.0, 1 + 4 / 128, "fp8f",
        "q_a_proj+q_b_proj", 16 * 2 * (7168 + 1536 + 1536 + 128 * 192), 2 * 129280 * 7168,
    ),
    "gpt-oss-120b": (
        dict(
            model_type="gpt_oss", architectures=["GptOssForCausalLM"], vocab_size=201088, hidden_size=2880,
            intermediate_size=2880, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
            num_local_experts=128, num_experts_per_tok=4, sliding_window=128, torch_dtype="bfloat16",
            layer_types=["sliding_attention", "full_attention"],
            quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        ),
        2 * 128 * 3 * 2880 * 2880, 17 / 32, 1 + 1 / 128, "fp8_e4m3",
        "q_proj", 16 * 2 * (2880 + 64 * 64), 2 * 201088 * 2880 + 2 * 2 * 2880 * (64 + 8) * 64,
    ),
    "llama-70b-gptq": (
        dict(
            model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=8192,
            intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=8,
            torch_dtype="float16", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128},
        ),
        2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672), 0.5 + 2.5 / 128, 0.5 + 8 / 128, "int4f",
        "q_proj+v_proj", 16 * 2 * (8192 + 8192 + 8192 + 1024), 2 * 32000 * 8192,
    ),
}  # fmt: skip
"""Real models, of two layers: config, quantized weights, their bytes each in the files and kept, the format, what an
adapter of rank 16 is on, its parameters, and the other matrices' weights, counted by hand."""


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_on_a_quantized_model_is_planned_from_its_config_alone(name, capsys, tmp_path):
    config, quantized, in_files, kept, form, targets, trained, plain = MODELS[name]
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    adapter = f"r=16,target_modules={targets}"
    lines = plan(
        capsys, tmp_path / f"{name}.json", "--storage", "kept", "--adapter", adapter, "--offload", "disk", *SMALL
    )
    assert f"LORA adapter of {trained:,} parameters, new" in one(lines, "note: LORA")
    told = [
        re.search(r"([\d.]+) GB", one(lines, start))[1] for start in ("the files are", "stored as", "a step fetches")
    ]
    files, stored, fetched = map(float, told)
    assert form in one(lines, "stored as")
    assert files == pytest.approx((quantized * in_files + 2 * plain) / 1e9, rel=4e-3)
    assert stored == pytest.approx((quantized * kept + 2 * plain + 4 * trained) / 1e9, rel=4e-3)
    assert fetched == pytest.approx(stored - 4 * trained / 1e9, rel=4e-3)  # the adapter stays on the device
    assert one(lines, "a step fetches").endswith("flushes 0 B (updates folded every 1 step)")
