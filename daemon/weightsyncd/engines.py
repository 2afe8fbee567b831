"""This node's engines: their adapters, and what is known of each between pushes.

The daemon keeps no state of its own about engines on disk. After a restart it asks them, and an engine that says it
is in the middle of an update is torn, whoever began it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from weightsync.adapters import adapter
from weightsync.config import EngineConfig
from weightsync.errors import EngineError, EngineLost, ErrorRecord, WeightSyncError
from weightsync.wire.messages import EngineStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from weightsync.adapters.base import EngineAdapter, EngineInfo
    from weightsync.config import TimeoutConfig
    from weightsyncd.keeper import KeeperAdapter

__all__ = ["SOON", "Engine", "Engines"]

logger = logging.getLogger(__name__)

SOON = 0.5  # seconds after a probe in which an engine cannot have restarted: loading its code alone takes longer


class _Ahead(NamedTuple):
    """A probe for a push that is to come."""

    began: float
    work: asyncio.Task[EngineInfo]

    def answer(self) -> EngineInfo | None:
        """Return the engine's answer, if it has come and the probe began less than `SOON` ago."""
        work = self.work
        told = work.done() and not work.cancelled() and work.exception() is None
        return work.result() if told and time.monotonic() - self.began < SOON else None


class Engine:
    """One engine: its adapter, and what is known of it."""

    def __init__(self, config: EngineConfig, hand: EngineAdapter) -> None:
        self.config = config
        self.name = config.name
        self.adapter = hand
        self.info: EngineInfo | None = None
        self.error: ErrorRecord | None = None
        # (manifest digest, whether the engine was torn or asleep, so that it needs all) → names that are not pushed
        self.accepted: dict[tuple[bytes, bool], tuple[str, ...] | None] = {}
        self.paused_by_us = False  # and neither resumed nor touched since: it is owed a resume
        self.begun = False  # an update of ours was begun, and it has not been resumed since
        self.owed_until = 0.0  # … even if it is not paused yet: a pause that was given up may take effect late
        self.asked_at = 0.0  # when the last probe that it answered was sent
        self.done_to_at = 0.0  # when an operation other than a probe was last begun, under the lock
        self._ahead: _Ahead | None = None
        self.gone = False  # no engine of this node any more
        self.lock = asyncio.Lock()  # held during an operation, so that operations happen in order

    @property
    def state(self) -> str:
        """serving | paused | asleep | torn | blank | lost | unknown"""
        if self.error is not None:
            return "lost"
        if self.info is None:
            return "unknown"
        if self.info.torn or (self.begun and self.info.paused):  # it says so, or a begin went wrong
            return "torn"
        if self.info.asleep:
            return "asleep"
        if self.info.paused:
            return "paused"
        return "blank" if self.info.version is None else "serving"

    def learned(self, info: EngineInfo) -> None:
        """Note what the engine says of itself; a restarted engine has accepted nothing yet."""
        if self.info is None or info.incarnation != self.info.incarnation:
            self.accepted.clear()
            self.paused_by_us = self.begun = False
            logger.info(
                "[engine=%s] %s, %s, tp %d, version %s",
                self.name,
                info.software,
                info.profile,
                info.tp_size,
                info.version,
            )
        elif self.error is not None:
            logger.info("[engine=%s] answers again", self.name)
        self.info, self.error = info, None

    def lost(self, error: WeightSyncError) -> None:
        """Note that it does not answer."""
        if self.error is None:
            logger.warning("[engine=%s] lost: %s", self.name, error.message)
        self.error = error.record()

    async def probe(self, deadline: float) -> EngineInfo:
        """Ask the engine and note the answer. Raises `EngineLost` or `EngineError`."""
        began = time.monotonic()
        try:
            info = await self.adapter.probe(deadline=deadline)
        except WeightSyncError as error:
            self.lost(error)
            raise
        except Exception as error:  # the seam: an engine's strange answer costs that engine, not this daemon
            if self.gone:  # its adapter was closed meanwhile
                raise EngineLost(f"engine {self.name} is not one of this node any more", engine=self.name) from error
            logger.exception("[engine=%s] probe failed in an unexpected way", self.name)
            words = f"unexpected {type(error).__name__} in the adapter of engine {self.name}: {error}"
            strange = EngineError(words, engine=self.name)
            self.lost(strange)
            raise strange from error
        self.learned(info)
        self.asked_at = began
        return info

    def look_ahead(self, deadline: float) -> None:
        """Begin the probe that a coming push will need, unless an operation is under way."""
        ahead = self._ahead
        if self.lock.locked() or (ahead is not None and (not ahead.work.done() or ahead.answer() is not None)):
            return
        self._ahead = _Ahead(time.monotonic(), asyncio.create_task(self._probe_locked(deadline)))
        self._ahead.work.add_done_callback(lambda work: work.cancelled() or work.exception())  # seen: `look` asks again

    async def _probe_locked(self, deadline: float) -> EngineInfo:
        async with self.lock:
            return await self.probe(deadline)

    async def look(self, deadline: float) -> EngineInfo:
        """Return what `look_ahead` was told, if that is fresh and nothing was done to the engine since; else `probe`.

        The caller holds the lock.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            info = ahead.answer()
            if info is not None and ahead.began > self.done_to_at:
                return info
            ahead.work.cancel()  # it waits for the lock, which the caller holds
        return await self.probe(deadline)

    async def close(self) -> None:
        """Close the adapter. The engine stays as it is."""
        if self._ahead is not None:
            self._ahead.work.cancel()
            await asyncio.wait([self._ahead.work], timeout=SOON)
        await self.adapter.close()

    def status(self, node: str) -> EngineStatus:
        """Return its status, for operators."""
        info = self.info
        return EngineStatus(
            name=self.name,
            node=node,
            kind=self.config.kind,
            model=self.config.model,
            url=self.config.url,
            state=self.state,
            version=info.version if info else None,
            tp_size=info.tp_size if info else None,
            software=info.software if info else None,
            profile=info.profile if info else None,
            error=self.error.message if self.error else None,
            frozen=self.config.frozen,
            replay=info.replay if info else None,
        )


class Engines:
    """All engines of this node, probed regularly while no push is under way."""

    def __init__(
        self,
        configs: Iterable[EngineConfig],
        timeouts: TimeoutConfig,
        busy: Callable[[], bool],
        make_keeper: Callable[[str], KeeperAdapter] | None = None,
    ) -> None:
        """`busy` says whether a push is under way. `make_keeper` makes the keeper of a model; None: nothing is kept."""
        self._engines = {config.name: Engine(config, adapter(config)) for config in configs}
        self._make_keeper = make_keeper
        self.keepers: dict[str, KeeperAdapter] = {}  # by model
        self._keeping: dict[str, Engine] = {}  # the keepers as engines of a push, by name
        self._timeouts = timeouts
        self._busy = busy

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    def __contains__(self, name: object) -> bool:
        return name in self._engines or name in self._keeping

    def __getitem__(self, name: str) -> Engine:
        """Return the engine, or keeper, of that name. Raises `EngineLost` if there is none."""
        engine = self._engines.get(name) or self._keeping.get(name)
        if engine is None:
            raise EngineLost(f"this node has no engine called {name!r}", engine=name)
        return engine

    def become(self, configs: Iterable[EngineConfig]) -> list[Engine]:
        """Have an engine for each of these configs, and return the engines that are gone.

        An engine stays if its config has not changed. Raises `ConfigError` for a config that no adapter takes; nothing
        has changed then.
        """
        before, after = self._engines, dict[str, Engine]()
        for config in configs:
            known = before.get(config.name)
            if known is not None and known.config == config:
                after[config.name] = known
                continue
            new = after[config.name] = Engine(config, adapter(config))
            if known is not None and known.config.url == config.url:
                new.info, new.begun = known.info, known.begun
                new.paused_by_us, new.owed_until = known.paused_by_us, known.owed_until
        self._engines = after
        gone = [engine for name, engine in before.items() if after.get(name) is not engine]
        for engine in gone:
            engine.gone = True
        return gone

    def of_model(self, model: str) -> list[str]:
        """Return the names of the engines that take pushes to `model`."""
        return [e.name for e in self._engines.values() if e.config.model == model and not e.config.frozen]

    def look_ahead(self, model: str) -> None:
        """Probe the model's engines ahead of a push that is about to begin, unless another is under way."""
        if not self._busy():
            for name in self.of_model(model):
                self._engines[name].look_ahead(time.monotonic() + self._timeouts.probe)

    def keeper_of(self, model: str) -> str | None:
        """Return the name that the model's keeper has in a push, making it if need be. None if nothing is kept."""
        if self._make_keeper is None:
            return None
        name = f"{model}:keeper"  # names of engines have no colon
        if name not in self._keeping:
            hand = self.keepers[model] = self._make_keeper(model)
            self._keeping[name] = Engine(EngineConfig(name=name, kind="keeper", url="", model=model), hand)
        return name

    async def watch(self) -> None:
        """Probe every engine, for ever, except while a push is under way."""
        while True:
            if not self._busy():
                until = time.monotonic() + self._timeouts.probe
                await asyncio.gather(*(self._look(engine, until) for engine in self._engines.values()))
            await asyncio.sleep(self._timeouts.probe_every)

    async def _look(self, engine: Engine, until: float) -> None:
        """Probe an engine, and pause or resume it if a push could not: the engine, or a daemon, did not answer then."""
        try:
            info = await engine.probe(until)
            if (info.torn and not info.paused) or engine.paused_by_us:
                await self._put_right(engine, info, until)
        except WeightSyncError as error:
            logger.debug("[engine=%s] look.failed: %s", engine.name, error)

    async def _put_right(self, engine: Engine, info: EngineInfo, until: float) -> None:
        async with engine.lock:  # a push that begins meanwhile waits for its turn
            if self._busy() or engine.gone:
                return
            engine.done_to_at = time.monotonic()
            if info.torn and not info.paused:
                logger.warning("[engine=%s] serves though it is torn: pausing it", engine.name)
                await engine.adapter.pause("abort", deadline=until)
            elif info.paused and not info.torn:
                logger.warning("[engine=%s] was left paused by a push that never touched it: resuming it", engine.name)
                await engine.adapter.resume(deadline=until)
            elif time.monotonic() < engine.owed_until:
                return
            engine.paused_by_us = False
            await engine.probe(until)

    @staticmethod
    async def let_go(engine: Engine) -> None:
        """Close the adapter of an engine that is gone, after operations that hold or await its lock."""
        async with engine.lock:
            await engine.close()

    async def close(self) -> None:
        """Close every adapter. Engines stay as they are; keepers end."""
        engines = [*self._engines.values(), *self._keeping.values()]
        await asyncio.gather(*(engine.close() for engine in engines))
