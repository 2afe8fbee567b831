"""Changes of a daemon's engines and peers, as operators ask for them: a command, or a config file that was edited.

Names of engines are unique over all nodes that know each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from weightsync.errors import ConfigError, WeightSyncError
from weightsync.wire import messages as msg
from weightsyncd.membership import as_in, need_restart, with_engines

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from weightsync.config import NodeConfig
    from weightsyncd.engines import Engines
    from weightsyncd.membership import Edit, Membership
    from weightsyncd.peers import Peer

__all__ = ["Changes"]

logger = logging.getLogger(__name__)


class Changes:
    """See the module. `spawn` runs work in the background."""

    def __init__(
        self,
        config: NodeConfig,
        members: Membership,
        engines: Engines,
        peers: Mapping[str, Peer],
        spawn: Callable[[Coroutine[None, None, None]], None],
        look: Callable[[], Awaitable[None]],
    ) -> None:
        """`look` asks the peers for the engines that they have now."""
        self._config = config
        self._members = members
        self._engines = engines
        self._peers = peers
        self._spawn = spawn
        self._look = look

    def reload(self, load: Callable[[], NodeConfig], started: NodeConfig) -> None:
        """Take engines and peers from the config file as it is now. A mistake in it is logged, and changes nothing.

        Other keys that differ from `started`, the config at the daemon's start, are logged: they need a restart.
        """
        try:
            file = load()
        except ConfigError as error:
            logger.error("reload.failed, and nothing has changed: %s", error)  # noqa: TRY400
            return
        if keys := need_restart(started, file):
            logger.warning("these keys of the node config need a restart: %s", ", ".join(keys))
        self._spawn(self._reload(file))

    async def _reload(self, file: NodeConfig) -> None:
        try:
            await self._look()
            edit = self._apart_from_peers(lambda config: as_in(config, file))
            await self._members.change(edit, timeout=self._config.timeouts.operation)
        except WeightSyncError as error:
            logger.error("reload.failed, and nothing has changed: %s", error)  # noqa: TRY400
        else:
            logger.info("reload.complete: %d engines, %d peers", len(list(self._engines)), len(self._peers))

    async def change_engines(self, message: msg.ChangeEngines) -> msg.Message:
        """Add and remove engines, between two pushes. Raises `ConfigError`, or `PushRefused` if a push goes on."""
        if not self._config.endpoint.startswith("ipc://"):  # any user of this machine may call a TCP endpoint
            raise ConfigError(
                "engines are added and removed over a private socket only",
                hint="leave node.listen away; or edit the node config, and send weightsyncd a SIGHUP",
            )
        if message.add:  # an engine that another node has just removed may be added here
            await self._look()
        edit = self._apart_from_peers(lambda config: with_engines(config, message.add, message.remove))
        await self._members.change(edit, timeout=min(message.timeout, self._config.timeouts.operation))
        until = time.monotonic() + self._config.timeouts.probe
        added = [self._engines[engine.name] for engine in message.add]
        await asyncio.gather(*(engine.probe(until) for engine in added), return_exceptions=True)  # status shows errors
        return msg.Changed(engines=tuple(engine.status(self._config.node.name) for engine in added))

    def _apart_from_peers(self, edit: Edit) -> Edit:
        """Return the edit with a check: it raises `ConfigError` if an engine has the name of another node's engine."""

        def edited(config: NodeConfig) -> NodeConfig:
            after, known = edit(config), self._names_elsewhere()
            for engine in after.engines:
                if (node := known.get(engine.name)) is not None:
                    raise ConfigError(
                        f"an engine of node {node} is called {engine.name!r} already", hint="give it another name"
                    )
            return after

        return edited

    def names_taken(self, node: str, names: Sequence[str]) -> str | None:
        """Return why a peer's engines cannot have these names, as a sentence; None if they can."""
        known = {**{e.name: self._config.node.name for e in self._engines}, **self._names_elsewhere(node)}
        for name in names:
            if name in known:
                return f"its engine {name!r} has the name of one on {known[name]}; rename one of them"
        return None

    def _names_elsewhere(self, but: str = "") -> dict[str, str]:
        """Map the names of peers' engines to their nodes, leaving out the node `but`."""
        return {e.name: node for node, peer in self._peers.items() if node != but for e in peer.engines}
