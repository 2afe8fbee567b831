"""What of the NCCL communicator needs no GPU: its terms and its network interface. The rest is in tests/gpu."""

from __future__ import annotations

import socket
import time

import msgspec
import pytest

from weightsync.errors import CodecError, ConfigError, LocalProtocolError
from weightsync.nccl_bridge import nccl
from weightsync.nccl_bridge.library import Nccl, settings_here
from weightsync.nccl_bridge.nccl import NcclCommunicator, Terms, check_settings, interface_of
from weightsync.nccl_bridge.rendezvous import Rendezvous

ALIKE = {"version": "2.28.9", "NCCL_CUMEM_ENABLE": "unset", "NCCL_NVLS_ENABLE": "0"}


def test_members_that_are_set_up_alike_go_together():
    check_settings(ALIKE, dict(ALIKE))


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"version": "2.27.3"}, "version is 2.28.9 here, 2.27.3 at rank 0"),
        ({"NCCL_CUMEM_ENABLE": "0"}, "NCCL_CUMEM_ENABLE is unset here, 0 at rank 0"),
        ({"NCCL_NVLS_ENABLE": "unset"}, "NCCL_NVLS_ENABLE is 0 here, unset at rank 0"),
        ({"NCCL_LATER": "1"}, "NCCL_LATER is unset here, 1 at rank 0"),
    ],
)
def test_what_differs_is_told_with_both_values(theirs, words):
    with pytest.raises(ConfigError, match=words):
        check_settings(ALIKE, ALIKE | theirs)


def test_settings_are_those_of_this_process(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    assert settings_here("2.28.9") == ALIKE


def test_the_interface_of_an_address():
    names = {name for _, name in socket.if_nameindex()}
    assert interface_of("127.0.0.1") in names
    assert interface_of("localhost") == interface_of("127.0.0.1")
    assert interface_of("192.0.2.1") is None, "an address of nobody"
    assert interface_of("no such host") is None


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(LocalProtocolError, match="rank 2 is not in a world of 2"):
        NcclCommunicator(generation=1, rank=2, world=2, address="127.0.0.1")


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"unique_id": b"short", "settings": {}})])
def test_terms_that_are_none(data):
    with pytest.raises(CodecError, match="tells no terms of NCCL"):
        nccl._decoded(data)


def test_terms_survive_the_store():
    rendezvous = Rendezvous.host("127.0.0.1", deadline=time.monotonic() + 10)
    terms = Terms(unique_id=bytes(range(128)), settings=ALIKE)
    rendezvous.store("key", 1).set("terms", msgspec.msgpack.encode(terms))
    assert nccl._decoded(rendezvous.store("key", 1).get("terms")) == terms


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(ConfigError, match="joined by NCCL, which cannot be loaded here"):
        Nccl()
