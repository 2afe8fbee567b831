"""The sockets a communicator has made, and cutting them: the way out of a gloo call that waits for a peer.

gloo can neither cancel an operation nor be told to; but it notices a connection that ends, at once and in every thread.
So who makes a communicator remembers which sockets of this process came up meanwhile, and to abort shuts those down. In
a process with several communicators they are made one after the other, or one's end would take others along. (A
listening socket must be left alone: gloo takes its end for a bug and terminates the process.)
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

_TURN = 0.05  # seconds between two checks of who waits for a turn
Sockets = frozenset[tuple[int, str]]  # descriptor and "socket:[inode]": a descriptor that was reused is another socket


class Window:
    """The sockets that came up while something was made, or have so far."""

    def __init__(self) -> None:
        self._before = open_sockets()
        self._after: Sockets | None = None

    def sockets(self) -> Sockets:
        """Those that are open now, or were when it was made."""
        return (open_sockets() if self._after is None else self._after) - self._before

    def close(self) -> None:
        """It is made."""
        self._after = open_sockets()


@contextmanager
def forming(one_by_one: threading.Lock, check: Callable[[], object]) -> Iterator[Window]:
    """While something that opens sockets is made; `check` raises when there is no point in waiting for one's turn."""
    while not one_by_one.acquire(timeout=_TURN):
        check()
    window = Window()
    try:
        yield window
    finally:
        window.close()
        one_by_one.release()


def open_sockets() -> Sockets:
    """Every socket of this process."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            link = os.readlink(f"/proc/self/fd/{entry}")
            if link.startswith("socket:"):
                found.add((int(entry), link))
    return frozenset(found)


def cut(sockets: Sockets) -> int:
    """Shut down those of `sockets` that still are what they were and are TCP connections; returns how many."""
    count = 0
    for descriptor, link in sockets:
        with suppress(OSError):
            mine = os.dup(descriptor)  # from here on it cannot become another file
            if os.readlink(f"/proc/self/fd/{mine}") != link:
                os.close(mine)
                continue
            with socket.socket(fileno=mine) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.getpeername()  # raises for a listening one
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count
