"""The daemon: sockets in front, bridges and engines behind, and at most one push at a time in between.

`Server.run` is the whole life of weightsyncd: take the node's lock, clean up after a daemon that was killed, start the
bridges, listen, and, when told to stop, let a push under way end within `timeouts.stop` before everything is taken
down. What arrives at `Reception` is given to `Trainers`, which pushes for this node's trainer, or to `Follower`, which
does this node's part in a push from elsewhere.
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

from weightsync.endpoints import check_endpoint, private_directory, runtime_dir
from weightsync.errors import ConfigError, ErrorRecord, WeightSyncError
from weightsync.placement import keeper_gpu
from weightsync.session import events as ev
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
from weightsyncd.metrics import Metrics
from weightsyncd.peers import Peer
from weightsyncd.plans import Plans
from weightsyncd.push import Services
from weightsyncd.rails import Rails
from weightsyncd.reception import Reception
from weightsyncd.repeats import Repeats, engines_everywhere
from weightsyncd.seed import Registry, Seeker
from weightsyncd.traces import Traces
from weightsyncd.trainers import Trainers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.config import NodeConfig

__all__ = ["Server"]

logger = logging.getLogger(__name__)

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
        self.reception = Reception(config, key)
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
                on_free=lambda: self.trainers.go_on(),
                taken=lambda node, names: self.changes.names_taken(node, names),
            ),
            spawn=self.reception.spawn,
            on_gone=self.executor.exports.forget,
            on_change=lambda: self.rails.break_up(),
        )
        self.changes = Changes(
            config, self.members, self.engines, self.peers, self.reception.spawn, lambda: self.see_peers()
        )
        self.rails = Rails(config, self.bridges, self.peers)
        self.traces = Traces(config.node.name, config.log.trace_dir)
        services = Services(
            config, self.executor, self.peers, self.rails, Plans(config.arena), self.reception.send, self.traces
        )
        self.follower = Follower(
            config,
            secrets.token_hex(8),
            self.executor,
            self.bridges,
            self.peers,
            rails=self.rails,
            send=self.reception.send,
            on_free=self._freed,
        )
        self.registry = Registry(config.timeouts.liveness)
        self.seeker = Seeker(config, key, self._learn_nodes) if config.cluster.seed else None
        self.trainers = Trainers(services, self.metrics, self.follower, self._freed)
        for model in {engine.config.model for engine in self.engines if not engine.config.frozen}:
            self.engines.keeper_of(model)  # starts now, so that it is there before the first push
        self.repeats = Repeats(
            self.engines.keepers,
            config.timeouts,
            engines=lambda: engines_everywhere(config.node.name, self.engines, self.peers.values()),
            refresh=self.see_peers,
            newest=lambda model: self.trainers.newest.get(model),
            busy=lambda: self.busy,
        )
        self.loras = Loras(config, self.engines, self.peers, lambda: self.busy, self.reception.spawn)

    @property
    def busy(self) -> bool:
        """Whether a push, from here or elsewhere, holds this node's engines and slots."""
        return self.trainers.busy or self.follower.following is not None

    # --- life -----------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises `ConfigError` when it cannot start; leaves nothing behind either way."""
        check_endpoint(self.config.endpoint, "node.listen")
        with self._only_one():
            until = time.monotonic()  # if it fails to start, there is nothing to wait for
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
        self.reception.remove_stale()  # the lock is ours, so the process that made the socket is gone
        until = time.monotonic() + self.config.timeouts.bridge_start
        starts = (bridge.start(deadline=until) for bridge in self.bridges)
        failures = [f for f in await asyncio.gather(*starts, return_exceptions=True) if f is not None]
        if failures:
            raise failures[0]
        self.reception.open()

    @contextlib.asynccontextmanager
    async def _loops(self, stop: asyncio.Event) -> Any:
        """Run all loops. The block begins when `stop` is set, and the loops go on until it ends."""
        with contextlib.ExitStack() as stack:
            if self.config.http.listen:
                page = HealthPage(self.config.http.listen, self.metrics)
                stack.callback(page.close)
                page.serve()
            loops = [
                *(
                    asyncio.create_task(self.reception.listen(socket, self), name=f"listen {socket.endpoint}")
                    for socket in self.reception.sockets
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
                    task.result()  # a loop that ends has failed: raise its error
                yield
            finally:
                for task in [*loops, stopped]:
                    task.cancel()
                await asyncio.gather(*loops, stopped, return_exceptions=True)

    async def _take_down(self, until: float) -> None:
        left = until - time.monotonic()
        end = time.monotonic() + min(max(left / 2, _BRIDGE_STOP_LEAST), _BRIDGE_STOP)
        # together, because work that waits for a silent bridge goes on when that bridge is killed
        await asyncio.gather(self.trainers.close(until), *(bridge.stop(deadline=end) for bridge in self.bridges))
        await self.executor.settle(until)
        await self.traces.settle(min(until, time.monotonic() + self.config.timeouts.grace))
        await self.reception.settle()
        await self.engines.close()
        self.reception.close()
        logger.info("node %s has stopped", self.config.node.name)

    # --- who is alive -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Notice trainer ranks and coordinators that have fallen silent."""
        liveness = self.config.timeouts.liveness
        late = False
        while True:
            before = time.monotonic()
            await asyncio.sleep(liveness / 5)
            # if this process was held up itself, it reads what has arrived before it gives anyone up
            late = not late and time.monotonic() - before > liveness / 2
            if not late:
                self.trainers.check_alive(liveness)
                self.follower.check(liveness)

    # --- nodes and engines -----------------------------------------------------------------------------------

    async def _learn_nodes(self, nodes: dict[str, str], complete: bool) -> None:
        await self.members.learn(nodes, complete=complete, timeout=self.config.timeouts.operation)

    def _freed(self) -> None:
        """Let calls, LoRA pushes and membership changes go on: no push holds this node any more."""
        self.members.settle()
        self.trainers.go_on()
        self.loras.go_on()
        if not self.busy:
            self.follower.tell_free()

    async def see_peers(self) -> None:
        """Look at the engines of other nodes anew. Nodes that do not answer soon stay as they were known."""
        if looks := [asyncio.create_task(peer.refresh()) for peer in self.peers.values()]:
            await asyncio.wait(looks, timeout=self.config.timeouts.liveness / 5)

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
