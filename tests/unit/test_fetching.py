"""Buckets by way of a GPU into host memory, with a GPU that is made here: the order of things, and what goes wrong."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from weightsync.device import reading
from weightsync.device.fetching import FetchedBuckets
from weightsync.errors import EngineError, TransportBroken, TransportTimeout
from weightsync.transports.base import Lease


def _soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Gpu:
    """What is asked of it, in order; its memory is the host's."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done = True
        self.found = 7  # the checksum of what it reads

    def query(self) -> bool:
        return self.done

    def copy(self, bucket: int, address: int, out: torch.Tensor, stream: Any) -> int:
        self.log.append(f"copy {bucket}")
        out.fill_(address)
        return self.found

    def lease(self, nbytes: int, address: int = 5) -> Lease:
        return Lease(
            sequence=1, nbytes=nbytes, lent=address, on_release=lambda: self.log.append("released"), checksum=7
        )

    def room(self, nbytes: int) -> torch.Tensor:
        self.log.append(f"room {nbytes}")
        return torch.empty(nbytes, dtype=torch.uint8)


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(reading, "BoxKernel", lambda device: None)
    monkeypatch.setattr(reading, "CheckedBuckets", lambda kernel, manifest: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made)
    return made


def expecting(fetched: FetchedBuckets, *nbytes: int) -> None:
    manifest: Any = SimpleNamespace(bucket_nbytes=np.array(nbytes), bucket_owner=np.zeros(len(nbytes), dtype=int))
    fetched.expect(manifest, deadline=_soon())


@pytest.fixture
def fetched(gpu) -> FetchedBuckets:
    return FetchedBuckets(torch.device("cpu"), gpu.room)


def test_a_slot_is_free_before_its_bucket_goes_to_the_host(gpu, fetched):
    expecting(fetched, 100, 300)
    lease = gpu.lease(300)
    found = fetched.copy(1, lease, deadline=_soon())
    assert gpu.log == ["copy 1", "released", "room 300"]
    assert lease.read_back == 7
    assert found.tolist() == [5] * 300
    again = fetched.copy(0, gpu.lease(100, 6), deadline=_soon())
    assert (again.tolist(), found.tolist()) == ([6] * 100, [5] * 300)


def test_a_bucket_that_came_otherwise_is_not_kept(gpu, fetched):
    expecting(fetched, 100)
    gpu.found = 8
    with pytest.raises(TransportBroken), gpu.lease(100) as lease:
        fetched.copy(0, lease, deadline=_soon())
    assert lease.read_back == 8
    assert gpu.log == ["copy 0", "released"]


def test_the_gpu_gives_the_room_of_one_bucket_for_good(gpu, fetched):
    expecting(fetched, 100, 300)
    first = fetched._stage.data_ptr()
    expecting(fetched, 200)
    assert fetched._stage.data_ptr() == first
    expecting(fetched, 400)
    assert fetched._stage.numel() == 400


def test_a_gpu_without_room_is_told_of(gpu, fetched, monkeypatch):
    def full(nbytes, **more):
        if nbytes:
            raise torch.cuda.OutOfMemoryError
        return torch.zeros(0, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 1000))
    with pytest.raises(EngineError, match=r"a bucket of 100 bytes .* that has 10 of 1000 bytes free"):
        expecting(fetched, 100)


def test_a_copy_that_does_not_end_is_waited_for_before_the_next_push(gpu, fetched):
    expecting(fetched, 100)
    gpu.done = False
    with pytest.raises(TransportTimeout, match="bucket 0 on its way to host memory"):
        fetched.copy(0, gpu.lease(100), deadline=_soon(0.02))
    with pytest.raises(TransportTimeout, match="what was fetched"):
        fetched.settle(deadline=_soon(0.02))
    gpu.done = True
    fetched.settle(deadline=_soon())
