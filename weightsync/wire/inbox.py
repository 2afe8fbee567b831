"""A queue that one thread reads, up to a deadline, and that Ctrl-C in the middle of a wait does not harm."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Inbox"]

_NAP = 0.5  # seconds; a signal that comes as a wait begins is noticed only when it ends

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Any thread puts; one thread gets.

    `queue.Queue` waits in Python, with a lock in its hands: a signal handler that raises there ends the wait with
    "release unlocked lock", or leaves the lock held for good. `queue.SimpleQueue` may wait without end after a short
    timeout (CPython 3.11 and 3.12). Waiting for a plain lock does neither.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._bell = threading.Lock()  # held while there is nothing that its reader has not been told of
        self._bell.acquire()

    def put(self, item: Item) -> None:
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # it rings already
            self._bell.release()

    def get(self, deadline: float) -> Item | None:
        """Return the next item, or None at the deadline."""
        while not self._items:
            left = deadline - time.monotonic()
            if not self._bell.acquire(timeout=min(max(0.0, left), _NAP)) and left <= _NAP and not self._items:
                return None
        return self._items.popleft()

    def clear(self) -> None:
        self._items.clear()
