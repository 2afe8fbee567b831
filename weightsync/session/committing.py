"""Everything is loaded: engines finish and verify, each for itself, and then resume together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.ending import end_when_all_ended
from weightsync.session.engines import answered, ask, succeeded
from weightsync.session.state import State
from weightsync.session.tracks import EngineStage

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.state import PushState

__all__ = ["begin_commit", "commit_on", "on_engine_finished", "on_engine_resumed", "on_engine_verified"]


# --- what is heard --------------------------------------------------------------------------------------------------


def on_engine_finished(push: PushState, event: ev.EngineFinished) -> None:
    engine = succeeded(push, event.engine, "finish")
    if engine is None:
        return
    engine.stage = EngineStage.VERIFYING
    ask(push, engine, "verify")
    push.issue(do.VerifyEngine(engine=engine.name, deadline=push.until()))


def on_engine_verified(push: PushState, event: ev.EngineVerified) -> None:
    engine = succeeded(push, event.engine, "verify")
    if engine is not None:
        engine.stage, engine.checked = EngineStage.VERIFIED, event.checked


def on_engine_resumed(push: PushState, event: ev.EngineResumed) -> None:
    engine = answered(push, event.engine, "resume")
    if engine is None:
        return
    engine.stage = EngineStage.COMMITTED
    engine.seconds = push.now - engine.began
    for keeper in push.live():  # a version that one engine serves is worth keeping, but not a long wait
        if keeper.keeper and keeper.stage is EngineStage.VERIFIED:
            keeper.stage = EngineStage.RESUMING
            ask(push, keeper, "resume")
            until = min(push.until(), push.now + push.grace)
            push.issue(do.ResumeEngine(engine=keeper.name, deadline=until))


# --- going on -------------------------------------------------------------------------------------------------------


def begin_commit(push: PushState) -> None:
    """Have every engine finish, since all is loaded. Nothing reads exposed weights any more: ranks may change them."""
    push.state = State.COMMITTING
    if any(engine.draws for engine in push.live()):
        push.issue(do.ReleaseWeights())
    for engine in push.live():
        engine.stage = EngineStage.FINISHING
        ask(push, engine, "finish")
        push.issue(do.FinishEngine(engine=engine.name, deadline=push.until()))


def commit_on(push: PushState) -> None:
    """Resume all live engines but keepers together, once each is verified: two versions are served only briefly.

    Engines that were paused before this push are resumed, too: an earlier push may have left them so, or they paused
    themselves. No engine is resumed before all have released their buckets, which in most pushes happened long before:
    the release shows whether an engine read other bytes than were sent, and such an engine must not serve. An engine
    that never releases is evicted within the time of one operation after it has loaded.
    """
    live = push.live()
    if all(engine.stage is EngineStage.VERIFIED for engine in live) and not push.held():
        for engine in live:
            if not engine.keeper:
                engine.stage = EngineStage.RESUMING
                ask(push, engine, "resume")
                push.issue(do.ResumeEngine(engine=engine.name, deadline=push.until()))
    end_when_all_ended(push)
