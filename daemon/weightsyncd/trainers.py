"""The daemon's trainers: decides which call of `push_weights` begins a push, joins one, waits or is refused.

The node of rank 0 coordinates. Ranks of the same trainer on other nodes take part through their own daemons
(`weightsyncd.branch`).

A node has one push at a time. A call is refused while another trainer's push is under way, and waits while the last
push only lets go of its slots. Before a push begins, other nodes are asked what they lead (`weightsyncd.turns`): the
call is refused if that is a push of the same model, and waits if it is of another. A rank that calls for a push that
has just failed without it gets that push's error, as its siblings did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import ErrorRecord, PushRefused, WeightSyncError
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsyncd.health import measure_push
from weightsyncd.outcomes import brought_all
from weightsyncd.push import Push, Services
from weightsyncd.push_engines import engines_for
from weightsyncd.rank_messages import passed_on, rank_said
from weightsyncd.refusals import Refusals
from weightsyncd.turns import Turns
from weightsyncd.waiting import Call, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from weightsyncd.follower import Follower
    from weightsyncd.metrics import Metrics

__all__ = ["Trainers"]

logger = logging.getLogger(__name__)

_MAX_WAITING = 4096  # ranks


class Trainers:
    """See the module. `follower` knows what other daemons do with this node."""

    def __init__(self, services: Services, metrics: Metrics, follower: Follower, on_free: Callable[[], None]) -> None:
        """`on_free` is called when a push has ended; it must call `go_on`."""
        self.push: Push | None = None
        self.last: msg.PushOutcome | None = None
        self.last_error: ErrorRecord | None = None
        self.last_at: float | None = None
        self.stopping = False
        self._services = services
        self._metrics = metrics
        self._follower = follower
        follower.leading = self
        self._on_free = on_free
        self.newest: dict[str, int] = {}  # model → newest version committed on any engine
        self.waiting = Waiting()
        self.refusals = Refusals(services, metrics, leads=self._leads, on_siblings_told=self.go_on)
        self._turns = Turns(
            services.config,
            services.peers,
            follower,
            self.waiting,
            begun=lambda: None if self.push is None else self.push.call.push,
            take_turns=self._take_turns,
            refuse=self.refusals.refuse,
        )
        self._ending: asyncio.Task[None] | None = None

    # --- a call of push_weights -----------------------------------------------------------------------------------

    def open(self, identity: bytes, message: msg.Open) -> None:
        """A rank has called `push_weights`."""
        config = self._services.config
        welcome = msg.Welcome(id=message.id, node=config.node.name, heartbeat=config.timeouts.liveness / 5)
        self._services.send(identity, welcome)
        self._admit(Call(identity, message, time.monotonic()))

    def _admit(self, call: Call) -> None:
        message, push = call.message, self.push
        if push is not None and not push.session.ended:
            if push.call.group == message.group:
                push.open(call.identity, message)
                return
            if self.stopping:
                self.refusals.refuse(call, "weightsyncd is stopping", None)
                return
            if push.repeat and not message.engines:  # a trainer with new weights need not know of a repeat
                self._wait(call)
            elif self._leads(message):
                version, model = push.session.version, push.session.model
                reason = f"a push of version {version} of {model!r} by another trainer is under way"
                self.refusals.refuse(call, reason, "one push at a time on a node; try again when it has ended")
            elif not self.refusals.failed_without(call):  # its own push, led elsewhere, waits for this node
                self._wait(call)
                self._held_up(call, push)
        elif (branch := self._follower.branch_for(call.identity, message)) is not None:
            branch.open(call)
        elif self.refusals.failed_without(call):
            pass
        elif self.stopping:
            self.refusals.refuse(call, "weightsyncd is stopping", None)
        elif push is None and self._leads(message) and self._turns.has(call):
            self._begin(call)
        else:
            self._wait(call)

    def _wait(self, call: Call) -> None:
        message = call.message
        if len(self.waiting) >= _MAX_WAITING:
            self.refusals.refuse(call, f"{_MAX_WAITING} ranks wait already", None)
            return
        words = (message.model, message.version, message.rank)
        logger.debug("[model=%s v=%d] rank %d waits", *words, extra={"rank": message.rank})
        self.waiting.add(call)
        self.refusals.failures.tries_again(message)

    def _held_up(self, call: Call, push: Push) -> None:
        """Tell the node that leads the rank's own push that it waits for a push from here: one must give way."""
        if (found := self._follower.calls.get(call.message.group)) is not None:
            identity, summons = found
            words = msg.RankSays(push=summons.push, rank=call.message.rank, waits_for=push.call.push)
            self._services.send(identity, words)
            self._give_way(push)

    def _give_way(self, push: Push) -> None:
        """End this push if it and another wait for ranks on each other's nodes, and the other's node is first by name.

        Neither has touched anything yet, because ranks are missing.
        """
        if push.ranks.complete or push.session.ended:
            return
        found = (self._follower.calls.get(group) for group in self.waiting.groups())
        here = {waits[1].push for waits in found if waits is not None}
        for node, other in push.held_up.items():
            if node < self._services.config.node.name and other in here:
                reason = (
                    f"a rank of this trainer waits on node {node} for push {other}, which needs a rank that is here"
                )
                hint = "one push at a time on a node; try again when that has ended"
                error = PushRefused(reason, model=push.call.model, version=push.call.version, hint=hint)
                push.hear(ev.RankFailed(rank=0, error=error.record()))
                return

    def _leads(self, message: msg.Open) -> bool:
        """Whether this node coordinates the rank's push: as the node of rank 0, or because it knows no other node."""
        joined = self._services.config.cluster.listen or self._services.peers or self._follower.known
        return message.rank == 0 or not joined

    def holder(self, claimant: str) -> msg.Holder | None:
        """Return what a node that claims this one has to wait for: a push from here, or a claim (`Turns.holder`)."""
        push = self.push
        if push is None:
            return self._turns.holder(claimant)
        return msg.Holder(
            node=self._services.config.node.name,
            push=push.call.push,
            group=push.call.group,
            model=push.call.model,
            version=push.call.version,
            ending=push.session.ended,
            repeat=push.repeat,
        )

    def _time_is_up(self, call: Call) -> None:
        following, holder = self._follower.following, self._turns.in_the_way(call)
        if following is None and self.push is None and not self._leads(call.message):
            what = "rank 0 of its trainer, to call on this node or on one that has this one among its cluster.peers"
        elif holder is not None:
            version, model = holder.version, holder.model
            what = f"push {holder.push}, of version {version} of {model!r}, which node {holder.node} leads"
        else:
            what = f"push {following} of another node" if following is not None else "the node to be free"
        self.refusals.time_is_up(call, what)

    def _begin(self, call: Call) -> None:
        message = call.message
        left = message.timeout - (time.monotonic() - call.since)
        if left <= 0:
            self._time_is_up(call)
            return
        try:
            engines = engines_for(self._services, message, self.newest.get(message.model))
        except PushRefused as error:
            self.refusals.refuse(call, error.message, error.hint)
            return
        keeper = self._services.executor.engines.keeper_of(message.model) if not message.engines else None
        self.refusals.failures.forget(message.group)
        self._follower.calls.forget(message.group)
        first = msgspec.structs.replace(message, timeout=left)
        last = self.newest.get(message.model) if not message.engines else None  # a repeat pushes just that version
        self.push = Push(
            self._services, first, engines, last, keeper, self._turns.claim, on_failed=self.refusals.push_failed
        )
        self._ending = asyncio.create_task(self._when_done(self.push), name="push")
        self.push.open(call.identity, message)
        self.go_on()  # other ranks may have called before

    # --- its end --------------------------------------------------------------------------------------------------

    async def _when_done(self, push: Push) -> None:
        await push.done.wait()
        try:
            with push.context.lines():
                await self._close(push)
        finally:  # the next push may begin, whatever went wrong here
            self.push = None
            self._on_free()

    async def _close(self, push: Push) -> None:
        await push.close()
        session = push.session
        if not push.repeat:
            self.last, self.last_error, self.last_at = push.outcome, session.error, time.monotonic()
        if session.committed:
            self.newest[session.model] = max(session.version, self.newest.get(session.model, -1))
        node = self._services.config.node.name
        keeper = self._services.executor.engines.keepers.get(session.model)
        if keeper is not None and not push.repeat:
            until = time.monotonic() + self._services.config.timeouts.grace
            whole = session.committed and brought_all(session.fleet, partial=session.partial)
            await keeper.settle(whole=session.version if whole else None, deadline=until)
        answering = [e.name for e in session.fleet if e.node == node and str(e.stage) != "lost"]
        await asyncio.gather(*(self._look(name) for name in answering))
        measure_push(self._metrics, session, push.outcome, repeat=push.repeat)

    async def _look(self, name: str) -> None:
        """Probe an engine, for status and metrics."""
        with contextlib.suppress(WeightSyncError):  # `Engine.probe` has logged the error and shows the engine as lost
            until = time.monotonic() + self._services.config.timeouts.probe
            await self._services.executor.engines[name].probe(until)

    def awaits(self, group: str) -> bool:
        """Whether ranks of a trainer wait here for its push."""
        return group in self.waiting.groups()

    def missed(self, call: msg.Gather, ranks: Collection[int], error: ErrorRecord) -> None:
        """Note a push from elsewhere that has failed, which ranks of this node may still call for."""
        self.refusals.missed(call, ranks, error)

    def again(self, calls: Sequence[Call]) -> None:
        """Let calls wait that came too late for a push from elsewhere."""
        for call in calls:
            self._wait(call)

    def go_on(self) -> None:
        """Let whoever waits try again: this node may be free, or another."""
        self._turns.again()

    def _take_turns(self) -> None:
        for call in self.waiting.take():
            self._admit(call)

    async def finish(self, until: float) -> None:
        """Begin no more pushes. Let the one under way end, or end it, within three quarters of the time."""
        self.stopping = True
        left = until - time.monotonic()
        if self.push is not None:
            logger.info("stopping; a push is under way and has %.1f s to end", left)
            await self._wait_done(self.push, left / 2)
            self.push.hear(ev.StopRequested(reason="weightsyncd was told to stop"))
            if not await self._wait_done(self.push, left / 4):
                logger.warning("the push did not let go in time; stopping all the same")
        for call in self.waiting.take():
            self.refusals.refuse(call, "weightsyncd is stopping", None)

    async def close(self, until: float) -> None:
        """Drop what is still under way: engines that were only paused are resumed, touched ones stay paused."""
        push = self.push
        self.stopping = True
        await self._turns.close()
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        if push is not None:
            await push.close()
            if not push.done.is_set():
                await self._services.executor.let_go(push.context, until)

    @staticmethod
    async def _wait_done(push: Push, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await push.done.wait()
        return push.done.is_set()

    # --- what ranks say during a push -------------------------------------------------------------------------------

    def heard(self, identity: bytes) -> None:
        """Note that a rank is alive."""
        self.waiting.heard(identity)
        if self.push is not None:
            self.push.ranks.rank_of(identity)
        if (branch := self._follower.branch) is not None:
            branch.heard(identity)

    def check_alive(self, liveness: float) -> None:
        """Drop ranks that have fallen silent, and calls whose timeout is over. Call it regularly."""
        if self.push is not None:
            self.push.check_alive(liveness)
        if (branch := self._follower.branch) is not None:
            branch.check_alive(liveness)
        now = time.monotonic()
        for call in self.waiting.late(now):
            self._time_is_up(call)
        for call in self.waiting.silent(now, liveness):
            self.refusals.fell_silent(call, liveness)
        self._turns.look_again()

    def hear(self, event: ev.Event) -> None:
        """Give an event to the push under way, if there is one."""
        if self.push is not None:
            self.push.hear(event)

    async def wind_up(self, until: float) -> None:
        """Wait for a push from here that has ended and only lets go of what it held, or for a repeat.

        A push under way that a trainer has asked for is not waited for.
        """
        push = self.push
        if push is not None and (push.session.ended or push.repeat) and self._ending is not None:
            await asyncio.wait([self._ending], timeout=max(0.0, until - time.monotonic()))

    @property
    def busy(self) -> bool:
        """A push from here holds this node."""
        return self.push is not None

    def route(self, identity: bytes, message: msg.RankWords) -> None:
        """Give a rank's message to its push. Raises `CodecError` if its layout cannot be read."""
        push, branch = self.push, self._follower.branch
        if branch is not None and branch.route(identity, message):
            return
        rank = push.ranks.rank_of(identity) if push is not None else None
        if push is None or rank is None or push.ranks[rank].number != message.id:
            if isinstance(message, msg.Failed):
                for call in self.waiting.given_up(identity, message.id):
                    self.refusals.gave_up(call, message.error)
            logger.debug("%s from nobody in a push", type(message).__name__)
            return
        rank_said(push, rank, message, self._services.plans)

    def route_from(self, node: str, message: msg.RankSays) -> None:
        """Do as `route` and `open`, for a rank on another node."""
        push = self.push
        if push is None or push.context.push != message.push:
            extra = {"rank": message.rank}
            logger.debug("rank %d of node %s, in no push of this node", message.rank, node, extra=extra)
            return
        if message.waits_for:
            push.held_up[node] = message.waits_for
            self._give_way(push)
            return
        passed_on(push, node, message, self._services.plans)
