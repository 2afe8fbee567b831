"""CUDA-IPC handles for stock engines: the slot itself, exported anew for each reader in torch's own format.

torch's importer (`rebuild_cuda_tensor`) opens the handle. When its storage is freed, torch synchronises its stream and
decrements a reference counter. Every export here has its own counter, 1 when it is made, so 0 means read and released:
the fence. One serialised export sent to two readers would take its counter below zero, at a time left to chance; a
counter for each reader avoids that leak. The bridge's slots are no torch memory, so torch keeps no books of them here,
and nothing waits for `ipc_collect`.

The formats, torch 2.6 to 2.13:
- handle: a version byte, `c` for cudaMalloc memory, and the 64 bytes of cudaIpcMemHandle_t. Readers refuse versions
  above their own (3 in torch 2.13, 2 before) and read lower ones alike (`SHAREABLE_HANDLE_VERSION` in
  c10/cuda/CUDACachingAllocator.cpp);
- counters: a file in /dev/shm with a header of 64 bytes and 10,000 little-endian int64 (`CudaIPCRefCountersFile` in
  torch/csrc/CudaIPCTypes.h). The header's first four bytes count the processes that map it. Readers remove the file
  when this count comes to 0, so it includes the bridge.
The adapters see to it that a reader opens the export on its own device.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from msgspec import Meta

from weightsync.errors import LocalProtocolError, TransportError
from weightsync.ipc.descriptors import Natural, ReaderName, seal, unseal
from weightsync.ipc.segments import DIRECTORY
from weightsync.transports.counted import CountedSender
from weightsync.transports.torch_shm import HEADER_BYTES

if TYPE_CHECKING:
    from weightsync.ipc.arena import Arena

__all__ = ["Counters", "TorchCudaSender", "TorchCudaTicket"]

_COUNT = struct.Struct("<q")
_CELLS = 10_000  # torch's CUDA_IPC_REF_COUNTER_FILE_SIZE
_MAPPED = struct.Struct("<i")
_HANDLE = b"\x01c"  # version 1, the lowest: every torch reads it
Blob = Annotated[bytes, Meta(max_length=1024)]


class TorchCudaTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a ticket: arguments of torch's `rebuild_cuda_tensor` for the bucket as uint8 [nbytes]."""

    reader: ReaderName
    nbytes: Natural
    checksum: Annotated[int, Meta(ge=0)]
    storage_handle: Blob
    storage_offset: Natural  # bytes, from the start of the handle's allocation to the bucket
    counter_handle: Blob
    counter: Natural

    @classmethod
    def unpack(cls, ticket: bytes) -> Self:
        """Return the ticket in bytes from outside. Raises `CodecError` only."""
        return unseal(ticket, b"U", cls)


class Counters:
    """A file of reference counters in torch's format. A bridge sets them; engines count them down."""

    def __init__(self, name: str) -> None:
        """Create the file. Raises `TransportError` if there is no room for it."""
        self.handle = b"/" + name.encode()
        self._path = os.path.join(DIRECTORY, name)
        size = HEADER_BYTES + _CELLS * _COUNT.size
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                self._map = mmap.mmap(fd, size)
            except OSError:
                os.unlink(self._path)
                raise
            finally:
                os.close(fd)
        except OSError as error:
            raise TransportError(f"no room for {size} bytes of reference counters in {DIRECTORY}: {error}") from error
        _MAPPED.pack_into(self._map, 0, 1)
        self._order = itertools.cycle(range(_CELLS))
        self._taken: set[int] = set()

    def take(self) -> int | None:
        """Return an unused counter, set to 1; None if all are held, for example by readers that were lost."""
        for cell in itertools.islice(self._order, _CELLS):
            if cell not in self._taken and self.value(cell) <= 0:
                self._taken.add(cell)
                _COUNT.pack_into(self._map, HEADER_BYTES + cell * _COUNT.size, 1)
                return cell
        return None

    def value(self, cell: int) -> int:
        """Return the present value of a counter."""
        count: int = _COUNT.unpack_from(self._map, HEADER_BYTES + cell * _COUNT.size)[0]
        return count

    def give_back(self, cell: int) -> None:
        """Let a counter be used again, once it has come to 0."""
        self._taken.discard(cell)

    def close(self) -> None:
        """Remove the file. Readers that release later find it gone, which torch tolerates."""
        self._map.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)


class _Export:
    """One reader's hold on a slot."""

    def __init__(self, counters: Counters, cell: int, handle: bytes, offset: int, nbytes: int) -> None:
        self._counters, self._cell = counters, cell
        self._handle, self._offset, self._nbytes = handle, offset, nbytes

    @property
    def released(self) -> bool:
        return self._counters.value(self._cell) <= 0

    def ticket(self, reader: str, checksum: int) -> bytes:
        return seal(
            b"U",
            TorchCudaTicket(
                reader=reader,
                nbytes=self._nbytes,
                checksum=checksum,
                storage_handle=_HANDLE + self._handle,
                storage_offset=self._offset,
                counter_handle=self._counters.handle,
                counter=self._cell,
            ),
        )

    def remove(self) -> None:
        self._counters.give_back(self._cell)


class TorchCudaSender(CountedSender):
    """Exports slots of an arena on a GPU."""

    def __init__(self, arena: Arena, **books: Any) -> None:
        super().__init__(arena, **books)
        self._counters: list[Counters] = []  # files; a further one if lost readers have used up all there are

    def _check_possible(self) -> None:
        if self._arena.memory is None:
            raise LocalProtocolError(
                "stock engines on GPUs are given CUDA-IPC handles, and this node's arenas lie in host memory",
                hint='set arena.device = "cuda" in the node config, or use the engine\'s plugin',
            )
        if os.path.realpath(self._arena.directory) != DIRECTORY:
            raise LocalProtocolError(
                f"stock engines look for reference counters in {DIRECTORY}, and this node keeps its files in "
                f"{self._arena.directory}",
                hint=f"leave node.shm_dir at {DIRECTORY}, or use the engine's plugin",
            )

    def _make_export(self, slot: int, nbytes: int) -> _Export:
        assert self._arena.memory is not None
        for counters in reversed(self._counters):
            if (cell := counters.take()) is not None:
                break
        else:
            counters = Counters(f"{self._arena.name}-x{len(self._counters)}")
            self._counters.append(counters)
            cell = counters.take()
            assert cell is not None, "a new file has counters"
        return _Export(counters, cell, self._arena.memory.handle, slot * self._arena.stride, nbytes)

    def close(self) -> None:
        super().close()
        while self._counters:
            self._counters.pop().close()
