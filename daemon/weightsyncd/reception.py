"""Gives each message that arrives at a daemon's sockets to the part that it is for, and sends the answers.

A frame that cannot be read, or a message that no part takes, is answered with an error and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import CodecError, LocalProtocolError, RemoteProtocolError, WeightSyncError
from weightsync.wire import messages as msg
from weightsync.wire.daemon_links import ControlServer
from weightsyncd.status import status_of

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from weightsync.config import NodeConfig
    from weightsync.wire.keys import ClusterKey
    from weightsyncd.server import Server

__all__ = ["Reception"]

logger = logging.getLogger(__name__)

_FAR = b"far"  # prefix of the identities of connections to cluster.listen
_FROM_AFAR = (
    msg.Heartbeat,
    msg.StatusRequest,
    msg.TraceRequest,
    msg.Attach,
    msg.Execute,
    msg.JoinRail,
    msg.Receive,
    msg.Exchange,
    msg.Prepare,
    msg.Collect,
    msg.Gather,
    msg.TellRank,
    msg.Release,
    msg.Register,
    msg.PushLora,
)


class Reception:
    """The sockets of one daemon: its own, and the cluster's if there is one."""

    def __init__(self, config: NodeConfig, key: ClusterKey | None) -> None:
        self._node = config.node.name
        self._here = ControlServer(config.endpoint, "node.listen")
        self._far = (
            ControlServer(config.cluster.listen, "cluster.listen", key=key, tag=_FAR) if config.cluster.listen else None
        )
        self.sockets = [self._here, self._far] if self._far is not None else [self._here]
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Listen. Raises `ConfigError`."""
        for socket in self.sockets:
            socket.bind()
            logger.info("node %s listens at %s", self._node, socket.endpoint)

    def remove_stale(self) -> None:
        """Remove the socket file that a killed daemon has left. Only for the holder of the node's lock."""
        self._here.remove_stale()

    def send(self, identity: bytes, message: msg.Message) -> bool:
        """Queue a message for the connection with this identity. Returns False if it is gone or lags too far behind."""
        socket = self._far if self._far is not None and identity.startswith(_FAR) else self._here
        return socket.send(identity, message)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run work in the background. `settle` cancels work that has not ended by then."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Cancel what `spawn` was given, and wait until it has ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Close the sockets."""
        for socket in self.sockets:
            socket.close()

    async def listen(self, socket: ControlServer, server: Server) -> None:
        """Give what arrives at one of the sockets to the parts of the server, until cancelled."""
        async for identity, message in socket.frames(refused=server.metrics.frames_refused.inc):
            try:
                if socket is self._far and not isinstance(message, _FROM_AFAR):
                    raise RemoteProtocolError(
                        f"{type(message).__name__} is taken on a node's own socket alone",
                        hint="call it on that machine, at the endpoint of its [node] listen",
                    )
                self._route(identity, message, server)
            except (CodecError, LocalProtocolError, RemoteProtocolError) as error:
                self.send(identity, msg.ErrorReply(id=message.id, error=error.record()))

    def _route(self, identity: bytes, message: msg.Message, server: Server) -> None:
        from_afar = identity.startswith(_FAR)
        match message:
            case msg.Heartbeat():
                if message.coming and not from_afar:
                    server.engines.look_ahead(message.coming)
                server.trainers.heard(identity)
                server.follower.heard(identity)
                self.send(identity, msg.Heartbeat())
            case msg.Open():
                server.trainers.open(identity, message)
            case _ if isinstance(message, msg.RankWords):
                server.trainers.route(identity, message)
            case msg.StatusRequest():
                self._answer(identity, message, status_of(server, fresh=message.fresh))
            case msg.TraceRequest():
                current = server.trainers.push.trace() if server.trainers.push is not None else None
                self._answer(identity, message, server.traces.answer(message, current))
            case msg.ChangeEngines():
                self._answer(identity, message, server.changes.change_engines(message))
            case msg.Attach():
                self._answer(identity, message, server.follower.attach(identity, message))
            case msg.Execute():
                self._answer(identity, message, server.follower.execute(identity, message))
            case msg.JoinRail() | msg.Receive() | msg.Exchange() | msg.Prepare() | msg.Collect():
                self._answer(identity, message, server.follower.at_rail(identity, message))
            case msg.PushLora():
                if message.forward and from_afar:
                    raise RemoteProtocolError("a LoRA adapter from another node is for the engines of this one alone")
                self._answer(identity, message, server.loras.push(message))
            case msg.Register():
                self.send(identity, msgspec.structs.replace(server.registry.register(message), id=message.id))
            case msg.Gather():
                server.follower.gather(identity, message)
            case msg.TellRank():
                server.follower.heard(identity)
                server.follower.tell(identity, message)
            case msg.Release():
                self.spawn(server.follower.release(identity, message.push, message.error))
            case _:
                raise RemoteProtocolError(f"a daemon does not take messages of type {type(message).__name__}")

    def _answer(self, identity: bytes, message: msg.Message, work: Coroutine[None, None, msg.Message]) -> None:
        self.spawn(self._answered(identity, message.id, work))

    async def _answered(self, identity: bytes, number: int, work: Coroutine[None, None, msg.Message]) -> None:
        try:
            answer = await work
        except asyncio.CancelledError:
            gone = LocalProtocolError("the push was let go before this was done")
            self.send(identity, msg.ErrorReply(id=number, error=gone.record()))
            raise
        except WeightSyncError as error:
            answer = msg.ErrorReply(error=error.record())
        except Exception as error:  # the seam: the caller must not wait for an answer that never comes
            logger.exception("a question failed in an unexpected way")
            answer = msg.ErrorReply(error=LocalProtocolError(f"weightsyncd failed: {error!r}").record())
        self.send(identity, msgspec.structs.replace(answer, id=number))
