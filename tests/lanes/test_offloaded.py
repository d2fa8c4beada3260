"""Models whose weights accelerate's hooks hold: trained as the same models without hooks, and given back with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from support.compare import assert_same
from support.zoo.models import ZOO
from zo_offload import Engine, MeZO
from zo_offload.errors import CheckpointError, PlanError
from zo_offload.run import vacated

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}


def in_memory(model: nn.Module, path: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def in_files(model: nn.Module, path: Path) -> nn.Module:
    return accelerate.disk_offload(model, path / "offload", execution_device="cpu")


def in_part(model: nn.Module, path: Path) -> nn.Module:
    """Some layers in files, some in the module, one in a checkpoint's own file."""
    model.save_pretrained(path / "checkpoint")
    inner = "model.decoder" if model.config.model_type == "opt" else "model"
    places = {f"{inner}.{name}": "cpu" for name, _ in model.get_submodule(inner).named_children() if name != "layers"}
    layers = {f"{inner}.layers.{i}": "disk" if i else "cpu" for i in range(len(model.get_submodule(f"{inner}.layers")))}
    return type(model).from_pretrained(
        path / "checkpoint", device_map={**places, **layers, "lm_head": "cpu"}, offload_folder=path / "offload",
        dtype=torch.float32,
    ).eval()  # fmt: skip


def trained(model: nn.Module, **settings: Any) -> tuple[Any, ...]:
    """(losses, the base's digest, blocks, logits of the module afterwards)"""
    with Engine(model, method=MeZO(lr=1e-3), **settings) as engine:
        losses = [engine.step(BATCH).loss for _ in range(2)]
        found = (losses, engine.base.digest(), [block.name for block in engine.plan.blocks])
    with torch.no_grad():
        return *found, model(**BATCH).logits


@pytest.mark.parametrize("offload", [in_memory, in_files, in_part], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["llama", "opt"])  # opt's output layer is its embedding
def test_an_offloaded_model_trains_as_itself_and_gets_hooks_and_weights_back(
    tmp_path: Path, name: str, offload: Callable[[nn.Module, Path], nn.Module]
) -> None:
    want = trained(ZOO[name].build().eval(), offload="disk", run_dir=tmp_path / "plain")
    model = offload(ZOO[name].build().eval(), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = [(vars(module).copy(), dict(module.named_parameters(recurse=False))) for module in model.modules()]
    assert any("_hf_hook" in own for own, _ in before) and any(p.is_meta for p in model.parameters())
    got = trained(model, offload="disk", run_dir=tmp_path / "run")
    assert got[:3] == want[:3]
    assert_same(got[3], want[3])
    for module, (own, params) in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == own.keys()
        assert all(vars(module)[key] is value for key, value in own.items() if key != "_parameters")
        assert all(module.get_parameter(key).device == p.device for key, p in params.items())
    assert all(path.read_bytes() == content for path, content in files.items())  # they may be a checkpoint
    if offload is in_part:  # loaded on meta: without its hooks it has no weights
        return
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with torch.no_grad():
        assert_same(model(**BATCH).logits, want[3])


def test_ties_that_offloading_broke_are_tied_again_and_ended_apart(tmp_path: Path) -> None:
    model = in_files(ZOO["opt"].build().eval(), tmp_path)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is not table.weight
    with Engine(model, method=MeZO(lr=1e-3), offload="none") as engine:
        engine.step(BATCH)
        assert head.weight is table.weight
    own = {name: dict(module.named_parameters()) for name, module in [("head", head), ("table", table)]}
    assert own["head"]["weight"] is not own["table"]["weight"]
    assert_same(head._hf_hook.weights_map["weight"], table._hf_hook.weights_map["weight"])


def test_files_that_memory_cannot_hold_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = in_files(ZOO["llama"].build().eval(), tmp_path)
    with Engine(model, method=MeZO(lr=1e-3), offload="none") as engine:
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "out")
        monkeypatch.setattr(vacated, "available_bytes", lambda: 1000)
    assert "engine.save_pretrained(directory)" in caplog.text and "1.0 kB is free" in caplog.text
    with pytest.raises(PlanError, match="its weights were left in an engine that was closed"):
        model(**BATCH)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


@pytest.mark.parametrize("wrong", ["gone", "short", "other", "no index"])
def test_a_wrong_offload_folder_is_refused_by_name(tmp_path: Path, wrong: str) -> None:
    model, name = in_files(ZOO["llama"].build(), tmp_path), "model.layers.1.mlp.up_proj.weight"
    file, index = tmp_path / "offload" / f"{name}.dat", tmp_path / "offload" / "index.json"
    if wrong == "gone":
        file.unlink()
    elif wrong == "short":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        entries = json.loads(index.read_text())
        entries[name]["shape"] = entries[name]["shape"][::-1]
        if wrong == "no index":
            del entries[name]
        index.write_text(json.dumps(entries))
        model = in_files(ZOO["llama"].build(), tmp_path)  # the folder is there: it is taken as it is
    hooked = [module for module in model.modules() if hasattr(module, "_hf_hook")]
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*{name}|{name}.*{tmp_path}"):
        Engine(model, method=MeZO())
    assert all(hasattr(module, "_hf_hook") for module in hooked)


def test_a_hook_that_does_more_than_move_weights_is_refused_beside_offloaded_ones(tmp_path: Path) -> None:
    class Own(accelerate.hooks.ModelHook):
        pass

    model = in_memory(ZOO["llama"].build(), tmp_path)
    accelerate.hooks.add_hook_to_module(model.lm_head, Own(), append=True)
    with pytest.raises(PlanError, match="Linear has a hook of the class Own"):
        Engine(model, method=MeZO())


class Preloaded(nn.Module):
    """A module whose own hook holds the weights of its parts, of which two are tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.b.weight = self.a.weight
        self.order = nn.Parameter(torch.randperm(8), requires_grad=False)
        self.table = nn.Parameter(torch.rand(8, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.norm(nn.functional.linear(self.a(x), self.b.weight, self.b.bias))[:, self.order]
        return (mixed * self.table.float()).square().mean()


@pytest.mark.parametrize("buffers", [False, True])
def test_a_hook_that_holds_the_weights_of_its_parts(buffers: bool) -> None:
    def losses(model: nn.Module) -> list[float]:
        with Engine(model, method=MeZO(lr=1e-2), objective=lambda m, given: m(**given), offload="none") as engine:
            found = [engine.step({"x": torch.arange(32.0).reshape(4, 8).cos()}).loss for _ in range(2)]
        return [*found, float(model.eval()(torch.arange(32.0).reshape(4, 8).sin()))]

    model = accelerate.cpu_offload(
        Preloaded(), execution_device="cpu", offload_buffers=buffers, preload_module_classes=["Preloaded"]
    )
    assert losses(model) == losses(Preloaded())


def test_a_module_of_ones_own_whose_ties_offloading_lost_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = in_files(nn.ModuleDict(dict(a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))), tmp_path)
    Engine(model, objective=lambda m, x: m["a"](x).mean(), example={"x": torch.ones(1, 8)}, method=MeZO())
    assert "tied" not in caplog.text
    tied = Preloaded()
    Engine(in_files(tied, tmp_path / "tied"), objective=lambda m, given: m(**given), method=MeZO())
    assert "offloaded a.weight and b.weight to are equal" in caplog.text
