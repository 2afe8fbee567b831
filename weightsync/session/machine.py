"""The rules of one push.

`PushSession.handle(event, now)` answers with instructions; the daemon carries them out and every outcome, failures and
deadlines included, comes back as an event. `TRANSITIONS` is the whole of it: one row for each state and event says
which method decides and which states may follow; the diagram in docs/ is drawn from it.

    OPENING        ranks arrive, engines are probed, the plan is made, every engine accepts the manifest
    TRANSFERRING   engines are paused, slots leased, filled, exported, relayed and loaded
    COMMITTING     everything is loaded: engines finish, verify, and, when all have, resume together
    COMMITTED      every engine that was not evicted on the way serves the new version
    ABORTED        ended with no engine touched
    TORN           ended with at least one engine touched and none committed; `torn` lists them

Three rules hold throughout. An engine is *touched* from the moment `BeginEngine` is issued; a touched engine that
does not commit is torn and is never resumed. A slot is leased again only when its fillers have reported and each of
its readers has released it or was evicted. And one failing engine is evicted while the others go on; the push itself
fails only when a trainer rank, the bytes or the last engine is gone.

After the end (`ended`) outcomes still under way are awaited, for `grace` seconds at most; then the session is `done`
and the slots are free for the next push.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import ErrorRecord
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.tracks import BucketTrack, Copy, EngineStage, EngineTrack, PhaseClock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightsync.session.events import Event
    from weightsync.session.instructions import Instruction

__all__ = ["TRANSITIONS", "PushSession", "State"]

STORY_LENGTH = 64


class State(StrEnum):
    OPENING = "opening"
    TRANSFERRING = "transferring"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTED = "aborted"
    TORN = "torn"

    @property
    def ended(self) -> bool:
        return self in _ENDED


_ENDED = frozenset({State.COMMITTED, State.ABORTED, State.TORN})
_FAILED = (State.ABORTED, State.TORN)


class PushSession:
    """One push of one version of one model by one group of trainer ranks.

    After construction, carry out `start(now)`; then give every event to `handle` and carry out what it returns. Call
    `handle(Tick(), now)` when `deadline()` is reached.
    """

    def __init__(
        self,
        *,
        model: str,
        version: int,
        world: int,
        home: str,
        engines: Mapping[str, str],
        slots: Mapping[tuple[str, int], int],
        pause: str = "keep",
        deadline: float,
        operation_timeout: float = 60.0,
        grace: float = 10.0,
        last_version: int | None = None,
    ) -> None:
        """`engines` maps name to node; `slots` maps (node, bridge) to how many slots it has, the home node's at
        least.
        """
        self.model, self.version, self.world, self.home, self.pause = model, version, world, home, pause
        self.push_deadline = deadline
        self.operation_timeout = operation_timeout
        self.grace = grace
        self.last_version = last_version
        self.state = State.OPENING
        self.error: ErrorRecord | None = None
        self.engines = {name: EngineTrack(name, node) for name, node in engines.items()}
        self.buckets: list[BucketTrack] = []
        self.phases = PhaseClock()
        self.nbytes = 0  # of the whole plan
        self.filled_bytes = 0
        self.started = self.finished = 0.0
        self.story: list[str] = []  # the last events, for error messages and logs
        self._free = {place: list(range(count)) for place, count in slots.items()}
        self._capacity = dict(slots)
        self._layouts: dict[int, bytes] = {}
        self._awaited_layouts: set[int] = set()
        self._planning = self._planned = False
        self._remote = sorted({node for node in engines.values() if node != home})
        self._group_ready = not self._remote
        self._nodes: set[str] = {home, *self._remote}
        self._ungranted: dict[int, deque[int]] = {}  # by bridge: buckets that wait for a slot, in order
        self._unrelayed: dict[int, deque[int]] = {}  # by bridge: buckets that wait for their broadcast, in order
        self._active: set[int] = set()  # buckets that lie in a slot somewhere
        self._relay_busy: set[int] = set()  # bridges with a broadcast under way
        self._stopped: set[int] = set()  # ranks that will write nothing more
        self._drain_until: float | None = None
        self._abandoned = False
        self._begun_at: dict[str, float] = {}

    # --- what the daemon asks -----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """The outcome is decided."""
        return self.state.ended

    @property
    def done(self) -> bool:
        """Ended, and nothing of it is under way any more: the next push may use engines and slots."""
        return self.ended and (self._abandoned or not self._outstanding())

    @property
    def torn(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.engines.values() if e.stage is EngineStage.TORN)

    @property
    def committed(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.engines.values() if e.stage is EngineStage.COMMITTED)

    def deadline(self) -> float | None:
        """When `Tick` is due; None once done."""
        if self.done:
            return None
        return self._drain_until if self.ended else self.push_deadline

    def waiting_for(self) -> str:
        """What keeps the push from going on, in words, for errors and status."""
        if self.state is State.OPENING:
            missing = [r for r in range(self.world) if r not in self._layouts]
            if missing:
                return f"rank{'s' if len(missing) > 1 else ''} {_listed(missing)} of {self.world} to call push_weights"
            if self._awaited_layouts:
                return f"the layout of rank {_listed(sorted(self._awaited_layouts))}"
            if not self._group_ready:
                return f"the communicator to {', '.join(self._remote)}"
            busy = [f"{e.name} ({e.stage})" for e in self._live() if e.asked]
            return f"engine {', '.join(busy)}" if busy else "the plan"
        writing = [(i, sorted(b.unfilled)) for i, b in enumerate(self.buckets) if b.unfilled]
        if writing:
            bucket, ranks = writing[0]
            return f"rank {_listed(ranks)} to fill bucket {bucket}"
        busy = [f"{e.name} ({e.asked}, bucket {e.next_bucket})" for e in self.engines.values() if e.asked]
        return f"engine {', '.join(busy)}" if busy else "the wire"

    # --- the machine ----------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Instruction]:
        """Probe the engines and form the communicator while ranks arrive."""
        self.started = now
        until = self._until(now)
        out: list[Instruction] = [do.ProbeEngine(engine=e.name, deadline=until) for e in self.engines.values()]
        if self._remote:
            out.append(do.FormGroup(nodes=tuple(self._remote), deadline=until))
        return out

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Hear one event. A duplicate or late one changes nothing."""
        method, follows = TRANSITIONS[self.state, type(event)]
        before = self.state
        self._remember(event)
        out: list[Instruction] = []
        method(self, event, now, out)
        if self.state is not before and self.state not in follows:
            raise AssertionError(f"{before} + {type(event).__name__} → {self.state} is not in the table")
        return out

    def _remember(self, event: Event) -> None:
        self.story.append(f"{self.state}: {event}")
        del self.story[:-STORY_LENGTH]

    def _until(self, now: float) -> float:
        return min(self.push_deadline, now + self.operation_timeout)

    def _live(self) -> list[EngineTrack]:
        return [e for e in self.engines.values() if not e.stage.ended]

    # --- opening --------------------------------------------------------------------------------------------------

    def _on_rank_opened(self, event: ev.RankOpened, now: float, out: list[Instruction]) -> None:
        if event.rank in self._layouts:
            return
        self._layouts[event.rank] = event.layout
        self.phases.seconds["describe"] = max(self.phases.seconds["describe"], event.describe_seconds)
        self._plan_when_open(now, out)

    def _plan_when_open(self, now: float, out: list[Instruction]) -> None:
        if len(self._layouts) == self.world and not self._planning and not self._awaited_layouts:
            self._planning = True
            self.phases.start("plan", now)
            out.append(do.MakePlan(deadline=self.push_deadline))

    def _on_layouts_missing(self, event: ev.LayoutsMissing, now: float, out: list[Instruction]) -> None:
        if not self._planning:
            return
        self._planning = False
        self.phases.stop("plan", now)
        self._awaited_layouts = set(event.ranks)
        out.extend(do.AskLayout(rank=rank) for rank in event.ranks)

    def _on_layout_received(self, event: ev.LayoutReceived, now: float, out: list[Instruction]) -> None:
        if event.rank in self._awaited_layouts:
            self._awaited_layouts.discard(event.rank)
            self._plan_when_open(now, out)

    def _on_plan_made(self, event: ev.PlanMade, now: float, out: list[Instruction]) -> None:
        if not self._planning or self._planned:
            return
        self._planned = True
        self.phases.stop("plan", now)
        self.buckets = [BucketTrack(b.nbytes, b.owner, frozenset(b.fillers)) for b in event.buckets]
        self.nbytes = sum(b.nbytes for b in self.buckets)
        for index, bucket in enumerate(self.buckets):
            self._ungranted.setdefault(bucket.owner, deque()).append(index)
            self._unrelayed.setdefault(bucket.owner, deque()).append(index)
        self._accept_when_known(now, out)

    def _on_plan_failed(self, event: ev.PlanFailed, now: float, out: list[Instruction]) -> None:
        if self._planning and not self._planned:
            self._fail(event.error, now, out)

    def _on_group_formed(self, event: ev.GroupFormed, now: float, out: list[Instruction]) -> None:
        if self._group_ready:
            return
        self._group_ready = True
        for node, error in event.failed:
            self._drop_node(node, error, "open", now, out)
        self._accept_when_known(now, out)

    def _on_engine_probed(self, event: ev.EngineProbed, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "probe", now, out)
        if engine is None:
            return
        engine.stage = EngineStage.KNOWN
        engine.version, engine.was_paused, engine.was_torn = event.version, event.paused, event.torn
        self._accept_when_known(now, out)

    def _accept_when_known(self, now: float, out: list[Instruction]) -> None:
        """Once the plan is made, the group stands and every engine has answered or is out: check, then show the
        plan.
        """
        if self.ended or not (self._planned and self._group_ready):
            return
        live = self._live()
        if any(e.stage is not EngineStage.KNOWN for e in live):
            return
        if not live:
            self._fail_without_engines(now, out)
            return
        newest = max((e for e in live if e.version is not None), key=lambda e: e.version or 0, default=None)
        served = -1 if newest is None or newest.version is None else newest.version
        if newest is not None and served >= self.version:
            self._refuse(
                f"version {self.version} is not above version {served}, which engine {newest.name} serves", now, out
            )
            return
        if self.last_version is not None and self.last_version >= self.version:
            self._refuse(f"version {self.version} is not above version {self.last_version}, pushed before", now, out)
            return
        for engine in live:
            engine.stage, engine.asked = EngineStage.ACCEPTING, "accept"
            out.append(do.AcceptEngine(engine=engine.name, deadline=self._until(now)))

    def _on_engine_accepted(self, event: ev.EngineAccepted, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "accept", now, out)
        if engine is None:
            return
        engine.stage, engine.untouched = EngineStage.ACCEPTED, event.untouched
        self._transfer_when_accepted(now, out)

    def _transfer_when_accepted(self, now: float, out: list[Instruction]) -> None:
        if any(e.stage is not EngineStage.ACCEPTED for e in self._live()):
            return
        self.state = State.TRANSFERRING
        out.append(do.AnnouncePlan())
        for engine in self._live():
            if self.pause == "none":
                engine.stage = EngineStage.PAUSED
                continue
            engine.stage, engine.asked, engine.paused_by_us = EngineStage.PAUSING, "pause", True
            self._begun_at[engine.name] = now
            out.append(do.PauseEngine(engine=engine.name, mode=self.pause, deadline=self._until(now)))
        self._go_on(now, out)

    # --- transferring ---------------------------------------------------------------------------------------------

    def _on_engine_paused(self, event: ev.EnginePaused, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "pause", now, out)
        if engine is not None:
            engine.stage = EngineStage.PAUSED
            self._go_on(now, out)

    def _on_engine_begun(self, event: ev.EngineBegun, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "begin", now, out)
        if engine is not None:
            engine.stage = EngineStage.LOADING
            self._go_on(now, out)

    def _on_rank_filled(self, event: ev.RankFilled, now: float, out: list[Instruction]) -> None:
        if not 0 <= event.bucket < len(self.buckets):
            return
        bucket = self.buckets[event.bucket]
        if event.rank not in bucket.unfilled:
            return
        bucket.unfilled.discard(event.rank)
        self.filled_bytes += event.nbytes
        if not bucket.unfilled and not bucket.filled:
            bucket.filled = True
            self.phases.stop("fill", now)
            if not self.ended:
                self._export(event.bucket, self.home, now, out)
        self._go_on(now, out)

    def _on_bucket_exported(self, event: ev.BucketExported, now: float, out: list[Instruction]) -> None:
        copy = self._copy(event.bucket, event.node)
        if copy is None or not copy.exporting:
            return
        copy.exporting, copy.exported = False, True
        self.phases.stop("wire", now)
        self._go_on(now, out)

    def _on_bucket_relayed(self, event: ev.BucketRelayed, now: float, out: list[Instruction]) -> None:
        home = self._copy(event.bucket, self.home)
        if home is None or not home.relaying:
            return
        bucket = self.buckets[event.bucket]
        home.relaying, bucket.relayed = False, True
        self._relay_busy.discard(bucket.owner)
        self.phases.stop("wire", now)
        for node, error in event.failed:
            self._drop_node(node, error, "relay", now, out)
        if not self.ended:
            for node in event.nodes:
                if node in self._nodes and node in bucket.copies:
                    self._export(event.bucket, node, now, out)
        self._go_on(now, out)

    def _on_bucket_loaded(self, event: ev.BucketLoaded, now: float, out: list[Instruction]) -> None:
        known = self.engines.get(event.engine)
        if known is None or known.next_bucket != event.bucket:
            return
        engine = self._answered(event.engine, "load", now, out)
        if engine is None:
            return
        self.phases.stop("load", now)
        if self.ended:
            self._evict_late(engine, now, out)
            return
        engine.next_bucket += 1
        engine.loaded += 1
        out.append(do.AwaitRelease(engine=engine.name, bucket=event.bucket, deadline=self._until(now)))
        self._go_on(now, out)

    def _on_bucket_released(self, event: ev.BucketReleased, now: float, out: list[Instruction]) -> None:
        engine = self.engines.get(event.engine)
        if engine is None or not 0 <= event.bucket < engine.loaded:
            return
        copy = self._copy(event.bucket, engine.node)
        if copy is not None and event.engine in copy.readers:
            copy.readers.discard(event.engine)
            self.buckets[event.bucket].read_by.add(event.engine)
            self._go_on(now, out)

    def _go_on(self, now: float, out: list[Instruction]) -> None:
        """Issue whatever has become possible: in bucket order for slots and relays, in its own order for each
        engine.
        """
        self._free_slots()
        if self.state is State.TRANSFERRING:
            self._grant(now, out)
            self._relay(now, out)
            for engine in self._live():
                self._advance(engine, now, out)
            if self._live() and all(e.stage is EngineStage.LOADING and self._all_loaded(e) for e in self._live()):
                self.state = State.COMMITTING
                for engine in self._live():
                    engine.stage, engine.asked = EngineStage.FINISHING, "finish"
                    self.phases.start("finalise", now)
                    out.append(do.FinishEngine(engine=engine.name, deadline=self._until(now)))

    def _all_loaded(self, engine: EngineTrack) -> bool:
        return engine.asked is None and engine.next_bucket == len(self.buckets)

    def _grant(self, now: float, out: list[Instruction]) -> None:
        for owner, waiting in self._ungranted.items():
            free = self._free[self.home, owner]
            while waiting and free:
                index = waiting.popleft()
                bucket = self.buckets[index]
                slot = do.Slot(self.home, owner, free.pop(0))
                bucket.unfilled = set(bucket.fillers)
                bucket.copies[self.home] = Copy(slot)
                self._active.add(index)
                self.phases.start("fill", now)
                out.append(do.GrantLease(bucket=index, slot=slot, ranks=tuple(sorted(bucket.fillers))))

    def _export(self, index: int, node: str, now: float, out: list[Instruction]) -> None:
        bucket = self.buckets[index]
        copy = bucket.copies[node]
        copy.exporting = True
        copy.readers = {e.name for e in self._live() if e.node == node}
        self.phases.start("wire", now)
        out.append(
            do.ExportBucket(
                bucket=index,
                slot=copy.slot,
                nbytes=bucket.nbytes,
                engines=tuple(sorted(copy.readers)),
                deadline=self._until(now),
            )
        )

    def _relay(self, now: float, out: list[Instruction]) -> None:
        """One broadcast at a time on each bridge, in bucket order, as soon as every remote node has a free slot."""
        remote = self._remote_nodes()
        if not remote:
            return
        for rail, waiting in self._unrelayed.items():
            if not waiting or rail in self._relay_busy:
                continue
            bucket = self.buckets[waiting[0]]
            home = bucket.copies.get(self.home)
            places = [(node, rail) for node in remote]
            if home is None or not home.exported or not all(self._free.get(place) for place in places):
                continue
            index = waiting.popleft()
            targets = tuple(do.Slot(node, rail, self._free[node, rail].pop(0)) for node, _ in places)
            for target in targets:
                bucket.copies[target.node] = Copy(target)
            home.relaying = True
            self._relay_busy.add(rail)
            self.phases.start("wire", now)
            out.append(
                do.RelayBucket(
                    bucket=index, slot=home.slot, nbytes=bucket.nbytes, targets=targets, deadline=self._until(now)
                )
            )

    def _remote_nodes(self) -> list[str]:
        return sorted(self._nodes - {self.home})

    def _advance(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """Begin the engine at its first bucket, then load bucket after bucket."""
        if engine.asked is not None:
            return
        copy = self._copy(engine.next_bucket, engine.node)
        there = copy is not None and copy.exported
        if engine.stage is EngineStage.PAUSED and (there or not self.buckets):
            engine.stage, engine.asked, engine.touched = EngineStage.BEGINNING, "begin", True
            self._begun_at.setdefault(engine.name, now)
            out.append(do.BeginEngine(engine=engine.name, deadline=self._until(now)))
        elif engine.stage is EngineStage.LOADING and there:
            engine.asked = "load"
            self.phases.start("load", now)
            out.append(do.LoadBucket(engine=engine.name, bucket=engine.next_bucket, deadline=self._until(now)))

    def _free_slots(self) -> None:
        """Take back each copy that nobody writes, sends or reads any more."""
        remote = self._remote_nodes()
        for index in list(self._active):
            bucket = self.buckets[index]
            for node, copy in list(bucket.copies.items()):
                idle = not (bucket.unfilled or copy.readers or copy.exporting or copy.relaying)
                served = copy.exported and (node != self.home or bucket.relayed or not remote)
                if idle and (served or self.ended):
                    del bucket.copies[node]
                    self._free.setdefault((node, copy.slot.bridge), []).append(copy.slot.index)
            if not bucket.copies:
                self._active.discard(index)

    # --- committing -----------------------------------------------------------------------------------------------

    def _on_engine_finished(self, event: ev.EngineFinished, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "finish", now, out)
        if engine is None:
            return
        self.phases.stop("finalise", now)
        if self.ended:
            self._tear(engine, now, out)
            return
        engine.stage, engine.asked = EngineStage.VERIFYING, "verify"
        self.phases.start("verify", now)
        out.append(do.VerifyEngine(engine=engine.name, deadline=self._until(now)))

    def _on_engine_verified(self, event: ev.EngineVerified, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "verify", now, out)
        if engine is None:
            return
        self.phases.stop("verify", now)
        engine.checked = event.checked
        if self.ended:
            self._tear(engine, now, out)
            return
        engine.stage = EngineStage.VERIFIED
        self._resume_when_verified(now, out)

    def _resume_when_verified(self, now: float, out: list[Instruction]) -> None:
        """All engines that are still in change over together, so that a fleet serves two versions as briefly as it
        can.
        """
        live = self._live()
        if any(e.stage is not EngineStage.VERIFIED for e in live):
            return
        for engine in live:
            if self.pause == "none":
                self._commit(engine, now)
            else:
                engine.stage, engine.asked = EngineStage.RESUMING, "resume"
                self.phases.start("finalise", now)
                out.append(do.ResumeEngine(engine=engine.name, deadline=self._until(now)))
        self._end_when_all_ended(now, out)

    def _on_engine_resumed(self, event: ev.EngineResumed, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "resume", now, out)
        if engine is None:
            return
        self.phases.stop("finalise", now)
        self._commit(engine, now)
        self._end_when_all_ended(now, out)

    def _commit(self, engine: EngineTrack, now: float) -> None:
        engine.stage = EngineStage.COMMITTED
        engine.seconds = now - self._begun_at.get(engine.name, now)

    def _end_when_all_ended(self, now: float, out: list[Instruction]) -> None:
        if self.ended or self._live():
            return
        if self.committed:
            self._end(State.COMMITTED, None, now, out)
        else:
            self._fail_without_engines(now, out)

    # --- failing --------------------------------------------------------------------------------------------------

    def _on_engine_failed(self, event: ev.EngineFailed, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, event.phase, now, out)
        if engine is None:
            return
        phase = {"load": "load", "finish": "finalise", "resume": "finalise", "verify": "verify"}.get(event.phase)
        if phase is not None:
            self.phases.stop(phase, now)
        if event.phase == "accept" and not event.lost and not self.ended:
            engine.stage, engine.error = EngineStage.SKIPPED, event.error
            self._fail(event.error, now, out)
            return
        self._evict(engine, event.error, lost=event.lost, now=now, out=out)
        self._after_eviction(now, out)

    def _after_eviction(self, now: float, out: list[Instruction]) -> None:
        if self.ended:
            return
        if not self._live():
            self._end_when_all_ended(now, out)
        elif self.state is State.OPENING:
            if self._live()[0].stage in (EngineStage.ACCEPTING, EngineStage.ACCEPTED):
                self._transfer_when_accepted(now, out)
            else:
                self._accept_when_known(now, out)
        elif self.state is State.COMMITTING:
            self._resume_when_verified(now, out)
        else:
            self._go_on(now, out)

    def _evict(
        self, engine: EngineTrack, error: ErrorRecord, *, lost: bool, now: float, out: list[Instruction]
    ) -> None:
        """Take the engine out of this push; its readers' holds are revoked, since what it may still read is never
        served.
        """
        engine.error = engine.error or error
        for index, bucket in enumerate(self.buckets):
            copy = bucket.copies.get(engine.node)
            if copy is not None and engine.name in copy.readers:
                copy.readers.discard(engine.name)
                out.append(do.RevokeBucket(engine=engine.name, bucket=index))
        if lost:
            engine.stage = EngineStage.LOST
            engine.asked = None
        else:
            self._tear(engine, now, out)

    def _tear(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """End an engine that answers but will not commit: torn where touched, let go where not."""
        engine.stage = EngineStage.TORN if engine.touched or engine.was_torn else EngineStage.SKIPPED
        self._let_rest(engine, now, out)

    def _let_rest(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """Once an ended engine has nothing under way: pause it if it serves a mixture, resume it if we paused it."""
        if engine.asked is not None or engine.at_rest:
            return
        engine.at_rest = True
        until = now + self.operation_timeout
        if engine.stage is EngineStage.TORN and engine.touched and self.pause == "none":
            engine.asked = "pause"
            out.append(do.PauseEngine(engine=engine.name, mode="abort", deadline=until))
        elif engine.stage is EngineStage.SKIPPED and engine.paused_by_us and not engine.was_paused:
            engine.asked = "resume"
            out.append(do.ResumeEngine(engine=engine.name, deadline=until))

    def _drop_node(self, node: str, error: ErrorRecord, phase: str, now: float, out: list[Instruction]) -> None:
        """A follower is out of this push, with each of its engines that has not loaded everything."""
        if node not in self._nodes or node == self.home:
            return
        self._nodes.discard(node)
        for engine in self._live():
            if engine.node == node:
                record = _about(error, engine=engine.name, phase=phase)
                self._evict(engine, record, lost=phase == "node", now=now, out=out)
        for bucket in self.buckets:
            bucket.copies.pop(node, None)
        self._after_eviction(now, out)

    def _on_node_lost(self, event: ev.NodeLost, now: float, out: list[Instruction]) -> None:
        self._drop_node(event.node, event.error, "node", now, out)
        for engine in self.engines.values():
            if engine.node == event.node:
                engine.asked = None

    def _on_bridge_lost(self, event: ev.BridgeLost, now: float, out: list[Instruction]) -> None:
        for index in self._active:
            bucket = self.buckets[index]
            copy = bucket.copies.get(event.node)
            if copy is not None and copy.slot.bridge == event.bridge:
                bucket.unfilled.clear()
                del bucket.copies[event.node]
        if event.node == self.home:
            self._relay_busy.discard(event.bridge)
        self._free[event.node, event.bridge] = list(range(self._capacity.get((event.node, event.bridge), 0)))
        if self.state is State.TRANSFERRING:
            if event.node == self.home:
                self._fail(_about(event.error, phase="wire"), now, out)
            else:
                self._drop_node(event.node, event.error, "wire", now, out)
        self._free_slots()

    def _on_rank_failed(self, event: ev.RankFailed, now: float, out: list[Instruction]) -> None:
        self._rank_stopped(event.rank)
        if not self.ended:
            self._fail(event.error, now, out)
        self._free_slots()

    def _on_rank_lost(self, event: ev.RankLost, now: float, out: list[Instruction]) -> None:
        """The rank may be alive and still writing: the arenas it holds leases in are replaced."""
        held = {b.copies[self.home].slot.bridge for b in self.buckets if event.rank in b.unfilled and b.copies}
        out.extend(
            do.RetireBridge(node=self.home, bridge=bridge, reason=f"rank {event.rank} was lost while it held a lease")
            for bridge in sorted(held)
        )
        self._rank_stopped(event.rank)
        if self.state in (State.OPENING, State.TRANSFERRING):
            message = f"trainer rank {event.rank} was lost: {event.reason}"
            self._fail(self._record("PushAborted", message, rank=event.rank), now, out)
        self._free_slots()

    def _on_rank_stopped(self, event: ev.RankStopped, now: float, out: list[Instruction]) -> None:
        if self.ended:
            self._rank_stopped(event.rank)
            self._free_slots()

    def _rank_stopped(self, rank: int) -> None:
        self._stopped.add(rank)
        for bucket in self.buckets:
            bucket.unfilled.discard(rank)

    def _on_tick(self, event: ev.Tick, now: float, out: list[Instruction]) -> None:
        if self.ended:
            if self._drain_until is not None and now >= self._drain_until and not self.done:
                self._abandon(now, out)
        elif now >= self.push_deadline:
            message = f"the push did not end before its deadline; it was waiting for {self.waiting_for()}"
            self._fail(self._record("PushTimeout", message, phase=self._phase()), now, out)

    def _on_stop_requested(self, event: ev.StopRequested, now: float, out: list[Instruction]) -> None:
        self._fail(self._record("PushAborted", event.reason), now, out)

    def _refuse(self, message: str, now: float, out: list[Instruction]) -> None:
        hint = "versions must rise; push a higher number"
        self._fail(self._record("PushRefused", message, hint=hint), now, out)

    def _fail_without_engines(self, now: float, out: list[Instruction]) -> None:
        reasons = "; ".join(f"{e.name}: {e.error.message}" for e in self.engines.values() if e.error is not None)
        first = next((e for e in self.engines.values() if e.error is not None), None)
        detail = first.error if first is not None else None
        self._fail(
            self._record(
                "PushAborted",
                f"no engine of model {self.model!r} is left to push to ({reasons or 'none is configured'})",
                engine=first.name if first is not None else None,
                phase=detail.phase if detail is not None else None,
                bucket=detail.bucket if detail is not None else None,
            ),
            now,
            out,
        )

    def _fail(self, error: ErrorRecord, now: float, out: list[Instruction]) -> None:
        """End the push as a whole: engines not touched are let go, touched ones stay paused."""
        error = _about(error, model=self.model, version=self.version)
        for engine in self._live():
            if engine.asked is None:
                engine.error = engine.error or error
                self._evict(engine, error, lost=False, now=now, out=out)
        kept = (EngineStage.LOST, EngineStage.RESUMING, EngineStage.COMMITTED)
        touched = [e.name for e in self.engines.values() if e.touched and e.stage not in kept]
        if touched:
            error = _about(error, message=f"{error.message}; torn and paused: {', '.join(touched)}")
        was_touched = any(e.touched for e in self.engines.values())
        self._end(State.TORN if was_touched else State.ABORTED, error, now, out)

    def _end(self, state: State, error: ErrorRecord | None, now: float, out: list[Instruction]) -> None:
        self.state, self.error, self.finished = state, error, now
        self.phases.stop_all(now)
        self._drain_until = now + self.operation_timeout + self.grace
        for engine in self.engines.values():
            if not engine.stage.ended and engine.error is None:
                engine.error = error
        out.append(do.EndPush(error=error))
        self._free_slots()

    # --- after the end --------------------------------------------------------------------------------------------

    def _settle_engine(self, event: Event, now: float, out: list[Instruction]) -> None:
        """A late success of an engine in a push that has failed: it is not going to commit."""
        phase = _SETTLED[type(event)]
        engine = self._answered(getattr(event, "engine", ""), phase, now, out)
        if engine is not None:
            self._evict_late(engine, now, out)

    def _evict_late(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        error = self.error or self._record("PushAborted", "the push had ended")
        self._evict(engine, error, lost=False, now=now, out=out)
        self._free_slots()

    def _abandon(self, now: float, out: list[Instruction]) -> None:
        """The grace is over. Whoever has not answered is given up; arenas they may still touch are replaced."""
        error = self._record("PushTimeout", f"no answer within the grace period; waited for {self.waiting_for()}")
        for engine in self.engines.values():
            if engine.asked is not None:
                engine.asked = None
                if not engine.stage.ended:
                    self._evict(engine, error, lost=True, now=now, out=out)
        suspects = {
            (node, copy.slot.bridge)
            for bucket in self.buckets
            for node, copy in bucket.copies.items()
            if bucket.unfilled or copy.exporting or copy.relaying
        }
        out.extend(
            do.RetireBridge(node=node, bridge=bridge, reason="work on its arena did not end within the grace period")
            for node, bridge in sorted(suspects)
        )
        self._abandoned = True

    def _on_stop_after_end(self, event: ev.StopRequested, now: float, out: list[Instruction]) -> None:
        if not self.done:
            self._abandon(now, out)

    def _ignore(self, event: Event, now: float, out: list[Instruction]) -> None:
        """Late, early or twice: of no consequence in this state."""

    # --- helpers --------------------------------------------------------------------------------------------------

    def _answered(self, name: str, phase: str, now: float, out: list[Instruction]) -> EngineTrack | None:
        """The engine whose instruction `phase` has just ended, or None when that is of no consequence any more."""
        engine = self.engines.get(name)
        if engine is None or engine.asked != phase:
            return None
        engine.asked = None
        if engine.stage.ended:  # it was evicted meanwhile, and this was its last answer
            self._let_rest(engine, now, out)
            return None
        return engine

    def _copy(self, bucket: int, node: str) -> Copy | None:
        return self.buckets[bucket].copies.get(node) if 0 <= bucket < len(self.buckets) else None

    def _outstanding(self) -> bool:
        return bool(self._active) or any(e.asked for e in self.engines.values())

    def _phase(self) -> str:
        return {State.OPENING: "open", State.TRANSFERRING: "transfer"}.get(self.state, "finalise")

    def _record(
        self,
        kind: str,
        message: str,
        *,
        rank: int | None = None,
        engine: str | None = None,
        bucket: int | None = None,
        phase: str | None = None,
        hint: str | None = None,
    ) -> ErrorRecord:
        return ErrorRecord(
            kind=kind,
            message=message,
            model=self.model,
            version=self.version,
            rank=rank,
            engine=engine,
            bucket=bucket,
            phase=phase,
            hint=hint,
        )

    def validate(self) -> None:
        """Raise AssertionError if a promise does not hold; cheap enough to call after each event in tests."""
        held: set[tuple[str, int, int]] = set()
        for index, bucket in enumerate(self.buckets):
            assert bucket.unfilled <= bucket.fillers, f"bucket {index} waits for a rank that does not fill it"
            for node, copy in bucket.copies.items():
                key = (node, copy.slot.bridge, copy.slot.index)
                assert key not in held, f"slot {key} holds two buckets"
                assert copy.slot.index not in self._free.get(key[:2], []), f"slot {key} is free and holds {index}"
                held.add(key)
                assert not copy.exported or not bucket.unfilled, f"bucket {index} was exported before it was filled"
        for engine in self.engines.values():
            assert engine.next_bucket <= len(self.buckets)
            if engine.stage is EngineStage.COMMITTED:
                assert engine.loaded == len(self.buckets), f"{engine.name} committed without every bucket"
                assert self.state in (State.COMMITTING, State.COMMITTED, State.TORN)
            if engine.stage in (EngineStage.SKIPPED,):
                assert not engine.touched, f"{engine.name} was touched and counts as untouched"
            if engine.touched and engine.stage is EngineStage.RESUMING:
                assert engine.loaded == len(self.buckets), f"{engine.name} is resumed with a mixture"
            if engine.asked == "resume" and engine.touched:
                assert engine.stage is EngineStage.RESUMING, f"{engine.name} is torn and is being resumed"
        if self.state is State.ABORTED:
            assert not any(e.touched for e in self.engines.values()), "aborted, yet an engine was touched"
        if self.ended:
            assert self.state is State.COMMITTED or self.error is not None
        else:
            assert self.error is None


Row = tuple["Callable[..., None]", tuple[State, ...]]

_S = PushSession
_O, _T, _C = State.OPENING, State.TRANSFERRING, State.COMMITTING


_SETTLED: dict[type, str] = {
    ev.EngineProbed: "probe",
    ev.EngineAccepted: "accept",
    ev.EnginePaused: "pause",
    ev.EngineBegun: "begin",
}

_ANYTIME: dict[type, Row] = {
    ev.RankLost: (_S._on_rank_lost, _FAILED),
    ev.RankFailed: (_S._on_rank_failed, _FAILED),
    ev.RankStopped: (_S._on_rank_stopped, ()),
    ev.StopRequested: (_S._on_stop_requested, _FAILED),
    ev.Tick: (_S._on_tick, _FAILED),
    ev.EngineFailed: (_S._on_engine_failed, (_T, _C, State.COMMITTED, *_FAILED)),
    ev.NodeLost: (_S._on_node_lost, (_T, _C, State.COMMITTED, *_FAILED)),
    ev.BridgeLost: (_S._on_bridge_lost, (_T, _C, State.COMMITTED, *_FAILED)),
    ev.BucketReleased: (_S._on_bucket_released, ()),
    ev.BucketExported: (_S._on_bucket_exported, (_C,)),
    ev.BucketRelayed: (_S._on_bucket_relayed, (_C, State.COMMITTED, *_FAILED)),
    ev.RankFilled: (_S._on_rank_filled, (_C,)),
    ev.EnginePaused: (_S._on_engine_paused, (_C,)),
    ev.EngineResumed: (_S._on_engine_resumed, (State.COMMITTED,)),
}

_BY_STATE: dict[State, dict[type, Row]] = {
    State.OPENING: {
        ev.RankOpened: (_S._on_rank_opened, ()),
        ev.LayoutsMissing: (_S._on_layouts_missing, ()),
        ev.LayoutReceived: (_S._on_layout_received, ()),
        ev.PlanMade: (_S._on_plan_made, _FAILED),
        ev.PlanFailed: (_S._on_plan_failed, _FAILED),
        ev.GroupFormed: (_S._on_group_formed, _FAILED),
        ev.EngineProbed: (_S._on_engine_probed, _FAILED),
        ev.EngineAccepted: (_S._on_engine_accepted, (_T,)),
    },
    State.TRANSFERRING: {
        ev.EngineBegun: (_S._on_engine_begun, (_C,)),
        ev.BucketLoaded: (_S._on_bucket_loaded, (_C,)),
    },
    State.COMMITTING: {
        ev.EngineFinished: (_S._on_engine_finished, ()),
        ev.EngineVerified: (_S._on_engine_verified, (State.COMMITTED,)),
        ev.RankLost: (_S._on_rank_lost, ()),
        ev.RankFailed: (_S._ignore, ()),  # everything is loaded: the push no longer needs the ranks
    },
}
_SETTLING: dict[type, Row] = {
    **dict.fromkeys(_SETTLED, (_S._settle_engine, ())),
    ev.BucketLoaded: (_S._on_bucket_loaded, ()),
    ev.EngineFinished: (_S._on_engine_finished, ()),
    ev.EngineVerified: (_S._on_engine_verified, ()),
    ev.StopRequested: (_S._on_stop_after_end, ()),
    **{
        event: (method, ())
        for event, (method, _) in _ANYTIME.items()
        if event not in (ev.StopRequested, ev.EnginePaused)
    },
}


def _table() -> dict[tuple[State, type], Row]:
    """Every state with every event; what is not listed above is ignored there."""
    everything = [kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)]
    table: dict[tuple[State, type], Row] = {}
    for state in State:
        listed = _SETTLING if state.ended else {**_ANYTIME, **_BY_STATE[state]}
        for event in everything:
            table[state, event] = listed.get(event, (_S._ignore, ()))
    return table


TRANSITIONS = _table()
"""(state, event) → (deciding method, states that may follow besides the same one)."""


def _about(error: ErrorRecord, **changes: object) -> ErrorRecord:
    """The same error with who and where filled in; `message` replaces, the rest only fills gaps."""
    fill = {k: v for k, v in changes.items() if k == "message" or getattr(error, k) is None}
    return msgspec.structs.replace(error, **fill)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
