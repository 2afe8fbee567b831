"""gloo: slots in host memory, broadcast between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from weightsync.errors import TransportBroken
from weightsync.ipc.descriptors import ALGORITHM, checksum
from weightsync.transports.broadcast import BroadcastReceiver, BroadcastSender, Member
from weightsync.transports.exports import Checksums

if TYPE_CHECKING:
    from weightsync.ipc.arena import Arena
    from weightsync.ipc.ledger import Ledger
    from weightsync.transports.broadcast import BroadcastTicket

__all__ = ["GlooReceiver", "GlooSender", "HostMember"]


class HostMember(Member, Protocol):
    """A communicator that moves host memory (`weightsync.nccl_bridge.gloo.GlooCommunicator`)."""

    def broadcast(self, memory: memoryview, root: int, *, deadline: float) -> None:
        """Copy the root's `memory` into every other member's."""


class GlooSender(BroadcastSender):
    """The root of broadcasts over gloo."""

    def __init__(
        self,
        communicator: HostMember,
        arena: Arena,
        *,
        ledger: Ledger | None = None,
        checksums: Checksums | None = None,
    ) -> None:
        super().__init__(communicator, arena, checksums if checksums is not None else Checksums(arena), ledger=ledger)
        self._gloo = communicator

    def _broadcast(self, slot: int, nbytes: int, sequence: int, deadline: float) -> None:
        self._gloo.broadcast(self._arena.slot(slot)[:nbytes], self._gloo.rank, deadline=deadline)


class GlooReceiver(BroadcastReceiver):
    """A receiver of broadcasts over gloo. Verifies every bucket."""

    def __init__(self, communicator: HostMember, arena: Arena, reader: str) -> None:
        super().__init__(communicator, arena, reader)
        self._gloo = communicator

    def _broadcast(self, slot: int, wanted: BroadcastTicket, deadline: float) -> None:
        self._gloo.broadcast(self._arena.slot(slot)[: wanted.nbytes], wanted.root, deadline=deadline)

    def _verify(self, slot: int, wanted: BroadcastTicket) -> None:
        found = checksum(self._arena.slot(slot)[: wanted.nbytes], self._check_open)
        if wanted.algorithm != ALGORITHM or found != wanted.checksum:
            raise TransportBroken(
                f"bucket of sequence {wanted.sequence} differs from what was exported: {ALGORITHM} is {found:016x}, "
                f"not {wanted.checksum:016x} ({wanted.algorithm})",
                hint="the slot was written to after it was exported, or the members take buckets in different orders",
            )

    def _lend(self, slot: int, nbytes: int) -> memoryview:
        return self._arena.slot(slot)[:nbytes].toreadonly()
