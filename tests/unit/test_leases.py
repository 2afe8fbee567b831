"""Leases that end with what a GPU does, on events made here."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from weightsync.device.leases import LeaseKeeper
from weightsync.errors import TransportBroken, TransportTimeout
from weightsync.testing import eventually
from weightsync.transports.base import Lease


class Event:
    """Comes when told to, or fails."""

    def __init__(self) -> None:
        self.come = threading.Event()
        self.error: RuntimeError | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.come.is_set()


@pytest.fixture
def keeper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return LeaseKeeper(torch.device("cuda", 0))


def lease() -> Lease:
    return Lease(sequence=1, nbytes=0, lent=0, on_release=lambda: None, checksum=7)


def _soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_a_lease_ends_when_its_event_has_come(keeper):
    first, second, events = lease(), lease(), [Event(), Event()]
    keeper.keep(first, events[0])
    keeper.keep(second, events[1])
    events[1].come.set()
    assert eventually(lambda: second.released)
    assert not first.released
    with pytest.raises(TransportTimeout, match="1 buckets"):
        keeper.settle(deadline=_soon(0.05))
    events[0].come.set()
    keeper.settle(deadline=_soon())
    assert first.released


def test_another_thread_starts_when_the_first_has_ended(keeper):
    for _ in range(50):
        one, event = lease(), Event()
        event.come.set()
        keeper.keep(one, event)
        keeper.settle(deadline=_soon())
        assert one.released


def test_what_was_read_back_wrong_is_told_once_and_the_lease_ends(keeper):
    one, event = lease(), Event()
    event.come.set()
    keeper.keep(one, event, lambda: one.confirm(8))
    with pytest.raises(TransportBroken, match="differs"):
        keeper.settle(deadline=_soon())
    assert one.released
    assert one.read_back == 8
    keeper.settle(deadline=_soon())


def test_what_else_goes_wrong_with_a_bucket_is_no_failure_of_the_gpu(keeper):
    one, event = lease(), Event()
    event.come.set()

    def then() -> None:
        raise ValueError("of another kind")

    keeper.keep(one, event, then)
    with pytest.raises(TransportBroken, match="reading a bucket: ValueError"):
        keeper.settle(deadline=_soon())
    assert one.released
    keeper.settle(deadline=_soon())


def test_a_gpu_that_failed_has_failed_for_good(keeper):
    one, event = lease(), Event()
    event.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    keeper.keep(one, event)
    for _ in range(2):
        with pytest.raises(TransportBroken, match="illegal memory access"):
            keeper.settle(deadline=_soon())
    with pytest.raises(TransportBroken, match="illegal memory access"):
        keeper.keep(lease(), Event())
    assert not one.released, "nobody knows what it read"


def test_a_sum_of_nothing_is_not_the_word_for_not_having_looked():
    one = Lease(sequence=1, nbytes=0, lent=0, on_release=lambda: None, checksum=0)
    one.confirm(0)
    assert one.read_back != 0
