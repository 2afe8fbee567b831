"""Base of exports to readers that know torch and nothing of ours: one export for each reader, counted by torch itself.

Stock engines open exports with torch's own functions, and torch keeps a reference count: for a storage shared by file
name, and for a CUDA-IPC export. Either count says when a reader is done, which is the fence. torch demands that every
export is opened exactly once, so each reader gets its own. This module has the bookkeeping; `torch_shm.py` exports a
copy, `torch_cuda.py` the slot itself.

There is no reading side of ours, so the conformance suite does not apply. Instead tests open tickets with torch's own
functions, in processes that know nothing of weightsync, and in real engines.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from weightsync.errors import LocalProtocolError
from weightsync.ipc.ledger import Ledger
from weightsync.transports.base import BucketSender, seconds_left
from weightsync.transports.exports import Checksums, Export, Exports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.ipc.arena import Arena

__all__ = ["Counted", "CountedSender"]


class Counted(Protocol):
    """One export: a bucket for one reader."""

    @property
    def released(self) -> bool:
        """Whether its reader has opened it and let it go."""

    def ticket(self, reader: str, checksum: int) -> bytes:
        """Return the ticket by which the reader opens this export."""

    def remove(self) -> None:
        """Free the resources of this export. A reader that still has it open keeps its mapping."""


class CountedSender(BucketSender):
    """Exports slots of `arena`, which the caller owns and closes."""

    mapped = True

    def __init__(self, arena: Arena, *, ledger: Ledger | None = None, checksums: Checksums | None = None) -> None:
        super().__init__()
        self._arena = arena
        self._ledger = ledger if ledger is not None else Ledger()
        self._checksums = checksums if checksums is not None else Checksums(arena)
        self._exports = Exports(arena.slots, arena.slot_bytes)
        self._counted: dict[tuple[int, str], Counted] = {}  # (slot, reader)
        self._readers: set[str] = set()
        self._lock = threading.RLock()
        self._exporting = threading.Lock()  # held during a checksum and a copy, unlike `_lock`

    @abstractmethod
    def _check_possible(self) -> None:
        """Raise `LocalProtocolError` or `TransportError` if such exports cannot be made at all."""

    @abstractmethod
    def _make_export(self, slot: int, nbytes: int) -> Counted:
        """Make an export of a bucket. Raises `TransportError` if there is no room."""

    def offer(self, reader: str) -> bytes:
        """Note the reader; returns no bytes, because every ticket says all that its reader needs."""
        self._check_open()
        self._check_possible()
        with self._lock:
            self._readers.add(reader)
        return b""

    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        names = list(readers)
        with self._exporting:
            with self._lock:
                self._check_open()
                if strangers := [name for name in names if name not in self._readers]:
                    raise LocalProtocolError(f"nothing was offered to {', '.join(strangers)}")
                self._settle(slot)
                export = self._exports.begin(slot, nbytes, sequence, names)
            export.checksum = self._checksums.of(slot, sequence, nbytes, self._check_open)
            made: dict[str, Counted] = {}
            try:
                for name in names:
                    made[name] = self._make_export(slot, nbytes)
                with self._lock:
                    self._check_open()
                    self._exports.record(slot, export)
                    return {name: self._ticket(slot, export, name, made.pop(name)) for name in names}
            finally:
                for counted in made.values():  # exports that were not handed out
                    counted.remove()

    def _ticket(self, slot: int, export: Export, reader: str, counted: Counted) -> bytes:
        self._counted[slot, reader] = counted
        export.readers.add(reader)
        export.waiting[reader] = 0
        self._ledger.exported(reader)
        return counted.ticket(reader, export.checksum.value)

    def send(self, slot: int, *, deadline: float) -> None:
        """Do nothing but check: there is nothing to move, since readers open the exports themselves."""
        self._check_open()
        seconds_left(deadline, f"send of slot {slot}")

    def pending(self, slot: int) -> tuple[str, ...]:
        with self._lock:
            self._check_open()
            return self._settle(slot)

    def revoke(self, slot: int, reader: str) -> None:
        with self._lock:
            self._check_open()
            if reader in self._settle(slot):
                self._forget(slot, reader)
                self._ledger.revoked(reader)

    def settle(self) -> None:
        """Book in the ledger what the readers have opened and closed so far."""
        with self._lock:
            for slot in self._exports.held():
                self._settle(slot)

    @property
    def held(self) -> bool:
        """Whether an export is still open at its reader, or not opened yet."""
        self.settle()
        return bool(self._counted)

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            while self._counted:
                self._counted.popitem()[1].remove()

    def abort(self) -> None:
        self.close()

    def _settle(self, slot: int) -> tuple[str, ...]:
        """Forget and book the readers of `slot` that are done; returns the others."""
        export = self._exports.get(slot)
        if export is None:
            return ()
        for reader in [name for name in export.waiting if self._counted[slot, name].released]:
            self._forget(slot, reader)
            self._ledger.opened(reader)
            self._ledger.closed(reader)
        return tuple(export.waiting)

    def _forget(self, slot: int, reader: str) -> None:
        self._counted.pop((slot, reader)).remove()
        export = self._exports.get(slot)
        if export is not None:
            export.waiting.pop(reader, None)
