"""A bridge whose daemon is gone leaves stock engines a moment to take what they were told of."""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path

import pytest

from weightsync.ipc.arena import Arena
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge.service import BridgeService
from weightsync.transports.torch_shm import TorchShmTicket


@pytest.fixture
def service():
    with Arena.create(node="linger", bridge=0, slots=1, slot_bytes=1000) as arena:
        made = BridgeService("linger/0", "x", arena)
        yield made
        made.close()


def exported(service, transport):
    service.handle(c.Offer(reader="e/0", transport=transport))
    reply = service.handle(c.Export(slot=0, nbytes=100, sequence=1, readers=("e/0",)))
    return reply.tickets["e/0"]


def seconds(service, most):
    start = time.monotonic()
    service.linger(most)
    return time.monotonic() - start


def test_nobody_is_waited_for_without_such_an_export(service):
    assert seconds(service, 5) < 1
    exported(service, "mapped")  # its reader has the arena mapped, whoever removes the file
    assert seconds(service, 5) < 1


def test_a_stock_engine_has_until_it_lets_go(service):
    file = Path("/dev/shm" + TorchShmTicket.unpack(exported(service, "torch-shm")).handle.decode())

    def let_go():
        with file.open("r+b") as opened:
            opened.write(struct.pack("<i", 1))

    timer = threading.Timer(0.3, let_go)
    start = time.monotonic()
    timer.start()
    service.linger(20)
    assert 0.25 < time.monotonic() - start < 10
    timer.join()
    service.close()
    assert not file.exists()


def test_one_that_never_comes_is_not_waited_for_for_long(service):
    file = Path("/dev/shm" + TorchShmTicket.unpack(exported(service, "torch-shm")).handle.decode())
    assert 0.2 <= seconds(service, 0.2) < 5
    assert file.exists()
    service.close()
    assert not file.exists()
