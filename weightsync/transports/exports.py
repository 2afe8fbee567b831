"""Bookkeeping of a sender's exports and checksums, the same for every transport."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from weightsync.errors import LocalProtocolError
from weightsync.ipc.descriptors import ALGORITHM, checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.descriptors import Algorithm

__all__ = ["Checksum", "Checksums", "Export", "Exports"]


class Checksum(NamedTuple):
    """The checksum of a bucket's bytes, and the algorithm that made it."""

    algorithm: Algorithm
    value: int


NONE = Checksum(ALGORITHM, 0)


@dataclass
class Export:
    """The current export of one slot."""

    sequence: int
    nbytes: int
    checksum: Checksum = NONE
    readers: set[str] = field(default_factory=set)  # all readers that ever got it
    waiting: dict[str, int] = field(default_factory=dict)  # pending readers and their fence cells
    opened: set[str] = field(default_factory=set)  # readers that were seen to have opened it
    damaged: set[str] = field(default_factory=set)  # readers that released it but read back other bytes


class Checksums:
    """Checksums of an arena's slots in host memory, computed once a sequence. The arena's senders share it."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._known: dict[int, tuple[int, int, Checksum]] = {}  # slot → (sequence, nbytes, checksum)
        self._lock = threading.Lock()

    def of(self, slot: int, sequence: int, nbytes: int, between: Callable[[], None] | None = None) -> Checksum:
        """Return the checksum of the first `nbytes` of `slot`. `between` is called every few MiB and may raise."""
        with self._lock:
            known = self._known.get(slot)
        if known is not None and known[:2] == (sequence, nbytes):
            return known[2]
        found = self.compute(slot, nbytes, between)
        self.know(slot, sequence, nbytes, found)
        return found

    def know(self, slot: int, sequence: int, nbytes: int, value: Checksum) -> None:
        """Take `value` as the checksum of these bytes; their writer told it, or a receiver verified it."""
        with self._lock:
            self._known[slot] = (sequence, nbytes, value)

    def compute(self, slot: int, nbytes: int, between: Callable[[], None] | None) -> Checksum:
        """Compute the checksum of the slot's present bytes."""
        return Checksum(ALGORITHM, checksum(self._arena.slot(slot)[:nbytes], between))


class Exports:
    """The current export of each slot of an arena. Has no lock: its sender holds one."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._by_slot: dict[int, Export] = {}

    def begin(self, slot: int, nbytes: int, sequence: int, readers: Sequence[str]) -> Export:
        """Check the arguments of `export`. Returns the export of this sequence, not yet recorded if it is new.

        Raises `LocalProtocolError` as `BucketSender.export` promises. Settle pending readers first.
        """
        if not 0 <= slot < self._slots:
            raise LocalProtocolError(f"there is no slot {slot}, only {self._slots}")
        if not 0 <= nbytes <= self._slot_bytes:
            raise LocalProtocolError(f"{nbytes} bytes do not lie in a slot of {self._slot_bytes}")
        if not 0 <= sequence < 2**60:
            raise LocalProtocolError(f"sequence {sequence} is outside 0 … 2^60 - 1")
        if len(set(readers)) != len(readers):
            raise LocalProtocolError(f"a reader is named twice: {', '.join(readers)}")
        current = self._by_slot.get(slot)
        if current is None or sequence > current.sequence:
            if current is not None and current.waiting:
                held = ", ".join(current.waiting)
                raise LocalProtocolError(f"slot {slot} is still held by {held}", hint="wait_released, or revoke")
            return Export(sequence, nbytes)
        if sequence < current.sequence:
            raise LocalProtocolError(f"slot {slot} is at sequence {current.sequence}; {sequence} is in the past")
        if nbytes != current.nbytes:
            raise LocalProtocolError(f"sequence {sequence} has {current.nbytes} bytes, not {nbytes}")
        if again := current.readers.intersection(readers):
            raise LocalProtocolError(f"sequence {sequence} was exported before to {', '.join(sorted(again))}")
        return current

    def record(self, slot: int, export: Export) -> None:
        """Make `export` the current one of `slot`."""
        self._by_slot[slot] = export

    def get(self, slot: int) -> Export | None:
        """Return the current export of `slot`. Raises `LocalProtocolError` if there is no such slot."""
        if not 0 <= slot < self._slots:
            raise LocalProtocolError(f"there is no slot {slot}, only {self._slots}")
        return self._by_slot.get(slot)

    def held(self) -> dict[int, Export]:
        """Return the exports with pending readers, by slot."""
        return {slot: export for slot, export in self._by_slot.items() if export.waiting}
