"""What every socket of the control plane has in common: bounds, CURVE, and what its endpoint says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import zmq

from weightsync.wire.codec import MAX_FRAME

if TYPE_CHECKING:
    from weightsync.wire.keys import ClusterKey

__all__ = ["bounded", "guarded", "socket_path"]

_QUEUE = 10_000  # messages a peer may lag behind before it is dropped


def socket_path(endpoint: str) -> str:
    """The file of an ipc endpoint, or "" for others."""
    return endpoint.removeprefix("ipc://") if endpoint.startswith("ipc://") else ""


def bounded(line: zmq.Socket[Any], endpoint: str) -> None:
    """Set what every socket is limited to, before it is bound or connected to `endpoint`."""
    if "[" in endpoint:  # an IPv6 address
        line.setsockopt(zmq.IPV6, 1)
    line.setsockopt(zmq.LINGER, 0)
    line.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    line.setsockopt(zmq.SNDHWM, _QUEUE)
    line.setsockopt(zmq.RCVHWM, _QUEUE)


def guarded(line: zmq.Socket[Any], key: ClusterKey | None, *, listens: bool) -> None:
    """Have the socket talk under CURVE, if there is a key. Whoever listens needs an authenticator besides."""
    if key is None:
        return
    line.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
    line.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
    if listens:
        line.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        line.setsockopt(zmq.CURVE_SERVERKEY, key.public)
