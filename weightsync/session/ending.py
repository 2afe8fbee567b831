"""How engines leave a push before their time, and how the push itself ends.

A *touched* engine that leaves is torn: paused where it still served, and never resumed. An untouched one is let go: it
is resumed if this push paused it. After the end, outcomes still under way are awaited, up to a grace period.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.state import PUSH_ERRORS, SessionState, State, about, listed
from weightsync.session.tracks import EngineStage, EngineTrack

if TYPE_CHECKING:
    from weightsync.errors import ErrorRecord
    from weightsync.session.events import Event
    from weightsync.session.instructions import Instruction

__all__ = ["SETTLED", "Ending"]

SETTLED: dict[type[Event], str] = {
    ev.EngineProbed: "probe",
    ev.EngineAccepted: "accept",
    ev.EnginePaused: "pause",
    ev.EngineBegun: "begin",
}
"""Successes of engines that change nothing after the end, and the instruction that each answers."""

_PHASES = {
    "load": "load",
    "draw": "load",
    "show": "load",
    "deliver": "wire",
    "finish": "finalise",
    "resume": "finalise",
    "verify": "verify",
}
"""Those of a report that work of an engine counts as, by instruction."""


class Ending(SessionState):
    """Rules for what leaves and ends."""

    # --- engines ------------------------------------------------------------------------------------------------

    def _ask(self, engine: EngineTrack, what: str, now: float) -> None:
        """Something is under way at the engine from now on. What it is asked once it has left counts as no phase."""
        engine.asked, engine.phase = what, _PHASES.get(what)
        if engine.phase is not None:
            self.phases.start(engine.phase, now)

    def _nothing_asked(self, engine: EngineTrack, now: float) -> None:
        """Nothing is under way at it any more, or nobody waits for it."""
        if engine.phase is not None:
            self.phases.stop(engine.phase, now)
        engine.asked = engine.phase = None

    def _answered(self, name: str, phase: str, now: float, out: list[Instruction]) -> EngineTrack | None:
        """The engine whose instruction `phase` has just ended, or None when that is of no consequence any more."""
        engine = self.engines.get(name)
        if engine is None or engine.asked != phase:
            return None
        self._nothing_asked(engine, now)
        if engine.stage.ended:  # it was evicted meanwhile, and this was its last answer
            self._let_rest(engine, now, out)
            return None
        return engine

    def _succeeded(self, name: str, asked: str, now: float, out: list[Instruction]) -> EngineTrack | None:
        """As `_answered`, for work on weights: done after the push has ended it is too late, and its engine leaves."""
        engine = self._answered(name, asked, now, out)
        if engine is None:
            return None
        if self.ended:
            self._evict_late(engine, now, out)
            return None
        return engine

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
                self._revoke(engine.name, index, now, out)
        if lost:
            engine.stage = EngineStage.LOST
            self._nothing_asked(engine, now)
            self._let_rest(engine, now, out)
        else:
            self._tear(engine, now, out)

    def _revoke(self, engine: str, bucket: int, now: float, out: list[Instruction]) -> None:
        out.append(do.RevokeBucket(engine=engine, bucket=bucket, deadline=now + self.operation_timeout))

    def _retire(self, node: str, bridge: int, reason: str, now: float, out: list[Instruction]) -> None:
        until = now + self.operation_timeout
        out.append(do.RetireBridge(node=node, bridge=bridge, reason=reason, deadline=until))

    def _tear(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """End an engine that answers but will not commit: torn where touched, let go where not."""
        engine.stage = EngineStage.TORN if engine.touched or engine.was_torn else EngineStage.SKIPPED
        self._let_rest(engine, now, out)

    def _let_rest(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """Once an ended engine has nothing under way: pause it if it serves a mixture, resume it if we paused it.

        A lost engine may only be slow, and serve: it is told to pause all the same.
        """
        if engine.asked is not None or engine.at_rest:
            return
        engine.at_rest = True
        until = now + self.operation_timeout
        ended_half_way = engine.touched and engine.stage in (EngineStage.TORN, EngineStage.LOST)
        if ended_half_way and self.pause == "none":
            engine.asked = "pause"
            out.append(do.PauseEngine(engine=engine.name, mode="abort", deadline=until))
        elif engine.stage is EngineStage.SKIPPED and engine.paused_by_us and not engine.was_paused:
            engine.asked = "resume"
            out.append(do.ResumeEngine(engine=engine.name, deadline=until))

    def _drop_node(
        self, node: str, error: ErrorRecord, phase: str, *, lost: bool = False, now: float, out: list[Instruction]
    ) -> None:
        """A follower is out of this push, with each of its engines that has not ended. The caller goes on without;
        unless there are trainer ranks: without what they hold there is nothing to go on with.
        """
        if node not in self._nodes or node == self.home:
            return
        self._nodes.discard(node)
        for engine in self._live():
            if engine.node == node:
                engine.at_rest = lost  # there is nobody to tell
                self._evict(engine, about(error, engine=engine.name, phase=phase), lost=lost, now=now, out=out)
        ranks = self._ranks_on(node)
        for bucket in self.buckets:
            copy = bucket.copies.get(node)
            if copy is None or copy.exporting:  # what is exported just now has holds to be revoked
                continue
            if not (copy.relaying or bucket.unfilled.intersection(ranks)):  # nor may others have what is written to
                del bucket.copies[node]
        if ranks and self.state in (State.OPENING, State.TRANSFERRING):
            who = f"trainer rank{'s' if len(ranks) > 1 else ''} {listed(ranks)} of node {node}"
            message = f"{who} cannot go on: {error.message}"
            self._fail(self._record("PushAborted", message, rank=ranks[0], phase=phase), now, out)

    def _end_when_all_ended(self, now: float, out: list[Instruction]) -> None:
        if self.ended or self._worth_it():
            return
        if not self.committed:
            self._fail_without_engines(now, out)
        elif not self._live():  # what a keeper is about to keep is waited for
            self._end(State.COMMITTED, None, now, out)

    # --- the push -------------------------------------------------------------------------------------------------

    def _refuse(self, message: str, now: float, out: list[Instruction]) -> None:
        hint = "versions must rise; push a higher number"
        self._fail(self._record("PushRefused", message, hint=hint), now, out)

    def _fail_without_engines(self, now: float, out: list[Instruction]) -> None:
        reasons = "; ".join(e.error.of_engine(e.name) for e in self.fleet if e.error is not None)
        first = next((e for e in self.fleet if e.error is not None), None)
        message = f"no engine of model {self.model!r} is left to push to ({reasons or 'none is configured'})"
        error = self._record("PushAborted", message)
        if first is not None and first.error is not None:
            detail = first.error
            error = about(error, engine=first.name, phase=detail.phase, bucket=detail.bucket, hint=detail.hint)
        self._fail(error, now, out)

    def _fail(self, error: ErrorRecord, now: float, out: list[Instruction]) -> None:
        """End the push as a whole: engines not touched are let go, touched ones stay paused."""
        error = about(error, model=self.model, version=self.version)
        if error.kind not in PUSH_ERRORS:  # of an engine, a bridge, a rank: what broke is told, how it ends is ours
            error = about(error, kind="PushAborted")
        for engine in self._live():
            if engine.asked is None:
                self._evict(engine, error, lost=False, now=now, out=out)
        kept = (EngineStage.LOST, EngineStage.RESUMING, EngineStage.COMMITTED)
        touched = [e.name for e in self.fleet if e.touched and e.stage not in kept]
        if touched:
            error = about(error, message=f"{error.message}; torn and paused: {', '.join(touched)}")
        was_touched = any(e.touched for e in self.fleet)
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
        engine = self._answered(getattr(event, "engine", ""), SETTLED[type(event)], now, out)
        if engine is not None:
            self._evict_late(engine, now, out)

    def _on_last_answer(self, event: Event, now: float, out: list[Instruction]) -> None:
        """A success of an engine that has left meanwhile; of no other was it asked for in this state."""
        engine = self.engines.get(getattr(event, "engine", ""))
        if engine is not None and engine.stage.ended:
            self._answered(engine.name, SETTLED[type(event)], now, out)

    def _evict_late(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        error = self.error or self._record("PushAborted", "the push had ended")
        self._evict(engine, error, lost=False, now=now, out=out)
        self._free_slots()

    def _abandon(self, now: float, out: list[Instruction]) -> None:
        """The grace is over. Whoever has not answered is given up; arenas they may still touch are replaced."""
        error = self._record("PushTimeout", f"no answer within the grace period; waited for {self.waiting_for()}")
        for engine in self.engines.values():
            if engine.asked is not None:
                self._nothing_asked(engine, now)
                if engine.stage.ended:  # it left while that was under way, and has not been told to rest
                    self._let_rest(engine, now, out)
                else:
                    self._evict(engine, error, lost=True, now=now, out=out)
        staging = {self.home, *self._delivering} if self._delivering else set()
        suspects = {place for place in self._capacity if place[0] in staging}
        for index, bucket in enumerate(self.buckets):
            for node, copy in bucket.copies.items():
                for name in sorted(copy.readers):
                    self._revoke(name, index, now, out)
                if bucket.unfilled.intersection(self._ranks_on(node)) or copy.exporting or copy.relaying:
                    suspects.add((node, copy.slot.bridge))
        for node, bridge in sorted(suspects):
            self._retire(node, bridge, "work on its arena did not end within the grace period", now, out)
        self._abandoned = True

    def _on_stop_after_end(self, event: ev.StopRequested, now: float, out: list[Instruction]) -> None:
        if not self.done:
            self._abandon(now, out)

    def _ignore(self, event: Event, now: float, out: list[Instruction]) -> None:
        """Late, early or twice: of no consequence in this state."""
