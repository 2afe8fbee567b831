"""Joining: bridges of this node become members of communicators that other daemons form, one at a time each."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from weightsync.errors import PushRefused, TransportTimeout
from weightsync.nccl_bridge import commands
from weightsyncd.rails import leave

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.config import NodeConfig
    from weightsync.wire import messages as msg
    from weightsyncd.bridges import Bridge

__all__ = ["Joining"]

_MAX_IN_LINES = 64  # communicators that wait to be formed


class Joining:
    """See the module. `on_taken` is called when another daemon has taken a bridge for a communicator of its own."""

    def __init__(self, config: NodeConfig, bridges: Sequence[Bridge], on_taken: Callable[[], None]) -> None:
        self._config = config
        self._bridges = bridges
        self._on_taken = on_taken
        self._lines = [asyncio.Lock() for _ in bridges]
        self._in_lines = 0

    async def join(self, message: msg.JoinRail, check_free: Callable[[], None], *, until: float) -> None:
        """Return when the bridge has joined. `check_free` raises while a push that is not the asker's needs it."""
        line = self._lines[message.rail]
        check_free()
        if self._in_lines >= _MAX_IN_LINES:
            raise PushRefused(f"node {self._config.node.name} has {_MAX_IN_LINES} communicators to form already")
        self._in_lines += 1
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await line.acquire()
        except TimeoutError:
            raise TransportTimeout(f"bridge {message.rail} of this node is forming other communicators") from None
        finally:
            self._in_lines -= 1
        try:
            check_free()
            await self._join(message, until)
        finally:
            line.release()

    async def _join(self, message: msg.JoinRail, until: float) -> None:
        bridge = self._bridges[message.rail]
        self._on_taken()
        await bridge.prompt(deadline=until)
        await bridge.warm(longest=self._config.timeouts.bridge_start, deadline=until)
        await leave(bridge)  # who forms another generation has given up what this bridge may still be doing in the last
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
