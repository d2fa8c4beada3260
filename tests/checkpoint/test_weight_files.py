"""Weights in other files than model.safetensors: pickled ones through torch's weights-only loader, and other names."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import Engine, MeZO
from zo_offload.checkpoint.checkpoint import Checkpoint
from zo_offload.checkpoint.files import find_weights
from zo_offload.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture
def base(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def tensors_of(base):
    return load_file(base / "model.safetensors")


def pickled(base, tensors=None, **options):
    """The checkpoint with its weights in pytorch_model.bin."""
    found = tensors_of(base) if tensors is None else tensors
    (base / "model.safetensors").unlink()
    torch.save(found, base / "pytorch_model.bin", **options)
    return base


def loaded(base):
    checkpoint = Checkpoint.open(base)
    checkpoint.build_model(torch.float32)
    return {name: checkpoint.load(name) for name in checkpoint.names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["archive", "before-1.6", "strided"])
def test_a_pickled_checkpoint_is_the_same_as_safetensors(base, dtype, way):
    tensors = {name: t.to(dtype) for name, t in tensors_of(base).items()}
    if way == "strided":  # transposed, and several in one storage
        tensors = {n: t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t])[1] for n, t in tensors.items()}
    pickled(base, tensors, _use_new_zipfile_serialization=way != "before-1.6")
    assert_same(loaded(base), {name: tensors[name].contiguous() for name in loaded(base)}, way)


def test_it_trains_from_the_disk_and_is_exported(base, tmp_path):
    settings = dict(method=MeZO(lr=1e-3), offload="disk", storage="bf16")
    with Engine(base, run_dir=tmp_path / "one", **settings) as engine:
        want = [engine.step(BATCH).loss for _ in range(3)]
    pickled(base)
    with Engine(base, run_dir=tmp_path / "two", **settings) as engine:
        assert [engine.step(BATCH).loss for _ in range(3)] == want
        engine.save_pretrained(tmp_path / "out")
    assert "pytorch_model.bin" not in os.listdir(tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_shards_go_by_their_index(base):
    tensors = tensors_of(base)
    want = loaded(base)
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, base / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = base / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(loaded(base), want)
    index.unlink()
    assert_same(loaded(base), want, "all parts of one set need no index")
    (base / names_of(base)[0]).unlink()
    with pytest.raises(CheckpointError, match="not the 2 parts .*part 1 is missing"):
        Checkpoint.open(base)


def names_of(base):
    return sorted(path.name for path in base.glob("pytorch_model-*"))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/zo_was_here",)


@pytest.mark.parametrize("way", ["code", "nested", "number", "cut", "flipped", "compressed", "text", "list"])
def test_what_is_not_tensors_by_name_is_refused(base, tmp_path, way):
    file = pickled(base) / "pytorch_model.bin"
    tensors = torch.load(file)
    if way == "code":
        torch.save({**tensors, "x": Evil()}, file)
    elif way == "nested":
        torch.save({"state_dict": tensors}, file)
    elif way == "number":
        torch.save({**tensors, "step": 3}, file)
    elif way == "list":
        torch.save(list(tensors.values()), file)
    elif way == "cut":
        file.write_bytes(file.read_bytes()[:-3000])
    elif way == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif way == "flipped":  # the place of a storage: one smaller than its tensor
        torch.save({**tensors, "model.norm.weight": tensors["model.norm.weight"]}, file)
        raw = bytearray(file.read_bytes())
        raw[-200:-190] = bytes(10)
        file.write_bytes(raw)
    else:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry.filename))
        (tmp_path / "new").rename(file)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        loaded(base)
    assert not Path("/tmp/zo_was_here").exists()


def test_a_pickle_of_a_plain_object_runs_nothing(base):
    file = pickled(base) / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="weights-only loader refuses it"):
        Checkpoint.open(base)
    assert not Path("/tmp/zo_was_here").exists()


def test_reading_a_large_one_takes_no_more_memory_than_what_is_asked_for(tmp_path):
    torch.save({"w": torch.zeros(64 << 20)}, tmp_path / "pytorch_model.bin")  # 256 MB
    code = """
import resource, sys, torch
from pathlib import Path
from zo_offload.checkpoint.pickled_io import PickledFile
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
file, out = PickledFile(Path(sys.argv[1])), torch.empty(1 << 20)
for at in range(0, 64 << 20, 1 << 20):
    file.read_into("w", at, out)
print((peak() - before) >> 10)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "pytorch_model.bin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert int(done.stdout) < 100, f"{done.stdout} MB"


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "consolidated.safetensors", "weights.safetensors", "pytorch_model.fp16.bin"]
)
def test_one_file_of_another_name_is_taken(base, name):
    want, tensors = loaded(base), tensors_of(base)
    (base / "model.safetensors").unlink()
    (torch.save if name.endswith(".bin") else save_file)(tensors, base / name)
    save_file({"x": torch.zeros(2)}, base / "adapter_model.safetensors")
    torch.save({}, base / "training_args.bin")
    assert_same(loaded(base), want, name)


def test_a_variants_index_and_parts_without_one_are_taken(base):
    want, tensors = loaded(base), tensors_of(base)
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model.bf16-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::2]}, base / file)
    assert_same(loaded(base), want, "no index")
    weight_map = {name: files[i] for i in range(2) for name in names[i::2]}
    (base / "model.safetensors.index.bf16.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(loaded(base), want, "its index")
    assert [path.name for path in find_weights(base)] == files


def test_several_files_that_could_be_meant_are_named(base):
    tensors = tensors_of(base)
    (base / "model.safetensors").rename(base / "a.safetensors")
    save_file(tensors, base / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"several files may be its weights \(a.safetensors, b.safetensors\)"):
        Checkpoint.open(base)


def test_safetensors_are_read_before_a_pickled_file(base):
    (base / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert loaded(base)
