"""Between nodes, bytes go from bridge to bridge: through one communicator per bridge index, a *rail*.

A rail is formed again, with a new generation, whenever its members have changed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING

from weightsync.errors import (
    DaemonLost,
    ErrorRecord,
    TransportBroken,
    TransportClosed,
    TransportError,
    WeightSyncError,
)
from weightsync.nccl_bridge import commands
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from weightsync.config import NodeConfig
    from weightsyncd.bridges import Bridge
    from weightsyncd.peers import Peer

__all__ = ["MOMENT", "Rails", "leave", "quietly", "sentences"]

logger = logging.getLogger(__name__)

_LEAVE = 5.0  # seconds for a bridge to abort its communicator
MOMENT = 1.0  # seconds beyond another node's deadline, for its answer to arrive


class Rails:
    """The communicators between this node's bridges and those of its peers; this node is rank 0 of each."""

    def __init__(self, config: NodeConfig, bridges: Sequence[Bridge], peers: dict[str, Peer]) -> None:
        self._config = config
        self.home = config.node.name
        self.bridges = bridges
        self._peers = peers
        self.generation = 0  # of the communicators that were formed last
        self._members: tuple[tuple[str, str], ...] = ()  # (node, incarnation), of the standing generation
        self._taken: str | None = None  # the node whose daemon has since taken bridges into its communicators
        self._keeping: asyncio.Task[dict[str, ErrorRecord]] | None = None  # communicators being formed for no push
        self._ours = False  # this daemon formed the last generation that its bridges joined
        self._used: frozenset[str] = frozenset()  # nodes of the last push, as long as nothing has changed since
        self._lock = asyncio.Lock()

    def count(self, nodes: Sequence[str]) -> int:
        """Return how many rails there are to these nodes: as many as the node with the fewest bridges has."""
        infos = [self._peers[node].info for node in nodes if node in self._peers]
        return min([len(self.bridges), *(len(info.slots) for info in infos if info is not None)])

    def break_up(self, generation: int | None = None) -> None:
        """Stop using the standing generation, if it is this one; None: whichever it is."""
        if generation in (None, self.generation):
            self._members, self._used = (), frozenset()

    async def give_up(self, bridge: Bridge, generation: int) -> None:
        """End the bridge's work in this generation. A generation that was formed since is left alone.

        One broken communicator ends several operations, and the last to hear of it must not break the successor.
        """
        if generation == self.generation:
            await leave(bridge)

    def taken(self, node: str, *, push: bool) -> bool:
        """Let the daemon of `node` take a bridge into its communicator, for a `push` or between pushes.

        Returns False if it may not. Two daemons that wait for each other, each in its own communicator, would wait for
        ever. So of daemons that form between pushes, the first by name goes on.
        """
        if self._keeping and not push and node > self.home:
            return False
        self._members, self._taken, self._ours = (), node, False
        return True

    def given_back(self, node: str) -> None:
        """Note that the daemon of a node has not taken a bridge after all, or is gone with its communicators."""
        if self._taken == node:
            self._taken = None

    def state_of(self, name: str) -> str:
        """Return the state of one peer, for operators: "connected" if a push can reach it at once."""
        nodes = self._likely()
        if name in nodes and self._taken is None and not self.stands(nodes) and not self._yields(nodes):
            return "joining"
        return self._peers[name].state

    async def keep(self, busy: Callable[[], bool]) -> None:
        """Between pushes, form communicators that are broken, for ever: the first push after a fault need not wait.

        Bridges that another daemon has taken are left to it until this one pushes. Of nodes that are each other's
        peers, the first by name forms (see `taken`).
        """
        told: dict[str, str] = {}
        while True:
            await asyncio.sleep(self._config.timeouts.liveness / 5)
            nodes = self._likely()
            if not nodes or self._taken is not None or busy() or self.stands(nodes) or self._yields(nodes):
                continue
            forming = self.form(nodes, time.monotonic() + self._config.timeouts.operation, push=False)
            self._keeping = task = asyncio.create_task(forming, name="between pushes")
            try:
                await asyncio.wait([task])
            finally:
                self._keeping = None
                task.cancel()
            if task.cancelled():
                continue  # a push has begun
            failed = task.result()
            if self._was_taken() or any(error.kind == "PushRefused" for error in failed.values()):
                continue  # another daemon pushes, or comes first
            problems = {node: error.message for node, error in failed.items()}
            for node in problems.keys() - {node for node, problem in told.items() if problem == problems.get(node)}:
                logger.warning("[node=%s] no communicator: %s", node, problems[node])
            told = problems
            if problems:
                await asyncio.sleep(self._config.timeouts.probe_every)

    async def overrule(self) -> None:
        """Stop forming communicators between pushes, because a push begins. Bridges that wait in one leave it."""
        if (forming := self._keeping) is None:
            return
        forming.cancel()
        await asyncio.wait([forming], timeout=_LEAVE)
        if self._taken is None:
            self.break_up()
            await asyncio.gather(*(leave(bridge) for bridge in self.bridges))

    def _was_taken(self) -> bool:
        """Return whether another daemon has taken a bridge by now; `_taken` changes during awaits."""
        return self._taken is not None

    def _likely(self) -> list[str]:
        """Return the nodes that the next push will likely reach: those of the last push, or all that have engines."""
        connected = {name: peer.info for name, peer in sorted(self._peers.items()) if peer.info is not None}
        if self._used and self._used <= connected.keys():
            return sorted(self._used)
        return [name for name, info in connected.items() if info.engines]

    async def use(self, nodes: Sequence[str], deadline: float) -> dict[str, ErrorRecord]:
        """Form for a push, as `form` does, and remember its nodes."""
        await self.overrule()
        failed = await self.form(nodes, deadline)
        self._used = frozenset(nodes) - failed.keys()
        return failed

    async def form(self, nodes: Sequence[str], deadline: float, *, push: bool = True) -> dict[str, ErrorRecord]:
        """Have every rail reach `nodes`. Returns the nodes that cannot be reached, which are left out, and why.

        Without `push`, bridges that another daemon has taken are left to it.
        """
        async with self._lock:
            failed: dict[str, ErrorRecord] = {}
            await self._refresh(nodes)
            wanted = list(nodes)
            while wanted:
                try:
                    await asyncio.gather(*(bridge.prompt(deadline=deadline) for bridge in self.bridges))
                except TransportError as error:
                    failed.update(dict.fromkeys(wanted, error.record()))
                    break
                members = self._present(wanted, failed)
                wanted = [node for node in wanted if node not in failed]
                if members == self._members or not wanted:
                    break
                if not push and self._was_taken():
                    failed.update(dict.fromkeys(wanted, _elsewhere("a bridge").record()))
                    break
                bad = await self._rendezvous(wanted, deadline, push)
                if not bad:
                    await self._refresh(wanted)  # a bridge that was starting has another incarnation now
                    self._members = self._present(wanted, failed)
                    break
                failed.update(bad)
                if self._was_taken():
                    break
                wanted = [node for node in wanted if node not in failed]
            return failed

    def peer(self, node: str) -> Peer:
        """Return the peer of that name. Raises `DaemonLost` if it has gone while a communicator was formed."""
        peer = self._peers.get(node)
        if peer is None:
            raise DaemonLost(f"node {node} is a peer no longer")
        return peer

    def _yields(self, nodes: Sequence[str]) -> bool:
        """Return whether forming is left to another node: one that is first by name and has this node as a peer.

        If this daemon formed the last generation, it goes on forming.
        """
        if self._ours:
            return False
        me = self.home
        infos = {node: self._peers[node].info for node in nodes}
        return any(info is not None and node < me and me in info.peers for node, info in infos.items())

    def stands(self, nodes: Sequence[str]) -> bool:
        """Return whether the standing generation has exactly these nodes, as far as is known here."""
        missing: dict[str, ErrorRecord] = {}
        return self._present(nodes, missing) == self._members and not missing

    def _present(self, nodes: Sequence[str], failed: dict[str, ErrorRecord]) -> tuple[tuple[str, str], ...]:
        members = [(bridge.name, bridge.incarnation or "") for bridge in self.bridges]
        for node in nodes:
            peer = self._peers.get(node)
            info = peer.info if peer is not None else None
            if info is None:
                problem = peer.problem if peer is not None else "it is a peer no longer"
                failed[node] = DaemonLost(f"node {node} is not connected: {problem}").record()
            elif info.device != self._config.arena.device:
                failed[node] = self._apart(node, info.device)
            else:
                members.append((node, info.incarnation))
        return tuple(members)

    def _apart(self, node: str, device: str) -> ErrorRecord:
        where = {"cpu": "in host memory", "cuda": "on GPUs"}
        return TransportBroken(
            f"node {node} keeps its slots {where[device]}, node {self.home} {where[self._config.arena.device]}",
            hint="give arena.device the same value on both",
        ).record()

    async def _refresh(self, nodes: Sequence[str]) -> None:
        await asyncio.gather(*(self._peers[node].refresh() for node in nodes if node in self._peers))

    async def _rendezvous(self, nodes: Sequence[str], deadline: float, push: bool) -> dict[str, ErrorRecord]:
        """Form a new generation on every rail. Returns the nodes to leave out of the next attempt, and why."""
        self.generation += 1
        self._members, self._taken = (), None
        until = min(deadline, time.monotonic() + self._config.timeouts.operation / 2)
        for rail in range(self.count(nodes)):
            try:
                await self._join_all(rail, nodes, until, push)
                if self._was_taken():
                    raise _elsewhere(f"bridge {self.bridges[rail].name}")
            except _NodeFailed as failed:
                return {failed.node: failed.error}
            except WeightSyncError as error:
                return dict.fromkeys(nodes, error.record())
        self._ours = True
        return {}

    async def _join_all(self, rail: int, nodes: Sequence[str], until: float, push: bool) -> None:
        """Form one rail of the new generation. Raises `_NodeFailed` for the node that failed first, so that all do."""
        bridge, address, key = self.bridges[rail], self._config.cluster.address, secrets.token_hex(16)
        await leave(bridge)  # else the next operation would wait for the one under way
        await bridge.warm(longest=self._config.timeouts.bridge_start, deadline=until)
        generation, world = self.generation, len(nodes) + 1
        hosted = await bridge.call(commands.Host(generation=generation, host=address), deadline=until)
        if self._was_taken():
            raise _elsewhere(f"bridge {bridge.name}")
        first: list[_NodeFailed] = []

        async def join(node: str, rank: int) -> None:
            question = msg.JoinRail(
                rail=rail,
                generation=generation,
                rank=rank,
                world=world,
                host=address,
                port=hosted.port,
                key=key,
                timeout=max(0.0, until - time.monotonic()),
                push=push,
            )
            try:
                await self.peer(node).ask(question, until + MOMENT)
            except WeightSyncError as error:
                first.append(_NodeFailed(node, error.record()))
                if not self._was_taken():  # else the bridge has left this communicator, and may be in another
                    await leave(bridge)

        own = commands.Join(
            generation=generation,
            rank=0,
            world=world,
            host=address,
            port=hosted.port,
            address=address,
            key=key,
        )
        async with asyncio.TaskGroup() as group:
            for rank, node in enumerate(nodes, start=1):
                group.create_task(join(node, rank))
            mine = group.create_task(quietly(bridge.call(own, deadline=until)))
        if first:
            raise first[0]
        if (problem := mine.result()) is not None:
            raise problem.error()


class _NodeFailed(Exception):
    def __init__(self, node: str, error: ErrorRecord) -> None:
        super().__init__(f"{node}: {error.message}")
        self.node = node
        self.error = error


def _elsewhere(what: str) -> TransportClosed:
    return TransportClosed(f"{what} joins a communicator of another node")


async def leave(bridge: Bridge) -> None:
    """Have a bridge leave its communicator, which ends its collective: no member can complete one that another left.

    A bridge that does not leave is replaced: its collective may go on, and write into a slot that is leased again.
    """
    incarnation = bridge.incarnation
    problem = await quietly(bridge.call(commands.Leave(), deadline=time.monotonic() + _LEAVE))
    if problem is not None and bridge.incarnation == incarnation:
        bridge.retire(f"it does not leave its communicator: {problem.message}")


async def quietly(call: Awaitable[object]) -> ErrorRecord | None:
    """Return the error that a bridge call ends with instead of raising it: sibling tasks must run to their own ends."""
    try:
        await call
    except WeightSyncError as error:
        return error.record()
    return None


def sentences(errors: dict[str, ErrorRecord]) -> str:
    """Return errors by node as one line for a log."""
    return "; ".join(f"{node}: {error.message}" for node, error in sorted(errors.items()))
