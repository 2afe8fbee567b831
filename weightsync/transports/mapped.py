"""Base of the mapped transports: readers on this node map the bridge's arena and read the slot where it lies.

The sender runs in the process that owns the arena. A receiver maps each arena once, keeps it, and drops it when a newer
incarnation of the same bridge is offered. The fence is a cell in the arena's file (`weightsync.ipc.fences`), even if
the slots lie on a GPU. `shm.py` and `cuda_ipc.py` map and check slots.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
from msgspec import Meta

from weightsync.errors import LocalProtocolError, TransportBroken, TransportError
from weightsync.ipc.arena import ArenaOffer
from weightsync.ipc.descriptors import Algorithm, Natural, ReaderName, seal, unseal
from weightsync.ipc.fences import State
from weightsync.ipc.ledger import Ledger
from weightsync.transports.base import NO_ZERO, BucketReceiver, BucketSender, Lease, seconds_left
from weightsync.transports.exports import Export, Exports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.fences import FenceTable
    from weightsync.transports.exports import Checksums

__all__ = ["Attached", "MappedReceiver", "MappedSender", "MappedTicket"]


class MappedTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a ticket."""

    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]  # of the arena
    reader: ReaderName
    cell: Natural
    slot: Natural
    sequence: Natural
    nbytes: Natural
    algorithm: Algorithm
    checksum: Annotated[int, Meta(ge=0)]


class Attached(Protocol):
    """One arena that a receiver has mapped."""

    arena: Arena

    def lend(self, slot: int, nbytes: int) -> memoryview | int:
        """Lend the first bytes of a slot: a read-only view, or their address on this process's GPU."""

    def returned(self) -> None:
        """Take back the memory of one call of `lend`: it is not read any more."""

    def close(self) -> None:
        """Detach. Lent memory stays valid until it is returned."""


class MappedSender(BucketSender):
    """Exports slots of `arena`, which the caller owns and closes."""

    mapped = True

    def __init__(self, arena: Arena, *, ledger: Ledger | None = None, checksums: Checksums) -> None:
        super().__init__()
        self._arena = arena
        self._ledger = ledger if ledger is not None else Ledger()
        self._checksums = checksums
        self._exports = Exports(arena.slots, arena.slot_bytes)
        self._cells: dict[str, int] = {}  # reader → cell; least recently offered or exported to first
        self._lock = threading.RLock()
        self._exporting = threading.Lock()  # held during a checksum, unlike `_lock`

    def offer(self, reader: str) -> bytes:
        with self._lock:
            self._check_open()
            cell = self._cells.pop(reader, None)
            if cell is None:
                cell = self._free_cell()
            self._cells[reader] = cell
            return self._arena.offer(reader, cell)

    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        names = list(readers)
        with self._exporting:
            with self._lock:
                self._check_open()
                if strangers := [name for name in names if name not in self._cells]:
                    raise LocalProtocolError(f"nothing was offered to {', '.join(strangers)}")
                self._settle(slot)
                export = self._exports.begin(slot, nbytes, sequence, names)
            export.checksum = self._checksums.of(slot, sequence, nbytes, self._check_open)
            with self._lock:
                self._check_open()
                self._exports.record(slot, export)
                return {name: self._ticket(slot, export, name) for name in names}

    def send(self, slot: int, *, deadline: float) -> None:
        """Do nothing but check: there is nothing to move, since readers map the slot itself."""
        self._check_open()
        seconds_left(deadline, f"send of slot {slot}")

    def pending(self, slot: int) -> tuple[str, ...]:
        with self._lock:
            self._check_open()
            export = self._settle(slot)
            return tuple(export.waiting) if export is not None else ()

    def damaged(self, slot: int) -> tuple[str, ...]:
        with self._lock:
            self._check_open()
            export = self._settle(slot)
            return tuple(sorted(export.damaged)) if export is not None else ()

    def revoke(self, slot: int, reader: str) -> None:
        with self._lock:
            self._check_open()
            export = self._settle(slot)
            if export is None or reader not in export.waiting:
                return
            self._arena.fences.revoke(slot, export.waiting.pop(reader), export.sequence)
            self._ledger.revoked(reader)

    def settle(self) -> None:
        """Book in the ledger what the readers have opened and closed so far."""
        with self._lock:
            self._check_open()
            for slot in self._exports.held():
                self._settle(slot)

    def close(self) -> None:
        self._ended.set()

    def abort(self) -> None:
        self._ended.set()

    def _ticket(self, slot: int, export: Export, reader: str) -> bytes:
        cell = self._cells[reader] = self._cells.pop(reader)
        self._arena.fences.export(slot, cell, export.sequence)
        export.readers.add(reader)
        export.waiting[reader] = cell
        self._ledger.exported(reader)
        ticket = MappedTicket(
            nonce=self._arena.nonce,
            reader=reader,
            cell=cell,
            slot=slot,
            sequence=export.sequence,
            nbytes=export.nbytes,
            algorithm=export.checksum.algorithm,
            checksum=export.checksum.value,
        )
        return seal(b"T", ticket)

    def _settle(self, slot: int) -> Export | None:
        """Read the cells of the slot's pending readers; forget and book the readers that are done."""
        export = self._exports.get(slot)
        if export is None:
            return None
        for reader, cell in list(export.waiting.items()):
            sequence, state = self._arena.fences.read(slot, cell)
            if sequence != export.sequence or state not in (State.OPENED, State.CLOSED):
                continue
            if reader not in export.opened:
                export.opened.add(reader)
                self._ledger.opened(reader)
            if state is State.CLOSED:
                found, exported = self._arena.fences.read_back(slot, cell), export.checksum.value or NO_ZERO
                del export.waiting[reader]
                self._ledger.closed(reader, confirmed=found == exported)
                if found not in (0, exported):
                    export.damaged.add(reader)
        return export

    def _free_cell(self) -> int:
        taken = set(self._cells.values())
        if len(taken) < self._arena.readers:
            return next(cell for cell in range(self._arena.readers) if cell not in taken)
        self.settle()
        busy = {reader for export in self._exports.held().values() for reader in export.waiting}
        for reader in self._cells:
            if reader not in busy:  # the least recent idle reader: it has left, or will be offered a cell again
                return self._cells.pop(reader)
        raise TransportError(f"all {self._arena.readers} readers of arena {self._arena.name} hold slots")


class MappedReceiver(BucketReceiver):
    """Reads from every arena it was offered."""

    def __init__(self) -> None:
        super().__init__()
        self._mappings: dict[bytes, Attached] = {}  # by the arena's nonce
        self._lineages: dict[str, bytes] = {}  # bridge → nonce of its newest arena
        self._readers: dict[bytes, dict[str, int]] = {}  # nonce → names that it was offered to here, and their cells
        self._leases: set[Lease] = set()
        self._lock = threading.RLock()

    def accept(self, offer: bytes, *, deadline: float) -> None:
        self._check_open()
        wanted = ArenaOffer.unpack(offer)
        if wanted.reader is None or wanted.cell is None:
            raise TransportBroken("this offer is for a trainer rank, not for a reader")
        seconds_left(deadline, f"attaching arena {wanted.name}")
        with self._lock:
            self._check_open()
            if wanted.nonce not in self._mappings:
                self._mappings[wanted.nonce] = self._map(wanted)
                self._readers[wanted.nonce] = {}
                self._drop(self._lineages.get(wanted.lineage))
                self._lineages[wanted.lineage] = wanted.nonce
            self._readers[wanted.nonce][wanted.reader] = wanted.cell

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        self._check_open()
        wanted = unseal(ticket, b"T", MappedTicket)
        what = f"bucket of sequence {wanted.sequence}"
        seconds_left(deadline, what)
        with self._lock:
            self._check_open()
            mapping = self._mappings.get(wanted.nonce)
            if mapping is None:
                raise TransportBroken(f"{what}: its arena was not offered here, or was replaced by a newer one")
            if self._readers[wanted.nonce].get(wanted.reader) != wanted.cell:
                raise TransportBroken(f"{what}: the ticket is for reader {wanted.reader}, who is not here")
            arena = mapping.arena
            if wanted.slot >= arena.slots or wanted.nbytes > arena.slot_bytes:
                raise TransportBroken(f"{what}: slot {wanted.slot} with {wanted.nbytes} bytes is outside the arena")
            fences = arena.fences
            fences.open(wanted.slot, wanted.cell, wanted.sequence)
            lent = mapping.lend(wanted.slot, wanted.nbytes)
        try:
            if verify:
                self._verify(lent, wanted, partial(self._go_on, deadline, what))
            return self._lease(wanted, lent, fences, mapping)
        except BaseException:
            mapping.returned()
            fences.close(wanted.slot, wanted.cell, wanted.sequence)
            raise

    def close(self) -> None:
        with self._lock:
            self._ended.set()
            leases = list(self._leases)
        for lease in leases:
            lease.release()
        self.abort()

    def abort(self) -> None:
        self._ended.set()
        with self._lock:
            for nonce in list(self._mappings):
                self._drop(nonce)
            self._lineages.clear()
            self._leases.clear()

    @abstractmethod
    def _map(self, offer: ArenaOffer) -> Attached:
        """Attach an arena for reading. Raises `TransportBroken`."""

    @abstractmethod
    def _verify(self, lent: memoryview | int, ticket: MappedTicket, between: Callable[[], None]) -> None:
        """Raise `TransportBroken` unless the bytes are the exported ones. `between` may raise, to end early."""

    def _go_on(self, deadline: float, what: str) -> None:
        self._check_open()
        seconds_left(deadline, what)

    def _lease(self, ticket: MappedTicket, lent: memoryview | int, fences: FenceTable, mapping: Attached) -> Lease:
        def on_release() -> None:
            mapping.returned()
            fences.close(ticket.slot, ticket.cell, ticket.sequence, lease.read_back)
            with self._lock:
                self._leases.discard(lease)

        lease = Lease(
            sequence=ticket.sequence,
            nbytes=ticket.nbytes,
            lent=lent,
            on_release=on_release,
            checksum=ticket.checksum,
        )
        with self._lock:
            self._check_open()
            self._leases.add(lease)
        return lease

    def _drop(self, nonce: bytes | None) -> None:
        """Detach from an arena. Its leases stay valid until they are released."""
        if nonce is not None and (mapping := self._mappings.pop(nonce, None)) is not None:
            self._readers.pop(nonce, None)
            mapping.close()
