"""POSIX shared memory: slots in host memory, read where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import TransportBroken
from weightsync.ipc.arena import Arena
from weightsync.ipc.descriptors import checksum
from weightsync.transports.base import damaged
from weightsync.transports.exports import Checksums
from weightsync.transports.mapped import MappedReceiver, MappedSender

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.ipc.arena import ArenaOffer
    from weightsync.ipc.ledger import Ledger
    from weightsync.transports.mapped import MappedTicket

__all__ = ["ShmReceiver", "ShmSender"]


class ShmSender(MappedSender):
    """Exports slots of an arena in host memory."""

    def __init__(self, arena: Arena, *, ledger: Ledger | None = None, checksums: Checksums | None = None) -> None:
        super().__init__(arena, ledger=ledger, checksums=checksums if checksums is not None else Checksums(arena))


class _HostMapping:
    """An arena in host memory, mapped in this process."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    def lend(self, slot: int, nbytes: int) -> memoryview:
        return self.arena.slot(slot)[:nbytes].toreadonly()

    def returned(self) -> None:
        pass  # the view itself keeps the memory

    def close(self) -> None:
        self.arena.close()


class ShmReceiver(MappedReceiver):
    """Reads slots in host memory."""

    def _map(self, offer: ArenaOffer) -> _HostMapping:
        if offer.memory is not None:
            raise TransportBroken(
                f"the slots of arena {offer.name} lie on a GPU, and this reader takes host memory",
                hint='arena.device = "cpu" in the node config serves engines on a CPU',
            )
        return _HostMapping(Arena.attach(offer, writable=False))

    def _verify(self, lent: memoryview | int, ticket: MappedTicket, between: Callable[[], None]) -> None:
        assert isinstance(lent, memoryview)
        found = checksum(lent, between)
        if found != ticket.checksum:
            raise damaged(ticket.sequence, found, ticket.checksum)
