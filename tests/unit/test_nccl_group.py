"""Groups over NCCL up to where a GPU is needed: what an engine's ranks find at the rendezvous, with their own code."""

from __future__ import annotations

import ctypes
import pickle
import sys
import time
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
import torch.distributed

from weightsync.nccl_bridge.meetings import TorchMeeting, VllmMeeting
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
