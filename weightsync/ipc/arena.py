"""The arena: a file of slots in shared memory, made by a bridge, mapped by trainer ranks and by readers.

    0            header   magic, version, slots, slot_bytes, readers, nonce, hash of where slots lie on a GPU
    64 KiB       fences   one 16-byte cell for every slot and reader (`fences.py`)
    control      slots    each begins at a multiple of 64 KiB, which is a multiple of every page size

If slots lie on a GPU (`weightsync.ipc.cuda`), the file has header and fences alone, and the offer says where they lie.

The file is called `weightsync-<uid>-<node>-<bridge>-<incarnation>`, belongs to its maker alone (0600) and is never
reused: a restarted bridge makes another one with another incarnation and nonce. Its pages are allocated when it is
made, so that a full /dev/shm is an error then, and not a SIGBUS in a later copy.

A process that may attach gets an *offer*: bytes in a control message. Attaching does not trust the offer: the file must
be a private regular file of this user, with the size and the nonce that the offer says. Trainer ranks map the slots
writable. Readers map them read-only and can write nothing but the fence cells. (Slots on a GPU cannot be mapped
read-only.)
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Self

import msgspec
from msgspec import Meta

from weightsync.errors import CodecError, ConfigError, LocalProtocolError, TransportBroken, TransportClosed
from weightsync.ipc.descriptors import ReaderName, seal, unseal
from weightsync.ipc.fences import CELL_BYTES, FenceTable
from weightsync.ipc.segments import DIRECTORY, SEGMENT, segment_name, unlink

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "MAX_READERS",
    "Arena",
    "ArenaOffer",
    "DeviceMemory",
    "stride",
]

MAX_READERS = 512  # cells a slot has by default: 64 engines of 8 tensor-parallel ranks; 8 KiB of table per slot

_MAGIC = b"WSARENA\0"
_VERSION = 3
_HEADER = struct.Struct("<8sIIQI16s8s")
_ALIGN = 64 * 1024


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Slots on a GPU: one allocation, slot after slot."""

    gpu: Annotated[str, Meta(min_length=1, max_length=64)]  # UUID
    handle: Annotated[bytes, Meta(min_length=64, max_length=64)]  # cudaIpcMemHandle_t of the allocation


class ArenaOffer(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of an offer. `reader` and `cell` are absent in the offer to a trainer rank."""

    directory: Annotated[str, Meta(min_length=1, max_length=512)]
    name: Annotated[str, Meta(pattern=rf"^{SEGMENT}\Z")]
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    slots: Annotated[int, Meta(ge=1, le=4096)]
    slot_bytes: Annotated[int, Meta(ge=1, le=2**44)]
    readers: Annotated[int, Meta(ge=1, le=4096)]
    memory: DeviceMemory | None = None  # where the slots lie, if not in the file
    reader: ReaderName | None = None
    cell: Annotated[int, Meta(ge=0, le=4095)] | None = None

    @property
    def lineage(self) -> str:
        """A name that is the same for all incarnations of one bridge."""
        return f"{self.directory}/{self.name.rpartition('-')[0]}"

    @classmethod
    def unpack(cls, data: bytes) -> ArenaOffer:
        """Read an offer in bytes from outside. Raises `CodecError` only."""
        offer = unseal(data, b"A", cls)
        if not os.path.isabs(offer.directory) or "\0" in offer.directory or ".." in offer.directory.split("/"):
            raise CodecError(f"an offer names the directory {offer.directory!r}")
        if (offer.reader is None) != (offer.cell is None):
            raise CodecError("an offer to a reader has both a name and a cell")
        if offer.cell is not None and offer.cell >= offer.readers:
            raise CodecError(f"an offer gives cell {offer.cell} of {offer.readers}")
        return offer


def stride(slot_bytes: int) -> int:
    """Bytes from the beginning of one slot to that of the next."""
    return _round_up(slot_bytes)


class Arena:
    """A mapped arena. Made by `create` in its bridge, or by `attach` from an offer anywhere else.

    `close` never fails because somebody still holds a view: it drops the arena's own references, and the memory stays
    mapped until the last memoryview, numpy array or tensor made from it is gone.
    """

    def __init__(self, offer: ArenaOffer, fd: int, *, writable: bool, owner: bool) -> None:
        """Map the file open as `fd`. Use `create` or `attach`."""
        self.directory = offer.directory
        self.name = offer.name
        self.nonce = offer.nonce
        self.slots = offer.slots
        self.slot_bytes = offer.slot_bytes
        self.readers = offer.readers
        self.memory = offer.memory
        self.writable = writable
        self.owner = owner
        self.stride = stride(offer.slot_bytes)
        control, total = _sizes(offer)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._control: mmap.mmap | None = mmap.mmap(fd, control, mmap.MAP_SHARED, protection)
        self._data: mmap.mmap | None = None
        if offer.memory is None:
            self._data = mmap.mmap(
                fd, total - control, mmap.MAP_SHARED, protection if writable else mmap.PROT_READ, offset=control
            )
        cells = memoryview(self._control)[_ALIGN : _ALIGN + offer.slots * offer.readers * CELL_BYTES]
        self._fences: FenceTable | None = FenceTable(cells, offer.slots, offer.readers)

    @classmethod
    def create(
        cls,
        *,
        node: str,
        bridge: int,
        slots: int,
        slot_bytes: int,
        incarnation: str | None = None,
        readers: int = MAX_READERS,
        directory: str = DIRECTORY,
        memory: DeviceMemory | None = None,
    ) -> Arena:
        """Make an arena of `slots` × `slot_bytes`. If `memory` is given, its slots lie there, on a GPU.

        Raises `ConfigError` if there is no room for it.
        """
        name = segment_name(node, bridge, incarnation or secrets.token_hex(8))
        wanted = ArenaOffer(
            directory=os.path.abspath(directory),
            name=name,
            nonce=secrets.token_bytes(16),
            slots=slots,
            slot_bytes=slot_bytes,
            readers=readers,
            memory=memory,
        )
        try:
            offer = ArenaOffer.unpack(seal(b"A", wanted))  # one validation for both ends
        except CodecError as error:
            raise ConfigError(
                f"no arena of {slots} slots of {slot_bytes} bytes can be made: {error.message}"
            ) from error
        try:
            fd = _open(offer, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise ConfigError(f"arena {name} cannot be made in {offer.directory}: {error.strerror}") from error
        try:
            _allocate(fd, offer)
            os.pwrite(fd, _header(offer), 0)
            return cls(offer, fd, writable=True, owner=True)
        except BaseException:
            unlink(offer.directory, name)
            raise
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, offer: bytes | ArenaOffer, *, writable: bool) -> Arena:
        """Map the arena that `offer` describes.

        Raises `CodecError` for bytes that are no offer, and `TransportBroken` if the arena is not there (any more) or
        is not the one that the offer describes.
        """
        wanted = ArenaOffer.unpack(offer) if isinstance(offer, bytes) else offer
        try:
            fd = _open(wanted, os.O_RDWR)
        except OSError as error:
            raise TransportBroken(
                f"arena {wanted.name} cannot be opened in {wanted.directory}: {error.strerror}",
                hint="its bridge has ended, or this process does not share that directory with the daemon "
                "(containers: --ipc=host, or one volume for both)",
            ) from error
        try:
            _check(fd, wanted)
            return cls(wanted, fd, writable=writable, owner=False)
        except (OSError, ValueError) as error:
            raise TransportBroken(f"arena {wanted.name} cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    def offer(self, reader: str | None = None, cell: int | None = None) -> bytes:
        """Return the bytes of an offer: to a trainer rank, or to the `reader` that was given `cell`."""
        return seal(
            b"A",
            ArenaOffer(
                directory=self.directory,
                name=self.name,
                nonce=self.nonce,
                slots=self.slots,
                slot_bytes=self.slot_bytes,
                readers=self.readers,
                memory=self.memory,
                reader=reader,
                cell=cell,
            ),
        )

    def slot(self, index: int) -> memoryview:
        """The `slot_bytes` bytes of one slot; read-only unless the arena was attached writable."""
        if self.memory is not None:
            raise LocalProtocolError(f"the slots of arena {self.name} lie on GPU {self.memory.gpu}")
        if self._data is None:
            raise TransportClosed(f"arena {self.name} was closed")
        if not 0 <= index < self.slots:
            raise LocalProtocolError(f"arena {self.name} has no slot {index}, only {self.slots}")
        return memoryview(self._data)[index * self.stride : index * self.stride + self.slot_bytes]

    @property
    def fences(self) -> FenceTable:
        """The cells. A holder of the table, such as a lease not yet released, can use it even after `close`."""
        if self._fences is None:
            raise TransportClosed(f"arena {self.name} was closed")
        return self._fences

    @property
    def there(self) -> bool:
        """Whether its file still exists. The bridge removes the file when it ends, or else its daemon does."""
        return os.path.exists(os.path.join(self.directory, self.name))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._control is None

    def close(self) -> None:
        """Let go of the mapping. Closing twice does nothing."""
        data, control, self._data, self._control, self._fences = self._data, self._control, None, None, None
        for mapping in (data, control):
            if mapping is not None:
                with suppress(BufferError):  # views are alive: the last of them unmaps
                    mapping.close()

    def unlink(self) -> None:
        """Remove the file. Processes that have it mapped keep the memory. Removing twice does nothing."""
        unlink(self.directory, self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self.owner:
            self.unlink()


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _sizes(offer: ArenaOffer) -> tuple[int, int]:
    """Return the bytes of header and fences together, and of the whole file."""
    control = _ALIGN + _round_up(offer.slots * offer.readers * CELL_BYTES)
    return control, control + (offer.slots * stride(offer.slot_bytes) if offer.memory is None else 0)


def _header(offer: ArenaOffer) -> bytes:
    memory = hashlib.blake2b(msgspec.msgpack.encode(offer.memory), digest_size=8).digest()
    return _HEADER.pack(_MAGIC, _VERSION, offer.slots, offer.slot_bytes, offer.readers, offer.nonce, memory)


def _open(offer: ArenaOffer, flags: int) -> int:
    directory = os.open(offer.directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.open(offer.name, flags | os.O_NOFOLLOW | os.O_NOCTTY, 0o600, dir_fd=directory)
    finally:
        os.close(directory)


def _check(fd: int, offer: ArenaOffer) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise TransportBroken(f"arena {offer.name} is not a private file of this user")
    if status.st_size != _sizes(offer)[1]:
        raise TransportBroken(f"arena {offer.name} has {status.st_size} bytes, not {_sizes(offer)[1]}")
    if os.pread(fd, _HEADER.size, 0) != _header(offer):
        raise TransportBroken(f"arena {offer.name} is not the one that was offered", hint="its bridge was restarted")


def _allocate(fd: int, offer: ArenaOffer) -> None:
    total = _sizes(offer)[1]
    try:
        os.posix_fallocate(fd, 0, total)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM):
            raise ConfigError(f"arena {offer.name} cannot be allocated: {error.strerror}") from error
        os.ftruncate(fd, 0)
        space = os.fstatvfs(fd)
        raise ConfigError(
            f"an arena of {offer.slots} slots of {offer.slot_bytes} bytes needs {total} bytes in {offer.directory}, "
            f"which has {space.f_bavail * space.f_frsize} free ({error.strerror})",
            hint=f"make arena.slots or arena.slot_bytes smaller, or {offer.directory} larger "
            f"(containers: --shm-size={-(-total // 2**20)}m or more)",
        ) from error
