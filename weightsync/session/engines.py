"""One engine of a push: it is asked for one thing at a time, answers, and may leave early.

A *touched* engine that leaves is torn: it is paused if it may still serve, and never resumed. An untouched engine that
leaves is resumed if this push paused it.
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
"""The phase of the report that an engine's work counts as, by instruction."""


# --- what it is asked -----------------------------------------------------------------------------------------------


def ask(push: PushState, engine: EngineTrack, what: str) -> None:
    """Note that the instruction `what` is under way at the engine. `let_rest` does not call this, so that work of an
    engine that has left counts as no phase.
    """
    engine.asked, engine.phase = what, _PHASES.get(what)
    if engine.phase is not None:
        push.phases.start(engine.phase, push.now)


def nothing_asked(push: PushState, engine: EngineTrack) -> None:
    """Note that nothing is under way at the engine any more, or that its answer is given up."""
    if engine.phase is not None:
        push.phases.stop(engine.phase, push.now)
    engine.asked = engine.phase = None


def answered(push: PushState, name: str, asked: str) -> EngineTrack | None:
    """Return the engine that has answered the instruction `asked`, or None if the answer changes nothing any more."""
    engine = push.engines.get(name)
    if engine is None or engine.asked != asked:
        return None
    nothing_asked(push, engine)
    if engine.stage.ended:  # it was evicted meanwhile, and this was its last answer
        let_rest(push, engine)
        return None
    return engine


def succeeded(push: PushState, name: str, asked: str) -> EngineTrack | None:
    """Do as `answered`, for work on weights: if it ends after the push has, evict the engine and return None."""
    engine = answered(push, name, asked)
    if engine is not None and push.ended:
        evict_late(push, engine)
        return None
    return engine


# --- how it leaves --------------------------------------------------------------------------------------------------


def evict(push: PushState, engine: EngineTrack, error: ErrorRecord, *, lost: bool = False) -> None:
    """Take the engine out of this push, and revoke its readers' holds: weights that they still read are never served.

    If the engine is not `lost`, it is torn if this push touched it or it was torn before, else skipped.
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
    """Evict an engine that answers after the push has ended."""
    evict(push, engine, push.error or record(push, "PushAborted", "the push had ended"))


def revoke(push: PushState, engine: str, bucket: int) -> None:
    push.issue(do.RevokeBucket(engine=engine, bucket=bucket, deadline=push.now + push.operation_timeout))


def let_rest(push: PushState, engine: EngineTrack) -> None:
    """Once nothing is under way at an ended engine, pause it if it may serve a mixture, or resume it if we paused it.

    A lost engine is told to pause, too: it may only be slow, and still serve.
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
