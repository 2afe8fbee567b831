"""Whether requests go on. Every decode step passes the gate; every request is counted in and out.

open    every request goes on
drain   pausing with "wait": those in flight go on, new ones are refused, then the gate is `wait`
keep    requests, new ones too, wait at the gate and go on when it opens, on the weights they find then
wait    requests are refused
abort   requests in flight were ended, new ones are refused
"""

from __future__ import annotations

import threading
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from weightsync.errors import EngineError

if TYPE_CHECKING:
    from weightsync.adapters.base import PauseMode

__all__ = ["Gate", "RequestError"]

_MAX_RUNNING = 256


class RequestError(EngineError):
    """A request that is answered with something else than success."""

    def __init__(self, status: HTTPStatus, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **more}


class Gate:
    """Safe to use from several threads. Whoever holds the engine's turn sees `paused` stand still."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards what follows, and is notified of every change
        self._state: Literal["open", "drain", "keep", "wait", "abort"] = "open"
        self._aborts = 0
        self._running = 0

    @property
    def paused(self) -> bool:
        """Whether requests in flight do not go on."""
        return self._state not in ("open", "drain")

    @property
    def running(self) -> int:
        """Requests in flight."""
        return self._running

    def enter(self) -> int:
        """Count a request in; returns what to give to `aborted`. Raises `RequestError` where it cannot be taken."""
        with self._changed:
            if self._state not in ("open", "keep"):
                raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine is paused")
            if self._running >= _MAX_RUNNING:
                raise RequestError(HTTPStatus.TOO_MANY_REQUESTS, f"{self._running} requests are running")
            self._running += 1
            return self._aborts

    def leave(self) -> None:
        """Count a request out."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def aborted(self, since: int) -> bool:
        """Whether a request that entered at `since` has to end."""
        return self._aborts != since

    def wait_open(self, since: int, *, deadline: float) -> None:
        """Return when a request that entered at `since` may go on or has to end; else raise `RequestError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self.paused or self.aborted(since), _left(deadline)):
                raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine was not resumed in time")

    def close(self, mode: PauseMode) -> None:
        """Begin to pause, in a turn; then, outside of it, `settle`. What is closed already stays as it is, but for
        "abort", which ends the requests that are kept."""
        with self._changed:
            if mode == "abort":
                self._state = "abort"
                self._aborts += 1
            elif mode != "none" and self._state == "open":
                self._state = "drain" if mode == "wait" else "keep"
            self._changed.notify_all()

    def settle(self, *, deadline: float) -> None:
        """Wait for the requests on their way out. A drain that takes too long is taken back: `RequestError`."""
        with self._changed:
            ended = self._changed.wait_for(
                lambda: not self._running or self._state not in ("drain", "abort"), _left(deadline)
            )
            if self._state == "drain":
                self._state = "wait" if ended else "open"
                self._changed.notify_all()
            if not ended:
                raise RequestError(HTTPStatus.GATEWAY_TIMEOUT, f"{self._running} requests did not end in time")
            if not self.paused:
                raise RequestError(HTTPStatus.CONFLICT, "the engine was resumed meanwhile")

    def shut(self) -> bool:
        """Close at once, keeping the requests; whether it was not closed before."""
        with self._changed:
            if self.paused:
                return False
            self._state = "keep"
            self._changed.notify_all()
            return True

    def open(self) -> None:
        """Let everything go on."""
        with self._changed:
            self._state = "open"
            self._changed.notify_all()


def _left(deadline: float) -> float:
    return max(deadline - monotonic(), 0)
