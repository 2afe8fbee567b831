"""Which version a step of a framework's trainer is pushed as.

Frameworks count from 0 in each run, while engines outlive runs and take only versions above what they serve.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from weightsync.endpoints import default_endpoint
from weightsync.errors import DaemonLost, WeightSyncError
from weightsync.operator import fetch_status

__all__ = ["Versions", "endpoint_of", "served_version"]

_UNKNOWN = -2  # what rank 0 tells the others where it could not ask


def endpoint_of(daemon: str | None) -> str:
    """The endpoint that `push_weights(daemon=daemon)` pushes to."""
    return daemon or os.environ.get("WEIGHTSYNC_DAEMON") or default_endpoint()


def served_version(model: str, daemon: str | None = None) -> int:
    """The highest version that an engine of `model` serves, as the daemon knows it; -1 where none serves any.

    Raises `DaemonLost`.
    """
    engines = fetch_status(endpoint_of(daemon)).engines
    return max((e.version for e in engines if e.model == model and e.version is not None), default=-1)


class Versions:
    """The versions of one run: the framework's own count, moved up where engines already serve later ones."""

    def __init__(self, model: str, daemon: str | None = None) -> None:
        self._model, self._daemon = model, daemon
        self._moved: int | None = None
        self._last = -1

    def of(self, step: int, *, alone: bool = False) -> int:
        """The version of `step`, above that of every earlier call. All ranks call it alike, unless `alone`.

        The first call asks rank 0's daemon, and has rank 0 tell the others. Raises `DaemonLost`, on every rank.
        """
        if self._moved is None:
            served = served_version(self._model, self._daemon) if alone else self._agreed()
            self._moved = max(0, served + 1 - step)
        self._last = max(step + self._moved, self._last + 1)
        return self._last

    def _agreed(self) -> int:
        dist: Any = sys.modules.get("torch.distributed")
        if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return served_version(self._model, self._daemon)
        torch: Any = sys.modules["torch"]
        on_gpu = "cpu" not in dist.get_backend_config() and torch.cuda.is_available()
        told = torch.tensor([_UNKNOWN], device=torch.cuda.current_device() if on_gpu else "cpu")
        failure: WeightSyncError | None = None
        if dist.get_rank() == 0:
            try:
                told.fill_(served_version(self._model, self._daemon))
            except WeightSyncError as error:
                failure = error
        dist.broadcast(told, src=0)
        if failure is not None:
            raise failure
        if int(told) == _UNKNOWN:
            raise DaemonLost("rank 0 could not ask its daemon which version the engines serve")
        return int(told)
