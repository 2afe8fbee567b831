"""One engine of a push: it is asked for one thing at a time, answers, and may leave before its time.

A *touched* engine that leaves is torn: paused where it still served, and never resumed. An untouched one is let go: it
is resumed if this push paused it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.tracks import EngineStage, EngineTrack
from weightsync.session.words import record

if TYPE_CHECKING:
    from weightsync.errors import ErrorRecord
    from weightsync.session.state import PushState

__all__ = ["answered", "ask", "evict", "evict_late", "let_rest", "nothing_asked", "revoke", "succeeded"]

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


# --- what it is asked -----------------------------------------------------------------------------------------------


def ask(push: PushState, engine: EngineTrack, what: str) -> None:
    """Something is under way at the engine from now on. What it is asked once it has left counts as no phase."""
    engine.asked, engine.phase = what, _PHASES.get(what)
    if engine.phase is not None:
        push.phases.start(engine.phase, push.now)


def nothing_asked(push: PushState, engine: EngineTrack) -> None:
    """Nothing is under way at it any more, or nobody waits for it."""
    if engine.phase is not None:
        push.phases.stop(engine.phase, push.now)
    engine.asked = engine.phase = None


def answered(push: PushState, name: str, asked: str) -> EngineTrack | None:
    """The engine that has just ended what it was `asked`, or None when that is of no consequence any more."""
    engine = push.engines.get(name)
    if engine is None or engine.asked != asked:
        return None
    nothing_asked(push, engine)
    if engine.stage.ended:  # it was evicted meanwhile, and this was its last answer
        let_rest(push, engine)
        return None
    return engine


def succeeded(push: PushState, name: str, asked: str) -> EngineTrack | None:
    """As `answered`, for work on weights: done after the push has ended it is too late, and its engine leaves."""
    engine = answered(push, name, asked)
    if engine is not None and push.ended:
        evict_late(push, engine)
        return None
    return engine


# --- how it leaves --------------------------------------------------------------------------------------------------


def evict(push: PushState, engine: EngineTrack, error: ErrorRecord, *, lost: bool = False) -> None:
    """Take the engine out of this push; its readers' holds are revoked, since what it may still read is never served.

    One that answers is torn where it was touched, and let go where it was not.
    """
    engine.error = engine.error or error
    for index, bucket in enumerate(push.buckets):
        copy = bucket.copies.get(engine.node)
        if copy is not None and engine.name in copy.readers:
            copy.readers.discard(engine.name)
            revoke(push, engine.name, index)
    if lost:
        engine.stage = EngineStage.LOST
        nothing_asked(push, engine)
    else:
        engine.stage = EngineStage.TORN if engine.touched or engine.was_torn else EngineStage.SKIPPED
    let_rest(push, engine)


def evict_late(push: PushState, engine: EngineTrack) -> None:
    """The push has ended without it."""
    evict(push, engine, push.error or record(push, "PushAborted", "the push had ended"))


def revoke(push: PushState, engine: str, bucket: int) -> None:
    push.issue(do.RevokeBucket(engine=engine, bucket=bucket, deadline=push.now + push.operation_timeout))


def let_rest(push: PushState, engine: EngineTrack) -> None:
    """Once an ended engine has nothing under way: pause it if it serves a mixture, resume it if we paused it.

    A lost engine may only be slow, and serve: it is told to pause all the same.
    """
    if engine.asked is not None or engine.at_rest:
        return
    engine.at_rest = True
    until = push.now + push.operation_timeout
    ended_half_way = engine.touched and engine.stage in (EngineStage.TORN, EngineStage.LOST)
    if ended_half_way and push.pause == "none":
        engine.asked = "pause"
        push.issue(do.PauseEngine(engine=engine.name, mode="abort", deadline=until))
    elif engine.stage is EngineStage.SKIPPED and engine.paused_by_us and not engine.was_paused:
        engine.asked = "resume"
        push.issue(do.ResumeEngine(engine=engine.name, deadline=until))
