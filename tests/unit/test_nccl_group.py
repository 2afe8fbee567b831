"""Groups over NCCL up to where a GPU is needed: what an engine's ranks find at the rendezvous, and what rank 0 does."""

from __future__ import annotations

import ctypes
import pickle
import sys
import threading
import time
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
import torch.distributed

from tests.unit.test_nccl_operations import Machine
from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.nccl_bridge import nccl, nccl_group
from weightsync.nccl_bridge.meetings import TorchMeeting, VllmMeeting
from weightsync.nccl_bridge.nccl_group import NcclGroup
from weightsync.nccl_bridge.rendezvous import Rendezvous

dist: Any = torch.distributed
UNIQUE_ID = bytes(range(128))


@pytest.fixture
def rendezvous():
    return Rendezvous.host("127.0.0.1", deadline=time.monotonic() + 20)


def client(rendezvous):
    return dist.TCPStore("127.0.0.1", rendezvous.port, is_master=False, timeout=timedelta(seconds=20))


def test_ranks_of_vllm_find_the_unique_id_as_an_object_of_theirs(rendezvous, monkeypatch):
    """`StatelessProcessGroup.broadcast_obj` unpickles what it finds."""
    module = ModuleType("vllm.distributed.device_communicators.pynccl_wrapper")

    class ncclUniqueId(ctypes.Structure):
        _fields_ = (("internal", ctypes.c_byte * 128),)

    module.ncclUniqueId = ncclUniqueId  # type: ignore[attr-defined]
    parts = module.__name__.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    VllmMeeting(rendezvous).tell(UNIQUE_ID)
    found = pickle.loads(client(rendezvous).get("broadcast_from/0/0"))
    assert isinstance(found, ncclUniqueId)
    assert bytes(found) == UNIQUE_ID


def test_ranks_of_torch_find_the_unique_id_where_their_process_group_looks(rendezvous):
    """`_new_process_group_helper` puts the device of the backend below what the caller has put there."""
    TorchMeeting(rendezvous, "g", device="cuda").tell(UNIQUE_ID)
    store = dist.PrefixStore("g", client(rendezvous))  # as init_custom_process_group of SGLang
    store = dist.PrefixStore("cuda/", dist.PrefixStore("g/", store))  # as torch
    assert store.get("0") == UNIQUE_ID


class Library(Machine):
    """That remembers what it was asked."""

    version = "2.28.9"

    def __init__(self):
        super().__init__()
        self.done: list[Any] = []

    def unique_id(self):
        return UNIQUE_ID

    def begin(self, world, unique_id, rank):
        self.done.append(("begin", world, unique_id, rank))
        return super().begin(world, unique_id, rank)

    def sum_float(self, communicator, address, stream):
        self.done.append("greet")

    def broadcast(self, communicator, address, nbytes, root, stream):
        self.done.append((address, nbytes, root))


@pytest.fixture
def library(monkeypatch):
    made = Library()
    for module in (nccl, nccl_group):
        monkeypatch.setattr(module, "cupy", lambda: made)
        monkeypatch.setattr(module, "nccl", lambda: made)
        monkeypatch.setattr(module, "prepare", lambda address: None)
    monkeypatch.setattr(nccl, "_IDLE", 0.05)
    return made


def soon(seconds=20.0):
    return time.monotonic() + seconds


BEGUN = ("begin", 3, UNIQUE_ID, 0)


@pytest.mark.parametrize("greets", [False, True])
def test_rank_0_is_there_when_the_others_are(library, greets):
    """Ranks of vLLM come when they are told, and add up a number; those of torch with their first broadcast."""
    group = NcclGroup(world=3, address="127.0.0.1", greets=greets)
    with pytest.raises(LocalProtocolError, match="nobody was told"):
        group.send([(64, 8)], deadline=soon())
    told: list[bytes] = []
    group.meet(told.append, deadline=soon())
    assert told == [UNIQUE_ID]
    assert library.done == ([BEGUN, "greet"] if greets else [])
    group.send([(64, 8), (512, 4)], deadline=soon())
    group.send([(64, 8)], deadline=soon())
    sent = [(64, 8, 0), (512, 4, 0), (64, 8, 0)]
    assert library.done == [BEGUN, *(["greet"] if greets else []), *sent]
    group.close(deadline=soon())
    assert library.aborted == 1
    assert library.freed == (1 if greets else 0)


@pytest.mark.parametrize("greets", [False, True])
@pytest.mark.parametrize("why", ["deadline", "NCCL"])
def test_ranks_that_do_not_come_are_told_of_with_what_may_be_wrong(library, greets, why, monkeypatch):
    group = NcclGroup(world=3, address="127.0.0.1", greets=greets)
    library.problem = "ncclInvalidUsage" if why == "NCCL" else ""
    monkeypatch.setattr(Library, "ready", lambda self, _: False if why == "deadline" else Machine.ready(self, _))
    error = TransportTimeout if why == "deadline" else TransportBroken

    def begin() -> None:
        group.meet(lambda unique_id: None, deadline=soon(0.05))
        group.send([(64, 8)], deadline=soon(0.05))

    with pytest.raises(error) as caught:
        begin()
    assert "NCCL 2.28.9" in str(caught.value)
    assert "NCCL_CUMEM_ENABLE" in (caught.value.hint or "")
    assert library.aborted == 1
    assert group.unusable


def test_leaving_ends_what_is_being_sent(library):
    group = NcclGroup(world=3, address="127.0.0.1", greets=False)
    group.meet(lambda unique_id: None, deadline=soon())
    library.status = 600  # the others take nothing
    abort = library.abort

    def abort_and_end(communicator):
        abort(communicator)
        library.status = 0

    library.abort = abort_and_end
    threading.Timer(0.05, group.abort).start()
    with pytest.raises(TransportClosed, match="aborted"):
        group.send([(64, 8)], deadline=soon())
