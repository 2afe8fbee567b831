"""Faults to order, for tests; the engine has them only when started with `--enable-faults`.

    POST /faults {"fail":  {"endpoint": "/load", "status": 500, "times": 1, "after": 2}}
    POST /faults {"delay": {"endpoint": "/finish", "seconds": 1.5, "times": 1, "after": 0}}
    POST /faults {"clear": true}

The first lets two loads pass and answers 500 to the third, which touches no worker; a failed /begin, /load, /draw or
/finish leaves the engine as an error of a worker would: torn. The second holds a request back first. `times` and
`after` are 1 and 0 unless given; orders are kept in the order they came, and each counts the requests to its endpoint.
"""

from __future__ import annotations

import threading
from typing import Annotated

import msgspec

__all__ = ["Delay", "Fail", "FaultOrder", "Faults"]

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Fail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answer `status` in place of doing anything."""

    endpoint: str  # without what follows the first word, such as "/manifest"
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 500
    times: _Count = 1
    after: _Count = 0


class Delay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Wait before doing anything."""

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
    """Orders not used up yet. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: list[tuple[Fail | Delay, int]] = []  # with the number of requests seen
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
        """Count a request to `endpoint`; wait out its delays; the status to fail it with, or None to go on."""
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
