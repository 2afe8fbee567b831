"""One end of a socket pair between a process and its child: length-prefixed frames, each with a deadline."""

from __future__ import annotations

import struct
from time import monotonic
from typing import TYPE_CHECKING

from weightsync.errors import CodecError, TransportBroken, TransportTimeout

if TYPE_CHECKING:
    import socket

__all__ = ["HEADER", "MAX_FRAME", "Pipe"]

MAX_FRAME = 512 << 20  # bytes; manifests are the largest
HEADER = struct.Struct("!I")  # the length of the frame that follows


class Pipe:
    """Sends and receives whole frames on one end of a socket pair. Used by one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, frame: bytes, *, deadline: float) -> None:
        """Send a frame. Raises `TransportTimeout`, `TransportBroken` if the other side is gone, or `CodecError`."""
        if len(frame) > MAX_FRAME:
            raise CodecError(f"a frame of {len(frame)} bytes is larger than {MAX_FRAME}")
        self._arm(deadline)
        try:
            self._socket.sendall(HEADER.pack(len(frame)) + frame)
        except TimeoutError as error:
            raise TransportTimeout("the other side of the pipe does not read") from error
        except OSError as error:
            raise TransportBroken(f"the other side of the pipe is gone: {error}") from error

    def receive(self, *, deadline: float | None) -> bytes:
        """Return the next frame. Raises as `send` does.

        Without a deadline it waits as long as the other side lives: a child has nothing else to do.
        """
        size = HEADER.unpack(self._exactly(HEADER.size, deadline))[0]
        if size > MAX_FRAME:
            raise CodecError(f"a frame of {size} bytes is larger than {MAX_FRAME}")
        return self._exactly(size, deadline)

    def fileno(self) -> int:
        """Return the socket's descriptor, for `select`."""
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
