"""Every transport against the one suite that all must pass."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from weightsync.ipc.arena import Arena
from weightsync.nccl_bridge.communicator import GlooCommunicator
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.testing import check_transport, transport_checks
from weightsync.transports.gloo import GlooReceiver, GlooSender
from weightsync.transports.shm import ShmReceiver, ShmSender

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightsync.transports.base import BucketReceiver, BucketSender, Lease


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


class Shm:
    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    @contextmanager
    def __call__(self, readers: int, slots: int, slot_bytes: int) -> Iterator[Pair]:
        with Arena.create(node="test", bridge=0, slots=slots, slot_bytes=slot_bytes, directory=self.directory) as arena:
            sender = ShmSender(arena)
            receivers = [ShmReceiver() for _ in range(readers)]
            try:
                yield Pair(sender, arena, [*receivers], [f"engine/{rank}" for rank in range(readers)])
            finally:
                for end in (sender, *receivers):
                    end.close()


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
                for end in (sender, *receivers):
                    end.close()
                for member in members:
                    member.close(deadline=time.monotonic() + 1)


@pytest.mark.parametrize("check", transport_checks())
@pytest.mark.parametrize("transport", [Shm, Gloo])
def test_conformance(transport, check, tmp_path):
    check_transport(transport(tmp_path), only=check, directory=str(tmp_path))
