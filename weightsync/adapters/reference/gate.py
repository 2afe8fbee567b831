"""The gate decides whether requests go on. Every decode step passes it; every request is counted in and out.

open    every request goes on
drain   pausing with "wait": requests in flight go on and new ones are refused; afterwards the state is `wait`
keep    all requests, new ones too, wait at the gate; when it opens they go on, on the weights of that time
wait    no request is in flight, and new ones are refused
abort   requests in flight end, and new ones are refused
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
    """A request that does not succeed: the HTTP status and the body of its answer."""

    def __init__(self, status: HTTPStatus, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **more}


class Gate:
    """The gate of one engine, for several threads. `paused` does not change while a decode step has the turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the fields below, and is notified of every change
        self._state: Literal["open", "drain", "keep", "wait", "abort"] = "open"
        self._aborts = 0
        self._running = 0

    @property
    def paused(self) -> bool:
        """Whether requests in flight are stopped."""
        return self._state not in ("open", "drain")

    @property
    def running(self) -> int:
        """The number of requests in flight."""
        return self._running

    def enter(self) -> int:
        """Count a request in. Returns the value to pass to `aborted`. Raises `RequestError` if none is taken now."""
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
        """Wait until a request that entered at `since` may go on, or has to end. Raises `RequestError` if too late."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self.paused or self.aborted(since), _left(deadline)):
                raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine was not resumed in time")

    def close(self, mode: PauseMode) -> None:
        """Begin to pause. Call it within a turn, and `settle` after the turn.

        A closed gate stays as it is, except that "abort" ends the requests that wait at it.
        """
        with self._changed:
            if mode == "abort":
                self._state = "abort"
                self._aborts += 1
            elif mode != "none" and self._state == "open":
                self._state = "drain" if mode == "wait" else "keep"
            self._changed.notify_all()

    def settle(self, *, deadline: float) -> None:
        """Wait until the requests that must end have ended. Raises `RequestError` at the deadline.

        A drain that has not ended by then is undone: the gate opens again.
        """
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
        """Close at once, keeping the requests. Returns False if the gate was closed already."""
        with self._changed:
            if self.paused:
                return False
            self._state = "keep"
            self._changed.notify_all()
            return True

    def open(self) -> None:
        """Let all requests go on."""
        with self._changed:
            self._state = "open"
            self._changed.notify_all()


def _left(deadline: float) -> float:
    return max(deadline - monotonic(), 0)
