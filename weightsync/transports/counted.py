"""Exports for readers that know torch and nothing of ours: one for each of them, which torch itself counts.

Stock engines open what they are given with torch's own functions, and torch counts who holds it: a storage shared by
file name has a reference count, a CUDA-IPC export has one too. Both say when a reader is done, which is the fence; both
demand that every export is opened exactly once, so that each reader is given its own. Here is the bookkeeping that both
share. What an export is, and how it is opened, is `torch_shm.py` (a copy) and `torch_cuda.py` (the slot itself).

There is no reading side of ours, so the conformance suite does not apply: tests open tickets with torch's own
functions, in processes that know nothing of weightsync, and real engines do.
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
        """What the reader opens it by."""

    def remove(self) -> None:
        """Give back what it takes up; a reader that still has it open keeps what it has mapped."""


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
        self._exporting = threading.Lock()  # held over a checksum and a copy, which `_lock` is not

    @abstractmethod
    def _check_possible(self) -> None:
        """Raise `LocalProtocolError` or `TransportError` where such exports cannot be made at all."""

    @abstractmethod
    def _count(self, slot: int, nbytes: int) -> Counted:
        """An export of a bucket. Raises `TransportError` when there is no room."""

    def offer(self, reader: str) -> bytes:
        """There is nothing to attach to: every ticket says all that its reader needs."""
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
                    made[name] = self._count(slot, nbytes)
                with self._lock:
                    self._check_open()
                    self._exports.record(slot, export)
                    return {name: self._ticket(slot, export, name, made.pop(name)) for name in names}
            finally:
                for counted in made.values():  # those that were not handed out
                    counted.remove()

    def _ticket(self, slot: int, export: Export, reader: str, counted: Counted) -> bytes:
        self._counted[slot, reader] = counted
        export.readers.add(reader)
        export.waiting[reader] = 0
        self._ledger.exported(reader)
        return counted.ticket(reader, export.checksum.value)

    def send(self, slot: int, *, deadline: float) -> None:
        """Nothing to move: the readers look for themselves."""
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
        """Bring the ledger up to what the readers have done."""
        with self._lock:
            for slot in self._exports.held():
                self._settle(slot)

    @property
    def held(self) -> bool:
        """Whether a reader has not let go of what it was given, or not opened it yet."""
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
        """Forget and book the readers of `slot` that are done; the others."""
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
