"""What is shm's own; what it shares with other transports is in tests/conformance."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportError, TransportTimeout
from weightsync.ipc.arena import Arena
from weightsync.ipc.descriptors import checksum, seal, unseal
from weightsync.ipc.ledger import Account, Ledger
from weightsync.transports import receiver
from weightsync.transports.exports import Checksum, Checksums
from weightsync.transports.mapped import MappedTicket
from weightsync.transports.shm import ShmReceiver, ShmSender


def _soon() -> float:
    return time.monotonic() + 20


@pytest.fixture
def arena(tmp_path):
    with Arena.create(node="n", bridge=0, slots=2, slot_bytes=1000, readers=3, directory=str(tmp_path)) as made:
        yield made


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def sender(arena, ledger):
    made = ShmSender(arena, ledger=ledger)
    yield made
    made.close()


@pytest.fixture
def reader():
    made = receiver("shm")
    assert isinstance(made, ShmReceiver)
    yield made
    made.close()


def test_the_ledger_follows_what_readers_do(sender, reader, ledger):
    for name in ("a/0", "b/0", "c/0"):
        reader.accept(sender.offer(name), deadline=_soon())
    tickets = sender.export(0, 10, 1, ["a/0", "b/0", "c/0"])
    assert ledger.outstanding == 3
    reader.receive(tickets["a/0"], deadline=_soon()).release()
    lease = reader.receive(tickets["b/0"], deadline=_soon())
    sender.revoke(0, "c/0")
    sender.settle()
    assert ledger.accounts() == (
        Account(reader="a/0", exports=1, opens=1, closes=1),
        Account(reader="b/0", exports=1, opens=1),
        Account(reader="c/0", exports=1, revoked=1),
    )
    lease.release()
    assert sender.pending(0) == ()
    assert ledger.outstanding == 0


def test_another_process_reads_and_releases(sender, arena):
    code = (
        "import sys, time; from weightsync.transports import receiver\n"
        "offer, ticket = map(bytes.fromhex, sys.argv[1:]); r = receiver('shm')\n"
        "r.accept(offer, deadline=time.monotonic() + 5)\n"
        "with r.receive(ticket, deadline=time.monotonic() + 5) as lease: sys.stdout.buffer.write(lease.view)\n"
        "r.close()"
    )
    offer = sender.offer("a/0")
    arena.slot(1)[:] = b"q" * 1000
    ticket = sender.export(1, 1000, 1, ["a/0"])["a/0"]
    read = subprocess.run(
        [sys.executable, "-c", code, offer.hex(), ticket.hex()],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert read.stdout == b"q" * 1000
    sender.wait_released(1, deadline=time.monotonic())


def test_cells_go_round_when_readers_come_and_go(sender, reader):
    """Of the three cells a fourth reader gets that of the reader offered to longest ago that holds nothing."""
    for name in ("a/0", "b/0", "c/0"):
        reader.accept(sender.offer(name), deadline=_soon())
    held = sender.export(0, 10, 1, ["a/0"])
    reader.accept(sender.offer("d/0"), deadline=_soon())  # takes the cell of b/0, since a/0 is busy
    with pytest.raises(LocalProtocolError, match="b/0"):
        sender.export(1, 10, 1, ["b/0"])
    tickets = sender.export(1, 10, 1, ["c/0", "d/0"])
    with pytest.raises(TransportError, match="3 readers"):
        sender.offer("e/0")
    for name, ticket in (held | tickets).items():
        with reader.receive(ticket, deadline=_soon()):
            assert name in sender.pending(0) + sender.pending(1)
    assert sender.pending(0) == sender.pending(1) == ()
    sender.offer("e/0")


def test_a_reader_in_use_keeps_its_cell_however_many_come_and_go(sender, reader):
    """Engines of many names come and go; one that has been there from the start is exported to all the time."""
    reader.accept(sender.offer("old/0"), deadline=_soon())
    for i in range(10):
        reader.accept(sender.offer(f"new{i}/0"), deadline=_soon())
        tickets = sender.export(0, 10, i + 1, ["old/0", f"new{i}/0"])
        for ticket in tickets.values():
            with reader.receive(ticket, deadline=_soon()):
                pass
        assert sender.pending(0) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": 2},
        {"nbytes": 1001},
        {"reader": "b/0"},
        {"cell": 1},
        {"cell": 2**40},
        {"nonce": bytes(16)},
        {"sequence": 6},
        {"sequence": 4},
        {"checksum": 1},
        {"nbytes": 9},
    ],
)
def test_tickets_that_lie(sender, reader, changes):
    reader.accept(sender.offer("a/0"), deadline=_soon())
    good = unseal(sender.export(0, 10, 5, ["a/0"])["a/0"], b"T", MappedTicket)
    with pytest.raises(TransportBroken):
        reader.receive(seal(b"T", msgspec.structs.replace(good, **changes)), deadline=_soon())


def test_the_error_names_both_checksums(sender, reader, arena):
    reader.accept(sender.offer("a/0"), deadline=_soon())
    ticket = sender.export(0, 10, 5, ["a/0"])["a/0"]
    arena.slot(0)[3] = 1
    with pytest.raises(TransportBroken, match=r"sequence 5 differs .* is [0-9a-f]{16}, not [0-9a-f]{16}"):
        reader.receive(ticket, deadline=_soon())


def test_a_reader_that_copies_confirms_its_copy(sender, reader, arena, ledger):
    arena.slot(0)[:4] = b"abcd"
    for name in ("a/0", "b/0", "c/0"):
        reader.accept(sender.offer(name), deadline=_soon())
    tickets = sender.export(0, 4, 1, ["a/0", "b/0", "c/0"])
    with reader.receive(tickets["a/0"], deadline=_soon(), verify=False) as lease:
        lease.confirm(checksum(memoryview(bytes(lease.view))))
    with (
        pytest.raises(TransportBroken, match="sequence 1 differs"),
        reader.receive(tickets["b/0"], deadline=_soon(), verify=False) as lease,
    ):
        lease.confirm(checksum(memoryview(b"abce")))
    reader.receive(tickets["c/0"], deadline=_soon()).release()
    assert sender.pending(0) == ()
    assert sender.damaged(0) == ("b/0",)
    assert [(a.reader, a.closes, a.confirmed) for a in ledger.accounts()] == [
        ("a/0", 1, 1),
        ("b/0", 1, 0),
        ("c/0", 1, 0),
    ]
    sender.export(0, 4, 2, ["a/0"])
    assert sender.damaged(0) == (), "that was an earlier export"


def test_an_offer_to_a_trainer_is_none_to_a_reader(arena, reader):
    with pytest.raises(TransportBroken, match="trainer"):
        reader.accept(arena.offer(), deadline=_soon())


def test_a_newer_arena_replaces_the_old_one(tmp_path, arena, sender, reader):
    reader.accept(sender.offer("a/0"), deadline=_soon())
    arena.slot(0)[:3] = b"old"
    tickets = sender.export(0, 3, 1, ["a/0"])
    late = sender.export(1, 3, 1, ["a/0"])
    lease = reader.receive(tickets["a/0"], deadline=_soon())
    with Arena.create(node="n", bridge=0, slots=1, slot_bytes=10, directory=str(tmp_path)) as newer:
        successor = ShmSender(newer)
        reader.accept(successor.offer("a/0"), deadline=_soon())
        with pytest.raises(TransportBroken, match="replaced"):
            reader.receive(late["a/0"], deadline=_soon())
        assert bytes(lease.view) == b"old", "a lease of the old arena must stay readable"
        lease.release()
        assert sender.pending(0) == ()
        newer.slot(0)[:3] = b"new"
        with reader.receive(successor.export(0, 3, 1, ["a/0"])["a/0"], deadline=_soon()) as fresh:
            assert bytes(fresh.view) == b"new"


def test_other_bridges_stay_mapped(tmp_path, sender, reader):
    reader.accept(sender.offer("a/0"), deadline=_soon())
    with Arena.create(node="n", bridge=1, slots=1, slot_bytes=10, directory=str(tmp_path)) as other:
        reader.accept(ShmSender(other).offer("a/0"), deadline=_soon())
        reader.receive(sender.export(0, 3, 1, ["a/0"])["a/0"], deadline=_soon()).release()


def test_the_view_dies_with_the_lease_unless_something_was_made_of_it(sender, reader):
    reader.accept(sender.offer("a/0"), deadline=_soon())
    lease = reader.receive(sender.export(0, 10, 1, ["a/0"])["a/0"], deadline=_soon())
    view = lease.view
    assert view.readonly
    lease.release()
    with pytest.raises(ValueError, match="released"):
        view.tolist()
    lease = reader.receive(sender.export(0, 10, 2, ["a/0"])["a/0"], deadline=_soon())
    array = np.frombuffer(lease.view, np.uint8)
    lease.release()
    assert array.sum() == 0
    assert sender.pending(0) == ()


def test_a_checksum_is_computed_once(arena, monkeypatch):
    checksums = Checksums(arena)
    first = checksums.of(0, 1, 10)
    monkeypatch.setattr("weightsync.transports.exports.checksum", None)
    assert checksums.of(0, 1, 10) == first
    told = Checksum("xxh3-64", 42)
    checksums.know(0, 2, 10, told)
    assert checksums.of(0, 2, 10) == told


def test_the_deadline_holds_during_a_checksum(sender, reader, monkeypatch):
    reader.accept(sender.offer("a/0"), deadline=_soon())
    ticket = sender.export(0, 10, 1, ["a/0"])["a/0"]

    def slow(view: memoryview, between) -> int:
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline + 1:
            between()
        return 0

    monkeypatch.setattr("weightsync.transports.shm.checksum", slow)
    with pytest.raises(TransportTimeout):
        reader.receive(ticket, deadline=time.monotonic() + 0.05)
    assert sender.pending(0) == (), "who timed out reads no more"


def test_abort_holds_during_a_checksum(sender, arena, monkeypatch):
    sender.offer("a/0")

    def slow(view: memoryview, between) -> int:
        sender.abort()
        between()
        return 0

    monkeypatch.setattr("weightsync.transports.exports.checksum", slow)
    with pytest.raises(TransportClosed):
        sender.export(0, 10, 1, ["a/0"])


def test_an_unknown_transport():
    with pytest.raises(Exception, match="one of: shm, cuda-ipc, gloo"):
        receiver("carrier-pigeon")
