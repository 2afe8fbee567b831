"""Joining: bridges of this node become members of communicators that other daemons form, one at a time each."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

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


class Taken(Protocol):
    """See `Joining`."""

    def __call__(self, node: str, *, push: bool) -> bool: ...


class Joining:
    """See the module. `taken` hears that another daemon takes a bridge for a communicator of its own, and says whether
    it may (`weightsyncd.rails.Rails.taken`).
    """

    def __init__(self, config: NodeConfig, bridges: Sequence[Bridge], taken: Taken) -> None:
        self._config = config
        self._bridges = bridges
        self._taken = taken
        self._lines = [asyncio.Lock() for _ in bridges]
        self._in_lines = 0

    async def join(self, node: str, message: msg.JoinRail, check_free: Callable[[], None], *, until: float) -> None:
        """Return when the bridge has joined what `node` forms. `check_free` raises while a push that is not that node's
        needs it.
        """
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
            if not self._taken(node, push=message.push):
                me = self._config.node.name
                raise PushRefused(f"node {me} forms communicators with {node} itself, and comes first")
            await self._join(message, check_free, until)
        finally:
            line.release()

    async def _join(self, message: msg.JoinRail, check_free: Callable[[], None], until: float) -> None:
        bridge = self._bridges[message.rail]
        await bridge.prompt(deadline=until)
        # Who forms another generation has given up what this bridge may still be doing in the last; and first, since
        # whatever else is asked of the bridge waits until that has ended.
        await leave(bridge)
        await bridge.warm(longest=self._config.timeouts.bridge_start, deadline=until)
        check_free()  # a push may have begun meanwhile, which forms its own
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
