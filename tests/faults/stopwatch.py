"""How long something took, on a machine that stands still now and then."""

from __future__ import annotations

import functools
import threading
import time

__all__ = ["Stopwatch"]


class _Standstills:
    """How long this process has stood still, and most likely the machine with it: a thread of it ticks."""

    _TICK, _LONG = 0.05, 0.3  # seconds: so often, and so much is more than being one of many

    def __init__(self) -> None:
        self._lock, self._sum, self._last = threading.Lock(), 0.0, time.monotonic()
        threading.Thread(target=self._run, name="standstills", daemon=True).start()

    def seconds(self) -> float:
        """In all, until now."""
        with self._lock:
            return self._sum + self._gap()

    def _gap(self) -> float:
        gap = time.monotonic() - self._last
        return gap if gap > self._LONG else 0.0

    def _run(self) -> None:
        never = threading.Event()
        while not never.wait(self._TICK):
            with self._lock:
                self._sum, self._last = self._sum + self._gap(), time.monotonic()


_standstills = functools.cache(_Standstills)


class Stopwatch:
    """Seconds since it was made, without those in which the machine stood still: a test that says how long something
    may take means the product.
    """

    def __init__(self) -> None:
        self._stood = _standstills().seconds()
        self._start = time.monotonic()

    @property
    def stood_still(self) -> float:
        return _standstills().seconds() - self._stood

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start - self.stood_still
