"""CUDA-IPC handles for stock engines: the slot itself, exported anew for each reader in torch's own format.

torch's importer (`rebuild_cuda_tensor`) opens the handle, and when it frees what it made of it, it synchronises its
stream and takes a reference counter down by one. Every export here has a counter of its own, 1 when it is made, so that
0 means read and released: the fence. Serialising once and sending that to two readers would take one counter below zero
and leave it to chance when; that is the leak that this avoids. torch keeps no books here: nothing of the bridge's is
torch memory, so nothing waits for `ipc_collect`.

The formats, torch 2.6 to 2.13:
- handle: a version byte, `c` for cudaMalloc memory, and the 64 bytes of cudaIpcMemHandle_t. Readers refuse versions
  above their own (3 in torch 2.13, 2 before) and read lower ones alike (`SHAREABLE_HANDLE_VERSION` in
  c10/cuda/CUDACachingAllocator.cpp);
- counters: a file in /dev/shm of 64 bytes, whose first four count who has it mapped, and 10,000 little-endian int64
  (`CudaIPCRefCountersFile` in torch/csrc/CudaIPCTypes.h). Readers remove the file when that count comes to 0, which
  ours in it prevents.
A reader puts its own device in the place of ours, which the adapters see to.
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
_HANDLE = b"\x01c"  # the lowest version there is: every torch reads it
Blob = Annotated[bytes, Meta(max_length=1024)]


class TorchCudaTicket(msgspec.Struct, frozen=True, kw_only=True):
    """What a ticket says: the arguments of torch's `rebuild_cuda_tensor` for the bucket as uint8 [nbytes]."""

    reader: ReaderName
    nbytes: Natural
    checksum: Annotated[int, Meta(ge=0)]
    storage_handle: Blob
    storage_offset: Natural  # bytes, of the bucket in what the handle opens
    counter_handle: Blob
    counter: Natural

    @classmethod
    def unpack(cls, ticket: bytes) -> Self:
        """The ticket in bytes from outside. Raises `CodecError` only."""
        return unseal(ticket, b"U", cls)


class Counters:
    """A file of reference counters as torch lays it out. Made by a bridge, taken down by engines."""

    def __init__(self, name: str) -> None:
        """Raises `TransportError` where there is no room for it."""
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
        """A counter that nobody uses, set to 1; None if all are held, such as by readers that were lost."""
        for cell in itertools.islice(self._order, _CELLS):
            if cell not in self._taken and self.value(cell) <= 0:
                self._taken.add(cell)
                _COUNT.pack_into(self._map, HEADER_BYTES + cell * _COUNT.size, 1)
                return cell
        return None

    def value(self, cell: int) -> int:
        """What it stands at."""
        count: int = _COUNT.unpack_from(self._map, HEADER_BYTES + cell * _COUNT.size)[0]
        return count

    def give_back(self, cell: int) -> None:
        """Nobody waits for this counter any more."""
        self._taken.discard(cell)

    def close(self) -> None:
        """Remove the file; readers that have yet to let go find it gone, which torch forgives."""
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
        self._counters: list[Counters] = []  # one file, and another whenever readers that were lost have used one up

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

    def _count(self, slot: int, nbytes: int) -> _Export:
        assert self._arena.memory is not None
        cell = self._counters[-1].take() if self._counters else None
        if cell is None:
            self._counters.append(Counters(f"{self._arena.name}-x{len(self._counters)}"))
            cell = self._counters[-1].take()
            assert cell is not None, "a new file has counters"
        return _Export(self._counters[-1], cell, self._arena.memory.handle, slot * self._arena.stride, nbytes)

    def close(self) -> None:
        super().close()
        while self._counters:
            self._counters.pop().close()
