"""Questions of an operator to a daemon, over the same socket that trainers use."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TypeVar

from weightsync.endpoints import check_endpoint
from weightsync.errors import ConfigError, DaemonLost, RemoteProtocolError
from weightsync.wire import messages as msg
from weightsync.wire.keys import read_key_file
from weightsync.wire.trainer_link import TrainerLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.config import EngineConfig

__all__ = ["ask", "change_engines", "fetch_status", "fetch_trace"]

_KEYED = (
    "at its [cluster] listen a daemon answers those who have its key_file: set WEIGHTSYNC_KEY_FILE to that; at [node] "
    "listen it takes no key: unset WEIGHTSYNC_KEY_FILE"
)
_PROBE = 30.0  # additional seconds for the daemon to look at the added engines

M = TypeVar("M", bound=msg.Message)


def fetch_status(endpoint: str, *, timeout: float = 5.0, fresh: bool = False) -> msg.Status:
    """Return the status of the daemon at `endpoint`.

    `endpoint` is a node's own socket or, with the key file that `WEIGHTSYNC_KEY_FILE` names, the `cluster.listen` of
    any node. `fresh`: engines as they are now, not as they were last seen. Raises `DaemonLost` if the daemon does not
    answer within `timeout` seconds.
    """
    return ask(endpoint, msg.StatusRequest(id=1, fresh=fresh), msg.Status, timeout)


def fetch_trace(endpoint: str, *, model: str = "", failed: bool = False, timeout: float = 30.0) -> msg.Traced:
    """Return a trace from the daemon at `endpoint`: of the push under way, or else the last; or the last that `failed`.

    If `model` is given, only its pushes count. Raises `ConfigError` if there is no such push, and `DaemonLost` as
    `fetch_status`.
    """
    return ask(endpoint, msg.TraceRequest(id=1, model=model, failed=failed), msg.Traced, timeout)


def change_engines(
    endpoint: str, *, add: Sequence[EngineConfig] = (), remove: Sequence[str] = (), timeout: float = 120.0
) -> tuple[msg.EngineStatus, ...]:
    """Add engines to the daemon at a node's own socket and remove others, as soon as no push is under way.

    Returns the status of the new ones. The change lasts until the daemon is restarted, or told by SIGHUP to read its
    config again. Raises `ConfigError` for engines that cannot be added or removed, `PushRefused` if a push does not
    end, and `DaemonLost`.
    """
    question = msg.ChangeEngines(id=1, timeout=timeout, add=tuple(add), remove=tuple(remove))
    return ask(endpoint, question, msg.Changed, timeout + _PROBE).engines


def ask(endpoint: str, question: msg.Message, kind: type[M], timeout: float) -> M:
    """Return the daemon's answer. Raises the error that it answers with, or `DaemonLost` after `timeout` seconds."""
    file = os.environ.get("WEIGHTSYNC_KEY_FILE")
    tcp = endpoint.startswith("tcp://")
    key = read_key_file(file) if file and tcp else None
    if key is None:
        _check_here(endpoint)
    link = TrainerLink(endpoint, patience=timeout, key=key)
    try:
        link.start()
        link.send(question)
        try:
            answer = link.receive(time.monotonic() + timeout)
        except DaemonLost as error:
            raise DaemonLost(error.message, hint=_KEYED if tcp else error.hint) from error
        if answer is None:
            raise DaemonLost(
                f"weightsyncd at {endpoint} did not answer within {timeout:g} s", hint=_KEYED if tcp else None
            )
    finally:
        link.close(flush=0.0)
    if isinstance(answer, msg.ErrorReply):
        raise answer.error.error()
    if not isinstance(answer, kind):
        raise RemoteProtocolError(f"weightsyncd answered {type(question).__name__} with {type(answer).__name__}")
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
