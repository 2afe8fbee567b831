"""Calls of `push_weights` that wait for the node to be free."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsyncd.ranks import is_lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.wire import messages as msg

__all__ = ["Call", "Waiting"]


@dataclass(frozen=True)
class Call:
    """One rank's call of `push_weights`."""

    identity: bytes
    message: msg.Open
    since: float


class Waiting:
    """The calls that wait, in the order in which they came."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._heard: dict[bytes, float] = {}  # identity → when the rank was last heard

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """Let a call wait, perhaps again."""
        self._calls.append(call)
        self._heard[call.identity] = max(call.since, self._heard.get(call.identity, 0.0))

    def heard(self, identity: bytes) -> None:
        """Note that a rank is alive, whether it waits or not."""
        if identity in self._heard:
            self._heard[identity] = time.monotonic()

    def take(self) -> list[Call]:
        """Take out all calls. Those that are added again soon keep their place in time."""
        calls, self._calls = self._calls, []
        return calls

    def groups(self) -> set[str]:
        """The trainers that have ranks waiting."""
        return {call.message.group for call in self._calls}

    def __contains__(self, call: object) -> bool:
        return any(call is one for one in self._calls)

    def drop(self, call: Call) -> None:
        """Take out one call."""
        self._taken(lambda one: one is call)

    def given_up(self, identity: bytes, number: int) -> list[Call]:
        """Take out the calls that a rank says it has given up."""
        return self._taken(lambda call: (call.identity, call.message.id) == (identity, number))

    def late(self, now: float) -> list[Call]:
        """Take out the calls that have waited for their whole timeout."""
        return self._taken(lambda call: now - call.since >= call.message.timeout)

    def silent(self, now: float, liveness: float) -> list[Call]:
        """Take out the calls of ranks that have been silent for so long that they are lost. Call it regularly."""
        here = {call.identity for call in self._calls}
        self._heard = {identity: at for identity, at in self._heard.items() if identity in here}
        return self._taken(lambda call: is_lost(now - self._heard[call.identity], liveness, call.message))

    def _taken(self, which: Callable[[Call], bool]) -> list[Call]:
        taken = [call for call in self._calls if which(call)]
        if taken:
            self._calls = [call for call in self._calls if call not in taken]
        return taken
