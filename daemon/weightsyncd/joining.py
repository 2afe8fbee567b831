"""Joining: this node's bridges join communicators that other daemons form. Each bridge joins one at a time."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from weightsync.errors import PushRefused, TransportTimeout, WeightSyncError
from weightsync.nccl_bridge import commands
from weightsyncd.rails import leave

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.config import NodeConfig
    from weightsync.wire import messages as msg
    from weightsyncd.bridges import Bridge

__all__ = ["Joining"]

_MAX_IN_LINES = 64  # communicators that wait to be formed


class Takers(Protocol):
    """This node's own communicators, which lose a bridge that another daemon takes (see `weightsyncd.rails`)."""

    def taken(self, node: str, *, push: bool) -> bool:
        """Let the daemon of `node` take a bridge. Returns whether it may."""

    def given_back(self, node: str) -> None:
        """Note that the daemon of `node` has not taken the bridge after all."""


class _Line(asyncio.Lock):
    """The lock of one bridge, held while the bridge joins a communicator."""

    push = False  # whether the holder joins for a push
    pushes = 0  # how many joins for a push wait; a holder that joins for none gives up for them


class Joining:
    """See the module."""

    def __init__(self, config: NodeConfig, bridges: Sequence[Bridge], rails: Takers) -> None:
        self._config = config
        self._bridges = bridges
        self._rails = rails
        self._lines = [_Line() for _ in bridges]
        self._in_lines = 0

    async def join(self, node: str, message: msg.JoinRail, check_free: Callable[[], None], *, until: float) -> None:
        """Have a bridge join a communicator that `node` forms, and return when it has.

        `check_free` raises while a push of another coordinator needs the bridge. A join for a push does not wait for
        one that is made between pushes.
        """
        line, bridge = self._lines[message.rail], self._bridges[message.rail]
        check_free()
        if self._in_lines >= _MAX_IN_LINES:
            raise PushRefused(f"node {self._config.node.name} has {_MAX_IN_LINES} communicators to form already")
        self._in_lines += 1
        line.pushes += message.push
        try:
            if message.push and line.locked() and not line.push:
                await leave(bridge)
            async with asyncio.timeout(until - time.monotonic()):
                await line.acquire()
        except TimeoutError:
            raise TransportTimeout(f"bridge {message.rail} of this node is forming other communicators") from None
        finally:
            self._in_lines -= 1
            line.pushes -= message.push
        line.push = message.push

        def check() -> None:
            check_free()
            if line.pushes and not message.push:
                raise PushRefused(f"node {self._config.node.name} takes part in a push")

        try:
            check()
            if not self._rails.taken(node, push=message.push):
                me = self._config.node.name
                raise PushRefused(f"node {me} is forming communicators itself, and comes before {node}")
            try:
                await self._join(bridge, message, check, until)
            except WeightSyncError:
                self._rails.given_back(node)
                raise
        finally:
            line.release()

    async def _join(self, bridge: Bridge, message: msg.JoinRail, check: Callable[[], None], until: float) -> None:
        await bridge.prompt(deadline=until)
        # A node that forms a new generation has given up the last one. The bridge leaves that before anything else,
        # because its next operation on a communicator would wait for the one under way.
        await leave(bridge)
        await bridge.warm(longest=self._config.timeouts.bridge_start, deadline=until)
        check()  # a push may have begun meanwhile
        command = commands.Join(
            generation=message.generation,
            rank=message.rank,
            world=message.world,
            host=message.host,
            port=message.port,
            address=self._config.cluster.address,
            key=message.key,
        )
        await bridge.call(command, deadline=until)
