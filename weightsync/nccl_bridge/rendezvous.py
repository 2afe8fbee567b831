"""Where the members of a communicator find one another: a key-value store on one of their nodes.

It listens on the one address it is given, not on all. Keys begin with a secret that the daemons tell their bridges over
their own (authenticated) connections, so that a stranger who reaches the port can neither guess nor overwrite one.
"""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from typing import Any, Protocol

from weightsync.errors import TransportBroken, TransportTimeout
from weightsync.nccl_bridge.sockets import Sockets, Window
from weightsync.transports.base import seconds_left

__all__ = ["Meeting", "Rendezvous", "load", "prefixed", "translated"]

_LONGEST = 1e6  # seconds that a socket can be told to wait
_PLACE = re.compile(r"^\[\S+:\d+\] ")  # gloo begins with where in its source it is


class Meeting(Protocol):
    """What a communicator needs of a rendezvous."""

    sockets: Sockets  # its own

    def store(self, key: str, generation: int) -> Any:
        """Where its members leave word for each other."""


class Rendezvous:
    """One end of the store: made by `host` on one member's node, by `connect` elsewhere."""

    def __init__(self, store: Any, port: int, sockets: Sockets) -> None:
        self._store = store
        self.port = port
        self.sockets = sockets

    @classmethod
    def host(cls, host: str, *, deadline: float) -> Rendezvous:
        """Listen on `host`, an address of this node, at any free port. Raises `TransportBroken` if that is not ours."""
        what = f"rendezvous on {host}"
        left, window = seconds_left(deadline, what), Window()
        try:
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            listening = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransportBroken(
                f"{what}: {error.strerror or error}", hint="it must be an address of this node"
            ) from error
        port = int(listening.getsockname()[1])
        try:
            store = _torch().TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=left),
                master_listen_fd=listening.detach(),  # bound already; torch itself would listen on every address
            )
        except RuntimeError as error:
            raise translated(error, what) from error
        return cls(store, port, window.sockets())

    @classmethod
    def connect(cls, host: str, port: int, *, deadline: float) -> Rendezvous:
        """Connect to the store that another member hosts. Raises `TransportBroken` where nobody does."""
        what = f"rendezvous at {host}:{port}"
        try:  # torch tries several times, each for as long as it is given in all
            socket.create_connection((host, port), timeout=min(seconds_left(deadline, what), _LONGEST)).close()
        except TimeoutError as error:
            raise TransportTimeout(f"{what}: its deadline passed") from error
        except OSError as error:
            raise TransportBroken(f"{what}: {error.strerror or error}", hint="whoever hosted it has left") from error
        left, window = seconds_left(deadline, what), Window()
        try:
            store = _torch().TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=left)
            )
        except RuntimeError as error:
            raise translated(error, what) from error
        return cls(store, port, window.sockets())

    def store(self, key: str, generation: int) -> Any:
        """The part of the store (a `torch.distributed.Store`) of one generation, behind the secret `key`."""
        return prefixed(self._store, f"weightsync/{key}/{generation}")

    @property
    def raw(self) -> Any:
        """The whole store."""
        return self._store


def prefixed(store: Any, *prefixes: str) -> Any:
    """The part of a store below `prefixes`, the outermost first."""
    for prefix in prefixes:
        store = _torch().PrefixStore(prefix, store)
    return store


def _torch() -> Any:
    import torch.distributed  # noqa: TID251 - here and not above: 200 MB that only a member of a communicator needs

    return torch.distributed


def load() -> None:
    """Do now what the first rendezvous of this process would do: seconds of loading."""
    _torch()


def translated(error: RuntimeError, what: str) -> TransportBroken | TransportTimeout:
    """torch's error as ours. torch tells a timeout by its text alone."""
    text = _PLACE.sub("", str(error).split("\n", 1)[0]).partition(" This is typically caused by")[0]
    text = text.partition(", keys:")[0].strip()  # they hold the secret
    lowered = text.lower()
    if "timed out" in lowered or "timeout" in lowered:
        return TransportTimeout(f"{what}: {text}")
    return TransportBroken(f"{what}: {text}", hint="a member of the communicator ended or cannot be reached")
