"""Pushes that failed before all their ranks had called. Ranks that call later are told at once, and need not wait."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.errors import ErrorRecord
    from weightsync.wire import messages as msg

__all__ = ["Failures"]

_MAX_TRAINERS = 64


@dataclass
class _Failed:
    model: str
    version: int
    told: set[int]  # ranks that know: they had called, or have been told since
    error: ErrorRecord
    until: float  # when no call of another rank can be for this push any more


class Failures:
    """The last push of each trainer, if it failed before all ranks had called."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, _Failed] = OrderedDict()

    def note(self, push: msg.Open | msg.Gather, told: Iterable[int], error: ErrorRecord, *, until: float) -> None:
        """Note that this push has failed. Ranks that are not in `told` are told if they call for it before `until`."""
        self._failed[push.group] = _Failed(push.model, push.version, set(told), error, until)
        self._failed.move_to_end(push.group)
        while len(self._failed) > _MAX_TRAINERS:
            self._failed.popitem(last=False)

    def tell(self, call: msg.Open) -> ErrorRecord | None:
        """Return the error of the push that this rank calls for, if it failed without the rank. Each is told once."""
        failed = self._failed.get(call.group)
        if failed is None or time.monotonic() > failed.until or call.rank in failed.told:
            return None
        if (failed.model, failed.version) != (call.model, call.version):
            return None
        failed.told.add(call.rank)
        return failed.error

    def tries_again(self, call: msg.Open) -> None:
        """Note a rank that waits. If it knows of the failure, its siblings' calls are for the next attempt, too."""
        failed = self._failed.get(call.group)
        if failed is not None and call.rank in failed.told:
            del self._failed[call.group]

    def forget(self, group: str) -> None:
        """Forget a trainer's failure: its next push begins."""
        self._failed.pop(group, None)
