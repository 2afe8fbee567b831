"""CUDA IPC: slots on a bridge's GPU, read where they lie by kernels on the reader's own GPU.

Fences stay in the arena's file in host memory. A reader releases its lease when its stream is past the kernels that
read. A rank sends `Filled` when its stream is past the writes. Both have synchronised with the host by then, so no
interprocess CUDA event is needed: the checksum that travels in `Filled` has to reach the host in any case.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from weightsync.ipc.arena import Arena
from weightsync.ipc.cuda import DeviceSlots
from weightsync.ipc.gone import Lookout
from weightsync.transports.base import damaged
from weightsync.transports.exports import Checksum, Checksums
from weightsync.transports.mapped import MappedReceiver, MappedSender

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.ipc.arena import ArenaOffer
    from weightsync.ipc.ledger import Ledger
    from weightsync.transports.mapped import MappedTicket

__all__ = ["CudaIpcReceiver", "CudaIpcSender", "DeviceChecksums"]


def _flat_sum(address: int, nbytes: int, device: int) -> int:
    import torch

    from weightsync.device.buckets import flat_sum

    return flat_sum(address, nbytes, torch.device("cuda", device))


class DeviceChecksums(Checksums):
    """Checksums of slots on a GPU.

    In a push the trainer's ranks compute them while they fill. The bridge computes none, and so launches no kernel
    between the trainer's and the engine's.
    """

    def __init__(self, arena: Arena, slots: DeviceSlots) -> None:
        super().__init__(arena)
        self._slots = slots

    def compute(self, slot: int, nbytes: int, between: Callable[[], None] | None) -> Checksum:
        if between is not None:
            between()
        return Checksum("fingerprint-64", _flat_sum(self._slots.slot(slot), nbytes, self._slots.device))


class CudaIpcSender(MappedSender):
    """Exports slots of an arena on this process's GPU. The caller owns and closes both `arena` and `slots`."""

    def __init__(
        self,
        arena: Arena,
        slots: DeviceSlots,
        *,
        ledger: Ledger | None = None,
        checksums: Checksums | None = None,
    ) -> None:
        super().__init__(
            arena, ledger=ledger, checksums=checksums if checksums is not None else DeviceChecksums(arena, slots)
        )


class _DeviceMapping:
    """An arena mapped in this process: its fences, and its slots on this process's GPU.

    Slots stay mapped until the last lease is over: a kernel that reads unmapped memory ends the process's CUDA context.
    """

    def __init__(self, arena: Arena, slots: DeviceSlots) -> None:
        self.arena = arena
        self._slots = slots
        self._leases = 0
        self._closed = False
        self._lock = threading.Lock()

    def lend(self, slot: int, nbytes: int) -> int:
        address = self._slots.slot(slot)
        with self._lock:
            self._leases += 1
        return address

    def returned(self) -> None:
        with self._lock:
            self._leases -= 1
            last = self._closed and not self._leases
        if last:
            self._slots.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            last = not self._leases
        if last:
            self._slots.close()
        self.arena.close()


class CudaIpcReceiver(MappedReceiver):
    """Reads slots on GPUs, by kernels on `device`, the GPU that the reader itself works on."""

    def __init__(self, device: int) -> None:
        super().__init__()
        self.device = device
        self._lookout = Lookout(self._look, device)

    def _look(self) -> bool:
        """Detach from arenas whose bridge has ended: its successor may need the memory. True if any are left."""
        with self._lock:
            for nonce, mapping in list(self._mappings.items()):
                if not mapping.arena.there:
                    self._drop(nonce)
            return bool(self._mappings)

    def _map(self, offer: ArenaOffer) -> _DeviceMapping:
        arena = Arena.attach(offer, writable=False)
        try:
            slots = DeviceSlots.open(offer, self.device)
        except BaseException:
            arena.close()
            raise
        self._lookout.start()
        return _DeviceMapping(arena, slots)

    def _verify(self, lent: memoryview | int, ticket: MappedTicket, between: Callable[[], None]) -> None:
        """See the base class. A checksum over tensors is left to the reader, which calls `Lease.confirm`."""
        if ticket.algorithm != "fingerprint-64":
            return
        assert isinstance(lent, int)
        between()
        found = _flat_sum(lent, ticket.nbytes, self.device)
        if found != ticket.checksum:
            raise damaged(ticket.sequence, found, ticket.checksum)
