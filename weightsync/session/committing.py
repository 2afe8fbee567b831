"""Everything is loaded: engines finish and verify, each for itself, and then resume together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.ending import Ending
from weightsync.session.state import State
from weightsync.session.tracks import EngineStage

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.instructions import Instruction

__all__ = ["Committing"]


class Committing(Ending):
    """Rules of the state COMMITTING."""

    def _begin_commit(self, now: float, out: list[Instruction]) -> None:
        self.state = State.COMMITTING
        if any(engine.draws for engine in self._live()):
            out.append(do.ReleaseWeights())
        for engine in self._live():
            engine.stage = EngineStage.FINISHING
            self._ask(engine, "finish", now)
            out.append(do.FinishEngine(engine=engine.name, deadline=self._until(now)))

    def _on_engine_finished(self, event: ev.EngineFinished, now: float, out: list[Instruction]) -> None:
        engine = self._succeeded(event.engine, "finish", now, out)
        if engine is None:
            return
        engine.stage = EngineStage.VERIFYING
        self._ask(engine, "verify", now)
        out.append(do.VerifyEngine(engine=engine.name, deadline=self._until(now)))

    def _on_engine_verified(self, event: ev.EngineVerified, now: float, out: list[Instruction]) -> None:
        engine = self._succeeded(event.engine, "verify", now, out)
        if engine is None:
            return
        engine.stage, engine.checked = EngineStage.VERIFIED, event.checked
        self._resume_when_verified(now, out)

    def _resume_when_verified(self, now: float, out: list[Instruction]) -> None:
        """All engines that are still in change over together, so that a fleet serves two versions as briefly as it
        can. Also those that this push did not pause: an earlier one may have left them so, or they paused themselves.
        None before all have released what they read, long before in most pushes: one that has read other bytes than
        were sent is found out then, and may not be resumed. One that never releases is evicted within the time of an
        operation after it has loaded.
        """
        live = self._live()
        if any(e.stage is not EngineStage.VERIFIED for e in live) or self._held():
            return
        for engine in live:
            if not engine.keeper:
                engine.stage = EngineStage.RESUMING
                self._ask(engine, "resume", now)
                out.append(do.ResumeEngine(engine=engine.name, deadline=self._until(now)))

    def _on_engine_resumed(self, event: ev.EngineResumed, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "resume", now, out)
        if engine is None:
            return
        engine.stage = EngineStage.COMMITTED
        engine.seconds = now - self._begun_at.get(engine.name, now)
        for keeper in self._live():  # what one engine serves is worth keeping; nobody waits long for that
            if keeper.keeper and keeper.stage is EngineStage.VERIFIED:
                keeper.stage = EngineStage.RESUMING
                self._ask(keeper, "resume", now)
                until = min(self._until(now), now + self.grace)
                out.append(do.ResumeEngine(engine=keeper.name, deadline=until))
        self._end_when_all_ended(now, out)
