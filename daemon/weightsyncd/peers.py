"""Other nodes: those whose engines this daemon reaches, and the rails that bytes take there.

Every daemon can coordinate. The one whose trainer pushes sends the instructions that concern another node's engines
there, inside `Execute`, and gets each outcome back as the event it would have had at home. Bytes go between bridges,
through one communicator per bridge index (a *rail*), formed again, with a new generation, whenever its members have
changed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING

from weightsync.errors import DaemonError, DaemonLost, ErrorRecord, ProtocolError, TransportError, WeightSyncError
from weightsync.nccl_bridge import commands
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.wire import messages as msg
from weightsync.wire.codec import plain, structured
from weightsync.wire.control import PeerLink
from weightsyncd.executor import phase_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from weightsync.config import NodeConfig
    from weightsyncd.bridges import Bridge
    from weightsyncd.executor import PushContext

__all__ = ["EVENTS", "INSTRUCTIONS", "Peer", "Rails"]

logger = logging.getLogger(__name__)

_LEAVE = 5.0  # seconds for a bridge to abort its communicator

EVENTS = {kind.__name__: kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)}
INSTRUCTIONS = {
    kind.__name__: kind for kind in vars(do).values() if isinstance(kind, type) and issubclass(kind, do.Instruction)
}


class Peer:
    """One other node, kept attached for as long as this daemon lives."""

    def __init__(
        self,
        name: str,
        endpoint: str,
        config: NodeConfig,
        *,
        on_attached: Callable[[str], None],
        on_lost: Callable[[str, ErrorRecord], None],
        taken: Callable[[str, Sequence[str]], str | None],
    ) -> None:
        """`taken(node, engine names)` returns why the node cannot be attached, if it cannot."""
        self.name = name
        self.endpoint = endpoint
        self.info: msg.Attached | None = None
        self.problem = "not reached yet"
        self._config = config
        self._on_attached = on_attached
        self._on_lost = on_lost
        self._taken = taken
        self._link: PeerLink | None = None
        self._known: set[tuple[str, bytes]] = set()  # (incarnation, manifest digest) sent before

    @property
    def state(self) -> str:
        """connected, or why not."""
        return "connected" if self.info is not None else self.problem

    async def keep(self) -> None:
        """Attach, watch, and attach again, for ever."""
        patience = self._config.timeouts.liveness
        self._link = link = PeerLink(self.endpoint, patience=patience)
        looked = 0.0
        try:
            while True:
                if self.info is None or time.monotonic() - looked > self._config.timeouts.probe_every:
                    await self._attach(link)
                    looked = time.monotonic()
                link.beat()
                await asyncio.sleep(patience / 5)
                if self.info is not None and link.silent:
                    self._lose(link, f"node {self.name} has not been heard for {patience:g} s")
        finally:
            await link.close()

    async def _attach(self, link: PeerLink) -> None:
        try:
            answer = await link.ask(
                msg.Attach(node=self._config.node.name), deadline=time.monotonic() + self._config.timeouts.liveness
            )
        except (DaemonError, ProtocolError) as error:
            self.problem = error.message
            return
        if not isinstance(answer, msg.Attached) or answer.node != self.name:
            self.problem = f"the daemon there calls itself {getattr(answer, 'node', '?')!r}"
            return
        if answer.slot_bytes < self._config.arena.slot_bytes:
            self.problem = (
                f"its slots hold {answer.slot_bytes} bytes, this node's {self._config.arena.slot_bytes}; "
                "set arena.slot_bytes alike on both"
            )
            return
        refusal = self._taken(self.name, [e.name for e in answer.engines])
        if refusal is not None:
            self.problem = refusal
            return
        new = self.info is None or self.info.incarnation != answer.incarnation
        self.info = answer
        if new:
            logger.info("[node=%s] attached: %d engines, %d bridges", self.name, len(answer.engines), len(answer.slots))
            self._on_attached(self.name)

    def _lose(self, link: PeerLink, reason: str) -> None:
        logger.warning("[node=%s] lost: %s", self.name, reason)
        self.info, self.problem = None, reason
        error = DaemonLost(reason)
        link.fail(error)
        self._on_lost(self.name, error.record())

    async def refresh(self) -> None:
        """Look again at its engines and its incarnation; `info` says what came of it."""
        if self._link is not None and self.info is not None:
            await self._attach(self._link)

    async def ask(self, message: msg.Message, deadline: float) -> msg.Message:
        """One question to that node. Raises `DaemonLost`, or the error it is answered with."""
        if self._link is None or self.info is None:
            raise DaemonLost(f"node {self.name} is not connected: {self.problem}")
        return await self._link.ask(message, deadline=deadline)

    def tell(self, message: msg.Message) -> None:
        """Say something that needs no answer."""
        if self._link is not None and self.info is not None:
            self._link.tell(message)

    async def execute(self, context: PushContext, instruction: do.Instruction) -> ev.Event | None:
        """Have one instruction carried out there; a node that does not answer ends in `EngineFailed` or `NodeLost`."""
        incarnation = self.info.incarnation if self.info is not None else ""
        manifest = context.manifest
        send = manifest is not None and (incarnation, manifest.digest) not in self._known
        verify = isinstance(instruction, do.VerifyEngine) and context.expected is not None
        question = msg.Execute(
            push=context.push,
            model=context.model,
            version=context.version,
            instruction=plain(instruction),
            timeout=max(0.0, instruction.deadline - time.monotonic()),
            plan=manifest.digest if manifest is not None else None,
            manifest=manifest.pack() if send and manifest is not None else None,
            fingerprints=context.expected.tobytes() if verify and context.expected is not None else None,
        )
        # the far side keeps the same deadline; its answer needs a moment more
        try:
            answer = await self.ask(question, instruction.deadline + self._config.timeouts.liveness)
            if not isinstance(answer, msg.Executed):
                raise ProtocolError(f"node {self.name} answered Execute with {type(answer).__name__}")
            if send and manifest is not None:
                self._known.add((incarnation, manifest.digest))
            if not answer.event:
                return None
            return structured(answer.event, EVENTS.get(str(answer.event.get("type")), ev.Tick))
        except WeightSyncError as error:
            lost = isinstance(error, DaemonLost)
            engine = getattr(instruction, "engine", None)
            if engine is not None and not isinstance(instruction, (do.AwaitRelease, do.RevokeBucket)):
                return ev.EngineFailed(engine=engine, phase=phase_of(instruction), error=error.record(), lost=lost)
            return ev.NodeLost(node=self.name, error=error.record())


class Rails:
    """The communicators between this node's bridges and those of its peers; this node is rank 0 of each."""

    def __init__(self, config: NodeConfig, bridges: Sequence[Bridge], peers: dict[str, Peer]) -> None:
        self._config = config
        self._bridges = bridges
        self._peers = peers
        self._generation = 0
        self._members: tuple[tuple[str, str], ...] = ()  # (node, incarnation), of the standing generation
        self._lock = asyncio.Lock()

    def count(self, nodes: Sequence[str]) -> int:
        """How many rails there are to these nodes: as many as the node with the fewest bridges has."""
        infos = [self._peers[node].info for node in nodes]
        return min([len(self._bridges), *(len(info.slots) for info in infos if info is not None)])

    def break_up(self) -> None:
        """The standing generation is not to be used again."""
        self._members = ()

    async def form(self, nodes: Sequence[str], deadline: float) -> ev.GroupFormed:
        """See that every rail reaches `nodes`; those that cannot be reached are left out and named."""
        async with self._lock:
            failed: dict[str, ErrorRecord] = {}
            await asyncio.gather(*(self._peers[node].refresh() for node in nodes))
            wanted = list(nodes)
            while wanted:
                members = self._present(wanted, failed)
                wanted = [node for node in wanted if node not in failed]
                if members == self._members or not wanted:
                    break
                bad = await self._rendezvous(wanted, deadline)
                if not bad:
                    self._members = self._present(wanted, failed)
                    break
                failed.update(bad)
                wanted = [node for node in wanted if node not in bad]
            return ev.GroupFormed(nodes=tuple(wanted), failed=tuple(sorted(failed.items())))

    def _present(self, nodes: Sequence[str], failed: dict[str, ErrorRecord]) -> tuple[tuple[str, str], ...]:
        members = [(bridge.name, bridge.incarnation or "") for bridge in self._bridges]
        for node in nodes:
            info = self._peers[node].info
            if info is None:
                failed[node] = DaemonLost(f"node {node} is not connected: {self._peers[node].problem}").record()
            else:
                members.append((node, info.incarnation))
        return tuple(members)

    async def _rendezvous(self, nodes: Sequence[str], deadline: float) -> dict[str, ErrorRecord]:
        """Form a new generation on every rail. Returns the nodes that could not join."""
        self._generation += 1
        self._members = ()
        generation, key = self._generation, secrets.token_hex(16)
        step = min(deadline, time.monotonic() + self._config.timeouts.operation / 2)
        bad: dict[str, ErrorRecord] = {}
        address = self._config.cluster.address
        for rail in range(self.count(nodes)):
            bridge = self._bridges[rail]
            try:
                hosted = await bridge.call(commands.Host(generation=generation, host=address), deadline=step)
            except TransportError as error:
                return dict.fromkeys(nodes, error.record())

            async def join(node: str, rank: int, rail: int = rail, port: int = hosted.port) -> None:
                question = msg.JoinRail(
                    rail=rail,
                    generation=generation,
                    rank=rank,
                    world=len(nodes) + 1,
                    host=address,
                    port=port,
                    key=key,
                    timeout=max(0.0, step - time.monotonic()),
                )
                try:
                    await self._peers[node].ask(question, step + 1.0)
                except WeightSyncError as error:
                    bad[node] = error.record()

            own = commands.Join(
                generation=generation,
                rank=0,
                world=len(nodes) + 1,
                host=address,
                port=hosted.port,
                address=address,
                key=key,
            )
            async with asyncio.TaskGroup() as group:
                for rank, node in enumerate(nodes, start=1):
                    group.create_task(join(node, rank))
                mine = group.create_task(_quietly(bridge.call(own, deadline=step)))
            if (problem := mine.result()) is not None and not bad:
                return dict.fromkeys(nodes, problem)
            if bad:
                return bad
        return bad

    async def relay(self, context: PushContext, instruction: do.RelayBucket, sequence: int) -> ev.Event:
        """Broadcast one bucket. Raises `TransportError` when this node's bridge cannot even export it."""
        bridge = self._bridges[instruction.slot.bridge]
        targets = {target.node: target for target in instruction.targets}
        readers = {node: f"{node}/{target.bridge}" for node, target in targets.items()}  # bridges are peers by name
        export = commands.Export(
            slot=instruction.slot.index,
            nbytes=instruction.nbytes,
            sequence=sequence,
            peers=tuple(sorted(readers.values())),
        )
        reply = await bridge.call(export, deadline=instruction.deadline)
        failed: dict[str, ErrorRecord] = {}

        async def receive(node: str, target: do.Slot) -> None:
            question = msg.Receive(
                push=context.push,
                bucket=instruction.bucket,
                rail=target.bridge,
                slot=target.index,
                ticket=reply.peer_tickets[readers[node]],
                timeout=max(0.0, instruction.deadline - time.monotonic()),
            )
            try:
                await self._peers[node].ask(question, instruction.deadline + 1.0)
            except WeightSyncError as error:
                failed[node] = error.record()
                # nobody can complete a collective that one member has left: end it here instead of at its deadline
                await _quietly(bridge.call(commands.Leave(), deadline=time.monotonic() + _LEAVE))

        send = commands.Send(slot=instruction.slot.index, sequence=sequence)
        async with asyncio.TaskGroup() as group:
            for node, target in targets.items():
                group.create_task(receive(node, target))
            mine = group.create_task(_quietly(bridge.call(send, deadline=instruction.deadline)))
        own = mine.result()
        if failed or own is not None:
            self.break_up()
        if own is not None and not failed:
            failed = dict.fromkeys(targets, own)
        reached = tuple(sorted(set(targets) - set(failed)))
        return ev.BucketRelayed(bucket=instruction.bucket, nodes=reached, failed=tuple(sorted(failed.items())))


async def _quietly(call: Awaitable[object]) -> ErrorRecord | None:
    """The error a bridge call ends with, as a value: its siblings must run to their own ends."""
    try:
        await call
    except TransportError as error:
        return error.record()
    return None
