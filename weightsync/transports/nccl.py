"""NCCL: slots on GPUs, broadcast between nodes.

If a bucket's checksum is one over tensors, the receiving bridge does not verify it. The reader confirms it when it
copies the bytes, so they are checked from the trainer's memory to the engine's without a kernel of a bridge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from weightsync.transports.base import damaged
from weightsync.transports.broadcast import BroadcastReceiver, BroadcastSender, Member
from weightsync.transports.cuda_ipc import DeviceChecksums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.ipc.ledger import Ledger
    from weightsync.transports.broadcast import BroadcastTicket
    from weightsync.transports.exports import Checksums

__all__ = ["DeviceMember", "NcclReceiver", "NcclSender", "Piece"]


class Piece(NamedTuple):
    """Bytes that the member `root` has and the others get; `address` is this member's own, on its GPU."""

    root: int
    address: int
    nbytes: int


class DeviceMember(Member, Protocol):
    """A communicator that moves GPU memory (`weightsync.nccl_bridge.nccl.NcclCommunicator`)."""

    def broadcast(self, pieces: Sequence[Piece], token: int, *, deadline: float) -> None:
        """Copy each piece from its root to every other member."""


class NcclSender(BroadcastSender):
    """The root of broadcasts over NCCL."""

    def __init__(
        self,
        communicator: DeviceMember,
        arena: Arena,
        slots: DeviceSlots,
        *,
        ledger: Ledger | None = None,
        checksums: Checksums | None = None,
    ) -> None:
        checksums = checksums if checksums is not None else DeviceChecksums(arena, slots)
        super().__init__(communicator, arena, checksums, ledger=ledger)
        self._nccl = communicator
        self._slots = slots

    def _broadcast(self, slot: int, nbytes: int, sequence: int, deadline: float) -> None:
        piece = Piece(self._nccl.rank, self._slots.slot(slot), nbytes)
        self._nccl.broadcast([piece], sequence, deadline=deadline)


class NcclReceiver(BroadcastReceiver):
    """A receiver of broadcasts over NCCL."""

    def __init__(self, communicator: DeviceMember, arena: Arena, slots: DeviceSlots, reader: str) -> None:
        super().__init__(communicator, arena, reader)
        self._nccl = communicator
        self._slots = slots
        self._checksums = DeviceChecksums(arena, slots)

    def _broadcast(self, slot: int, wanted: BroadcastTicket, deadline: float) -> None:
        piece = Piece(wanted.root, self._slots.slot(slot), wanted.nbytes)
        self._nccl.broadcast([piece], wanted.sequence, deadline=deadline)

    def _verify(self, slot: int, wanted: BroadcastTicket) -> None:
        if wanted.algorithm == "tensors-64":
            return
        found = self._checksums.compute(slot, wanted.nbytes, self._check_open)
        if found.algorithm != wanted.algorithm or found.value != wanted.checksum:
            raise damaged(wanted.sequence, found.value, wanted.checksum)

    def _lend(self, slot: int, nbytes: int) -> int:
        return self._slots.slot(slot)
