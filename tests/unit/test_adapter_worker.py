"""The part of our plugins that is the same in every engine's worker."""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np
import pytest
import torch

from tests.bucket_kit import Buckets
from weightsync.adapters.worker import SlotReader
from weightsync.errors import CodecError, LocalProtocolError, TransportBroken

TENSORS = {
    "embed.weight": torch.randn(40, 8),
    "norm.weight": torch.randn(7).to(torch.bfloat16),
    "scale": torch.tensor(3.5),
    "big": torch.randint(-100, 100, (50, 6, 4), dtype=torch.int8),
}


def _soon() -> float:
    return time.monotonic() + 20


@pytest.fixture
def slots():
    with closing(SlotReader("cpu")) as made:
        yield made


@pytest.fixture
def world(tmp_path):
    made: list[Buckets] = []

    def make(slot_bytes: int) -> Buckets:
        made.append(Buckets(tmp_path, slot_bytes, TENSORS))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("slot_bytes", [100_000, 1500, 400])
def test_every_tensor_comes_whole_once_and_stays_when_the_slot_goes_on(world, slots, slot_bytes):
    here = world(slot_bytes)
    slots.begin(here.manifest, [here.offer], deadline=_soon())
    assert set(slots.manifest.tensors.names) == set(TENSORS)
    found: list[tuple[str, torch.Tensor]] = []
    for bucket in range(here.manifest.buckets):
        found += slots.read(bucket, here.ticket(bucket), deadline=_soon()).tensors()
        assert here.sender.pending(0) == (), "released before it is loaded"
        here.arena.slot(0)[:] = bytes(slot_bytes)
    slots.finish()
    assert sorted(name for name, _ in found) == sorted(TENSORS)
    for name, tensor in found:
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name]), name
    assert here.sender.damaged(0) == ()


@pytest.mark.parametrize("slot_bytes", [100_000, 400])
def test_a_bucket_is_taken_out_of_its_slot(world, slots, slot_bytes):
    here = world(slot_bytes)
    slots.begin(here.manifest, [here.offer], deadline=_soon())
    found: dict[str, torch.Tensor] = {}

    def take(bucket, share):
        assert share == 1
        assert here.sender.pending(0), "it is held meanwhile"
        found.update((name, tensor.clone()) for name, tensor in bucket.tensors())

    for bucket in range(here.manifest.buckets):
        assert slots.lends(bucket)
        slots.pull(bucket, here.ticket(bucket), take, deadline=_soon())
        assert here.sender.pending(0) == ()
        here.arena.slot(0)[:] = bytes(slot_bytes)
    slots.finish()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_bucket_that_cannot_be_taken_is_given_back(world, slots):
    here = world(100_000)
    slots.begin(here.manifest, [here.offer], deadline=_soon())

    def fails(bucket, share):
        raise ZeroDivisionError(bucket.index)

    with pytest.raises(ZeroDivisionError):
        slots.pull(0, here.ticket(0), fails, deadline=_soon())
    assert here.sender.pending(0) == ()
    assert here.sender.damaged(0) == ()
    with pytest.raises(LocalProtocolError, match="read before"):
        slots.pull(0, b"", fails, deadline=_soon())


def test_what_did_not_come_is_named(world, slots):
    here = world(1500)
    slots.begin(here.manifest, [here.offer], deadline=_soon())
    slots.read(0, here.ticket(0), deadline=_soon())
    with pytest.raises(LocalProtocolError, match="did not come whole"):
        slots.finish()
    with pytest.raises(LocalProtocolError, match="begin first"):
        slots.finish()


def test_a_bucket_is_read_once(world, slots):
    here = world(1500)
    slots.begin(here.manifest, [here.offer], deadline=_soon())
    slots.read(0, here.ticket(0), deadline=_soon())
    with pytest.raises(LocalProtocolError, match="read before"):
        slots.read(0, here.ticket(0), deadline=_soon())
    with pytest.raises(LocalProtocolError, match="buckets 0 to"):
        slots.read(99, b"", deadline=_soon())


def test_bytes_that_changed_under_way_are_found_and_told(world, slots):
    here = world(100_000)
    slots.begin(here.manifest, [here.offer], deadline=_soon())
    ticket = here.ticket(0)
    np.frombuffer(here.arena.slot(0), dtype=np.uint8)[3] ^= 1
    with pytest.raises(TransportBroken, match="differs from what was exported"):
        slots.read(0, ticket, deadline=_soon())
    assert here.sender.pending(0) == ()
    assert here.sender.damaged(0) == ("e/0",)


def test_foreign_bytes_begin_nothing(world, slots):
    here = world(100_000)
    with pytest.raises(CodecError):
        slots.begin(here.manifest, [b"nonsense"], deadline=_soon())
    with pytest.raises(LocalProtocolError, match="begin first"):
        slots.read(0, b"", deadline=_soon())
