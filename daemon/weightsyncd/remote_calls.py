"""Calls for ranks: other nodes that push for a trainer take ranks of it that call on this node."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightsync.wire import messages as msg

__all__ = ["RemoteCalls"]

_MAX_CALLS = 64  # trainers whose ranks are called for


class RemoteCalls:
    """By trainer, the newest call for its ranks, and the connection that it came by."""

    def __init__(self) -> None:
        self._calls: OrderedDict[str, tuple[bytes, msg.Gather]] = OrderedDict()

    def add(self, identity: bytes, call: msg.Gather) -> None:
        """Ranks of a trainer are called for."""
        self._calls[call.group] = (identity, call)
        self._calls.move_to_end(call.group)
        while len(self._calls) > _MAX_CALLS:
            self._calls.popitem(last=False)

    def get(self, group: str) -> tuple[bytes, msg.Gather] | None:
        """Who calls for the ranks of this trainer, and for what."""
        return self._calls.get(group)

    def drop(self, identity: bytes, push: str = "") -> list[msg.Gather]:
        """Nobody is called for by this connection any more, or not for this push. Returns what is dropped."""
        gone = {g: call for g, (who, call) in self._calls.items() if who == identity and push in ("", call.push)}
        for group in gone:
            del self._calls[group]
        return list(gone.values())

    def forget(self, group: str) -> None:
        """This trainer's pushes are coordinated here now."""
        self._calls.pop(group, None)
