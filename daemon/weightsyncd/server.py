"""The daemon: sockets in front, bridges and engines behind, and at most one push at a time in between.

`Server.run` is the whole life of weightsyncd: take the node's lock, clean up after a daemon that was killed, start the
bridges, listen, and, when told to stop, let a push under way end within `timeouts.stop` before everything is taken
down.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from weightsync.config import runtime_dir
from weightsync.errors import (
    CodecError,
    ConfigError,
    ErrorRecord,
    LocalProtocolError,
    PushRefused,
    RemoteProtocolError,
    WeightSyncError,
)
from weightsync.metrics import Metrics
from weightsync.nccl_bridge import commands
from weightsync.plan.manifest import Manifest
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.wire import messages as msg
from weightsync.wire.codec import plain, structured
from weightsync.wire.control import ControlServer, check_endpoint
from weightsyncd.bridges import Bridge, BridgeConfig, kill_orphans
from weightsyncd.engines import Engines
from weightsyncd.executor import NodeExecutor, PushContext
from weightsyncd.health import HealthPage, measure_node, measure_push, status_of
from weightsyncd.peers import INSTRUCTIONS, Peer, Rails
from weightsyncd.plans import Plans
from weightsyncd.push import Push, Services

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from weightsync.config import NodeConfig

__all__ = ["Server"]

logger = logging.getLogger(__name__)

_MAX_WAITING = 4096  # ranks that may wait for the push before theirs to let go of its slots


@dataclass
class _Coordinator:
    """Another daemon that pushes to this node's engines."""

    identity: bytes
    context: PushContext
    heard: float
    running: int = 0


class Server:
    """One weightsyncd."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.incarnation = secrets.token_hex(8)
        self.started = time.monotonic()
        self.push: Push | None = None
        self.last: msg.PushOutcome | None = None
        self.last_error: ErrorRecord | None = None
        self.versions: dict[str, int] = {}  # model → newest version committed on any engine
        self.stopping = False
        self.bridges = [
            Bridge(
                BridgeConfig(
                    node=config.node.name,
                    index=index,
                    slots=config.arena.slots,
                    slot_bytes=config.arena.slot_bytes,
                    directory=config.node.shm_dir,
                ),
                on_lost=self._bridge_lost,
            )
            for index in range(config.node.bridges)
        ]
        self.engines = Engines(config.engines, config.timeouts, busy=lambda: self.busy)
        self.executor = NodeExecutor(config.node.name, self.engines, self.bridges)
        self.peers = {
            name: Peer(
                name,
                endpoint,
                config,
                on_attached=self._peer_attached,
                on_lost=self._peer_lost,
                taken=self._names_taken,
            )
            for name, endpoint in config.cluster.peers.items()
        }
        self._control = ControlServer(config.endpoint)
        rails = Rails(config, self.bridges, self.peers)
        self._services = Services(config, self.executor, self.peers, rails, Plans(config.arena), self._control.send)
        self._coordinator: _Coordinator | None = None
        self._manifests: dict[bytes, Manifest] = {}  # sent by coordinators
        self._waiting: deque[tuple[bytes, msg.Open]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """A push holds this node's engines and slots."""
        return self.push is not None or self._coordinator is not None

    # --- life -----------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises `ConfigError` when it cannot start; leaves nothing behind either way."""
        check_endpoint(self.config.endpoint, "node.listen")
        with self._only_one():
            try:
                await self._start()
                await self._serve(stop)
            finally:
                await self._take_down()

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Hold the node's lock; the kernel lets go of it however this process ends."""
        directory = runtime_dir()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        self._control.remove_stale()  # the lock is ours: whoever made the socket is gone
        until = time.monotonic() + self.config.timeouts.bridge_start
        await asyncio.gather(*(bridge.start(deadline=until) for bridge in self.bridges))
        self._control.bind()
        logger.info("node %s listens at %s", node.name, self.config.endpoint)

    async def _serve(self, stop: asyncio.Event) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self.config.http.listen:
                page = HealthPage(self.config.http.listen, self.metrics)
                stack.callback(page.close)
                page.serve()
            loops = [
                asyncio.create_task(self._listen(), name="listen"),
                asyncio.create_task(self._watch_ranks(), name="ranks"),
                asyncio.create_task(self.engines.watch(), name="engines"),
                asyncio.create_task(self._measure(), name="measure"),
                *(asyncio.create_task(peer.keep(), name=f"peer {name}") for name, peer in self.peers.items()),
            ]
            stopped = asyncio.create_task(stop.wait(), name="stop")
            try:
                done, _ = await asyncio.wait([*loops, stopped], return_when=asyncio.FIRST_COMPLETED)
                for task in done - {stopped}:
                    task.result()  # a loop that ends has failed: let it be seen
                await self._finish_push()
            finally:
                for task in [*loops, stopped]:
                    task.cancel()
                await asyncio.gather(*loops, stopped, return_exceptions=True)

    async def _finish_push(self) -> None:
        """Let the push under way end, or end it, inside `timeouts.stop`."""
        self.stopping = True
        push = self.push
        if push is None:
            return
        patience = self.config.timeouts.stop
        logger.info("stopping; a push is under way and has %g s to end", patience)
        try:
            async with asyncio.timeout(patience / 2):
                await push.done.wait()
        except TimeoutError:
            push.hear(ev.StopRequested(reason="weightsyncd was told to stop"))
            try:
                async with asyncio.timeout(patience / 2):
                    await push.done.wait()
            except TimeoutError:
                logger.warning("the push did not let go in time; stopping all the same")

    async def _take_down(self) -> None:
        if self.push is not None:
            await self.push.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        until = time.monotonic() + 5.0
        await asyncio.gather(*(bridge.stop(deadline=until) for bridge in self.bridges))
        await self.engines.close()
        self._control.close()
        logger.info("node %s has stopped", self.config.node.name)

    # --- what arrives ---------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async for identity, message in self._control.frames(refused=self.metrics.frames_refused.inc):
            try:
                self._route(identity, message)
            except (CodecError, LocalProtocolError, RemoteProtocolError) as error:
                self._control.send(identity, msg.ErrorReply(id=message.id, error=error.record()))

    def _route(self, identity: bytes, message: msg.Message) -> None:
        match message:
            case msg.Heartbeat():
                self._heard(identity)
                self._control.send(identity, msg.Heartbeat())
            case msg.Open():
                self._open(identity, message)
            case msg.Describe() | msg.Filled() | msg.Failed() | msg.Stopped():
                self._from_rank(identity, message)
            case msg.StatusRequest():
                self._spawn(self._answer(identity, message.id, self._status()))
            case msg.Attach():
                self._spawn(self._answer(identity, message.id, self._attach(identity)))
            case msg.Execute():
                self._spawn(self._answer(identity, message.id, self._execute(identity, message)))
            case msg.HostRail() | msg.JoinRail() | msg.Receive():
                self._spawn(self._answer(identity, message.id, self._at_rail(identity, message)))
            case msg.Release():
                self._spawn(self._release(message.push))
            case _:
                raise RemoteProtocolError(f"a daemon does not take messages of type {type(message).__name__}")

    def _heard(self, identity: bytes) -> None:
        if self.push is not None:
            self.push.rank_of(identity)
        if self._coordinator is not None and self._coordinator.identity == identity:
            self._coordinator.heard = time.monotonic()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, identity: bytes, number: int, work: Coroutine[None, None, msg.Message]) -> None:
        try:
            answer = await work
        except WeightSyncError as error:
            answer = msg.ErrorReply(error=error.record())
        self._control.send(identity, msgspec.structs.replace(answer, id=number))

    # --- trainers -------------------------------------------------------------------------------------------------

    def _open(self, identity: bytes, message: msg.Open) -> None:
        self._control.send(
            identity,
            msg.Welcome(id=message.id, node=self.config.node.name, heartbeat=self.config.timeouts.liveness / 5),
        )
        push = self.push
        if push is not None and not push.session.ended and push.group == message.group:
            push.open(identity, message)
        elif push is not None and not push.session.ended:
            self._refuse(
                identity,
                message,
                f"a push of version {push.session.version} of {push.session.model!r} by another trainer is under way",
                "one push at a time on a node; try again when it has ended",
            )
        elif push is not None or self._coordinator is not None:
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.append((identity, message))
        elif self.stopping:
            self._refuse(identity, message, "weightsyncd is stopping", None)
        else:
            self._begin(identity, message)

    def _refuse(self, identity: bytes, message: msg.Open, reason: str, hint: str | None) -> None:
        logger.warning("[push=%s v=%d] refused: %s", message.model, message.version, reason)
        error = PushRefused(reason, model=message.model, version=message.version, hint=hint)
        self._control.send(identity, msg.Ended(id=message.id, error=error.record()))

    def _begin(self, identity: bytes, message: msg.Open) -> None:
        engines = self._engines_of(message.model)
        if not engines:
            models = sorted(
                {e.config.model for e in self.engines}
                | {e.model for p in self.peers.values() if p.info for e in p.info.engines}
            )
            self._refuse(
                identity,
                message,
                f"no engine serves model {message.model!r}",
                f"models known here: {', '.join(models) or 'none; add [[engines]] to the node config'}",
            )
            return
        self.push = Push(self._services, message, engines, self.versions.get(message.model))
        self._spawn(self._when_done(self.push))
        self.push.open(identity, message)

    def _engines_of(self, model: str) -> dict[str, str]:
        engines = dict.fromkeys(self.engines.of_model(model), self.config.node.name)
        for name, peer in self.peers.items():
            if peer.info is not None:
                engines.update({e.name: name for e in peer.info.engines if e.model == model})
        return engines

    async def _when_done(self, push: Push) -> None:
        await push.done.wait()
        await push.cancel()
        session, outcome = push.session, push.outcome
        self.last, self.last_error = outcome, session.error
        if session.committed:
            self.versions[session.model] = session.version
        for name in session.committed:
            if session.engines[name].node == self.config.node.name:
                await self._look(name)
        measure_push(self.metrics, session, outcome)
        self.push = None
        waiting, self._waiting = list(self._waiting), deque()
        for identity, message in waiting:
            self._open(identity, message)

    async def _look(self, name: str) -> None:
        """Note what an engine serves now, for status and metrics."""
        with contextlib.suppress(WeightSyncError):  # Engine.probe has logged it and shows it as lost
            await self.engines[name].probe(time.monotonic() + self.config.timeouts.probe)

    def _from_rank(self, identity: bytes, message: msg.Message) -> None:
        push = self.push
        rank = push.rank_of(identity) if push is not None else None
        if push is None or rank is None:
            if not isinstance(message, msg.Stopped):
                logger.debug("%s from nobody in a push", type(message).__name__)
            return
        match message:
            case msg.Describe():
                digest = self._services.plans.learn(message.layout)
                if digest != push.ranks[rank].layout:
                    error = RemoteProtocolError(f"rank {rank} described another layout than it opened with", rank=rank)
                    push.hear(ev.RankFailed(rank=rank, error=error.record()))
                else:
                    push.hear(ev.LayoutReceived(rank=rank))
            case msg.Filled():
                push.filled(rank, message)
            case msg.Failed():
                push.hear(ev.RankFailed(rank=rank, error=message.error))
            case msg.Stopped():
                push.hear(ev.RankStopped(rank=rank))

    async def _watch_ranks(self) -> None:
        """Notice trainer ranks and coordinators that have fallen silent."""
        liveness = self.config.timeouts.liveness
        while True:
            await asyncio.sleep(liveness / 5)
            if self.push is not None:
                self.push.check_alive(liveness)
            coordinator = self._coordinator
            if coordinator is None or coordinator.running:
                continue
            if time.monotonic() - coordinator.heard > liveness:
                logger.warning("the coordinator of %s was lost", coordinator.context.push)
                await self._release(coordinator.context.push)

    # --- bridges and peers ----------------------------------------------------------------------------------------

    def _bridge_lost(self, bridge: Bridge, error: WeightSyncError) -> None:
        self._services.rails.break_up()
        if self.push is not None:
            self.push.hear(ev.BridgeLost(node=self.config.node.name, bridge=bridge.config.index, error=error.record()))

    def _peer_attached(self, node: str) -> None:
        if not self.busy:
            self._spawn(self._form_rails())

    async def _form_rails(self) -> None:
        """Join the peers' bridges before the first push needs them: loading gloo takes seconds."""
        nodes = [name for name, peer in self.peers.items() if peer.info is not None]
        formed = await self._services.rails.form(nodes, time.monotonic() + self.config.timeouts.operation)
        for node, error in formed.failed:
            logger.warning("[node=%s] no communicator yet: %s", node, error.message)

    def _peer_lost(self, node: str, error: ErrorRecord) -> None:
        self._services.rails.break_up()
        if self.push is not None:
            self.push.hear(ev.NodeLost(node=node, error=error))

    def _names_taken(self, node: str, names: Sequence[str]) -> str | None:
        known = {e.name: self.config.node.name for e in self.engines}
        for other, peer in self.peers.items():
            if other != node and peer.info is not None:
                known.update({e.name: other for e in peer.info.engines})
        for name in names:
            if name in known:
                return f"its engine {name!r} has the name of one on {known[name]}; rename one of them"
        return None

    # --- following another daemon ---------------------------------------------------------------------------------

    async def _attach(self, identity: bytes) -> msg.Message:
        self._heard(identity)
        return msg.Attached(
            node=self.config.node.name,
            incarnation=f"{self.incarnation}:{':'.join(b.incarnation or '-' for b in self.bridges)}",
            engines=tuple(e.status(self.config.node.name) for e in self.engines),
            slots=tuple(self.config.arena.slots for _ in self.bridges),
            slot_bytes=self.config.arena.slot_bytes,
            address=self.config.cluster.address,
        )

    def _follow(self, identity: bytes, push: str, model: str = "", version: int = 0) -> _Coordinator:
        """The coordinator's place here; taken at its first instruction. Raises `PushRefused` while another holds it."""
        holder = self._coordinator
        if self.push is not None:
            raise PushRefused(f"node {self.config.node.name} is busy with a push of its own")
        if holder is not None and holder.identity != identity:
            raise PushRefused(f"node {self.config.node.name} is busy with push {holder.context.push}")
        if holder is None or holder.context.push != push:
            holder = self._coordinator = _Coordinator(identity, PushContext(push, model, version), time.monotonic())
        holder.heard = time.monotonic()
        return holder

    async def _execute(self, identity: bytes, message: msg.Execute) -> msg.Message:
        holder = self._follow(identity, message.push, message.model, message.version)
        context = holder.context
        if message.manifest is not None:
            manifest = Manifest.unpack(message.manifest)
            self._manifests[manifest.digest] = manifest
        if message.plan is not None:
            if message.plan not in self._manifests:
                raise RemoteProtocolError("the manifest of this digest was never sent here")
            context.manifest = self._manifests[message.plan]
        if message.fingerprints is not None:
            expected = np.frombuffer(message.fingerprints, dtype="<u8")
            if len(expected) != len(context.known_manifest().tensors):
                raise RemoteProtocolError("fingerprints and manifest differ in length")
            context.expected = expected
        kind = INSTRUCTIONS.get(str(message.instruction.get("type")))
        if kind is None:
            raise CodecError(f"no instruction is called {message.instruction.get('type')!r}")
        fields = {**message.instruction, "deadline": time.monotonic() + message.timeout}
        holder.running += 1
        try:
            event = await self.executor.execute(context, structured(fields, kind))
        finally:
            holder.running -= 1
            holder.heard = time.monotonic()
        return msg.Executed(event=plain(event) if event is not None else {})

    async def _at_rail(self, identity: bytes, message: msg.Message) -> msg.Message:
        until = time.monotonic() + getattr(message, "timeout", 0.0)
        rail: int = getattr(message, "rail", 0)
        if rail >= len(self.bridges):
            raise RemoteProtocolError(f"node {self.config.node.name} has no bridge {rail}")
        bridge = self.bridges[rail]
        match message:
            case msg.HostRail():
                host = commands.Host(generation=message.generation, host=self.config.cluster.address)
                return msg.Hosted(port=(await bridge.call(host, deadline=until)).port)
            case msg.JoinRail():
                join = commands.Join(
                    generation=message.generation,
                    rank=message.rank,
                    world=message.world,
                    host=message.host,
                    port=message.port,
                    address=self.config.cluster.address,
                    key=message.key,
                )
                await bridge.call(join, deadline=until)
                return msg.Executed(event={})
            case msg.Receive():
                holder = self._follow(identity, message.push)
                slot = do.Slot(self.config.node.name, rail, message.slot)
                await self.executor.receive(holder.context, message.bucket, slot, message.ticket, until)
                return msg.Executed(event={})
        raise RemoteProtocolError(f"{type(message).__name__} is not for a bridge")

    async def _release(self, push: str) -> None:
        holder = self._coordinator
        if holder is None or holder.context.push != push:
            return
        await self.executor.let_go(holder.context, time.monotonic() + self.config.timeouts.operation)
        if self._coordinator is holder:
            self._coordinator = None
            waiting, self._waiting = list(self._waiting), deque()
            for identity, message in waiting:
                self._open(identity, message)

    # --- looking at it --------------------------------------------------------------------------------------------

    async def _status(self) -> msg.Message:
        return await status_of(self)

    async def _measure(self) -> None:
        while True:
            await measure_node(self)
            await asyncio.sleep(self.config.timeouts.probe_every)
