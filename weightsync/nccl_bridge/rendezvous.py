"""Where the members of a communicator find one another: a key-value store on one of their nodes.

The store listens only on the address that it is given. Keys begin with a secret, which the daemons tell their bridges
over their own (authenticated) connections. So a stranger who reaches the port can neither guess nor overwrite a key.
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

_LONGEST = 1e6  # seconds; the longest timeout that is given to a socket
_PLACE = re.compile(r"^\[\S+:\d+\] ")  # gloo's errors begin with file and line of its source


class Meeting(Protocol):
    """What a communicator needs of a rendezvous."""

    sockets: Sockets  # the rendezvous's own

    def store(self, key: str, generation: int) -> Any:
        """Return the store through which the members of one generation exchange what they need to connect."""


class Rendezvous:
    """One end of the store: made by `host` on one member's node, by `connect` elsewhere."""

    def __init__(self, store: Any, port: int, sockets: Sockets) -> None:
        self._store = store
        self.port = port
        self.sockets = sockets

    @classmethod
    def host(cls, host: str, *, deadline: float) -> Rendezvous:
        """Listen on `host` at any free port. Raises `TransportBroken` if `host` is no address of this node."""
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
        """Connect to the store that another member hosts. Raises `TransportBroken` if nothing listens there."""
        what = f"rendezvous at {host}:{port}"
        try:  # a plain connection first: torch tries several times, and gives each try the whole timeout
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
        """Return one generation's part of the store (a `torch.distributed.Store`), behind the secret `key`."""
        return prefixed(self._store, f"weightsync/{key}/{generation}")

    @property
    def raw(self) -> Any:
        """The whole store."""
        return self._store


def prefixed(store: Any, *prefixes: str) -> Any:
    """Return the part of a store below `prefixes`, the outermost first."""
    for prefix in prefixes:
        store = _torch().PrefixStore(prefix, store)
    return store


def _torch() -> Any:
    import torch.distributed  # noqa: TID251 - here and not above: 200 MB that only a member of a communicator needs

    return torch.distributed


def load() -> None:
    """Load torch now, which takes seconds, so that this process's first rendezvous does not have to."""
    _torch()


def translated(error: RuntimeError, what: str) -> TransportBroken | TransportTimeout:
    """Return torch's error as ours. Only its text tells a timeout from other failures."""
    text = _PLACE.sub("", str(error).split("\n", 1)[0]).partition(" This is typically caused by")[0]
    text = text.partition(", keys:")[0].strip()  # the keys contain the secret
    lowered = text.lower()
    if "timed out" in lowered or "timeout" in lowered:
        return TransportTimeout(f"{what}: {text}")
    return TransportBroken(f"{what}: {text}", hint="a member of the communicator ended or cannot be reached")
