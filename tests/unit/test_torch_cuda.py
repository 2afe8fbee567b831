"""Exports of slots on a GPU for stock engines: the books, without a GPU. What torch makes of them is in tests/gpu."""

from __future__ import annotations

import os
import secrets
import struct
from pathlib import Path

import pytest

from weightsync.errors import LocalProtocolError, TransportError
from weightsync.ipc.arena import Arena, DeviceMemory
from weightsync.ipc.ledger import Ledger
from weightsync.ipc.segments import discard, discard_exports
from weightsync.transports import torch_cuda
from weightsync.transports.exports import Checksum, Checksums
from weightsync.transports.torch_cuda import Counters, TorchCudaSender, TorchCudaTicket
from weightsync.transports.torch_shm import HEADER_BYTES

HANDLE = bytes(range(64))


class Told(Checksums):
    """What the trainer's ranks would have told."""

    def compute(self, slot, nbytes, between):
        return Checksum("tensors-64", 7)


@pytest.fixture
def arena():
    memory = DeviceMemory(gpu="aa", handle=HANDLE)
    name = f"cuda{secrets.token_hex(3)}"
    with Arena.create(node=name, bridge=0, slots=3, slot_bytes=100_000, memory=memory) as made:
        yield made


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def sender(arena, ledger):
    made = TorchCudaSender(arena, ledger=ledger, checksums=Told(arena))
    for rank in range(2):
        assert made.offer(f"e/{rank}") == b""
    yield made
    made.close()


def files(arena: Arena) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"{arena.name}-x*"))


def let_go(ticket: TorchCudaTicket) -> None:
    """As torch's importer does: one less in its cell."""
    path = Path("/dev/shm") / ticket.counter_handle.decode()[1:]
    with path.open("r+b") as file:
        at = HEADER_BYTES + 8 * ticket.counter
        (count,) = struct.unpack("<q", os.pread(file.fileno(), 8, at))
        os.pwrite(file.fileno(), struct.pack("<q", count - 1), at)


def test_every_reader_has_a_counter_of_its_own_for_the_slot_itself(sender, arena, ledger):
    tickets = {name: TorchCudaTicket.unpack(t) for name, t in sender.export(2, 5000, 1, ["e/0", "e/1"]).items()}
    first, second = tickets["e/0"], tickets["e/1"]
    assert first.counter != second.counter
    assert first.storage_handle == second.storage_handle == b"\x01c" + HANDLE
    assert first.storage_offset == 2 * arena.stride
    assert (first.nbytes, first.checksum) == (5000, 7)
    let_go(second)
    assert sender.pending(2) == ("e/0",)
    let_go(first)
    assert sender.pending(2) == ()
    assert ledger.outstanding == 0
    assert files(arena) == [f"{arena.name}-x0"]
    sender.close()
    assert files(arena) == []


def test_a_reader_that_is_lost_keeps_its_counter_to_itself(sender, ledger):
    first = TorchCudaTicket.unpack(sender.export(0, 5000, 1, ["e/0"])["e/0"])
    sender.revoke(0, "e/0")
    assert ledger.outstanding == 0
    second = TorchCudaTicket.unpack(sender.export(0, 5000, 2, ["e/0"])["e/0"])
    assert second.counter != first.counter
    let_go(first)  # much later
    assert sender.pending(0) == ("e/0",)


def test_counters_that_lost_readers_have_used_up_are_followed_by_others(sender, arena, monkeypatch):
    monkeypatch.setattr(torch_cuda, "_CELLS", 2)
    handles = set()
    for sequence in range(1, 6):
        ticket = TorchCudaTicket.unpack(sender.export(0, 5000, sequence, ["e/0"])["e/0"])
        handles.add(ticket.counter_handle)
        sender.revoke(0, "e/0")
    assert len(handles) == 3
    discard(arena.directory, arena.name)
    discard_exports(arena.name)
    assert files(arena) == [], "a killed bridge's are removed with its arena"


def test_counters_of_an_older_file_serve_again(sender, arena, monkeypatch):
    monkeypatch.setattr(torch_cuda, "_CELLS", 2)
    tickets = [TorchCudaTicket.unpack(sender.export(slot, 5000, slot + 1, ["e/0"])["e/0"]) for slot in range(3)]
    assert tickets[0].counter_handle != tickets[2].counter_handle
    for ticket in tickets[:2]:
        let_go(ticket)
    assert sender.pending(0) == sender.pending(1) == ()
    again = [TorchCudaTicket.unpack(sender.export(slot, 5000, 10 + slot, ["e/0"])["e/0"]) for slot in range(2)]
    assert again[0].counter_handle == tickets[2].counter_handle
    assert again[1].counter_handle == tickets[0].counter_handle
    assert len(files(arena)) == 2


def test_no_room_for_counters_leaves_nothing_and_ends(monkeypatch):
    def full(fd: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    name = f"weightsync-{secrets.token_hex(4)}"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TransportError, match="No space left"):
            Counters(name)
    Counters(name).close()


def test_slots_in_host_memory_have_no_handles(tmp_path):
    with (
        Arena.create(node="n", bridge=0, slots=1, slot_bytes=10, directory=str(tmp_path)) as arena,
        pytest.raises(LocalProtocolError, match="lie in host memory") as refused,
    ):
        TorchCudaSender(arena).offer("e/0")
    assert 'arena.device = "cuda"' in str(refused.value)
