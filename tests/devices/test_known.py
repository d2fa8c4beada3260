"""Masks of a batch on a device answer from the host's copy: never otherwise than the device would."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from zo_offload.devices import placing
from zo_offload.devices.known import Known, known


class Asked(torch.Tensor):
    """A device's tensor, whose values nobody may ask for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func.__name__ not in ("__bool__", "__int__", "item", "tolist"), "the device was asked"
        return super().__torch_function__(func, types, args, kwargs or {})


def masks():
    values = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    return values, known(values.clone().as_subclass(Asked), values)


QUESTIONS = {
    "all": lambda m: m.all(),
    "as transformers asks": lambda m: (b := m.to(device=torch.device("cpu"), dtype=torch.bool)).sum() == b.numel(),
    "a part": lambda m: m[:, :3].bool().all(),
    "the rest": lambda m: (~m.bool()[:, 4:]).all(),
    "padded": lambda m: F.pad(m, (0, 2)).any(),
    "packed": lambda m: (torch.diff(m, prepend=m[:, :1] - 1, dim=-1) != 1).cumsum(-1)[:, -1].eq(0).all(),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_answered_by_the_host(question):
    values, mask = masks()
    answer = QUESTIONS[question](mask)
    assert isinstance(answer, Known) and bool(answer) is bool(QUESTIONS[question](values))
    assert int(answer) == int(bool(answer)) and answer.item() is bool(answer)


def test_to_everything_else_it_is_the_devices_tensor():
    values, mask = masks()
    assert type(mask * torch.ones(5)) is type(mask[:, torch.arange(5)]) is Asked, "not all of it is the batch's"
    assert type(mask.float()) is Asked, "sums of floats depend on their order"
    assert torch.equal(torch.vmap(lambda i: mask[0, i])(torch.arange(5)).as_subclass(torch.Tensor), values[0])
    assert mask.data_ptr() != values.data_ptr() and mask.shape == values.shape
    features = torch.rand(2, 3)
    assert known(features, features) is features


def test_what_was_written_to_is_read_from_the_device():
    values = torch.ones(2, 4, dtype=torch.int64)
    there = values.clone()
    mask = known(there, values)
    whole, view = mask.all(), mask.view(-1)
    mask[0, 0] = 0
    assert not mask.all() and not view.all() and bool(whole), "what was computed before stays"
    other = known(there, there.clone())
    there.add_(1)
    assert other.sum().item() == 15, "written to under another name"


def test_only_masks_and_positions_of_a_batch_are_known():
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "decoder_attention_mask": torch.ones(2, 3, dtype=torch.bool), "position_ids": torch.zeros(1, 3).long(),
        "extra_attention_mask": torch.ones(2, 3),
    }  # fmt: skip

    class Device:
        torch_device = torch.device("meta")

        def upload(self, tensor):
            return tensor.clone()

    placed = placing.PlacedBatches(Device()).place(batch)
    found = {name for name, value in placed.items() if isinstance(value, Known)}
    assert found == {"attention_mask", "decoder_attention_mask", "position_ids"}
    assert all(torch.equal(value.clone(), batch[name]) for name, value in placed.items())
