"""Faults that tests order; the engine takes orders only if started with `--enable-faults`.

    POST /faults {"fail":  {"endpoint": "/load", "status": 500, "times": 1, "after": 2}}
    POST /faults {"delay": {"endpoint": "/finish", "seconds": 1.5, "times": 1, "after": 0}}
    POST /faults {"clear": true}

The first lets two loads pass and answers 500 to the third, which touches no worker. A status of 500 or more from
/begin, /load, /draw, /places or /finish leaves the engine torn, as an error of a worker would. The second delays a
request. `times` and `after` default to 1 and 0. Orders stay in the order they came in, and each counts the requests to
its own endpoint.
"""

from __future__ import annotations

import threading
from typing import Annotated

import msgspec

__all__ = ["Delay", "Fail", "FaultOrder", "Faults"]

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Fail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answer `status` instead of doing anything."""

    endpoint: str  # the first word of the path, such as "/manifest"
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 500
    times: _Count = 1
    after: _Count = 0


class Delay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Wait before the request is handled."""

    endpoint: str
    seconds: Annotated[float, msgspec.Meta(ge=0, le=600)]
    times: _Count = 1
    after: _Count = 0


class FaultOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /faults."""

    fail: Fail | None = None
    delay: Delay | None = None
    clear: bool = False


class Faults:
    """The orders that are not used up yet. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: list[tuple[Fail | Delay, int]] = []  # each with the number of requests it has seen
        self._cleared = threading.Event()

    def add(self, order: FaultOrder) -> None:
        """Take an order; `clear` drops the earlier ones and ends delays under way."""
        with self._lock:
            if order.clear:
                self._orders.clear()
                self._cleared.set()
                self._cleared = threading.Event()
            self._orders += [(fault, 0) for fault in (order.fail, order.delay) if fault is not None]

    def meet(self, endpoint: str) -> int | None:
        """Count a request to `endpoint` and wait out its delays. Returns the status to fail it with, or None."""
        status, seconds = None, 0.0
        with self._lock:
            kept: list[tuple[Fail | Delay, int]] = []
            for fault, seen in self._orders:
                mine = fault.endpoint == endpoint
                if mine and fault.after <= seen < fault.after + fault.times:
                    if isinstance(fault, Delay):
                        seconds += fault.seconds
                    else:
                        status = fault.status
                seen += mine
                if seen < fault.after + fault.times:
                    kept.append((fault, seen))
            self._orders = kept
            cleared = self._cleared
        if seconds:
            cleared.wait(seconds)
        return status
