"""What of the NCCL communicator needs no GPU: its terms and its network interface. The rest is in tests/gpu."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from weightsync.errors import CodecError, ConfigError, LocalProtocolError, TransportBroken, WeightSyncError
from weightsync.nccl_bridge import terms
from weightsync.nccl_bridge.library import Nccl, settings_here
from weightsync.nccl_bridge.nccl import NcclCommunicator
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.nccl_bridge.terms import Terms, check_settings, interface_of

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


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"unique_id": b"short"})])
def test_terms_that_are_none(data):
    with pytest.raises(CodecError, match="tells no terms of NCCL"):
        terms._decoded(data, Terms)


# --- agreeing -----------------------------------------------------------------------------------------------------


class Library:
    """NCCL as far as agreeing goes."""

    def __init__(self, version="2.28.9", problem=""):
        self.version, self.problem, self.made = version, problem, 0

    def unique_id(self):
        self.made += 1
        if self.problem:
            raise TransportBroken(self.problem)
        return bytes(range(128))


class GivenUp(Exception):
    pass


@pytest.fixture
def store():
    return Rendezvous.host("127.0.0.1", deadline=time.monotonic() + 10).store("key", 1)


def agreed(monkeypatch, store, libraries):
    """What becomes of each member. Who still waits when one has failed by itself is told to give up."""
    own, over = threading.local(), threading.Event()
    monkeypatch.setattr(terms, "nccl", lambda: own.library)

    def pause():
        if over.wait(0.001):
            raise GivenUp("enough")

    def member(rank):
        own.library = libraries[rank]
        try:
            return terms.agree(store, rank, len(libraries), pause)
        except GivenUp as error:
            return error
        except WeightSyncError as error:
            if isinstance(error, ConfigError):
                over.set()
            return error

    with ThreadPoolExecutor(len(libraries)) as pool:
        return list(pool.map(member, range(len(libraries))))


def test_all_members_get_one_id(monkeypatch, store):
    libraries = [Library() for _ in range(3)]
    assert agreed(monkeypatch, store, libraries) == [bytes(range(128))] * 3
    assert [library.made for library in libraries] == [1, 0, 0]


def test_one_that_differs_fails_by_itself_and_no_id_is_made(monkeypatch, store):
    libraries = [Library(), Library("2.27.3"), Library()]
    root, other, third = agreed(monkeypatch, store, libraries)
    assert isinstance(other, ConfigError)
    assert "version is 2.27.3 here, 2.28.9 at rank 0" in other.message
    assert isinstance(root, GivenUp)
    assert isinstance(third, GivenUp | TransportBroken)
    assert [library.made for library in libraries] == [0, 0, 0]


def test_the_others_hear_of_it_when_rank_0_gives_up(monkeypatch, store):
    libraries = [Library(problem="no socket interface found"), Library()]
    root, other = agreed(monkeypatch, store, libraries)
    assert "no socket interface found" in str(root)
    assert isinstance(other, TransportBroken)
    assert "rank 0 has given up: no socket interface found" in other.message


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(ConfigError, match="joined by NCCL, which cannot be loaded here"):
        Nccl()
