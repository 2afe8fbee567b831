"""Exports that a process with torch, and nothing of ours, opens."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from weightsync.errors import CodecError, LocalProtocolError, TransportTimeout
from weightsync.ipc.arena import Arena
from weightsync.ipc.ledger import Ledger
from weightsync.ipc.segments import DIRECTORY, remove_stale
from weightsync.transports.torch_shm import HEADER_BYTES, TorchShmSender, TorchShmTicket

NODE = f"torchshm{os.getpid()}"

IMPORTER = """
import sys, torch
from torch.multiprocessing.reductions import rebuild_storage_filename
handle, nbytes = sys.argv[1].encode(), int(sys.argv[2])
storage = rebuild_storage_filename(torch.storage.TypedStorage, b"", handle, nbytes, torch.uint8)
bucket = torch._utils._rebuild_tensor_v2(storage, 0, (nbytes,), (1,), False, None)
print(bytes(bucket.tolist()).hex(), flush=True)
sys.stdin.readline()
del storage, bucket
print("freed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def arena():
    with Arena.create(node=NODE, bridge=0, slots=2, slot_bytes=4096) as made:
        yield made
        made.unlink()
    assert not [name for name in os.listdir(DIRECTORY) if NODE in name]


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def sender(arena, ledger):
    made = TorchShmSender(arena, ledger=ledger)
    yield made
    made.close()


class Importer:
    """A process that opens one ticket with torch's own functions."""

    def __init__(self, ticket: bytes) -> None:
        wanted = TorchShmTicket.unpack(ticket)
        self.process = subprocess.Popen(
            [sys.executable, "-c", IMPORTER, wanted.handle.decode(), str(wanted.nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture
def importer():
    made: list[Importer] = []

    def make(ticket: bytes) -> Importer:
        made.append(Importer(ticket))
        return made[-1]

    yield make
    for each in made:
        each.kill()


def _fill(arena: Arena, slot: int, data: bytes) -> None:
    arena.slot(slot)[: len(data)] = data


def test_each_rank_opens_its_own_copy_and_the_count_comes_back(arena, ledger, sender, importer):
    _fill(arena, 0, bytes(range(200)))
    for reader in ("e/0", "e/1"):
        sender.offer(reader)
    tickets = sender.export(0, 200, 1, ["e/0", "e/1"])
    handles = {TorchShmTicket.unpack(ticket).handle for ticket in tickets.values()}
    assert len(handles) == 2
    assert sender.pending(0) == ("e/0", "e/1")
    first = importer(tickets["e/0"])
    assert first.says() == bytes(range(200)).hex()
    assert sender.pending(0) == ("e/0", "e/1"), "mapped, and not released"
    first.go_on()
    assert first.says() == "freed"
    assert sender.pending(0) == ("e/1",)
    second = importer(tickets["e/1"])
    assert second.says() == bytes(range(200)).hex()
    second.go_on()
    assert second.says() == "freed"
    sender.wait_released(0, deadline=time.monotonic() + 5)
    assert ledger.outstanding == 0
    assert not [name for name in os.listdir(DIRECTORY) if NODE in name and name != arena.name]


def test_the_slot_may_change_while_a_reader_still_holds_its_copy(arena, sender, importer):
    _fill(arena, 0, b"old" * 10)
    sender.offer("e/0")
    reading = importer(sender.export(0, 30, 1, ["e/0"])["e/0"])
    _fill(arena, 0, b"new" * 10)
    assert bytes.fromhex(reading.says()) == b"old" * 10


def test_a_reader_that_died_is_revoked(arena, ledger, sender, importer):
    sender.offer("e/0")
    reading = importer(sender.export(0, 30, 1, ["e/0"])["e/0"])
    reading.says()
    reading.kill()
    with pytest.raises(TransportTimeout, match="e/0"):
        sender.wait_released(0, deadline=time.monotonic() + 0.05)
    sender.revoke(0, "e/0")
    assert sender.pending(0) == ()
    assert ledger.outstanding == 0


def test_what_a_killed_bridge_exported_is_removed_with_its_arena(arena, sender):
    sender.offer("e/0")
    sender.export(0, 30, 1, ["e/0"])
    assert len([name for name in os.listdir(DIRECTORY) if NODE in name]) == 2
    assert len(remove_stale(DIRECTORY, NODE)) == 2


def test_a_slot_still_read_is_not_exported_anew(arena, sender):
    sender.offer("e/0")
    sender.export(0, 30, 1, ["e/0"])
    with pytest.raises(LocalProtocolError, match="still held by e/0"):
        sender.export(0, 30, 2, ["e/0"])


def test_a_node_that_keeps_its_arenas_elsewhere_has_nothing_for_stock_engines(tmp_path):
    with Arena.create(node=NODE, bridge=0, slots=1, slot_bytes=4096, directory=str(tmp_path)) as elsewhere:
        with pytest.raises(LocalProtocolError, match="shm_dir"):
            TorchShmSender(elsewhere).offer("e/0")
        elsewhere.unlink()


def test_a_full_directory_is_an_error_and_leaves_nothing(arena, sender, monkeypatch):
    sender.offer("e/0")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    from weightsync.errors import TransportError

    with pytest.raises(TransportError, match="No space left"):
        sender.export(0, 30, 1, ["e/0"])
    assert [name for name in os.listdir(DIRECTORY) if NODE in name] == [arena.name]


def test_foreign_bytes_are_no_ticket():
    with pytest.raises(CodecError):
        TorchShmTicket.unpack(b"\x80\x04N.")
    assert HEADER_BYTES == 64
