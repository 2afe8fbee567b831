"""The sockets a communicator has made, and cutting them: the way out of a gloo call that waits for a peer.

gloo can neither cancel an operation nor be told to; but it notices a connection that ends, at once and in every thread.
So who makes a communicator remembers which connections of this process are new, and to abort shuts those down. (A
listening socket must be left alone: gloo takes its end for a bug and terminates the process.)
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

__all__ = ["Sockets", "cut", "open_sockets"]

Sockets = frozenset[tuple[int, str]]  # descriptor and "socket:[inode]": a descriptor that was reused is another socket


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
