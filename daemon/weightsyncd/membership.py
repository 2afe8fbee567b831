"""Engines and other nodes that come and go while the daemon runs: between two pushes, and never in one.

A change is an edit of the node's config: by an operator (`weightsync engines add`), or by SIGHUP, after which the file
holds again. Changes of other keys need a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from weightsync.config import checked
from weightsync.errors import ConfigError, LocalProtocolError, PushRefused, WeightSyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from weightsync.config import EngineConfig, NodeConfig
    from weightsyncd.engines import Engines
    from weightsyncd.peers import Peer

    Edit = Callable[[NodeConfig], NodeConfig]

__all__ = ["Edit", "Membership", "as_in", "need_restart", "with_engines"]

logger = logging.getLogger(__name__)


def with_engines(config: NodeConfig, add: tuple[EngineConfig, ...], remove: tuple[str, ...]) -> NodeConfig:
    """Return the config with engines added and removed. Raises `ConfigError`, also if one to remove is not there."""
    names = [engine.name for engine in config.engines]
    if unknown := sorted(set(remove) - set(names)):
        raise ConfigError(
            f"node {config.node.name} has no engine called {', '.join(map(repr, unknown))}",
            hint=f"it has {', '.join(names) or 'none'}",
        )
    left = tuple(engine for engine in config.engines if engine.name not in remove)
    after = msgspec.structs.replace(config, engines=(*left, *add))
    return checked(after) if add else after  # removing engines makes no config invalid


def as_in(config: NodeConfig, file: NodeConfig) -> NodeConfig:
    """Return the config with the engines and peers of its file as that is now. Raises `ConfigError`."""
    cluster = msgspec.structs.replace(config.cluster, peers=file.cluster.peers)
    return checked(msgspec.structs.replace(config, engines=file.engines, cluster=cluster))


def need_restart(before: NodeConfig, after: NodeConfig) -> list[str]:
    """Return the keys that differ between two versions of a file and take effect only after a restart."""
    return [
        f"{section}.{key}"
        for section in before.__struct_fields__
        if section != "engines"
        for key in getattr(before, section).__struct_fields__
        if (section, key) != ("cluster", "peers")
        and getattr(getattr(before, section), key) != getattr(getattr(after, section), key)
    ]


class Membership:
    """The engines and peers of a daemon. `engines` and `peers` change in place, because other modules hold them."""

    def __init__(
        self,
        config: NodeConfig,
        engines: Engines,
        peers: dict[str, Peer],
        *,
        busy: Callable[[], bool],
        make_peer: Callable[[str, str], Peer],
        spawn: Callable[[Coroutine[None, None, None]], None],
        on_gone: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        """`on_gone` is called with the name of an engine that has gone, `on_change` when a peer has come or gone.
        `spawn` runs work in the background.
        """
        self.config = config
        self._seeded: dict[str, str] = {}  # peers that a seed has told of, besides those of the config
        self._engines = engines
        self._peers = peers
        self._busy = busy
        self._make_peer = make_peer
        self._spawn = spawn
        self._on_gone = on_gone
        self._on_change = on_change
        self._waiting: deque[tuple[Edit, asyncio.Future[None]]] = deque()
        self._group: asyncio.TaskGroup | None = None
        self._keeping: dict[str, asyncio.Task[None]] = {}
        for name, endpoint in config.cluster.peers.items():
            peers[name] = make_peer(name, endpoint)

    async def keep(self) -> None:
        """Keep every peer attached, for ever."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for name in self._peers:
                    self._keep(name)
                await asyncio.Event().wait()
        finally:
            self._group = None

    async def change(self, edit: Edit, *, timeout: float) -> None:
        """Edit the config as soon as no push is under way. Raises what `edit` raises.

        Raises `PushRefused` if a push outlasts `timeout` seconds; nothing has changed then.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((edit, done))
        self.settle()
        try:
            async with asyncio.timeout(timeout):
                await done
        except TimeoutError:
            if not done.cancelled():  # the change was made in this very moment
                return done.result()
            raise PushRefused(
                f"a push has been under way for {timeout:g} s", hint="engines come and go between pushes; try again"
            ) from None

    async def learn(self, nodes: dict[str, str], *, complete: bool, timeout: float) -> None:
        """Have the nodes that a seed has told of as peers. Nodes that it told of before have left if `complete`.

        Raises `PushRefused` if a push outlasts the timeout.
        """
        seeded = nodes if complete else {**self._seeded, **nodes}
        if seeded == self._seeded:
            return

        def edit(config: NodeConfig) -> NodeConfig:
            self._seeded = seeded
            return config

        await self.change(edit, timeout=timeout)

    def settle(self) -> None:
        """Make the changes that wait, unless a push is under way. Call it when a push has ended."""
        while self._waiting and not self._busy():
            edit, done = self._waiting.popleft()
            if done.done():  # its caller has given up
                continue
            try:
                self._become(edit(self.config))
            except WeightSyncError as error:
                done.set_exception(error)
            except Exception as error:  # the seam: the caller must hear of it, and the daemon goes on
                logger.exception("a change of engines or peers failed in an unexpected way")
                done.set_exception(LocalProtocolError(f"weightsyncd failed: {error!r}"))
            else:
                done.set_result(None)

    def _become(self, config: NodeConfig) -> None:
        names = {engine.name for engine in self._engines}
        dropped = self._engines.become(config.engines)
        self.config = config
        for gone in dropped:
            logger.info("[engine=%s] is no longer an engine of this node", gone.name)
            self._on_gone(gone.name)
            self._spawn(self._engines.let_go(gone))
        for engine in self._engines:
            if engine.name not in names:
                logger.info("[engine=%s] is an engine of this node from now on", engine.name)
        before = {name: peer.endpoint for name, peer in self._peers.items()}
        after = {**self._seeded, **config.cluster.peers}
        for name in [name for name, endpoint in before.items() if after.get(name) != endpoint]:
            logger.info("[node=%s] is no longer a peer", name)
            del self._peers[name]
            if name in self._keeping:
                self._keeping.pop(name).cancel()  # its end closes the connection
        for name in [name for name in after if name not in self._peers]:
            logger.info("[node=%s] is a peer from now on", name)
            self._peers[name] = self._make_peer(name, after[name])
            self._keep(name)
        if before != after:
            self._on_change()

    def _keep(self, name: str) -> None:
        if self._group is not None:
            self._keeping[name] = self._group.create_task(self._peers[name].keep(), name=f"peer {name}")
