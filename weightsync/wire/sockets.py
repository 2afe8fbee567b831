"""Settings of every socket of the control plane: limits, CURVE, and the file of an ipc endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import zmq

from weightsync.wire.codec import MAX_FRAME

if TYPE_CHECKING:
    from weightsync.wire.keys import ClusterKey

__all__ = ["bounded", "guarded", "socket_path"]

_QUEUE = 10_000  # messages a peer may lag behind before it is dropped


def socket_path(endpoint: str) -> str:
    """Return the file of an ipc endpoint, or "" for others."""
    return endpoint.removeprefix("ipc://") if endpoint.startswith("ipc://") else ""


def bounded(line: zmq.Socket[Any], endpoint: str) -> None:
    """Set the limits of a socket that is about to be bound or connected to `endpoint`."""
    if "[" in endpoint:  # an IPv6 address
        line.setsockopt(zmq.IPV6, 1)
    line.setsockopt(zmq.LINGER, 0)
    line.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    line.setsockopt(zmq.SNDHWM, _QUEUE)
    line.setsockopt(zmq.RCVHWM, _QUEUE)


def guarded(line: zmq.Socket[Any], key: ClusterKey | None, *, listens: bool) -> None:
    """Have the socket use CURVE, if there is a key. A socket that listens also needs an authenticator."""
    if key is None:
        return
    line.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
    line.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
    if listens:
        line.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        line.setsockopt(zmq.CURVE_SERVERKEY, key.public)
