"""What the front process says to its workers: typed MessagePack, length-prefixed, over a socket pair. No pickle.

Every worker gets the same commands in the same order and answers each with one `Reply`. Deadlines travel as they are:
`time.monotonic()` is one clock for all processes of a machine.
"""

from __future__ import annotations

import struct
from time import monotonic
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from weightsync.errors import CodecError, TransportBroken, TransportTimeout

if TYPE_CHECKING:
    import socket

__all__ = [
    "MANIFESTS_KEPT",
    "MAX_FRAME",
    "Accept",
    "Begin",
    "Checksums",
    "Command",
    "Fingerprints",
    "Finish",
    "Load",
    "Pipe",
    "Reply",
    "Residents",
    "Step",
]

MANIFESTS_KEPT = 8  # newest accepted manifests that front and workers remember; both forget at the same count
MAX_FRAME = 512 << 20  # bytes; manifests are the largest
_HEADER = struct.Struct("!I")


class Accept(msgspec.Struct, frozen=True, tag=True):
    """Plan the loading of a manifest, and remember it by its digest."""

    manifest: bytes  # as packed


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Open an update; forget one that is open."""

    digest: bytes
    offers: tuple[bytes, ...]  # this rank's
    deadline: float


class Load(msgspec.Struct, frozen=True, tag=True):
    """Take this rank's slices out of one bucket."""

    bucket: int
    ticket: bytes  # this rank's
    deadline: float


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Check that every piece was loaded once, wait until it is; end the update; drop all caches."""

    deadline: float


class Residents(msgspec.Struct, frozen=True, tag=True):
    """Tell which boxes of an accepted manifest's tensors this rank holds. Answers packed `ResidentBoxes`."""

    digest: bytes


class Fingerprints(msgspec.Struct, frozen=True, tag=True):
    """Fingerprint these boxes as they lie in the parameters. Answers 8 bytes for each, little-endian, in order."""

    digest: bytes


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """xxh3 over all parameters in order. Answers 8 bytes, big-endian."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """Decode one token of a sequence."""

    sequence: int
    start: int  # position of the first of `tokens`; all before it are cached, and from 0 nothing is
    tokens: tuple[int, ...]
    ended: tuple[int, ...] = ()  # sequences whose caches to forget first
    draw: float | None = None  # of [0, 1): take the token there in the distribution; none: the likeliest


Command: TypeAlias = Accept | Begin | Load | Finish | Residents | Fingerprints | Checksums | Step


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's answer: how an HTTP answer would say it, and what was asked for."""

    status: int = 200
    error: str = ""
    data: bytes = b""
    token: int = 0
    logprob: float = 0.0


class Pipe:
    """One end of a socket pair, as whole frames. Used by one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, frame: bytes, *, deadline: float) -> None:
        """Raises `TransportTimeout`, and `TransportBroken` when the other side is gone."""
        if len(frame) > MAX_FRAME:
            raise CodecError(f"a command of {len(frame)} bytes is larger than {MAX_FRAME}")
        self._arm(deadline)
        try:
            self._socket.sendall(_HEADER.pack(len(frame)) + frame)
        except TimeoutError as error:
            raise TransportTimeout("the other side of the pipe does not read") from error
        except OSError as error:
            raise TransportBroken(f"the other side of the pipe is gone: {error}") from error

    def receive(self, *, deadline: float | None) -> bytes:
        """The next frame; raises as `send` does.

        Without a deadline, wait for as long as the other side lives: a worker has nothing else to do.
        """
        size = _HEADER.unpack(self._exactly(_HEADER.size, deadline))[0]
        if size > MAX_FRAME:
            raise CodecError(f"a frame of {size} bytes is larger than {MAX_FRAME}")
        return self._exactly(size, deadline)

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other side's next `receive` raises `TransportBroken`."""
        self._socket.close()

    def _exactly(self, size: int, deadline: float | None) -> bytes:
        data = bytearray(size)
        view, have = memoryview(data), 0
        while have < size:
            self._arm(deadline)
            try:
                got = self._socket.recv_into(view[have:])
            except TimeoutError as error:
                raise TransportTimeout("the other side of the pipe does not answer") from error
            except OSError as error:
                raise TransportBroken(f"the other side of the pipe is gone: {error}") from error
            if not got:
                raise TransportBroken("the other side of the pipe was closed")
            have += got
        return bytes(data)

    def _arm(self, deadline: float | None) -> None:
        self._socket.settimeout(None if deadline is None else max(deadline - monotonic(), 0.001))
