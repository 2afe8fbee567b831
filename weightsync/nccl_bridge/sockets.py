"""The sockets that a communicator has opened, and cutting them: the way out of a gloo call that waits for a peer.

gloo cannot cancel an operation, but notices at once, in every thread, that a connection has ended. So a communicator
remembers which sockets of this process came up while it was made, and shuts them down to abort. Communicators of one
process are made one after the other; else aborting one would end others too. (A listening socket must be left alone:
gloo takes its end for a bug and terminates the process.)
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

__all__ = ["Sockets", "Window", "cut", "forming", "open_sockets"]

_TURN = 0.05  # seconds between two calls of `check` while waiting for a turn
Sockets = frozenset[tuple[int, str]]  # descriptor and "socket:[inode]": a descriptor that was reused is another socket


class Window:
    """The sockets that came up while something was made; until `close`, those that have come up so far."""

    def __init__(self) -> None:
        self._before = open_sockets()
        self._after: Sockets | None = None

    def sockets(self) -> Sockets:
        """Return the new sockets that are open now; after `close`, those that were open then."""
        return (open_sockets() if self._after is None else self._after) - self._before

    def close(self) -> None:
        """End the window: sockets that come up later do not belong to it."""
        self._after = open_sockets()


@contextmanager
def forming(one_by_one: threading.Lock, check: Callable[[], object]) -> Iterator[Window]:
    """Wait for a turn to make something that opens sockets, and yield the window of its sockets.

    `check`, called during the wait, raises to give up.
    """
    while not one_by_one.acquire(timeout=_TURN):
        check()
    window = Window()
    try:
        yield window
    finally:
        window.close()
        one_by_one.release()


def open_sockets() -> Sockets:
    """Return every socket of this process."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            link = os.readlink(f"/proc/self/fd/{entry}")
            if link.startswith("socket:"):
                found.add((int(entry), link))
    return frozenset(found)


def cut(sockets: Sockets) -> int:
    """Shut down the TCP connections among `sockets` that are still the same sockets. Returns how many."""
    count = 0
    for descriptor, link in sockets:
        with suppress(OSError):
            mine = os.dup(descriptor)  # unlike `descriptor`, nobody can close and reuse `mine` after the check below
            if os.readlink(f"/proc/self/fd/{mine}") != link:
                os.close(mine)
                continue
            with socket.socket(fileno=mine) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.getpeername()  # raises for a listening socket
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count
