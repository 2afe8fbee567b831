"""Every transport against the one suite that all must pass."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import msgspec
import pytest

from weightsync.errors import CodecError, TransportBroken
from weightsync.ipc.arena import Arena
from weightsync.ipc.descriptors import checksum, seal, unseal
from weightsync.nccl_bridge.gloo import GlooCommunicator
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.testing import check_transport, transport_checks
from weightsync.transports.base import Lease
from weightsync.transports.gloo import GlooReceiver, GlooSender
from weightsync.transports.mapped import MappedTicket
from weightsync.transports.shm import ShmReceiver, ShmSender

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from weightsync.transports.base import BucketReceiver, BucketSender


class Pair:
    """A sender and its receivers in this process."""

    def __init__(self, sender: BucketSender, arena: Arena, receivers: list[BucketReceiver], readers: list[str]) -> None:
        self.sender = sender
        self.receivers = receivers
        self.readers = readers
        self._arena = arena

    def fill(self, slot: int, data: bytes) -> None:
        self._arena.slot(slot)[: len(data)] = data

    def read(self, lease: Lease) -> bytes:
        return bytes(lease.view)


def _close(*ends: BucketSender | BucketReceiver) -> None:
    for end in ends:
        end.close()


class Shm:
    def __init__(
        self, directory: Path, sender: type[ShmSender] = ShmSender, receiver: type[ShmReceiver] = ShmReceiver
    ) -> None:
        self.directory = str(directory)
        self.sender = sender
        self.receiver = receiver

    @contextmanager
    def __call__(self, readers: int, slots: int, slot_bytes: int) -> Iterator[Pair]:
        with Arena.create(node="test", bridge=0, slots=slots, slot_bytes=slot_bytes, directory=self.directory) as arena:
            sender = self.sender(arena)
            receivers = [self.receiver() for _ in range(readers)]
            try:
                yield Pair(sender, arena, [*receivers], [f"engine/{rank}" for rank in range(readers)])
            finally:
                _close(sender, *receivers)


class Gloo:
    """Rank 0 sends; each rank has an arena and a communicator, joined in threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    @contextmanager
    def __call__(self, readers: int, slots: int, slot_bytes: int) -> Iterator[Pair]:
        world, deadline = readers + 1, time.monotonic() + 30
        with ExitStack() as stack:
            arenas = [
                stack.enter_context(
                    Arena.create(node="test", bridge=rank, slots=slots, slot_bytes=slot_bytes, directory=self.directory)
                )
                for rank in range(world)
            ]
            hosted = Rendezvous.host("127.0.0.1", deadline=deadline)
            members = [
                GlooCommunicator(generation=1, rank=rank, world=world, address="127.0.0.1") for rank in range(world)
            ]

            def join(rank: int) -> None:
                meeting = hosted if rank == 0 else Rendezvous.connect("127.0.0.1", hosted.port, deadline=deadline)
                members[rank].join(meeting, "key", deadline=deadline)

            threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            names = [f"node-{rank}/0" for rank in range(1, world)]
            sender = GlooSender(members[0], arenas[0])
            receivers = [GlooReceiver(members[rank], arenas[rank], names[rank - 1]) for rank in range(1, world)]
            try:
                yield Pair(sender, arenas[0], [*receivers], names)
            finally:
                _close(sender, *receivers)
                for member in members:
                    member.close(deadline=time.monotonic() + 1)


class TrustingReceiver(ShmReceiver):
    """Does not look at the checksum."""

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        wanted = unseal(ticket, b"T", MappedTicket)
        found = checksum(self._mappings[wanted.nonce].arena.slot(wanted.slot)[: wanted.nbytes])
        return super().receive(seal(b"T", msgspec.structs.replace(wanted, checksum=found)), deadline=deadline)


class HastyReceiver(ShmReceiver):
    """Releases what it has not read yet."""

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        lease = super().receive(ticket, deadline=deadline)
        copy = memoryview(bytes(lease.view)).toreadonly()
        lease.release()
        return Lease(sequence=lease.sequence, nbytes=lease.nbytes, lent=copy, on_release=lambda: None)


class PatientReceiver(ShmReceiver):
    """Knows no deadlines."""

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        return super().receive(ticket, deadline=deadline + 3600)


class LeakyReceiver(ShmReceiver):
    """Opens a file that nobody closes."""

    def accept(self, offer: bytes, *, deadline: float) -> None:
        super().accept(offer, deadline=deadline)
        os.open("/dev/null", os.O_RDONLY)


class ForgivingReceiver(ShmReceiver):
    """Says of nonsense that the transport broke."""

    def accept(self, offer: bytes, *, deadline: float) -> None:
        try:
            super().accept(offer, deadline=deadline)
        except CodecError as error:
            raise TransportBroken("?") from error


class SharingSender(ShmSender):
    """Gives everybody the same ticket."""

    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        tickets = super().export(slot, nbytes, sequence, readers)
        return dict.fromkeys(tickets, next(iter(tickets.values())))


@pytest.mark.parametrize(
    ("sender", "receiver", "check"),
    [
        (ShmSender, TrustingReceiver, "altered_bytes"),
        (ShmSender, HastyReceiver, "held_leases"),
        (ShmSender, HastyReceiver, "close_releases"),
        (ShmSender, PatientReceiver, "past_deadlines"),
        (ShmSender, LeakyReceiver, "bytes_arrive"),
        (ShmSender, ForgivingReceiver, "hostile_offers"),
        (SharingSender, ShmReceiver, "a_ticket_for_each"),
    ],
)
def test_the_suite_catches_a_transport_that(sender, receiver, check, tmp_path, monkeypatch):
    """A suite that nothing fails proves nothing."""
    monkeypatch.setattr("weightsync.testing.LEAK_SECONDS", 0.2)
    with pytest.raises((AssertionError, TransportBroken)) as caught:
        check_transport(Shm(tmp_path, sender, receiver), only=check, directory=str(tmp_path))
    assert check in caught.value.__notes__[0]


@pytest.mark.parametrize("check", transport_checks())
@pytest.mark.parametrize("transport", [Shm, Gloo])
def test_conformance(transport, check, tmp_path):
    check_transport(transport(tmp_path), only=check, directory=str(tmp_path))
