"""Masks of a run: thresholds as they are in the base, the same wherever blocks live, and kept with the run."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.compare import assert_same
from support.training import batches, in_words, placed, resident, stored_weights, train
from support.zoo.small import tiny_llama, with_adapters
from zo_offload import QZO, ConfigError, Engine, JournalError, MeZO, RandomMask, SensZOQ, SparseMeZO
from zo_offload.checkpoint import weights
from zo_offload.cli import main
from zo_offload.journal import masks
from zo_offload.journal.format import read_journal
from zo_offload.kernels.records import Mask
from zo_offload.plan.plan import make_plan
from zo_offload.replay import replayed
from zo_offload.stream.ingest import ModuleBase

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METHOD = SparseMeZO(lr=1e-3, eps=1e-2, sparsity=0.6, weight_decay=0.1, batch_size=4)
CHOSEN = RandomMask(lr=1e-3, eps=1e-2, sparsity=0.6, batch_size=4)


@dataclass(frozen=True, kw_only=True)
class SoMany(MeZO):
    """So many elements of each parameter, by chance."""

    count: int = 40

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask:
        order = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(len(name)))
        return Mask.listed(order[: self.count].sort().values, shape.numel())


LISTED = SoMany(lr=1e-3, eps=1e-2, batch_size=4)


class Values(torch.nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(values, requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 1.0])
def test_a_threshold_is_the_smallest_magnitude_that_the_share_does_not_exceed(dtype, share, monkeypatch):
    """Against a sort, over chunk borders; with equal magnitudes, zeros and values of every size."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-20, 5).repeat(200)
    values[:300], values[300:700] = 0.0, 0.125
    values = values.to(dtype)
    monkeypatch.setattr(weights, "CHUNK", 512)
    limit = masks.smallest_limit(ModuleBase(Values(values)), "w", share)
    rank = max(1, math.ceil(share * 5000))
    want = float(values.float().abs().sort().values[rank - 1])
    assert Mask("magnitude", limit).threshold == want and (limit == 0) == (want == 0.0)
    assert limit == 0 or Mask.smallest(want) == Mask("magnitude", limit)


def llama():
    return tiny_llama(2)


WAYS = [
    dict(offload="none"), dict(offload="host", num_slots=2), dict(offload="disk", order="lane"),
    dict(offload="host", order="block", prefetch=0),
]  # fmt: skip


@pytest.mark.parametrize("method", [METHOD, CHOSEN, LISTED], ids=lambda method: method.name)
@pytest.mark.parametrize("storage", ["bf16", "bf16+16", "int8+8"])
def test_a_masked_run_is_the_same_in_every_tier_after_a_resume_and_in_a_replay(storage, method, tmp_path):
    fixed = dict(storage=storage, method=method, fold_every=2)
    never = resident(llama, 5, **fixed)
    for way in WAYS[1:]:
        assert_same(never, train(llama(), 5, **fixed, **placed(way, tmp_path / in_words(way))), in_words(way))
    run_dir = tmp_path / in_words(WAYS[2]) / "run"
    longer = resident(llama, 7, **fixed)
    own = {} if method.own() else {"method": type(method)}
    with Engine.resume(run_dir, llama(), **own) as engine:
        rest = engine.fit(batches(), steps=7).losses
        assert_same(longer, (longer[0][:5] + rest, stored_weights(engine)))
    with replayed(llama(), run_dir, **own) as engine:
        assert_same(longer[1], stored_weights(engine))


def test_in_float32_the_folds_do_not_matter_and_what_the_mask_leaves_out_keeps_its_bits():
    first = train(llama(), 5, method=METHOD, storage="fp32", fold_every=1)
    assert_same(first, train(llama(), 5, method=METHOD, storage="fp32", fold_every=3, offload="host", num_slots=2))
    base = dict(llama().named_parameters())
    for name, w in first[1].items():
        size = base[name].abs()
        limit = size.flatten().kthvalue(math.ceil(0.4 * size.numel())).values
        moved = w != base[name]
        assert limit == 0 or not moved[size > limit].any(), name
        assert moved.float().mean() > 0.3, name
    chosen = train(llama(), 3, method=CHOSEN, storage="fp32")[1]
    share = sum(int((w != base[n]).sum()) for n, w in chosen.items()) / sum(w.numel() for w in base.values())
    assert abs(share - 0.4) < 0.02


def test_thresholds_are_those_of_the_journal(tmp_path):
    train(llama(), 2, method=METHOD, offload="disk", run_dir=tmp_path / "run")
    header = read_journal((tmp_path / "run/journal.zoj").read_bytes()).header
    plan = make_plan(llama(), batches()[0])
    found = masks.masks_of(header, plan, "here")
    assert found == masks.decide_masks(plan, METHOD, ModuleBase(llama()), 0)
    assert set(found) == {name for name, spec in plan.params.items() if spec.trainable}
    assert masks.masks_of({}, plan, "a run without masks") == {}


@pytest.mark.parametrize("record", [
    [], {"a": 1}, {"a": ["magnitude", 1]}, {"a": ["other", 1, 0]}, {"a": ["random", 65537, 0]},
    {"model.norm.weight": ["magnitude", "x", 0]}, {"a": ["random", 5, 0]},
], ids=str)  # fmt: skip
def test_masks_of_a_header_that_are_none_are_refused(record):
    with pytest.raises(JournalError, match=r"here: the header.*masks"):
        masks.masks_of({"masks": record}, make_plan(llama(), batches()[0]), "here")


def test_an_adapter_that_begins_at_zero_is_refused_and_a_bias_is_not():
    model = with_adapters(llama())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("q_proj.b"))
            p.mul_(0.0 if p.requires_grad else 1.0)
    with pytest.raises(ConfigError, match="are all 0: there is no threshold between them, as in an adapter"):
        Engine(model, method=METHOD, trainable="requires_grad").fit(batches(), steps=1)
    plan = make_plan(llama(), batches()[0])
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    found = masks.decide_masks(plan, METHOD, ModuleBase(model), 0)
    assert "model.norm.weight" not in found and "lm_head.weight" in found


def write_masks(path, model, count=30):
    """A file for `model`: indices of some, a mask of another, and of most parameters none."""
    lists = {}
    for name, p in model.named_parameters():
        chance = torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        if name.endswith("q_proj.weight"):
            lists[name] = chance.flatten().topk(count).indices.sort().values.to(torch.int32)
        elif name.endswith("v_proj.weight"):
            lists[name] = chance < 0.1
    save_file(lists, path)
    return lists


def test_a_file_of_masks_is_the_run_s_and_may_go(tmp_path):
    lists = write_masks(tmp_path / "m.safetensors", llama())
    method = SensZOQ(lr=1e-2, eps=1e-2, mask_file=str(tmp_path / "m.safetensors"), batch_size=4)
    whole = train(llama(), 4, method=method, storage="fp32")
    base = dict(llama().named_parameters())
    for name, w in whole[1].items():
        moved = (w != base[name]).flatten().nonzero().flatten()
        kept = lists.get(name, torch.zeros(0))
        want = kept.flatten().nonzero().flatten() if kept.dtype == torch.bool else kept.long()
        assert set(moved.tolist()) <= set(want.tolist()) and len(moved) >= 0.9 * len(want), name
    run_dir = tmp_path / "run"
    train(llama(), 2, method=method, storage="fp32", run_dir=run_dir, offload="disk")
    header = read_journal((run_dir / "journal.zoj").read_bytes()).header
    plan = make_plan(llama(), batches()[0])
    found = masks.masks_of(header, plan, "here", method=method, run_dir=run_dir)
    assert found == masks.masks_of(header, plan, "here") == masks.decide_masks(plan, method, ModuleBase(llama()), 0)
    assert all(mask.kind == "listed" for mask in found.values()) and set(found) == set(plan.params)
    (tmp_path / "m.safetensors").unlink()
    with Engine.resume(run_dir, llama()) as engine:
        engine.fit(batches(), steps=4)
        assert_same(whole[1], stored_weights(engine))
    with replayed(llama(), run_dir) as engine:
        assert_same(whole[1], stored_weights(engine))
    (run_dir / masks.LISTS).unlink()
    gone = r"mask_file=.*m.safetensors: no safetensors file"
    with pytest.raises(ConfigError, match=gone), replayed(llama(), run_dir) as engine:
        stored_weights(engine)
    write_masks(tmp_path / "m.safetensors", llama(), count=31)
    with pytest.raises(JournalError, match=r"another list of '.*q_proj.weight'.*30 elements.*Restore masks"):
        Engine.resume(run_dir, llama()).fit(batches(), steps=5)
    write_masks(tmp_path / "m.safetensors", llama())  # the same again
    with replayed(llama(), run_dir) as engine:
        assert_same(whole[1], stored_weights(engine))


def test_the_example_finds_the_weights_with_the_largest_gradients():
    spec = importlib.util.spec_from_file_location("sensitive_weights", EXAMPLES / "sensitive_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = llama()
    found = module.sensitive(model, batches()[:1], 0.01)
    params = {name: p for name, p in model.named_parameters() if p.grad is not None}
    every = torch.cat([p.grad.flatten() ** 2 for p in params.values()])
    count = sum(map(len, found.values()))
    assert "model.embed_tokens.weight" not in found and abs(count - round(0.01 * len(every))) <= 1
    least = every.topk(count).values[-1]
    for name, at in found.items():
        assert (params[name].grad.flatten()[at] ** 2 >= least).all(), name
        assert Mask.listed(at, params[name].numel()).indices.equal(at)


@pytest.mark.parametrize("lists, message", [
    (None, "give mask_file"), ({"a": torch.tensor([1])}, "none of any parameter that trains"),
    ({"model.norm.weight": torch.tensor([3, 3])}, "'model.norm.weight': .*each larger than the one before"),
    ({"model.norm.weight": torch.tensor([10**6])}, "indices from 0 to"),
    ({"model.norm.weight": torch.ones(3, dtype=torch.bool)}, r"has shape \(3,\), the parameter"),
], ids=str)  # fmt: skip
def test_files_of_masks_that_are_none_are_refused(lists, message, tmp_path):
    if lists is not None:
        save_file(lists, tmp_path / "m.safetensors")
    method = SensZOQ(mask_file="" if lists is None else str(tmp_path / "m.safetensors"))
    with pytest.raises(ConfigError, match=message):
        masks.decide_masks(make_plan(llama(), batches()[0]), method, ModuleBase(llama()), 0)


@pytest.mark.parametrize("wrong", [
    lambda: SparseMeZO(sparsity=1.0), lambda: SparseMeZO(sparsity=-0.1), lambda: RandomMask(sparsity=1.0),
    lambda: RandomMask(mask_seed=-1), lambda: RandomMask(mask_seed=1 << 32),
])  # fmt: skip
def test_sparsities_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        wrong()


def test_a_mask_of_a_method_that_trains_scales_is_refused():
    class Both(QZO):
        mask = RandomMask.mask

    with pytest.raises(ConfigError, match="method 'Both' trains scales: a mask selects values"):
        Both()


def test_from_the_command_line_and_a_config(tmp_path: Path, capsys: Any) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    llama().save_pretrained(base)
    rows.write_text("".join(json.dumps({"input_ids": [5 + i, 6, 7]}) + "\n" for i in range(8)))
    run = ["--data", str(rows), "--steps", "2", "--batch-size", "2"]
    given = ["--method", "sparse-mezo", "--sparsity", "0.6", "--lr", "1e-3"]
    assert main(["fit", str(base), *run, "--run-dir", str(tmp_path / "a"), *given]) == 0
    config = tmp_path / "fit.yaml"
    config.write_text(f"data: {rows}\nsteps: 2\nbatch_size: 2\nmethod: sparse-mezo\nsparsity: 0.6\nlr: 1e-3\n")
    assert main(["fit", str(base), "--config", str(config), "--run-dir", str(tmp_path / "b")]) == 0
    first, second = (read_journal((tmp_path / n / "journal.zoj").read_bytes()) for n in "ab")
    assert first.steps == second.steps and first.header["method"]["sparsity"] == 0.6
    assert first.header["masks"] == second.header["masks"] != {}
    assert main(["replay", str(base), str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert main(["plan", str(base), "--method", "random-mask", "--sparsity", "0.9", "--tokens", "8"]) == 0
    assert "2 lanes" in capsys.readouterr().out
    for text in ("int4", "nf4"):  # the mask is of values, which these never rewrite
        assert main(["fit", str(base), *run, "--run-dir", str(tmp_path / text), *given, "--storage", text]) == 2
    assert "int4" in capsys.readouterr().err
