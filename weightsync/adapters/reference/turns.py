"""A lock that is granted in order of arrival, so that a control call waits for decode steps, not for whole requests."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Turns"]


class Turns:
    """A lock: first come, first served. Every wait has a deadline."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    @contextmanager
    def take(self, *, deadline: float) -> Iterator[None]:
        """Hold the turn inside the block. Raises `TimeoutError` when it does not come before `deadline`."""
        with self._guard:
            if self._held:
                mine: threading.Lock | None = threading.Lock()
                assert mine is not None
                mine.acquire()
                self._waiting.append(mine)
            else:
                mine, self._held = None, True
        if mine is not None and not mine.acquire(timeout=max(deadline - monotonic(), 0)):
            with self._guard:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise TimeoutError("the engine is busy")
            # Else the turn was granted after the wait timed out and before `_guard` was taken: it is ours.
        try:
            yield
        finally:
            with self._guard:
                if self._waiting:
                    self._waiting.popleft().release()
                else:
                    self._held = False
