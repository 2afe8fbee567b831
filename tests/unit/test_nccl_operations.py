"""How the NCCL communicator ends its operations, on a GPU and a library that do as they are told."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.nccl_bridge import nccl
from weightsync.nccl_bridge.nccl import NcclCommunicator
from weightsync.transports.nccl import Piece


class Machine:
    """NCCL and CUDA: `status` is what a stream says of itself, 600 being "not ready"."""

    def __init__(self):
        self.status = 0
        self.aborted = self.freed = 0
        self.problem = ""
        runtime = SimpleNamespace(
            malloc=lambda nbytes: 4096,
            free=self._free,
            memcpyAsync=lambda *_: None,
            memcpyDefault=4,
            streamQuery=lambda stream: self.status,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda device: nullcontext(),
            Stream=lambda non_blocking: SimpleNamespace(ptr=1),
            alloc_pinned_memory=bytearray,
        )

    def _free(self, address):
        self.freed += 1

    def begin(self, world, unique_id, rank):
        return object()

    def ready(self, communicator):
        if self.problem:
            raise TransportBroken(self.problem)
        return True

    def abort(self, communicator):
        self.aborted += 1

    def group_start(self): ...

    def group_end(self): ...

    def broadcast(self, *_): ...


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(nccl, "cupy", lambda: made)
    monkeypatch.setattr(nccl, "nccl", lambda: made)
    monkeypatch.setattr(nccl, "prepare", lambda address: None)
    monkeypatch.setattr(nccl, "agree", lambda *_: bytes(128))
    monkeypatch.setattr(nccl, "_IDLE", 0.05)
    return made


@pytest.fixture
def member(machine):
    made = NcclCommunicator(generation=3, rank=0, world=2, address="127.0.0.1")
    made.join(SimpleNamespace(sockets=frozenset(), store=lambda key, generation: None), "key", deadline=soon())
    return made


def soon(seconds=20.0):
    return time.monotonic() + seconds


PIECES = [Piece(0, 4096, 8)]


def test_one_that_ends_well_may_be_followed_by_another(machine, member):
    for token in (1, 2):
        member.broadcast(PIECES, token, deadline=soon())
    member.close(deadline=soon())
    assert (machine.aborted, machine.freed) == (1, 1)
    with pytest.raises(TransportClosed):
        member.broadcast(PIECES, 3, deadline=soon())


@pytest.mark.parametrize("why", ["deadline", "peer", "abort", "GPU"])
def test_one_that_fails_leaves_nothing_on_the_gpu(machine, member, why):
    machine.status = 600
    error, words = {
        "deadline": (TransportTimeout, "its deadline passed"),
        "peer": (TransportBroken, "remote process exited"),
        "abort": (TransportClosed, "aborted"),
        "GPU": (TransportBroken, "CUDA error 700"),
    }[why]
    abort = machine.abort

    def abort_and_end(communicator):
        abort(communicator)
        machine.status = 0

    machine.abort = abort_and_end
    if why == "peer":
        machine.problem = words
    if why == "GPU":
        machine.status = 700
    if why == "abort":
        threading.Timer(0.1, member.abort).start()
    with pytest.raises(error, match=words):
        member.broadcast(PIECES, 1, deadline=soon(0.2 if why == "deadline" else 20))
    assert (machine.aborted, machine.freed) == (1, 1)
    with pytest.raises((TransportBroken, TransportClosed)):
        member.broadcast(PIECES, 2, deadline=soon())
    member.close(deadline=soon())
    assert machine.aborted == 1, "it is aborted once"


def test_kernels_that_do_not_end_are_told_again_and_again(machine, member):
    """Whoever leaves has to hear of it: what they write into may be given to somebody else."""
    machine.status = 600
    with pytest.raises(TransportTimeout, match="its kernels did not end"):
        member.broadcast(PIECES, 1, deadline=soon(0.1))
    for _ in range(2):
        with pytest.raises(TransportTimeout, match="its kernels did not end"):
            member.close(deadline=soon())
    assert (machine.aborted, machine.freed) == (1, 0)
    machine.status = 0
    member.close(deadline=soon())
    assert machine.freed == 1


def test_what_is_asked_wrongly_breaks_nothing(machine, member):
    with pytest.raises(LocalProtocolError, match="there is no rank 2, only 2"):
        member.broadcast([Piece(2, 0, 1)], 1, deadline=soon())
    member.broadcast(PIECES, 1, deadline=soon())
