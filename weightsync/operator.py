"""Questions an operator asks a daemon, over the same socket that trainers use."""

from __future__ import annotations

import time

from weightsync.errors import DaemonLost, RemoteProtocolError
from weightsync.wire import messages as msg
from weightsync.wire.control import TrainerLink

__all__ = ["fetch_status"]


def fetch_status(endpoint: str, *, timeout: float = 5.0) -> msg.Status:
    """How the daemon at `endpoint` is. Raises `DaemonLost` when it does not answer within `timeout` seconds."""
    link = TrainerLink(endpoint, patience=timeout)
    try:
        link.start()
        link.send(msg.StatusRequest(id=1))
        answer = link.receive(time.monotonic() + timeout)
    finally:
        link.close(flush=0.0)
    if answer is None:
        raise DaemonLost(f"weightsyncd at {endpoint} did not answer within {timeout:g} s")
    if isinstance(answer, msg.ErrorReply):
        raise answer.error.error()
    if not isinstance(answer, msg.Status):
        raise RemoteProtocolError(f"weightsyncd answered a status request with {type(answer).__name__}")
    return answer
