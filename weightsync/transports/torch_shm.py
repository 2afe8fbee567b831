"""Host memory for readers that know torch and nothing of ours: stock engines on a CPU.

Every export is a file of its own, made for one reader and laid out as torch lays out a storage that it shares by file
name: 64 bytes whose first four are a reference count, then the bucket. torch's own importer adds one when it maps the
file, drops the one that was in flight, and drops its own when the storage is freed. So a count back at 1, which is
ours, means read and released: the same contract as CUDA IPC's, with the same demand that each export is opened exactly
once. (`RefcountedMapAllocator` in torch/aten/src/ATen/MapAllocator.cpp, `rebuild_storage_filename` in
torch/multiprocessing/reductions.py; run with torch 2.13.)

A copy is made for each reader, which is what independence costs where no slot can be mapped. Only torch's name for the
file is given away: torch's helper process removes it by that name if the reader dies, so names are never used twice.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Self

import msgspec
from msgspec import Meta

from weightsync.errors import LocalProtocolError, TransportError
from weightsync.ipc.arena import DIRECTORY
from weightsync.ipc.descriptors import Natural, ReaderName, seal, unseal
from weightsync.ipc.ledger import Ledger
from weightsync.transports.base import BucketSender, Capabilities, seconds_left
from weightsync.transports.exports import Checksums, Exports

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.ipc.arena import Arena

__all__ = ["HEADER_BYTES", "TorchShmSender", "TorchShmTicket"]

HEADER_BYTES = 64  # torch's `map_alloc_alignment`
_COUNT = struct.Struct("<i")
_HANDED_OUT = 2  # ours, and the one in flight that the importer drops
_OURS = 1


class TorchShmTicket(msgspec.Struct, frozen=True, kw_only=True):
    """What a ticket says: which storage to open, once."""

    reader: ReaderName
    handle: Annotated[bytes, Meta(min_length=2, max_length=255)]  # as torch names it: "/" and the file's name
    nbytes: Natural  # of the bucket, without torch's header
    checksum: Annotated[int, Meta(ge=0)]

    @classmethod
    def unpack(cls, ticket: bytes) -> Self:
        """The ticket in bytes from outside. Raises `CodecError` only."""
        return unseal(ticket, b"S", cls)


class _Copy:
    """One export: a file, mapped here as long as its reader may hold it."""

    def __init__(self, name: str, data: memoryview) -> None:
        self.name = name
        self._path = os.path.join(DIRECTORY, name)
        size = HEADER_BYTES + len(data)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # a full /dev/shm is an error here, not a SIGBUS in the copy
            self._map = mmap.mmap(fd, size)
        except OSError:
            os.unlink(self._path)
            raise
        finally:
            os.close(fd)
        self._map[HEADER_BYTES:] = data
        _COUNT.pack_into(self._map, 0, _HANDED_OUT)

    @property
    def released(self) -> bool:
        count: int = _COUNT.unpack_from(self._map, 0)[0]
        return count <= _OURS

    def remove(self) -> None:
        self._map.close()
        with suppress(FileNotFoundError):  # torch's helper has removed it: its reader died
            os.unlink(self._path)


class TorchShmSender(BucketSender):
    """Exports slots of `arena`, which the caller owns and closes."""

    capabilities = Capabilities(device="cpu", scope="node", collective=False)

    def __init__(self, arena: Arena, *, ledger: Ledger | None = None, checksums: Checksums | None = None) -> None:
        super().__init__()
        self._arena = arena
        self._ledger = ledger if ledger is not None else Ledger()
        self._checksums = checksums if checksums is not None else Checksums(arena)
        self._exports = Exports(arena.slots, arena.slot_bytes)
        self._copies: dict[tuple[int, str], _Copy] = {}  # (slot, reader)
        self._readers: set[str] = set()
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    def offer(self, reader: str) -> bytes:
        """There is nothing to attach to: every ticket says all that its reader needs."""
        self._check_open()
        if os.path.realpath(self._arena.directory) != DIRECTORY:
            raise LocalProtocolError(
                f"stock engines look for shared memory in {DIRECTORY}, and this node keeps its own in "
                f"{self._arena.directory}",
                hint=f"leave node.shm_dir at {DIRECTORY}, or use the engine's plugin",
            )
        self._readers.add(reader)
        return b""

    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        names = list(readers)
        with self._lock:
            self._check_open()
            if strangers := [name for name in names if name not in self._readers]:
                raise LocalProtocolError(f"nothing was offered to {', '.join(strangers)}")
            self._settle(slot)
            export = self._exports.begin(slot, nbytes, sequence, names)
            export.checksum = self._checksums.of(slot, sequence, nbytes, self._check_open)
            self._exports.record(slot, export)
            tickets = {}
            for name in names:
                copy = self._copy(slot, nbytes)
                self._copies[slot, name] = copy
                export.readers.add(name)
                export.waiting[name] = 0
                self._ledger.exported(name)
                tickets[name] = seal(
                    b"S",
                    TorchShmTicket(
                        reader=name, handle=b"/" + copy.name.encode(), nbytes=nbytes, checksum=export.checksum
                    ),
                )
            return tickets

    def send(self, slot: int, *, deadline: float) -> None:
        """Nothing to move: the readers look at their own copies."""
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

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            while self._copies:
                self._copies.popitem()[1].remove()

    def abort(self) -> None:
        self.close()

    def _copy(self, slot: int, nbytes: int) -> _Copy:
        name = f"{self._arena.name}-x{next(self._numbers)}"
        try:
            return _Copy(name, self._arena.slot(slot)[:nbytes])
        except OSError as error:
            raise TransportError(
                f"no room for a copy of {nbytes} bytes in {DIRECTORY}: {error.strerror}",
                hint="stock engines on a CPU need room for one bucket for each of their ranks beside the arenas",
            ) from error

    def _settle(self, slot: int) -> tuple[str, ...]:
        """Forget and book the readers of `slot` that are done; the others."""
        export = self._exports.get(slot)
        if export is None:
            return ()
        for reader in [name for name in export.waiting if self._copies[slot, name].released]:
            self._forget(slot, reader)
            self._ledger.opened(reader)
            self._ledger.closed(reader)
        return tuple(export.waiting)

    def _forget(self, slot: int, reader: str) -> None:
        self._copies.pop((slot, reader)).remove()
        export = self._exports.get(slot)
        if export is not None:
            export.waiting.pop(reader, None)
