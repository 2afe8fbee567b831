"""Repeats: between pushes, a keeper pushes the version that it keeps to engines that are late.

An engine is late if it serves an older version than is kept, serves none because it has restarted or joined, or was
left torn by a push. If another node has pushed a newer version since, nothing is repeated: a fleet only goes forward.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from weightsync.errors import WeightSyncError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from weightsync.config import TimeoutConfig
    from weightsync.wire.messages import EngineStatus
    from weightsyncd.engines import Engine
    from weightsyncd.keeper import KeeperAdapter
    from weightsyncd.peers import Peer

__all__ = ["Repeats", "engines_everywhere", "late_engines"]

logger = logging.getLogger(__name__)

_IDLE_LOOKS = 3  # looks in a row that find no push under way, after which a keeper that is to push is wedged
_LONGEST = 600.0  # seconds; as long as a push has
_PATIENCE = 300.0  # seconds at most between two attempts at an engine, to which up to as much is added at random


def late_engines(engines: Iterable[EngineStatus], model: str, version: int) -> list[str]:
    """Return the engines that a repeat of this version would bring up to date; none if one serves a newer version."""
    ours = [e for e in engines if e.model == model and not e.frozen]
    if any(e.version is not None and e.version > version for e in ours):
        return []
    return [e.name for e in ours if e.state in ("torn", "blank") or (e.state == "serving" and e.version != version)]


def engines_everywhere(node: str, engines: Iterable[Engine], peers: Iterable[Peer]) -> list[EngineStatus]:
    """Return the engines of this node and of its peers, as they were last seen."""
    return [e.status(node) for e in engines] + [e for peer in peers for e in peer.engines]


class Repeats:
    """See the module."""

    def __init__(
        self,
        keepers: Mapping[str, KeeperAdapter],
        timeouts: TimeoutConfig,
        *,
        engines: Callable[[], Iterable[EngineStatus]],
        refresh: Callable[[], Awaitable[None]],
        newest: Callable[[str], int | None],
        busy: Callable[[], bool],
    ) -> None:
        """`keepers` are by model. `engines` returns all engines known here, of other nodes too, as they were last seen.
        `refresh` asks other nodes anew. `newest` returns the version of a model that was committed last.
        """
        self._keepers = keepers
        self._timeouts = timeouts
        self._engines = engines
        self._refresh = refresh
        self._newest = newest
        self._busy = busy
        self._failures: dict[str, tuple[int, float]] = {}  # engine → how often in a row, and when to try again

    async def keep(self) -> None:
        """See that keepers run, and look for late engines, for ever."""
        while True:
            for model, keeper in list(self._keepers.items()):
                if not any(engine.model == model for engine in self._engines()):
                    await keeper.close()
                elif not keeper.alive and not self._busy():
                    await keeper.warm(deadline=time.monotonic() + self._timeouts.bridge_start)
                elif not self._busy():
                    await self._bring_up(model, keeper)
            await asyncio.sleep(self._timeouts.probe_every)

    async def _bring_up(self, model: str, keeper: KeeperAdapter) -> None:
        version, newest = keeper.version, self._newest(model)
        if version is None or (newest is not None and newest > version) or not self._late(model, version):
            return
        await self._refresh()  # it may not be known here yet what other nodes' engines were just pushed
        late = self._late(model, version)
        if not late or self._busy():
            return
        # an engine that refuses ends the push for all, so engines that have failed are tried one by one
        late = [name for name in late if name not in self._failures] or late[:1]
        logger.info("[model=%s v=%d] repeat.started engines=%s", model, version, ",".join(late))
        try:
            await self._repeat(keeper, late)
        except WeightSyncError as error:
            for name in late:
                times = self._failures.get(name, (0, 0.0))[0] + 1
                pause = min(_PATIENCE, self._timeouts.probe_every * 2**times)
                pause *= 1 + random.random()  # two nodes that collided do not collide again
                self._failures[name] = times, time.monotonic() + pause
            logger.warning("[model=%s v=%d] repeat.failed: %s", model, version, error.message)
        else:
            logger.info("[model=%s v=%d] repeat.complete engines=%s", model, version, ",".join(late))

    async def _repeat(self, keeper: KeeperAdapter, engines: list[str]) -> None:
        """Have the keeper push. Raises the push's error. A keeper that does not answer after its push is replaced."""
        work = asyncio.ensure_future(keeper.repeat(engines, deadline=time.monotonic() + _LONGEST))
        try:
            idle = 0
            while not work.done() and idle < _IDLE_LOOKS:
                await asyncio.wait([work], timeout=max(1.0, self._timeouts.probe_every))
                idle = 0 if self._busy() else idle + 1
            if not work.done():
                await keeper.close()
            await work
        finally:
            work.cancel()

    def _late(self, model: str, version: int) -> list[str]:
        """Return the late engines that it is time to try. Forget the failures of engines that are not late any more."""
        engines, now = list(self._engines()), time.monotonic()
        late = late_engines(engines, model, version)
        for engine in engines:
            if engine.model == model and engine.name not in late:
                self._failures.pop(engine.name, None)
        return [name for name in late if self._failures.get(name, (0, 0.0))[1] <= now]
