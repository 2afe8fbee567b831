"""Base of the transports over gloo and NCCL: a slot of this bridge is broadcast into slots of bridges on other nodes.

Sender and receivers share a communicator, which their maker joins and closes; every member except the root receives
each bucket. An offer names the communicator and its root; a ticket names the bucket that comes next. As in any
collective, all members take the buckets in one order. Subclasses say where the slots lie and what moves their bytes.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.ipc.descriptors import Algorithm, Natural, ReaderName, seal, unseal
from weightsync.ipc.ledger import Ledger
from weightsync.transports.base import BucketReceiver, BucketSender, Lease, seconds_left
from weightsync.transports.exports import Checksum, Checksums, Exports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.ipc.arena import Arena

__all__ = ["Arrival", "BroadcastOffer", "BroadcastReceiver", "BroadcastSender", "BroadcastTicket", "Member"]

_REMEMBERED = 4096  # opened tickets; opening an older one again is refused only by its checksum


class Member(Protocol):
    """What senders and receivers need of a joined communicator, over host or GPU memory."""

    generation: int
    rank: int
    world: int

    def abort(self) -> None:
        """Make an operation under way raise `TransportClosed`."""


class BroadcastOffer(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of an offer."""

    generation: Natural
    root: Natural
    reader: ReaderName


class BroadcastTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a ticket."""

    generation: Natural
    root: Natural
    reader: ReaderName
    sequence: Natural
    nbytes: Natural
    algorithm: Algorithm
    checksum: Annotated[int, Meta(ge=0)]


class Arrival(NamedTuple):
    """A bucket that was received and verified."""

    sequence: int
    nbytes: int
    checksum: Checksum


class BroadcastSender(BucketSender):
    """The root of the broadcasts. Its readers are the other members, one name each."""

    mapped = False

    def __init__(
        self, communicator: Member, arena: Arena, checksums: Checksums, *, ledger: Ledger | None = None
    ) -> None:
        super().__init__()
        self._communicator = communicator
        self._arena = arena
        self._ledger = ledger if ledger is not None else Ledger()
        self._checksums = checksums
        self._exports = Exports(arena.slots, arena.slot_bytes)
        self._offered: set[str] = set()
        self._lock = threading.RLock()
        self._exporting = threading.Lock()

    def offer(self, reader: str) -> bytes:
        with self._lock:
            self._check_open()
            self._offered.add(reader)
            return seal(
                b"G",
                BroadcastOffer(generation=self._communicator.generation, root=self._communicator.rank, reader=reader),
            )

    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        names = list(readers)
        with self._exporting:
            with self._lock:
                self._check_open()
                if strangers := [name for name in names if name not in self._offered]:
                    raise LocalProtocolError(f"nothing was offered to {', '.join(strangers)}")
                export = self._exports.begin(slot, nbytes, sequence, names)
            export.checksum = self._checksums.of(slot, sequence, nbytes, self._check_open)
            with self._lock:
                self._check_open()
                self._exports.record(slot, export)
                for name in names:
                    export.readers.add(name)
                    export.waiting[name] = 0
                    self._ledger.exported(name)
                return {name: self._ticket(sequence, nbytes, export.checksum, name) for name in names}

    def send(self, slot: int, *, deadline: float) -> None:
        with self._lock:
            self._check_open()
            export = self._exports.get(slot)
            if export is None or not export.waiting:
                raise LocalProtocolError(f"nothing of slot {slot} is exported and not sent")
            waiting = list(export.waiting)
        what = f"bucket of sequence {export.sequence}"
        seconds_left(deadline, what)
        try:
            self._broadcast(slot, export.nbytes, export.sequence, deadline)
        except BaseException:
            self._end(slot, export.sequence, waiting, arrived=False)
            raise
        self._end(slot, export.sequence, waiting, arrived=True)

    @abstractmethod
    def _broadcast(self, slot: int, nbytes: int, sequence: int, deadline: float) -> None:
        """Send the bytes of the slot from here. Returns when they may change."""

    def pending(self, slot: int) -> tuple[str, ...]:
        with self._lock:
            self._check_open()
            export = self._exports.get(slot)
            return tuple(export.waiting) if export is not None else ()

    def revoke(self, slot: int, reader: str) -> None:
        """Stop waiting for `reader`. A broadcast under way still needs it; call `abort` to end that."""
        with self._lock:
            self._check_open()
            export = self._exports.get(slot)
            if export is not None and export.waiting.pop(reader, None) is not None:
                self._ledger.revoked(reader)

    def close(self) -> None:
        """Close, and revoke exports that were never sent."""
        self._ended.set()
        with self._lock:
            for slot, export in self._exports.held().items():
                self._end(slot, export.sequence, list(export.waiting), arrived=False)

    def abort(self) -> None:
        self._ended.set()
        self._communicator.abort()

    def _end(self, slot: int, sequence: int, readers: list[str], *, arrived: bool) -> None:
        """End a broadcast: no reader of the slot is pending, and the ledger books a failure as a revocation."""
        with self._lock:
            export = self._exports.get(slot)
            if export is None or export.sequence != sequence:
                return
            for reader in readers:
                if export.waiting.pop(reader, None) is None:
                    continue  # revoked meanwhile
                if arrived:
                    self._ledger.opened(reader)
                    self._ledger.closed(reader)
                else:
                    self._ledger.revoked(reader)

    def _ticket(self, sequence: int, nbytes: int, value: Checksum, reader: str) -> bytes:
        ticket = BroadcastTicket(
            generation=self._communicator.generation,
            root=self._communicator.rank,
            reader=reader,
            sequence=sequence,
            nbytes=nbytes,
            algorithm=value.algorithm,
            checksum=value.value,
        )
        return seal(b"C", ticket)


class BroadcastReceiver(BucketReceiver):
    """A member that is not root. Receives buckets into slots of its own `arena`, which the caller owns and closes."""

    def __init__(self, communicator: Member, arena: Arena, reader: str) -> None:
        """`reader` is the name under which this member is exported to."""
        super().__init__()
        self._communicator = communicator
        self._arena = arena
        self._reader = reader
        self._opened: OrderedDict[tuple[int, int], None] = OrderedDict()  # (root, sequence), oldest first
        self._leased: dict[int, Lease | None] = {}  # slot → its lease; None while it is being filled
        self._freed = threading.Condition()

    def accept(self, offer: bytes, *, deadline: float) -> None:
        self._check_open()
        wanted = unseal(offer, b"G", BroadcastOffer)
        seconds_left(deadline, "accepting an offer")
        self._check_mine("the offer", wanted.generation, wanted.reader, wanted.root)

    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        """See the base class. `verify` is ignored: verification decides whether the broadcast succeeded."""
        wanted = self._wanted(ticket, deadline)
        slot = self._take_slot(deadline)
        try:
            self._receive(wanted, slot, deadline)
            lease = Lease(
                sequence=wanted.sequence,
                nbytes=wanted.nbytes,
                lent=self._lend(slot, wanted.nbytes),
                on_release=partial(self._free, slot),
                checksum=wanted.checksum,
            )
            with self._freed:
                self._check_open()
                self._leased[slot] = lease
        except BaseException:
            self._free(slot)
            raise
        return lease

    def receive_into(self, ticket: bytes, slot: int, *, deadline: float) -> Arrival:
        """Like `receive`, into a slot that the caller knows to be free. There is no lease: the caller keeps it free."""
        wanted = self._wanted(ticket, deadline)
        self._receive(wanted, slot, deadline)
        return Arrival(wanted.sequence, wanted.nbytes, Checksum(wanted.algorithm, wanted.checksum))

    def close(self) -> None:
        with self._freed:
            self._ended.set()
            leases = [lease for lease in self._leased.values() if lease is not None]
            self._freed.notify_all()
        for lease in leases:
            lease.release()

    def abort(self) -> None:
        self._ended.set()
        with self._freed:
            self._freed.notify_all()
        self._communicator.abort()

    def _wanted(self, ticket: bytes, deadline: float) -> BroadcastTicket:
        self._check_open()
        wanted = unseal(ticket, b"C", BroadcastTicket)
        what = f"bucket of sequence {wanted.sequence}"
        seconds_left(deadline, what)
        self._check_mine(what, wanted.generation, wanted.reader, wanted.root)
        if wanted.nbytes > self._arena.slot_bytes:
            raise TransportBroken(f"{what}: {wanted.nbytes} bytes do not fit into a slot of {self._arena.slot_bytes}")
        with self._freed:
            self._check_unopened(wanted)  # first, so that an opened ticket does not wait for a slot and time out
        return wanted

    def _check_unopened(self, wanted: BroadcastTicket) -> None:
        if (wanted.root, wanted.sequence) in self._opened:
            raise TransportBroken(f"the ticket of sequence {wanted.sequence} was opened before")

    def _check_mine(self, what: str, generation: int, reader: str, root: int) -> None:
        mine = self._communicator
        if generation != mine.generation:
            raise TransportBroken(f"{what}: of generation {generation}, here is generation {mine.generation}")
        if reader != self._reader:
            raise TransportBroken(f"{what}: for reader {reader}, here is {self._reader}")
        if root >= mine.world or root == mine.rank:
            raise TransportBroken(f"{what}: rank {root} of {mine.world} cannot be its root for rank {mine.rank}")

    @abstractmethod
    def _broadcast(self, slot: int, wanted: BroadcastTicket, deadline: float) -> None:
        """Receive the bytes that `wanted` describes into the slot."""

    @abstractmethod
    def _verify(self, slot: int, wanted: BroadcastTicket) -> None:
        """Raise `TransportBroken` if the slot's bytes are not the exported ones, as far as this can be told here."""

    @abstractmethod
    def _lend(self, slot: int, nbytes: int) -> memoryview | int:
        """Return what a lease of this slot lends: a view, or an address on the GPU."""

    def _receive(self, wanted: BroadcastTicket, slot: int, deadline: float) -> None:
        with self._freed:
            self._check_unopened(wanted)
            self._opened[wanted.root, wanted.sequence] = None
            if len(self._opened) > _REMEMBERED:
                self._opened.popitem(last=False)
        self._broadcast(slot, wanted, deadline)
        self._verify(slot, wanted)

    def _take_slot(self, deadline: float) -> int:
        with self._freed:
            while True:
                self._check_open()
                for slot in range(self._arena.slots):
                    if slot not in self._leased:
                        self._leased[slot] = None
                        return slot
                self._freed.wait(seconds_left(deadline, f"all {self._arena.slots} slots of this receiver are leased"))

    def _free(self, slot: int) -> None:
        with self._freed:
            self._leased.pop(slot, None)
            self._freed.notify_all()
