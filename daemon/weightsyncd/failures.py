"""Pushes that have failed before all their ranks had called: those that call only now are told, and need not wait."""

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
    until: float  # how long the others may still be on their way


class Failures:
    """The last such push of each trainer."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, _Failed] = OrderedDict()

    def note(self, push: msg.Open | msg.Gather, told: Iterable[int], error: ErrorRecord, *, until: float) -> None:
        """The push that this is of has failed; ranks that call for it before `until` and were not `told` are."""
        self._failed[push.group] = _Failed(push.model, push.version, set(told), error, until)
        self._failed.move_to_end(push.group)
        while len(self._failed) > _MAX_TRAINERS:
            self._failed.popitem(last=False)

    def tell(self, call: msg.Open) -> ErrorRecord | None:
        """The error of the push that this rank calls for, if that has failed without it. Told once only."""
        failed = self._failed.get(call.group)
        if failed is None or time.monotonic() > failed.until or call.rank in failed.told:
            return None
        if (failed.model, failed.version) != (call.model, call.version):
            return None
        failed.told.add(call.rank)
        return failed.error

    def tries_again(self, call: msg.Open) -> None:
        """A rank waits. If it is one that knows of the failure, what its siblings call for is the next attempt, too."""
        failed = self._failed.get(call.group)
        if failed is not None and call.rank in failed.told:
            del self._failed[call.group]

    def forget(self, group: str) -> None:
        """This trainer's next push begins."""
        self._failed.pop(group, None)
