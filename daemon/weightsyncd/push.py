"""One push in a daemon: gives events to its session and has the instructions carried out.

This is the only place where the two sides meet: `hear` takes an event, asks the session what to do, and sends each
instruction to the trainer ranks, to this node's executor, or to another node. The outcome of an instruction is heard as
an event again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightsync.errors import ErrorRecord, PushRefused, TransportError
from weightsync.logs import of_error
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.machine import PushSession
from weightsync.session.trace import Trace
from weightsync.wire import messages as msg
from weightsyncd.context import PushContext
from weightsyncd.exchanges import exchange
from weightsyncd.outcomes import account_of, outcome_of, status_of_push
from weightsyncd.planning import Planning
from weightsyncd.rank_weights import KnownExposures, RankWeights
from weightsyncd.ranks import Rank, Ranks
from weightsyncd.relays import relay
from weightsyncd.traces import PushTrace, Traces

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from weightsync.config import NodeConfig
    from weightsyncd.claims import Claim
    from weightsyncd.executor import NodeExecutor
    from weightsyncd.peers import Peer
    from weightsyncd.plans import Plans
    from weightsyncd.rails import Rails

__all__ = ["Push", "Services"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What a push needs of its daemon."""

    config: NodeConfig
    executor: NodeExecutor
    peers: dict[str, Peer]
    rails: Rails
    plans: Plans
    send: Callable[[bytes, msg.Message], bool]
    traces: Traces
    exposures: KnownExposures = field(default_factory=KnownExposures)


class Push:
    """One push under way. `done` is set when its session is done; the next push may begin after `close`."""

    def __init__(
        self,
        services: Services,
        first: msg.Open,
        engines: dict[str, str],
        last_version: int | None,
        keeper: str | None = None,
        claim: Claim | None = None,
        *,
        on_failed: Callable[[Push, ErrorRecord], None],
    ) -> None:
        """`engines` maps the name of each engine of this push to its node. `keeper` is the keeper that keeps it, and
        `claim` the claim by which other nodes know it already. `on_failed` is called as soon as the push fails: its
        work under way may go on until `done`.
        """
        config = services.config
        now = time.monotonic()
        self.repeat = bool(first.engines)  # a keeper pushes what it has kept
        self.held_up: dict[str, str] = {}  # node where a rank of this push waits → the push there that the rank awaits
        self.done = asyncio.Event()
        self._ended = asyncio.Event()  # its outcome is decided
        self.outcome: msg.PushOutcome | None = None
        self._services = services
        self._on_failed = on_failed
        self._terms = (first.version, first.model, first.world, first.pause)
        self._home = config.node.name
        self._engines = engines = engines | ({keeper: self._home} if keeper is not None else {})
        self._tasks: set[asyncio.Task[None]] = set()
        self._chores: set[asyncio.Task[None]] = set()  # tasks that must be done even after the end
        self._timer: asyncio.TimerHandle | None = None
        self._claimed = claim.nodes if claim is not None else set[str]()
        # each attempt has its own name, so that late messages of an earlier one are not mistaken for this one's
        name = claim.terms.push if claim is not None else f"{self._home}-{secrets.token_hex(8)}"
        self.context = PushContext(push=name, model=first.model, version=first.version)
        self.call = msg.Gather(push=name, group=first.group, model=first.model, version=first.version)
        self.ranks = ranks = Ranks(self.call, first.world, self._home, services.send, services.peers)
        self.session = PushSession(
            model=first.model,
            version=first.version,
            world=first.world,
            home=self._home,
            engines=engines,
            slots={(node, b): n for node in engines.values() for b, n in enumerate(ranks.slots_there(node))}
            | {(self._home, b): config.arena.slots for b in range(config.node.bridges)},
            pause=first.pause,
            deadline=now + first.timeout,
            operation_timeout=config.timeouts.operation,
            grace=config.timeouts.grace,
            last_version=last_version,
            keepers=() if keeper is None else (keeper,),
        )
        self._planning = Planning(services, self.context, ranks, engines)
        self.weights = RankWeights(self.context, self.session, ranks, services.exposures, self.hear)
        self._trace = Trace(self._home, engines, now)
        self._began = time.time()
        self._lines = self.context.lines()
        self.ranks.call_on_nodes()
        with self._lines:
            logger.debug("[model=%s v=%d] opened by %s, %d ranks", first.model, first.version, first.group, first.world)
            self._carry_out(self.session.start(now), now)

    # --- what is heard ----------------------------------------------------------------------------------------------

    def hear(self, event: ev.Event) -> None:
        """Give the session one event and have its instructions carried out."""
        if self.done.is_set():
            return
        if isinstance(event, ev.NodeLost):
            self.ranks.node_lost(event.node)
        before, now = self.session.state, time.monotonic()
        self._trace.heard(event, now)
        with self._lines:
            instructions = self.session.handle(event, now)
            if (after := self.session.state) is not before:
                logger.debug("[model=%s v=%d] %s → %s", self.session.model, self.session.version, before, after)
            self._carry_out(instructions, now)

    def _carry_out(self, instructions: list[do.Instruction], now: float) -> None:
        self._trace.told(instructions, now)
        for instruction in instructions:
            self._dispatch(instruction)
        if self.session.done:
            self._finish()
        else:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self.session.deadline()
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, due - time.monotonic()) + 0.001, self.hear, ev.Tick())

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        logger.debug("[model=%s v=%d] done, %s", self.session.model, self.session.version, self.session.state)
        self.done.set()

    # --- trainer ranks ----------------------------------------------------------------------------------------------

    def open(self, identity: bytes, message: msg.Open, node: str = "") -> None:
        """Take a rank's call of `push_weights`, made here or on another `node`."""
        if self.session.ended and self.ranks.complete:
            return  # it is for the next push: once its daemon hears that this one is over, it has the rank wait
        terms = (message.version, message.model, message.world, message.pause)
        rank = Rank(identity, message, time.monotonic(), node or self._home)
        known = self.ranks.get(message.rank)
        if known is not None:
            if (known.identity, known.node) != (identity, rank.node):
                reason = f"rank {message.rank} of this trainer takes part in the push already"
                if rank.node != known.node:
                    reason += f", from node {known.node}"
                error = PushRefused(reason, model=self.session.model, version=self.session.version)
                self.ranks.tell(message.rank, msg.Ended(error=error.record()), rank)
            return
        if self.session.ended:  # it was on its way when the push failed
            self.ranks.tell(message.rank, msg.Ended(error=self.session.error), rank)
            return
        self.ranks.add(message.rank, rank)
        if terms != self._terms or message.rank >= message.world:
            names = ("version", "model", "world size", "pause")
            differ = [f"{n} {b!r}, not {a!r}" for n, a, b in zip(names, self._terms, terms, strict=True) if a != b]
            what = f"pushes {'; '.join(differ)} as the ranks before it"
            if not differ:
                what = f"is not in a world of {message.world}, whose ranks are 0 to {message.world - 1}"
            error = PushRefused(f"rank {message.rank} {what}", rank=message.rank)
            self.hear(ev.RankFailed(rank=message.rank, error=error.record()))
            return
        self.hear(
            ev.RankOpened(
                rank=message.rank,
                layout=message.layout,
                node=rank.node,
                slots=self.ranks.slots_there(rank.node),
                describe_seconds=message.describe_seconds,
                in_place=message.in_place,
                partial=message.partial,
            )
        )

    def check_alive(self, liveness: float) -> None:
        """Tell the session of ranks that have fallen silent. Call it regularly."""
        model, version = self.session.model, self.session.version
        if not self.session.ended:
            self.ranks.call_on_nodes()
        for rank in self.ranks.silent(liveness):
            logger.warning("[model=%s v=%d] rank %d has not been heard", model, version, rank, extra={"rank": rank})
            self.hear(ev.RankLost(rank=rank, reason=f"it has not been heard for {liveness:g} s"))

    # --- instructions -----------------------------------------------------------------------------------------------

    def _dispatch(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.AskLayout():
                self.ranks.tell(instruction.rank, msg.AskDescription())
            case do.AnnouncePlan():
                self._planning.announce(expose=instruction.expose)
            case do.GrantLease() if self._planning.announced:
                lease = msg.Lease(
                    bucket=instruction.bucket, bridge=instruction.slot.bridge, slot=instruction.slot.index
                )
                for rank in instruction.ranks:
                    self.ranks.tell(rank, lease)
            case do.ReleaseWeights():
                for rank in self.ranks:
                    self.ranks.tell(rank, msg.Drawn())
            case do.EndPush():
                self._end(instruction.error)
            case do.GrantLease():
                pass
            case do.MakePlan():
                self._start(self._planning.make(self.session.push_deadline))
            case do.FormRails():
                self._start(self._form_rails(instruction))
            case do.RelayBucket():
                self._start(self._relay(instruction))
            case do.ExchangeBucket():
                self._start(self._exchange(instruction))
            case do.DeliverWeights():
                deliver = self._services.executor.deliveries.deliver
                self._start(deliver(self._services.rails, self.context, instruction, self._ended))
            case do.RevokeBucket() | do.RetireBridge():
                self._start(self._at_node(instruction), self._chores)
            case _:
                self._start(self._at_node(instruction))

    def _start(
        self, work: Coroutine[None, None, ev.Event | None], tasks: set[asyncio.Task[None]] | None = None
    ) -> None:
        tasks = self._tasks if tasks is None else tasks
        task = asyncio.create_task(self._hear_outcome(work))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _hear_outcome(self, work: Coroutine[None, None, ev.Event | None]) -> None:
        try:
            event = await work
        except Exception as error:
            logger.exception("[model=%s v=%d] unexpected failure", self.session.model, self.session.version)
            event = ev.StopRequested(reason=f"weightsyncd failed: {type(error).__name__}: {error}")
        if event is not None:
            self.hear(event)

    def _node_of(self, instruction: do.Instruction) -> str:
        if isinstance(instruction, do.ExportBucket):
            return instruction.slot.node
        if isinstance(instruction, do.RetireBridge):
            return instruction.node
        return self._engines[getattr(instruction, "engine", "")]

    async def _at_node(self, instruction: do.Instruction) -> ev.Event | None:
        node = self._node_of(instruction)
        if node == self._home:
            return await self._services.executor.execute(self.context, instruction)
        return await self._services.peers[node].execute(self.context, instruction)

    async def _relay(self, instruction: do.RelayBucket) -> ev.Event:
        executor, index = self._services.executor, instruction.slot.bridge
        sequence = executor.exports.sequence_of(self.context, instruction.bucket, instruction.slot)
        incarnation = executor.exports.bridges[index].incarnation
        try:
            return await relay(self._services.rails, self.context, instruction, sequence)
        except TransportError as error:
            return executor.exports.bridge_lost(index, incarnation, error, instruction.bucket)

    async def _exchange(self, instruction: do.ExchangeBucket) -> ev.Event:
        runs = self._planning.runs(instruction.bucket)
        (own,) = [slot for slot in instruction.slots if slot.node == self._home]
        self.context.arenas[instruction.bucket] = self._services.rails.bridges[own.bridge].incarnation
        return await exchange(self._services.rails, self.context, instruction, runs)

    async def _form_rails(self, instruction: do.FormRails) -> ev.Event:
        failed = await self._services.rails.use(instruction.nodes, instruction.deadline)
        reached = tuple(node for node in instruction.nodes if node not in failed)
        return ev.RailsFormed(number=instruction.number, nodes=reached, failed=tuple(sorted(failed.items())))

    def _end(self, error: ErrorRecord | None) -> None:
        session = self.session
        self._ended.set()
        self.outcome = outcome_of(session, self.context.manifest)
        if error is not None:
            refused = error.kind == "PushRefused"  # nothing was touched, so only the trainer has to act
            words = (session.model, session.version, "refused" if refused else session.state, error.message)
            level = logging.WARNING if refused else logging.ERROR
            logger.log(level, "[model=%s v=%d] %s: %s", *words, extra=of_error(error))
        else:
            logger.info(
                "[model=%s v=%d] committed on %d of %d engines: %.1f MB in %.3f s",
                session.model,
                session.version,
                len(session.committed),
                len(session.fleet),
                self.outcome.nbytes / 1e6,
                self.outcome.seconds,
            )
        ended = msg.Ended(outcome=self.outcome if error is None else None, error=error)
        for rank in self.ranks:
            self.ranks.tell(rank, ended)
        if error is not None:
            self._on_failed(self, error)

    def status(self) -> msg.PushStatus:
        """Return how far it is."""
        return status_of_push(self.session)

    def trace(self) -> PushTrace:
        """Return the trace of what it has done so far."""
        session, now = self.session, time.monotonic()
        about = account_of(session, self.context.push, self._began, now)
        return PushTrace(self._trace, now, session.model, session.version, about)

    async def close(self) -> None:
        """Stop what is still under way and let go of every slot. Call it once `done`, or when the daemon ends."""
        if self._timer is not None:
            self._timer.cancel()
        if self._chores:
            await asyncio.wait(list(self._chores), timeout=self._services.config.timeouts.operation)
        if self.done.is_set():
            self.ranks.release(self._claimed | set(self._engines.values()), self.session.error)
        left = [*self._tasks, *self._chores]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._services.executor.exports.sweep(self.context)
        trace = self.trace()
        if not self.repeat:
            self._services.traces.keep(trace, failed=self.session.error is not None)
        self._services.traces.write(trace, self.context.push)
