"""Which copies a recording comes to, and which parameters it leaves to the loader, of loads a few lines long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weightsync.replay.recorder import Recorder


def recorded(targets, load, **offered):
    """The plan of `load`, which is given what is offered."""
    recorder = Recorder(targets)
    given = {name: tensor.clone() for name, tensor in offered.items()}
    for name, tensor in given.items():
        recorder.offer(name, tensor)
    with recorder, torch.no_grad():
        load(**given)
    del given, tensor  # a loader keeps nothing
    return recorder.plan({})


def replayed(plan, targets, **offered):
    """What the targets are after the plan's fills and copies alone."""
    for fill in plan.fills:
        view(targets[fill.target], fill.box).fill_(fill.value)
    for copy in plan.copies:
        view(targets[copy.target], copy.target_box).copy_(view(offered[copy.source], copy.source_box))
    return targets


def view(tensor, box):
    size = tensor.element_size()
    first = tensor.storage_offset() + box.offset // size
    return torch.as_strided(tensor, box.sizes, [stride // size for stride in box.strides], first)


def numbers(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


# --- parameters that share a storage ----------------------------------------------------------------------------


def test_parameters_side_by_side_in_one_storage_are_each_replayed():
    flat = torch.zeros(10)
    targets = {"a.w": flat[:6], "b.w": flat[6:]}
    w, v = numbers(6), numbers(4) * 10

    def load(w, v):
        targets["a.w"].copy_(w)
        targets["b.w"].copy_(v)

    plan = recorded(targets, load, w=w, v=v)
    assert (plan.targets, plan.by_loader) == (("a.w", "b.w"), {})
    flat.zero_()
    replayed(plan, targets, w=w, v=v)
    assert flat.tolist() == [1, 2, 3, 4, 5, 6, 10, 20, 30, 40]


@pytest.mark.parametrize("part", [slice(0, 6), slice(0, 4), slice(2, 6), slice(2, 4)])
def test_a_parameter_within_another_is_loaded_with_that(part):
    """Tied parameters, for one: equal memory under two names."""
    first = torch.zeros(6)
    targets = {"a.w": first, "b.w": first[part]}
    plan = recorded(targets, lambda w: first.copy_(w), w=numbers(6))
    assert (plan.targets, plan.by_loader, plan.untouched) == (("a.w",), {}, ())


@pytest.mark.parametrize(("first", "other"), [(slice(0, 6), slice(4, 9)), (slice(3, 9), slice(0, 5))])
def test_a_parameter_that_overlaps_another_in_part_leaves_it_to_the_loader(first, other):
    flat = torch.zeros(9)
    targets = {"a.w": flat[first], "b.w": flat[other]}
    plan = recorded(targets, lambda w: targets["a.w"].copy_(w), w=numbers(6))
    assert plan.by_loader == {"a.w": "it shares a part of its memory with b.w"}


# --- copies -----------------------------------------------------------------------------------------------------


def test_a_value_that_is_spread_over_a_parameter_is_replayed():
    targets = {"a.w": torch.zeros(3, 4)}
    w = numbers(4)
    plan = recorded(targets, lambda w: targets["a.w"].copy_(w), w=w)
    assert plan.by_loader == {}
    targets["a.w"].zero_()
    assert replayed(plan, targets, w=w)["a.w"].tolist() == [[1, 2, 3, 4]] * 3


def test_a_part_of_memory_that_was_put_together_is_not_taken_for_all_of_what_lies_there():
    """The middle of two tensors that lie side by side is copied: of neither does all of it arrive."""
    targets = {"a.w": torch.zeros(4)}

    def load(w, v):
        apart = torch.empty(8)
        apart[:4].copy_(w)
        apart[4:].copy_(v)
        targets["a.w"].copy_(apart[2:6])

    plan = recorded(targets, load, w=numbers(4), v=numbers(4) * 10)
    assert (plan.targets, plan.copies) == ((), ())
    assert "a.w" in plan.by_loader


def test_memory_put_together_of_several_types_is_not_followed():
    targets = {"a.w": torch.zeros(8)}

    def load(w, v):
        apart = torch.empty(8)
        apart[:4].copy_(w)
        apart[4:].view(torch.int32).copy_(v)
        targets["a.w"].copy_(apart)

    plan = recorded(targets, load, w=numbers(4), v=numbers(4, dtype=torch.int32))
    assert "a.w" in plan.by_loader


# --- fills ------------------------------------------------------------------------------------------------------


def test_a_fill_that_was_computed_over_is_none_any_more():
    """Padding of a buffer on the way, doubled before it is copied on."""
    targets = {"a.w": torch.zeros(6)}

    def load(w):
        apart = torch.empty(6)
        apart[4:].fill_(7)
        apart[:4].copy_(w)
        apart[4:].mul_(2)
        targets["a.w"].copy_(apart)

    plan = recorded(targets, load, w=numbers(4))
    assert (plan.fills, plan.targets) == ((), ())
    assert "a.w" in plan.by_loader


def test_what_is_computed_elsewhere_in_a_buffer_leaves_its_fill():
    targets = {"a.w": torch.zeros(6)}

    def load(w):
        apart = torch.empty(10)
        apart[4:6].fill_(7)
        apart[:4].copy_(w)
        apart[6:].fill_(1)
        apart[6:].mul_(2)
        targets["a.w"].copy_(apart[:6])

    w = numbers(4)
    plan = recorded(targets, load, w=w)
    assert plan.by_loader == {}
    targets["a.w"].zero_()
    assert replayed(plan, targets, w=w)["a.w"].tolist() == [1, 2, 3, 4, 7, 7]


# --- memory -----------------------------------------------------------------------------------------------------


def test_memory_that_is_gone_is_forgotten():
    """A load of a model with 20,000 tensors makes as many on the way."""
    target = torch.zeros(4)
    recorder: Any = Recorder({"a.w": target})
    w = numbers(4)
    recorder.offer("w", w)
    with recorder:
        for _ in range(3000):
            target.copy_(w.clone())
    assert len(recorder._lineage._memories) <= 3 * 256
