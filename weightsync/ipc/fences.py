"""Fences say which reader still reads which slot: a table in the arena, with a cell for every slot and reader.

A cell is two words of eight bytes. The first has the sequence number of an export and its state: the owner of the arena
writes `EXPORTED` and `REVOKED`; the reader, in its own process, writes `OPENED` and `CLOSED`. Because the sequence
travels in the same eight bytes, the release of an earlier export can never pass for the release of this one. The reader
writes the second word before `CLOSED`: the checksum of its own copy of the bytes, or 0 if it did not look.

Words are read and written through a `memoryview` of 64-bit items: one aligned 8-byte load or store each, which x86-64
and aarch64 never tear. Two processes see them in order because a reader's store comes after its interpreter's (and its
copy's) own synchronisation, and a ticket travels through the kernel between `EXPORTED` and `OPENED`. The table needs no
lock, because a cell has one writer at a time. Only a reader whose ticket was revoked may write out of turn, and the
owner ignores that.
"""

from __future__ import annotations

from enum import IntEnum

from weightsync.errors import TransportBroken

__all__ = ["CELL_BYTES", "MAX_SEQUENCE", "FenceTable", "State"]

CELL_BYTES = 16
MAX_SEQUENCE = 2**60
_BITS = 3


class State(IntEnum):
    """The state of an export."""

    EMPTY = 0
    EXPORTED = 1
    OPENED = 2
    CLOSED = 3
    REVOKED = 4


class FenceTable:
    """Cells `[slots][readers]` in `memory`, a writable memoryview of exactly that many cells."""

    def __init__(self, memory: memoryview, slots: int, readers: int) -> None:
        if memory.nbytes != slots * readers * CELL_BYTES:
            raise ValueError(f"{memory.nbytes} bytes are no table of {slots} × {readers} cells")
        self._cells = memory.cast("B").cast("Q")
        self._slots = slots
        self._readers = readers

    def read(self, slot: int, cell: int) -> tuple[int, State]:
        """Return sequence and state. A value that is no state of a cell reads as (0, EMPTY)."""
        value = self._cells[self._at(slot, cell)]
        code = value & (2**_BITS - 1)
        return (value >> _BITS, State(code)) if code <= State.REVOKED else (0, State.EMPTY)

    def export(self, slot: int, cell: int, sequence: int) -> None:
        """Owner: call this before a ticket of `sequence` is handed out."""
        self._write(slot, cell, sequence, State.EXPORTED)

    def revoke(self, slot: int, cell: int, sequence: int) -> None:
        """Owner: make the ticket worthless if it was not opened yet."""
        self._write(slot, cell, sequence, State.REVOKED)

    def open(self, slot: int, cell: int, sequence: int) -> None:
        """Reader: open the ticket. Raises `TransportBroken` unless it was handed out and never opened."""
        found, state = self.read(slot, cell)
        if (found, state) == (sequence, State.EXPORTED):
            self._write(slot, cell, sequence, State.OPENED)
            return
        if found == sequence:
            why = {State.OPENED: "opened before", State.CLOSED: "opened and closed before"}.get(state, "revoked")
        else:
            why = f"overtaken: the slot's sequence is {found}" if found > sequence else "not exported"
        raise TransportBroken(f"the ticket of sequence {sequence} was {why}", hint="a ticket is opened exactly once")

    def read_back(self, slot: int, cell: int) -> int:
        """Owner: return the checksum that the reader of a `CLOSED` cell found in its copy; 0 if it did not look."""
        return self._cells[self._at(slot, cell) + 1]

    def close(self, slot: int, cell: int, sequence: int, read_back: int = 0) -> bool:
        """Reader: note that it has read, and found the checksum `read_back`.

        Returns False, with nothing written, if the cell has gone on without the reader.
        """
        if self.read(slot, cell) != (sequence, State.OPENED):
            return False
        self._cells[self._at(slot, cell) + 1] = read_back
        self._write(slot, cell, sequence, State.CLOSED)
        return True

    def _write(self, slot: int, cell: int, sequence: int, state: State) -> None:
        if not 0 <= sequence < MAX_SEQUENCE:
            raise ValueError(f"sequence {sequence} is outside 0 … {MAX_SEQUENCE - 1}")
        self._cells[self._at(slot, cell)] = sequence << _BITS | state

    def _at(self, slot: int, cell: int) -> int:
        if not (0 <= slot < self._slots and 0 <= cell < self._readers):
            raise ValueError(f"no cell {slot}, {cell} in a table of {self._slots} × {self._readers}")
        return 2 * (slot * self._readers + cell)
