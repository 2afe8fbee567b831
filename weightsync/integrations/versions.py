"""The version that a step of a framework's trainer is pushed as.

Frameworks count from 0 in each run, but engines outlive runs and take only versions above the one that they serve.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from weightsync.endpoints import default_endpoint
from weightsync.errors import DaemonLost, WeightSyncError
from weightsync.operator import fetch_status

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Versions", "endpoint_of", "served_version"]

_UNKNOWN = -2  # rank 0 tells this to the others if it could not ask


def endpoint_of(daemon: str | None) -> str:
    """Return the endpoint that `push_weights(daemon=daemon)` pushes to."""
    return daemon or os.environ.get("WEIGHTSYNC_DAEMON") or default_endpoint()


def served_version(model: str, daemon: str | None = None) -> int:
    """Return the highest version that an engine of `model` serves or that the daemon has seen committed; -1 if none.

    The daemon takes only versions above it, even if every engine has restarted since. Raises `DaemonLost`.
    """
    status = fetch_status(endpoint_of(daemon))
    served = [e.version for e in status.engines if e.model == model and e.version is not None]
    return max([*served, status.pushed.get(model, -1)])


class Versions:
    """The versions of one run: the framework's own count, moved up if engines already serve later ones."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """options: those of `push_weights`, of which `model`, `daemon` and `process_group` are used."""
        self._model: str = options.get("model", "default")
        self._daemon: str | None = options.get("daemon")
        self._group: Any = options.get("process_group")
        self._moved: int | None = None
        self._last = -1

    def of(self, step: int) -> int:
        """Return the version of `step`, higher than any returned before. All ranks of the group call it alike.

        In the first call the process group's rank 0 asks its daemon and tells the others. Raises `DaemonLost`, on every
        rank.
        """
        if self._moved is None:
            self._moved = max(0, self._agreed() + 1 - step)
        self._last = max(step + self._moved, self._last + 1)
        return self._last

    def _agreed(self) -> int:
        dist: Any = sys.modules.get("torch.distributed")
        group, together = self._group, dist is not None and dist.is_available() and dist.is_initialized()
        if not together or dist.get_world_size(group) == 1:
            return served_version(self._model, self._daemon)
        torch: Any = sys.modules["torch"]
        on_gpu = "cpu" not in dist.get_backend_config(group) and torch.cuda.is_available()
        told = torch.tensor([_UNKNOWN], device=torch.cuda.current_device() if on_gpu else "cpu")
        failure: WeightSyncError | None = None
        first = 0 if group is None else dist.get_global_rank(group, 0)
        if dist.get_rank() == first:
            try:
                told.fill_(served_version(self._model, self._daemon))
            except WeightSyncError as error:
                failure = error
        dist.broadcast(told, src=first, group=group)
        if failure is not None:
            raise failure
        if int(told) == _UNKNOWN:
            raise DaemonLost("rank 0 could not ask its daemon which version the engines serve")
        return int(told)
