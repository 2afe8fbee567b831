"""The daemon's bridges: started, spoken to, watched, ended, and started again when they are lost.

A bridge is *lost* when its process ends, when its pipe breaks, or when it does not answer in time: a communicator can
wedge for good, and ending its process is the only sure way out. The process is then killed and reaped, and its arena
removed. A successor with another incarnation is started in the background: at once the first time, then with growing
pauses. The contents of the old arena are gone. Trainer ranks and readers attach again, with new offers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from weightsync.errors import (
    ErrorRecord,
    LocalProtocolError,
    TransportBroken,
    TransportClosed,
    TransportError,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.nccl_bridge.commands import Command, Hello, Reply, Warm
from weightsyncd.bridge_link import BridgeConfig, BridgeLink
from weightsyncd.orphans import kill_orphans

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.config import NodeConfig

__all__ = ["Bridge", "BridgeConfig", "BridgeStatus", "bridges_of", "kill_orphans"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R", bound=Reply)
State = Literal["stopped", "starting", "ready", "lost"]

_PAUSE_FIRST = 0.1  # seconds before the second attempt to restart; doubled for each further one up to …
_PAUSE_LAST = 5.0
_STEADY = 2.0  # seconds a bridge must have lived for its next restart to be a first attempt again
_PROMPT = 5.0  # seconds for an answer that needs no work; a bridge that takes longer is wedged
_RESTART_SECONDS = 30.0  # for one attempt; starting takes 0.2 s, allocating a large arena some seconds


@dataclass(frozen=True, kw_only=True)
class BridgeStatus:
    """One bridge as plain data."""

    name: str  # "node/index"
    state: State
    pid: int | None
    incarnation: str | None
    restarts: int
    last_error: ErrorRecord | None


def bridges_of(config: NodeConfig) -> list[BridgeConfig]:
    """Return the configs of this node's bridges."""
    return [
        BridgeConfig(
            node=config.node.name,
            index=index,
            slots=config.arena.slots,
            slot_bytes=config.arena.slot_bytes,
            directory=config.node.shm_dir,
            gpu=config.node.gpus[index] if config.node.gpus else "",
            log_level=config.log.level,
            log_format=config.log.format,
        )
        for index in range(config.node.bridges)
    ]


class Bridge:
    """One bridge process and its successors. Used from one asyncio loop."""

    def __init__(
        self,
        config: BridgeConfig,
        *,
        on_lost: Callable[[Bridge, WeightSyncError], None] | None = None,
        on_ready: Callable[[Bridge], None] | None = None,
    ) -> None:
        """`on_lost` is called with the reason whenever the bridge is lost, `on_ready` whenever a successor is ready
        (not at the first start, which `start` waits for). Both are called from the loop and must return soon."""
        self.config = config
        self.state: State = "stopped"
        self.restarts = 0
        self.last_error: ErrorRecord | None = None
        self._on_lost = on_lost
        self._on_ready = on_ready
        self._link: BridgeLink | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # replaced whenever it is set, so that each waiter sees each change

    @property
    def name(self) -> str:
        """ "node/index", also its name as a peer of other bridges."""
        return self.config.name

    @property
    def pid(self) -> int | None:
        """The id of its process; None unless ready."""
        return link.pid if (link := self._alive()) is not None else None

    @property
    def incarnation(self) -> str | None:
        """Changes with every restart; None unless ready."""
        return link.incarnation if (link := self._alive()) is not None else None

    @property
    def offer(self) -> bytes | None:
        """For trainer ranks: `Arena.attach(offer, writable=True)`; None unless ready."""
        return link.offer if (link := self._alive()) is not None else None

    async def start(self, *, deadline: float) -> None:
        """Start it and wait until it is ready. Raises the error it failed with: `ConfigError` if /dev/shm is full."""
        before = self.state
        if before != "stopped":
            raise LocalProtocolError(f"bridge {self.name} is {before} already")
        self._become("starting")
        try:
            link = await BridgeLink.open(self.config, deadline=deadline)
        except BaseException as error:
            if isinstance(error, WeightSyncError):
                self.last_error = error.record()
            self._become("stopped")
            raise
        if self.state != "starting":  # `stop` was called meanwhile
            await link.end()
            raise TransportClosed(f"bridge {self.name} was stopped while it started")
        self._link = link
        self._become("ready")
        self._supervisor = asyncio.create_task(self._supervise(link), name=f"bridge {self.name}")

    async def ready(self, *, deadline: float) -> None:
        """Wait until it is ready. Raises `TransportTimeout` with the last error; `TransportClosed` if it is stopped."""
        while self._alive() is None:
            await self._change(deadline)

    async def _change(self, deadline: float) -> None:
        """Wait for the next change of state, or the next failed restart. Raises as `ready` does."""
        if self.state == "stopped":
            raise TransportClosed(f"bridge {self.name} is stopped")
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            raise TransportTimeout(self._not_ready(), hint=self.last_error.hint if self.last_error else None) from None

    def _not_ready(self) -> str:
        why = f": {self.last_error.message}" if self.last_error is not None else ""
        return f"bridge {self.name} is not ready{why}"

    async def prompt(self, *, deadline: float) -> None:
        """Wait until it is ready and answers. So a wedged bridge is found and replaced before it is given work.

        Raises as `ready` does, and `TransportBroken` at once if only an operator can help, such as by making room for
        its arena.
        """
        while True:
            while self._alive() is None:
                if self.state == "lost" and self.last_error is not None and self.last_error.kind == "ConfigError":
                    raise TransportBroken(self._not_ready(), hint=self.last_error.hint)
                await self._change(deadline)
            left = deadline - time.monotonic()
            try:
                await self.call(Hello(), deadline=time.monotonic() + min(_PROMPT, left / 2))
            except TransportError:
                if time.monotonic() >= deadline:
                    raise
            else:
                return

    async def warm(self, *, longest: float, deadline: float) -> None:
        """Have it load the libraries that communicators need. Waits and raises as `work` does."""
        await self.work(Warm(), "loading", longest=longest, deadline=deadline)

    async def work(self, command: Command[R], what: str, *, longest: float, deadline: float) -> R:
        """Have it do local work, and wait for that until `deadline`. Raises `TransportError`.

        The bridge itself has `longest` seconds. So a slow bridge is not taken for wedged, and goes on after `deadline`.
        """
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await self.call(command, deadline=time.monotonic() + longest)
        except TimeoutError:
            raise TransportTimeout(
                f"bridge {self.name} is still {what}", hint="it is ready for the next push"
            ) from None

    def retire(self, reason: str) -> None:
        """Take it for lost, whatever it is doing: it is killed and replaced. Does nothing unless it is ready."""
        link = self._alive()
        if link is not None:
            link.give_up(reason)

    async def call(self, command: Command[R], *, deadline: float) -> R:
        """Send one command and return its reply.

        Raises the error that the bridge answers; a `TransportTimeout` among these is of a wait, and the bridge lives.
        Raises `TransportBroken` naming the bridge if it is not ready or ends under way, and `TransportClosed` if it is
        stopped. Raises `TransportTimeout` if no answer comes by `deadline`. The bridge is then taken for wedged, killed
        and restarted in the background.
        """
        link = self._alive()
        if link is None:
            if self.state == "stopped":
                raise TransportClosed(f"bridge {self.name} is stopped")
            raise TransportBroken(self._not_ready(), hint="it is being restarted")
        return await link.call(command, deadline=deadline)

    async def stop(self, *, deadline: float) -> None:
        """End it, gracefully until `deadline`, then by force. Nothing of it is left. Stopping twice does nothing."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        link, self._link = self._link, None
        self._become("stopped")
        if link is not None:
            await link.end(deadline=deadline)

    def status(self) -> BridgeStatus:
        """Return its state as plain data."""
        return BridgeStatus(
            name=self.name,
            state=self.state,
            pid=self.pid,
            incarnation=self.incarnation,
            restarts=self.restarts,
            last_error=self.last_error,
        )

    def _alive(self) -> BridgeLink | None:
        """The link, unless it has ended; the supervisor may not have seen that yet."""
        return self._link if self._link is not None and not self._link.ended.done() else None

    async def _supervise(self, link: BridgeLink) -> None:
        attempts = 0
        while True:
            since = time.monotonic()
            error = await asyncio.shield(link.ended)
            if time.monotonic() - since > _STEADY:
                attempts = 0
            self._link = None
            self.last_error = error.record()
            logger.warning("[bridge=%s] lost: %s", self.name, error.message)
            self._become("lost")
            ending = asyncio.ensure_future(link.end())
            self._tell(self._on_lost, self, error)
            await _finish(ending)
            link, attempts = await self._restart(attempts)
            self.restarts += 1
            self._link = link
            self._become("ready")
            self._tell(self._on_ready, self)

    async def _restart(self, attempts: int) -> tuple[BridgeLink, int]:
        while True:
            if attempts:
                await asyncio.sleep(min(_PAUSE_FIRST * 2 ** (attempts - 1), _PAUSE_LAST))
            attempts += 1
            try:
                return await BridgeLink.open(self.config, deadline=time.monotonic() + _RESTART_SECONDS), attempts
            except WeightSyncError as error:
                self.last_error = error.record()
                logger.warning("[bridge=%s] restart.failed attempt=%d: %s", self.name, attempts, error.message)
                self._become("lost")

    def _tell(self, callback: Callable[P, None] | None, *args: P.args, **kwargs: P.kwargs) -> None:
        if callback is None:
            return
        try:
            callback(*args, **kwargs)
        except Exception:  # the seam: a bug in a callback must not end the supervision
            logger.exception("[bridge=%s] a callback failed", self.name)

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()


async def _finish(ending: asyncio.Future[None]) -> None:
    """Wait for `ending` even if this task is cancelled, so that no process is left half ended."""
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await ending
        raise
