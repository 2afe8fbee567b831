"""Host memory for stock engines on a CPU.

Every copy is a file in the format of a torch storage that is shared by file name: 64 bytes, the first four of which are
a reference count, then the bucket. torch's importer adds a reference when it maps the file, drops the one that was in
flight, and drops its own when the storage is freed. So a count back at 1, which is ours, means read and released.
(`RefcountedMapAllocator` in torch/aten/src/ATen/MapAllocator.cpp, `rebuild_storage_filename` in
torch/multiprocessing/reductions.py; run with torch 2.13.)

A ticket has only the file's name in torch's form. torch's helper process removes the file by this name if the reader
dies, so names are never used twice.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from contextlib import suppress
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from weightsync.errors import LocalProtocolError, TransportError
from weightsync.ipc.descriptors import Natural, ReaderName, seal, unseal
from weightsync.ipc.segments import DIRECTORY
from weightsync.transports.counted import CountedSender

__all__ = ["HEADER_BYTES", "TorchShmSender", "TorchShmTicket"]

HEADER_BYTES = 64  # torch's `map_alloc_alignment`
_COUNT = struct.Struct("<i")
_HANDED_OUT = 2  # our reference, and the one in flight that the importer drops
_OURS = 1


class TorchShmTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a ticket: which storage to open, once."""

    reader: ReaderName
    handle: Annotated[bytes, Meta(min_length=2, max_length=255)]  # as torch names it: "/" and the file's name
    nbytes: Natural  # of the bucket, without torch's header
    checksum: Annotated[int, Meta(ge=0)]

    @classmethod
    def unpack(cls, ticket: bytes) -> Self:
        """Return the ticket in bytes from outside. Raises `CodecError` only."""
        return unseal(ticket, b"S", cls)


class _File:
    """A copy of a bucket, mapped here as long as its reader may hold it."""

    def __init__(self, name: str, data: memoryview) -> None:
        self._name = name
        self._nbytes = len(data)
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

    def ticket(self, reader: str, checksum: int) -> bytes:
        handle = b"/" + self._name.encode()
        return seal(b"S", TorchShmTicket(reader=reader, handle=handle, nbytes=self._nbytes, checksum=checksum))

    def remove(self) -> None:
        self._map.close()
        with suppress(FileNotFoundError):  # its reader died, and torch's helper has removed it
            os.unlink(self._path)


class TorchShmSender(CountedSender):
    """Exports copies in /dev/shm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._numbers = itertools.count(1)

    def _check_possible(self) -> None:
        if self._arena.memory is not None:
            raise LocalProtocolError(
                "this reader takes host memory, and this node's arenas lie on GPUs",
                hint='arena.device = "cpu" in the node config serves engines on a CPU',
            )
        if os.path.realpath(self._arena.directory) != DIRECTORY:
            raise LocalProtocolError(
                f"stock engines look for shared memory in {DIRECTORY}, and this node keeps its own in "
                f"{self._arena.directory}",
                hint=f"leave node.shm_dir at {DIRECTORY}, or use the engine's plugin",
            )

    def _make_export(self, slot: int, nbytes: int) -> _File:
        data = self._arena.slot(slot)[:nbytes]
        name = f"{self._arena.name}-x{next(self._numbers)}"
        try:
            return _File(name, data)
        except OSError as error:
            raise TransportError(
                f"no room for a copy of {len(data)} bytes in {DIRECTORY}: {error.strerror}",
                hint="stock engines on a CPU need room for one bucket for each of their ranks beside the arenas",
            ) from error
