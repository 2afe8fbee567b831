"""Leases that end when a GPU is past what reads them."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from weightsync.errors import TransportBroken, TransportTimeout, WeightSyncError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from weightsync.transports.base import Lease

__all__ = ["LeaseKeeper"]

logger = logging.getLogger(__name__)

_GLANCE = 50e-6  # seconds between two looks at a GPU


class _Kept(NamedTuple):
    event: torch.cuda.Event
    lease: Lease
    then: Callable[[], None] | None


class LeaseKeeper:
    """Releases each lease once its event has come, from a thread of its own that runs while there are any.

    What fails on the GPU is raised by the next `settle`; the lease is then not released, so that the daemon counts
    a leak rather than a bucket that was read.
    """

    def __init__(self) -> None:
        self._waiting: list[_Kept] = []
        self._changed = threading.Condition()
        self._running = False
        self._error: Exception | None = None

    def keep(self, lease: Lease, event: torch.cuda.Event, then: Callable[[], None] | None = None) -> None:
        """Release `lease` when `event` has come; call `then` before that. What it raises is told by `settle`."""
        with self._changed:
            self._waiting.append(_Kept(event, lease, then))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="weightsync-leases", daemon=True).start()

    def settle(self, *, deadline: float) -> None:
        """Return when every lease is released. Raises `TransportTimeout`, or `TransportBroken` for a GPU's error."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, max(0.0, deadline - time.monotonic())):
                raise TransportTimeout(f"{len(self._waiting)} buckets are still being read by this rank's GPU")
            error, self._error = self._error, None
        if isinstance(error, WeightSyncError):
            raise error
        if error is not None:
            raise TransportBroken(f"reading a bucket failed on this rank's GPU: {error}") from error

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            with self._changed:
                done = [one for one in self._waiting if self._come(one.event)]
                if self._error is not None:
                    self._waiting.clear()
                for one in done:
                    self._waiting.remove(one)
            for one in done:
                self._end(one)
            with self._changed:
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
            pause.wait(_GLANCE)

    def _end(self, one: _Kept) -> None:
        try:
            if one.then is not None:
                one.then()
        except Exception as error:  # noqa: BLE001 - carried over to `settle`, in the thread that asks for it
            self._error = error
        finally:
            one.lease.release()

    def _come(self, event: torch.cuda.Event) -> bool:
        try:
            return self._error is None and bool(event.query())
        except RuntimeError as error:  # a kernel failed: the CUDA context is lost, and with it every stream
            logger.exception("a GPU failed while it read a bucket")
            self._error = error
            return False
