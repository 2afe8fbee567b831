"""Notices when the owner of mapped memory is gone: no other process can have that memory until it is unmapped here."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from weightsync.ipc.cuda import cupy

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lookout"]

logger = logging.getLogger(__name__)

_EVERY = 1.0  # seconds


class Lookout:
    """Calls `look` every second until it returns False, from its own thread.

    The thread works on `device` of this process; None is for memory that is not on a GPU.
    """

    def __init__(self, look: Callable[[], bool], device: int | None) -> None:
        self._look = look
        self._device = device
        self._running = False
        self._wanted = False  # `start` was called after the last `look` began
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to look, unless the thread already runs."""
        with self._lock:
            self._wanted = True
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="weightsync-lookout", daemon=True).start()

    def _run(self) -> None:
        if self._device is not None:
            cupy().cuda.runtime.setDevice(self._device)  # else what this thread does would make a CUDA context on GPU 0
        pause = threading.Event()
        while True:
            pause.wait(_EVERY)
            with self._lock:
                self._wanted = False
            try:
                more = self._look()
            except Exception:
                logger.exception("memory of processes that are gone may stay mapped until the next push")
                more = False
            with self._lock:
                if not (more or self._wanted):
                    self._running = False
                    return
