"""Calls for ranks: a node that coordinates a trainer's push calls on other nodes for the trainer's ranks."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightsync.wire import messages as msg

__all__ = ["RemoteCalls"]

_MAX_CALLS = 64  # trainers whose ranks are called for


class RemoteCalls:
    """The newest call for each trainer's ranks, and the connection that it came by."""

    def __init__(self) -> None:
        self._calls: OrderedDict[str, tuple[bytes, msg.Gather]] = OrderedDict()

    def add(self, identity: bytes, call: msg.Gather) -> None:
        """Note a call for a trainer's ranks."""
        self._calls[call.group] = (identity, call)
        self._calls.move_to_end(call.group)
        while len(self._calls) > _MAX_CALLS:
            self._calls.popitem(last=False)

    def get(self, group: str) -> tuple[bytes, msg.Gather] | None:
        """Return the connection and the call for this trainer's ranks, if there is one."""
        return self._calls.get(group)

    def drop(self, identity: bytes, push: str = "") -> list[msg.Gather]:
        """Drop all calls of this connection, or only its calls for `push`. Returns the dropped calls."""
        gone = {g: call for g, (who, call) in self._calls.items() if who == identity and push in ("", call.push)}
        for group in gone:
            del self._calls[group]
        return list(gone.values())

    def forget(self, group: str) -> None:
        """Drop the call for a trainer's ranks: its pushes are coordinated here now."""
        self._calls.pop(group, None)
