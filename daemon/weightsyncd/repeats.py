"""Engines that come late: what is kept of the last push is pushed to them again, between pushes.

Late is an engine that serves an older version than is kept, none at all because it has restarted or joined, or that an
aborted push has left torn. What another node has pushed since is newer than what is kept here, and nothing is repeated
then: a fleet goes forward.
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

_IDLE_LOOKS = 3  # at a node that is not busy, in a row, while a keeper says that it pushes
_LONGEST = 600.0  # seconds; as long as a push has
_PATIENCE = 300.0  # seconds at most between two attempts at an engine


def late_engines(engines: Iterable[EngineStatus], model: str, version: int) -> list[str]:
    """Names of those that a repeat of this version would bring up to date; none where one is beyond it."""
    ours = [e for e in engines if e.model == model and not e.frozen]
    if any(e.version is not None and e.version > version for e in ours):
        return []
    return [e.name for e in ours if e.state in ("torn", "blank") or (e.state == "serving" and e.version != version)]


def engines_everywhere(node: str, engines: Iterable[Engine], peers: Iterable[Peer]) -> list[EngineStatus]:
    """Of this node and of those it knows, as they were last seen."""
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
        """`keepers` are those of each model; `engines` gives all that are known here, of other nodes too, as
        they were last seen; `refresh` looks at other nodes anew. `newest` is the version of a model that was committed
        last.
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
        await self._refresh()  # what was just pushed may not be known of other nodes yet
        late = self._late(model, version)
        if not late or self._busy():
            return
        # one that refuses ends the push for all: those that have failed are tried one by one
        late = [name for name in late if name not in self._failures] or late[:1]
        logger.info("[model=%s v=%d] repeat.started engines=%s", model, version, ",".join(late))
        try:
            await self._repeat(keeper, late)
        except WeightSyncError as error:
            for name in late:
                times = self._failures.get(name, (0, 0.0))[0] + 1
                pause = min(_PATIENCE, self._timeouts.probe_every * 2**times)
                pause *= 1 + random.random()  # two nodes in each other's way are not so again
                self._failures[name] = times, time.monotonic() + pause
            logger.warning("[model=%s v=%d] repeat.failed: %s", model, version, error.message)
        else:
            logger.info("[model=%s v=%d] repeat.complete engines=%s", model, version, ",".join(late))

    async def _repeat(self, keeper: KeeperAdapter, engines: list[str]) -> None:
        """Raises what the push failed with; a keeper that does not answer when it has ended is wedged, and replaced."""
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
        """Those that it is time to try. Who is late no more has not failed, either."""
        engines, now = list(self._engines()), time.monotonic()
        late = late_engines(engines, model, version)
        for engine in engines:
            if engine.model == model and engine.name not in late:
                self._failures.pop(engine.name, None)
        return [name for name in late if self._failures.get(name, (0, 0.0))[1] <= now]
