"""The seed: one node that all others know, and that tells them of each other.

Every node with a `cluster.seed` registers there regularly, and has the nodes that it is told of as peers. The seed
registers with itself, too. While the seed is down, the others keep the peers that they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsync.endpoints import check_endpoint
from weightsync.errors import DaemonLost, PushRefused, RemoteProtocolError, WeightSyncError
from weightsync.wire import messages as msg
from weightsync.wire.daemon_links import PeerLink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weightsync.config import NodeConfig
    from weightsync.wire.keys import ClusterKey

__all__ = ["Registry", "Seeker"]

logger = logging.getLogger(__name__)

_FORGET = 6  # times `timeouts.liveness` that a node may be silent before it counts as gone for good
_MAX_NODES = 4096
_GOODBYE = 0.5  # seconds for a seed to hear that a node leaves


@dataclass
class _Node:
    endpoint: str
    heard: float


class Registry:
    """On the seed: the nodes that have registered and not left since."""

    def __init__(self, liveness: float) -> None:
        self._patience = _FORGET * liveness
        self._since = time.monotonic()
        self._nodes: dict[str, _Node] = {}

    def register(self, message: msg.Register) -> msg.Registered:
        """Note a node and answer with all of them. Raises `RemoteProtocolError` for a name that another has."""
        now = time.monotonic()
        self._nodes = {name: node for name, node in self._nodes.items() if now - node.heard < self._patience}
        known = self._nodes.get(message.node)
        if message.leaving:
            if known is not None and known.endpoint == message.endpoint:
                del self._nodes[message.node]
        elif known is not None and known.endpoint != message.endpoint:
            raise RemoteProtocolError(
                f"a node at {known.endpoint} is called {message.node!r} already",
                hint=f"give each node a node.name of its own; one that has moved waits {self._patience:g} s",
            )
        elif known is None and len(self._nodes) >= _MAX_NODES:
            raise RemoteProtocolError(f"{_MAX_NODES} nodes have registered already")
        else:
            self._nodes[message.node] = _Node(message.endpoint, now)
        nodes = {name: node.endpoint for name, node in self._nodes.items()}
        return msg.Registered(nodes=nodes, complete=now - self._since > self._patience)


class Seeker:
    """On every node: registers with the seed, and gives `learn` the other nodes, by name."""

    def __init__(
        self, config: NodeConfig, key: ClusterKey | None, learn: Callable[[dict[str, str], bool], Awaitable[None]]
    ) -> None:
        """`learn(nodes, complete)` is called with each answer of the seed; unless `complete`, more nodes may exist."""
        self._config = config
        self._key = key
        self._learn = learn
        self._link: PeerLink | None = None
        self.problem = ""  # why the seed is not reached

    async def keep(self) -> None:
        """Register again and again, for ever."""
        patience = self._config.timeouts.liveness
        try:
            while True:
                try:
                    await self._look(patience)
                except PushRefused:  # a push goes on for longer than a change waits: the next answer brings it again
                    pass
                except WeightSyncError as error:
                    if str(error) != self.problem:
                        logger.warning("seed %s: %s", self._config.cluster.seed, error)
                    self.problem = str(error)
                    await self._hang_up()
                else:
                    self.problem = ""
                await asyncio.sleep(patience / 5)
        finally:
            await self._hang_up()

    async def leave(self) -> None:
        """Tell the seed that this node goes for good, so that no node waits for it to come back."""
        link = self._link
        if link is not None:
            with contextlib.suppress(WeightSyncError):
                await link.ask(self._register(leaving=True), deadline=time.monotonic() + _GOODBYE)

    async def _look(self, patience: float) -> None:
        if self._link is not None and self._link.broken.is_set():
            await self._hang_up()
        if self._link is None:
            self._link = PeerLink(self._config.cluster.seed, patience=patience, key=self._key)
        answer = await self._link.ask(self._register(), deadline=time.monotonic() + patience)
        if not isinstance(answer, msg.Registered):
            raise DaemonLost(f"the seed answers Register with {type(answer).__name__}")
        others = {name: endpoint for name, endpoint in answer.nodes.items() if name != self._config.node.name}
        for name, endpoint in others.items():
            check_endpoint(endpoint, f"the endpoint of node {name}", keys=self._key is not None)
        await self._learn(others, answer.complete)

    def _register(self, *, leaving: bool = False) -> msg.Register:
        return msg.Register(node=self._config.node.name, endpoint=self._config.cluster.listen, leaving=leaving)

    async def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()
