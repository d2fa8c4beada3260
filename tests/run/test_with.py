"""`with Engine(module)`: the module has its weights at the end; and the names that a user of the package sees."""

from __future__ import annotations

import pytest
import torch

import zo_offload
from support.compare import assert_same
from support.training import METHOD, batches
from support.zoo.small import tiny_opt
from zo_offload import ConfigError, Engine, StorageError


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_at_the_end_of_with_a_module_has_its_trained_weights(tmp_path, offload):
    model = tiny_opt()
    more = dict(run_dir=tmp_path / "run") if offload == "disk" else {}
    with Engine(model, method=METHOD, offload=offload, **more) as engine:
        engine.fit(batches(2), steps=2, batch_size=4)
        want = {name: value.clone() for name, value in engine.weights()}
    assert_same(([], want), ([], dict(model.named_parameters())))
    assert any(not torch.equal(value, before) for value, before in zip(want.values(), tiny_opt().parameters()))  # noqa: B905


def test_a_module_has_them_also_where_the_body_of_with_raised():
    model = tiny_opt()
    with pytest.raises(RuntimeError, match="mine"), Engine(model, method=METHOD) as engine:
        engine.step(batches(1)[0])
        want = {name: value.clone() for name, value in engine.weights()}
        raise RuntimeError("mine")
    assert_same(([], want), ([], dict(model.named_parameters())))


def test_weights_that_cannot_be_had_do_not_hide_the_error(monkeypatch, caplog):
    def fails(self):
        raise StorageError("the disk is gone")

    with pytest.raises(RuntimeError, match="mine"), Engine(tiny_opt(), method=METHOD) as engine:
        engine.step(batches(1)[0])
        monkeypatch.setattr(type(engine), "restore", fails)
        raise RuntimeError("mine")
    assert "the disk is gone" in caplog.text
    with pytest.raises(ConfigError, match="closed"):
        engine.step(batches(1)[0])


def test_dir_shows_what_a_user_writes_and_every_other_name_is_there():
    assert len(dir(zo_offload)) == 12 and "Engine" in dir(zo_offload)
    for name in {*dir(zo_offload), *zo_offload.__all__}:
        assert getattr(zo_offload, name) is not None
