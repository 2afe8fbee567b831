"""Ends leases when a GPU is past the work that reads them."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from weightsync.errors import TransportBroken, TransportTimeout, WeightSyncError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.transports.base import Lease

__all__ = ["LeaseKeeper"]

logger = logging.getLogger(__name__)

_GLANCE = 50e-6  # seconds between two looks at a GPU


class _Kept(NamedTuple):
    event: torch.cuda.Event
    lease: Lease
    then: Callable[[], None] | None


class LeaseKeeper:
    """Releases each lease once its event has come, from its own thread, which runs while there are leases.

    An error of the GPU ends this process's CUDA context. Every later call raises it, and the leases that were kept are
    not released, because it is unknown what was read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[_Kept] = []
        self._changed = threading.Condition()
        self._running = False
        self._failed: Exception | None = None  # of the GPU, for good
        self._error: Exception | None = None  # of a `then`

    def keep(self, lease: Lease, event: torch.cuda.Event, then: Callable[[], None] | None = None) -> None:
        """Release `lease` when `event` has come, after a call of `then`. `settle` raises the error of `then`.

        Raises `TransportBroken` if the GPU has failed.
        """
        with self._changed:
            self._check()
            self._waiting.append(_Kept(event, lease, then))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="weightsync-leases", daemon=True).start()

    def settle(self, *, deadline: float) -> None:
        """Wait until every lease is released. Raises `TransportTimeout`, or the last error since the last call."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, max(0.0, deadline - time.monotonic())):
                raise TransportTimeout(f"{len(self._waiting)} buckets are still being read by this rank's GPU")
            self._check()
            error, self._error = self._error, None
        if error is not None:
            raise error if isinstance(error, WeightSyncError) else TransportBroken(f"reading a bucket: {error!r}")

    def _check(self) -> None:
        if self._failed is not None:
            raise TransportBroken(
                f"this rank's GPU failed while it read a bucket: {self._failed}", hint="restart the engine"
            ) from self._failed

    def _run(self) -> None:
        try:
            torch.cuda.set_device(self._device)  # else what this thread does would make a CUDA context on GPU 0
            pause = threading.Event()
            while self._release_some():
                pause.wait(_GLANCE)
        except Exception as error:
            logger.exception("a GPU failed while it read a bucket")
            with self._changed:
                self._failed = error
                self._end()

    def _release_some(self) -> bool:
        """Release leases whose event has come. Returns whether there are others."""
        with self._changed:
            done = [one for one in self._waiting if one.event.query()]
            self._waiting = [one for one in self._waiting if one not in done]
        for one in done:
            try:
                if one.then is not None:
                    one.then()
            except Exception as error:  # noqa: BLE001 - raised by `settle`, in the thread that asks
                self._error = error
            finally:
                one.lease.release()
        with self._changed:
            if self._waiting:
                return True
            self._end()
            return False

    def _end(self) -> None:
        """Note that the thread ends. The caller holds the lock under which it found no lease left, or an error.

        A lease that is kept from now on starts another thread.
        """
        self._running = False
        self._changed.notify_all()
