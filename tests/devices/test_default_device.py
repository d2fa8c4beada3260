"""torch.set_default_device in the user's script: what the library keeps on the host stays there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import zo_offload
from support import training
from support.compare import assert_same
from support.training import METHOD
from support.zoo.small import tiny_opt
from zo_offload import Engine

PACKAGE = Path(zo_offload.__file__).parent
MAKERS = {function.__name__ for function in _device_constructors()}


def run(directory, offload, default=None):
    settings = dict(offload=offload, storage="int8+8", fold_every=2)
    model = tiny_opt(2, vocab=97, hidden=16)
    model.save_pretrained(directory / "base")
    rows = [{"input_ids": torch.arange(4 + i % 3, 13), "labels": torch.arange(4 + i % 3, 13)} for i in range(8)]
    eval_data = training.batches(2, length=9, vocab=97)
    torch.set_default_device(default)
    try:
        with Engine(directory / "base", method=METHOD, run_dir=directory / "run", **settings) as engine:
            losses = engine.fit(rows, steps=2, batch_size=2, eval_data=eval_data).losses
        with Engine.resume(directory / "run") as engine:
            losses += engine.fit(rows, steps=4, batch_size=2).losses
            engine.save_pretrained(directory / "out")
            return losses, engine.evaluate(eval_data, batch_size=4), dict(engine.weights())
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_a_default_device_of_the_users_changes_nothing(tmp_path, offload):
    """meta stands in for cuda: whatever were made there by mistake has no values, and shows."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert_same(run(tmp_path / "a", offload), run(tmp_path / "b", offload, "meta"))


def test_whatever_makes_a_tensor_says_where():
    """A tensor made without device= is wherever the user's default is: on the GPU, and copied back with a wait."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            maker = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in MAKERS
            if maker and not {"device", "pin_memory", None} & {keyword.arg for keyword in node.keywords}:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: torch.{node.func.attr} without device=")
    assert "empty" in MAKERS and not found, "\n".join(found)
