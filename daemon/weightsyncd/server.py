"""The daemon: sockets in front, bridges and engines behind, and at most one push at a time in between.

`Server.run` is the whole life of weightsyncd: take the node's lock, clean up after a daemon that was killed, start the
bridges, listen, and, when told to stop, let a push under way end within `timeouts.stop` before everything is taken
down. What arrives is given to `Trainers`, which pushes for this node's trainer, or to `Follower`, which does this
node's part in a push from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec

from weightsync.endpoints import check_endpoint, private_directory, runtime_dir
from weightsync.errors import (
    CodecError,
    ConfigError,
    ErrorRecord,
    LocalProtocolError,
    RemoteProtocolError,
    WeightSyncError,
)
from weightsync.metrics import Metrics
from weightsync.placement import keeper_gpu
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsync.wire.daemon_links import ControlServer
from weightsync.wire.keys import read_key_file
from weightsyncd.bridges import Bridge, bridges_of, kill_orphans
from weightsyncd.changes import Changes
from weightsyncd.engines import Engines
from weightsyncd.executor import NodeExecutor
from weightsyncd.follower import Follower
from weightsyncd.health import HealthPage, measure_node
from weightsyncd.keeper import KeeperAdapter
from weightsyncd.loras import Loras
from weightsyncd.membership import Membership
from weightsyncd.peers import Peer
from weightsyncd.plans import Plans
from weightsyncd.push import Services
from weightsyncd.rails import Rails
from weightsyncd.repeats import Repeats, engines_everywhere
from weightsyncd.seed import Registry, Seeker
from weightsyncd.status import status_of
from weightsyncd.traces import Traces
from weightsyncd.trainers import Trainers

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from weightsync.config import NodeConfig

__all__ = ["Server"]

logger = logging.getLogger(__name__)

_FAR = b"far"  # before the identity of whoever is connected to cluster.listen
_FROM_AFAR = (
    msg.Heartbeat,
    msg.StatusRequest,
    msg.TraceRequest,
    msg.Attach,
    msg.Execute,
    msg.JoinRail,
    msg.Receive,
    msg.Exchange,
    msg.Gather,
    msg.TellRank,
    msg.Release,
    msg.Register,
    msg.PushLora,
)
_BRIDGE_STOP_LEAST, _BRIDGE_STOP = 0.5, 5.0  # seconds; an idle bridge takes milliseconds


class Server:
    """One weightsyncd."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.metrics = Metrics({engine.model for engine in config.engines if not engine.frozen})
        self.started = time.monotonic()
        self.bridges = [Bridge(each, on_lost=self._bridge_lost) for each in bridges_of(config)]
        self.engines = Engines(
            config.engines,
            config.timeouts,
            busy=lambda: self.busy,
            make_keeper=self._make_keeper if config.node.retain == "host" else None,
        )
        self.executor = NodeExecutor(config.node.name, config.cluster.address, self.engines, self.bridges)
        key = read_key_file(config.cluster.key_file) if config.cluster.key_file else None
        self.peers: dict[str, Peer] = {}
        self.members = Membership(
            config,
            self.engines,
            self.peers,
            busy=lambda: self.busy,
            make_peer=lambda name, endpoint: Peer(
                name,
                endpoint,
                config,
                key=key,
                on_lost=self._peer_lost,
                on_rank=lambda node, said: self.trainers.route_from(node, said),
                taken=lambda node, names: self.changes.names_taken(node, names),
            ),
            spawn=self._spawn,
            on_gone=self.executor.wire.forget,
            on_change=lambda: self.rails.break_up(),
        )
        self.changes = Changes(config, self.members, self.engines, self.peers, self._spawn)
        self._here = ControlServer(config.endpoint, "node.listen")
        self._far = (
            ControlServer(config.cluster.listen, "cluster.listen", key=key, tag=_FAR) if config.cluster.listen else None
        )
        self.rails = Rails(config, self.bridges, self.peers)
        self.traces = Traces(config.node.name, config.log.trace_dir)
        services = Services(config, self.executor, self.peers, self.rails, Plans(config.arena), self._send, self.traces)
        self.follower = Follower(
            config,
            secrets.token_hex(8),
            self.executor,
            self.bridges,
            self.peers,
            busy=lambda: self.trainers.busy,
            wind_up=lambda until: self.trainers.wind_up(until),
            on_free=self._freed,
            rails=self.rails,
            send=self._send,
            on_missed=lambda call, ranks, error: self.trainers.missed(call, ranks, error),
        )
        self.registry = Registry(config.timeouts.liveness)
        self.seeker = Seeker(config, key, self._learn_nodes) if config.cluster.seed else None
        self.trainers = Trainers(services, self.metrics, self.follower, self._freed)
        for model in {engine.config.model for engine in self.engines if not engine.config.frozen}:
            self.engines.keeper_of(model)  # to be there before the first push
        self.repeats = Repeats(
            self.engines.keepers,
            config.timeouts,
            engines=lambda: engines_everywhere(config.node.name, self.engines, self.peers.values()),
            refresh=self.see_peers,
            newest=lambda model: self.trainers.newest.get(model),
            busy=lambda: self.busy,
        )
        self.loras = Loras(config, self.engines, self.peers, lambda: self.busy, self._spawn)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """A push holds this node's engines and slots."""
        return self.trainers.busy or self.follower.following is not None

    # --- life -----------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises `ConfigError` when it cannot start; leaves nothing behind either way."""
        check_endpoint(self.config.endpoint, "node.listen")
        with self._only_one():
            until = time.monotonic()  # when it fails to start, there is nothing to wait for
            try:
                await self._start()
                async with self._loops(stop):
                    until = time.monotonic() + self.config.timeouts.stop
                    await asyncio.gather(self.trainers.finish(until), self.follower.finish(until))
                    if self.seeker is not None:
                        await self.seeker.leave()
            finally:
                await self._take_down(until)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Hold the node's lock; the kernel lets go of it however this process ends."""
        directory = private_directory(runtime_dir())
        lock = os.open(directory / f"{self.config.node.name}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(
                f"another weightsyncd serves node {self.config.node.name!r}",
                hint="stop it, or give this one another node.name",
            ) from error
        try:
            yield
        finally:
            os.close(lock)

    async def _start(self) -> None:
        node = self.config.node
        killed = kill_orphans(node.name, node.shm_dir)
        if killed:
            logger.warning("ended %d bridges that a killed daemon had left", killed)
        self._here.remove_stale()  # the lock is ours: whoever made the socket is gone
        until = time.monotonic() + self.config.timeouts.bridge_start
        starts = (bridge.start(deadline=until) for bridge in self.bridges)
        failures = [f for f in await asyncio.gather(*starts, return_exceptions=True) if f is not None]
        if failures:
            raise failures[0]
        for server in self._servers:
            server.bind()
            logger.info("node %s listens at %s", node.name, server.endpoint)

    @contextlib.asynccontextmanager
    async def _loops(self, stop: asyncio.Event) -> Any:
        """Everything that runs for ever; the block begins when `stop` is set, and they go on meanwhile."""
        with contextlib.ExitStack() as stack:
            if self.config.http.listen:
                page = HealthPage(self.config.http.listen, self.metrics)
                stack.callback(page.close)
                page.serve()
            loops = [
                *(
                    asyncio.create_task(self._listen(server), name=f"listen {server.endpoint}")
                    for server in self._servers
                ),
                asyncio.create_task(self._watch(), name="watch"),
                asyncio.create_task(self.engines.watch(), name="engines"),
                asyncio.create_task(self._measure(), name="measure"),
                asyncio.create_task(self.repeats.keep(), name="repeats"),
                asyncio.create_task(self.rails.keep(lambda: self.busy), name="rails"),
                asyncio.create_task(self.members.keep(), name="peers"),
                *([asyncio.create_task(self.seeker.keep(), name="seed")] if self.seeker is not None else []),
            ]
            stopped = asyncio.create_task(stop.wait(), name="stop")
            try:
                done, _ = await asyncio.wait([*loops, stopped], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {stopped}:
                    task.result()  # a loop that ends has failed: let it be seen
                yield
            finally:
                for task in [*loops, stopped]:
                    task.cancel()
                await asyncio.gather(*loops, stopped, return_exceptions=True)

    async def _take_down(self, until: float) -> None:
        left = until - time.monotonic()
        end = time.monotonic() + min(max(left / 2, _BRIDGE_STOP_LEAST), _BRIDGE_STOP)
        # together: what waits for a bridge that does not answer goes on when that is killed
        await asyncio.gather(self.trainers.close(until), *(bridge.stop(deadline=end) for bridge in self.bridges))
        await self.executor.settle(until)
        await self.traces.settle(min(until, time.monotonic() + self.config.timeouts.grace))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.engines.close()
        for server in self._servers:
            server.close()
        logger.info("node %s has stopped", self.config.node.name)

    # --- what arrives ---------------------------------------------------------------------------------------------

    async def _listen(self, server: ControlServer) -> None:
        async for identity, message in server.frames(refused=self.metrics.frames_refused.inc):
            try:
                if server is self._far and not isinstance(message, _FROM_AFAR):
                    raise RemoteProtocolError(
                        f"{type(message).__name__} is taken on a node's own socket alone",
                        hint="call it on that machine, at the endpoint of its [node] listen",
                    )
                self._route(identity, message)
            except (CodecError, LocalProtocolError, RemoteProtocolError) as error:
                self._send(identity, msg.ErrorReply(id=message.id, error=error.record()))

    def _send(self, identity: bytes, message: msg.Message) -> bool:
        server = self._far if self._far is not None and identity.startswith(_FAR) else self._here
        return server.send(identity, message)

    @property
    def _servers(self) -> list[ControlServer]:
        return [self._here, self._far] if self._far is not None else [self._here]

    def _route(self, identity: bytes, message: msg.Message) -> None:
        match message:
            case msg.Heartbeat():
                if message.coming and not identity.startswith(_FAR):
                    self.engines.look_ahead(message.coming)
                self.trainers.heard(identity)
                self.follower.heard(identity)
                self._send(identity, msg.Heartbeat())
            case msg.Open():
                self.trainers.open(identity, message)
            case _ if isinstance(message, msg.RankWords):
                self.trainers.route(identity, message)
            case msg.StatusRequest():
                self._spawn(self._answer(identity, message.id, status_of(self, fresh=message.fresh)))
            case msg.TraceRequest():
                current = self.trainers.push.trace() if self.trainers.push is not None else None
                self._spawn(self._answer(identity, message.id, self.traces.answer(message, current)))
            case msg.ChangeEngines():
                self._spawn(self._answer(identity, message.id, self.changes.change_engines(message)))
            case msg.Attach():
                self._spawn(self._answer(identity, message.id, self.follower.attach(identity, message)))
            case msg.Execute():
                self._spawn(self._answer(identity, message.id, self.follower.execute(identity, message)))
            case msg.JoinRail() | msg.Receive() | msg.Exchange():
                self._spawn(self._answer(identity, message.id, self.follower.at_rail(identity, message)))
            case msg.PushLora():
                if message.forward and identity.startswith(_FAR):
                    raise RemoteProtocolError("a LoRA adapter from another node is for the engines of this one alone")
                self._spawn(self._answer(identity, message.id, self.loras.push(message)))
            case msg.Register():
                self._send(identity, msgspec.structs.replace(self.registry.register(message), id=message.id))
            case msg.Gather():
                self.follower.gather(identity, message)
            case msg.TellRank():
                self.follower.heard(identity)
                self.follower.tell(identity, message)
            case msg.Release():
                self._spawn(self.follower.release(identity, message.push, message.error))
            case _:
                raise RemoteProtocolError(f"a daemon does not take messages of type {type(message).__name__}")

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, identity: bytes, number: int, work: Coroutine[None, None, msg.Message]) -> None:
        try:
            answer = await work
        except asyncio.CancelledError:
            gone = LocalProtocolError("the push was let go before this was done")
            self._send(identity, msg.ErrorReply(id=number, error=gone.record()))
            raise
        except WeightSyncError as error:
            answer = msg.ErrorReply(error=error.record())
        except Exception as error:  # the seam: whoever asked must not wait for an answer that never comes
            logger.exception("a question failed in an unexpected way")
            answer = msg.ErrorReply(error=LocalProtocolError(f"weightsyncd failed: {error!r}").record())
        self._send(identity, msgspec.structs.replace(answer, id=number))

    async def _watch(self) -> None:
        """Notice trainer ranks and coordinators that have fallen silent."""
        liveness = self.config.timeouts.liveness
        late = False
        while True:
            before = time.monotonic()
            await asyncio.sleep(liveness / 5)
            # who was held up itself has heard nobody: what arrived meanwhile is read before anyone is given up
            late = not late and time.monotonic() - before > liveness / 2
            if not late:
                self.trainers.check_alive(liveness)
                await self.follower.check(liveness)

    # --- nodes and engines -----------------------------------------------------------------------------------

    async def _learn_nodes(self, nodes: dict[str, str], complete: bool) -> None:
        await self.members.learn(nodes, complete=complete, timeout=self.config.timeouts.operation)

    def _freed(self) -> None:
        """No push holds this node any more."""
        self.members.settle()
        self.trainers.go_on()
        self.loras.go_on()

    async def see_peers(self) -> None:
        """Look at the engines of other nodes anew."""
        await asyncio.gather(*(peer.refresh() for peer in self.peers.values()))

    def _make_keeper(self, model: str) -> KeeperAdapter:
        gpu = keeper_gpu(self.config.node.gpus, len(self.engines.keepers))
        return KeeperAdapter(model, self.config.endpoint, self.config.log, self.trainers.newest.get, gpu=gpu)

    # --- bridges and peers ----------------------------------------------------------------------------------------

    def _bridge_lost(self, bridge: Bridge, error: WeightSyncError) -> None:
        self.rails.break_up()
        self.follower.bridge_lost(error)
        lost = ev.BridgeLost(node=self.config.node.name, bridge=bridge.config.index, error=error.record())
        self.trainers.hear(lost)

    def _peer_lost(self, node: str, error: ErrorRecord) -> None:
        self.rails.break_up()
        self.rails.given_back(node)
        self.trainers.hear(ev.NodeLost(node=node, error=error))

    # --- looking at it --------------------------------------------------------------------------------------------

    async def _measure(self) -> None:
        while True:
            await measure_node(self)
            await asyncio.sleep(self.config.timeouts.probe_every)
