"""Questions an operator asks a daemon, over the same socket that trainers use."""

from __future__ import annotations

import os
import time

from weightsync.config import check_endpoint
from weightsync.errors import ConfigError, DaemonLost, RemoteProtocolError
from weightsync.wire import messages as msg
from weightsync.wire.keys import read_key_file
from weightsync.wire.trainer_link import TrainerLink

__all__ = ["fetch_status"]


def fetch_status(endpoint: str, *, timeout: float = 5.0) -> msg.Status:
    """How the daemon at `endpoint` is: a node's own socket or, with the key file that `WEIGHTSYNC_KEY_FILE` names, the
    `cluster.listen` of any. Raises `DaemonLost` when it does not answer within `timeout` seconds.
    """
    file = os.environ.get("WEIGHTSYNC_KEY_FILE")
    key = read_key_file(file) if file and endpoint.startswith("tcp://") else None
    if key is None:
        _check_here(endpoint)
    link = TrainerLink(endpoint, patience=timeout, key=key)
    try:
        link.start()
        link.send(msg.StatusRequest(id=1))
        answer = link.receive(time.monotonic() + timeout)
        if answer is None:
            raise DaemonLost(f"weightsyncd at {endpoint} did not answer within {timeout:g} s")
    except DaemonLost as error:
        if not endpoint.startswith("tcp://"):
            raise
        words = "where it listens for other nodes, it answers those alone who have its [cluster] key_file"
        raise DaemonLost(error.message, hint=f"{words}: set WEIGHTSYNC_KEY_FILE to that") from error
    finally:
        link.close(flush=0.0)
    if isinstance(answer, msg.ErrorReply):
        raise answer.error.error()
    if not isinstance(answer, msg.Status):
        raise RemoteProtocolError(f"weightsyncd answered a status request with {type(answer).__name__}")
    return answer


def _check_here(endpoint: str) -> None:
    try:
        check_endpoint(endpoint, "daemon")
    except ConfigError as error:
        if not endpoint.startswith("tcp://"):
            raise
        raise ConfigError(
            error.message, hint="set WEIGHTSYNC_KEY_FILE to the cluster's key file, or ask on that machine itself"
        ) from error
