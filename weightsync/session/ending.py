"""How a push ends, and the wait after it for outcomes of work that was under way, up to a grace period."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.engines import answered, evict, evict_late, let_rest, nothing_asked, revoke
from weightsync.session.slots import free_slots
from weightsync.session.state import State
from weightsync.session.tracks import EngineStage
from weightsync.session.words import PUSH_ERRORS, about, listed, record, waited_for

if TYPE_CHECKING:
    from weightsync.errors import ErrorRecord
    from weightsync.session.events import Event
    from weightsync.session.state import PushState

__all__ = [
    "SETTLED",
    "abandon",
    "drop_node",
    "end_when_all_ended",
    "fail",
    "fail_without_engines",
    "ignore",
    "on_last_answer",
    "on_stop_after_end",
    "retire",
    "settle_engine",
]

SETTLED: dict[type[Event], str] = {
    ev.EngineProbed: "probe",
    ev.EngineAccepted: "accept",
    ev.EnginePaused: "pause",
    ev.EngineBegun: "begin",
}
"""An engine's successes before any weights, and the instruction that each answers. After the end they come too late."""


# --- the push as a whole --------------------------------------------------------------------------------------------


def end_when_all_ended(push: PushState) -> None:
    """End the push if no engine but keepers may still commit: well if one has committed, else as a failure."""
    if push.ended or push.worth_it():
        return
    if not push.committed:
        fail_without_engines(push)
    elif not push.live():  # a keeper that may still commit is waited for
        _end(push, State.COMMITTED, None)


def fail_without_engines(push: PushState) -> None:
    reasons = "; ".join(e.error.of_engine(e.name) for e in push.fleet if e.error is not None)
    first = next((e for e in push.fleet if e.error is not None), None)
    message = f"no engine of model {push.model!r} is left to push to ({reasons or 'none is configured'})"
    error = record(push, "PushAborted", message)
    if first is not None and first.error is not None:
        detail = first.error
        error = about(error, engine=first.name, phase=detail.phase, bucket=detail.bucket, hint=detail.hint)
    fail(push, error)


def fail(push: PushState, error: ErrorRecord) -> None:
    """End the push as a failure. Engines that were not touched are let go; touched engines stay paused."""
    error = about(error, model=push.model, version=push.version)
    if error.kind not in PUSH_ERRORS:  # an engine's, bridge's or rank's: the push keeps its message, not its kind
        error = about(error, kind="PushAborted")
    for engine in push.live():
        if engine.asked is None:
            evict(push, engine, error)
    kept = (EngineStage.LOST, EngineStage.RESUMING, EngineStage.COMMITTED)
    touched = [e.name for e in push.fleet if e.touched and e.stage not in kept]
    if touched:
        error = about(error, message=f"{error.message}; torn and paused: {', '.join(touched)}")
    was_touched = any(e.touched for e in push.fleet)
    _end(push, State.TORN if was_touched else State.ABORTED, error)


def _end(push: PushState, state: State, error: ErrorRecord | None) -> None:
    push.state, push.error, push.finished = state, error, push.now
    push.phases.stop_all(push.now)
    push.drain_until = push.now + push.operation_timeout + push.grace
    for engine in push.engines.values():
        if not engine.stage.ended and engine.error is None:
            engine.error = error
    push.issue(do.EndPush(error=error))
    free_slots(push)


# --- a node ---------------------------------------------------------------------------------------------------------


def drop_node(push: PushState, node: str, error: ErrorRecord, phase: str, *, lost: bool = False) -> None:
    """Take a follower out of this push, with each of its engines that has not ended. The push goes on without them.

    If trainer ranks that are still needed run there, the push fails: it cannot go on without the weights they hold.
    """
    if node not in push.nodes or node == push.home:
        return
    push.nodes.discard(node)
    for engine in push.live():
        if engine.node == node:
            engine.at_rest = lost  # a lost node cannot be told to pause or resume
            evict(push, engine, about(error, engine=engine.name, phase=phase), lost=lost)
    ranks = push.ranks_on(node)
    for bucket in push.buckets:
        copy = bucket.copies.get(node)
        if copy is None or copy.exporting:  # once its export has ended, its readers' holds have to be revoked
            continue
        if not (copy.relaying or bucket.unfilled.intersection(ranks)):  # the next push may not get a slot still written
            del bucket.copies[node]
    if ranks and push.state in (State.OPENING, State.TRANSFERRING):
        who = f"trainer rank{'s' if len(ranks) > 1 else ''} {listed(ranks)} of node {node}"
        message = f"{who} cannot go on: {error.message}"
        fail(push, record(push, "PushAborted", message, rank=ranks[0], phase=phase))


def retire(push: PushState, node: str, bridge: int, reason: str) -> None:
    """Replace a bridge and its arena, because a process that cannot be stopped may still write into the arena."""
    until = push.now + push.operation_timeout
    push.issue(do.RetireBridge(node=node, bridge=bridge, reason=reason, deadline=until))


# --- after the end --------------------------------------------------------------------------------------------------


def settle_engine(push: PushState, event: Event) -> None:
    """Evict an engine whose late success arrives after the push has ended: it cannot commit any more."""
    engine = answered(push, getattr(event, "engine", ""), SETTLED[type(event)])
    if engine is not None:
        evict_late(push, engine)


def on_last_answer(push: PushState, event: Event) -> None:
    """Note the last success of an engine that has left. In this state no other engine is asked for it."""
    engine = push.engines.get(getattr(event, "engine", ""))
    if engine is not None and engine.stage.ended:
        answered(push, engine.name, SETTLED[type(event)])


def on_stop_after_end(push: PushState, event: ev.StopRequested) -> None:
    if not push.done:
        abandon(push)


def abandon(push: PushState) -> None:
    """Give up on engines that have not answered: the grace is over. Arenas that may still be in use are replaced."""
    words, _ = waited_for(push)
    error = record(push, "PushTimeout", f"no answer within the grace period; waited for {words}")
    for engine in push.engines.values():
        if engine.asked is not None:
            nothing_asked(push, engine)
            if engine.stage.ended:  # it left while that was under way, and has not been told to rest
                let_rest(push, engine)
            else:
                evict(push, engine, error, lost=True)
    staging = {push.home, *push.delivering} if push.delivering else set()
    suspects = {place for place in push.capacity if place[0] in staging}
    for index, bucket in enumerate(push.buckets):
        for node, copy in bucket.copies.items():
            for name in sorted(copy.readers):
                revoke(push, name, index)
            if bucket.unfilled.intersection(push.ranks_on(node)) or copy.exporting or copy.relaying:
                suspects.add((node, copy.slot.bridge))
    for node, bridge in sorted(suspects):
        retire(push, node, bridge, "work on its arena did not end within the grace period")
    push.abandoned = True


def ignore(push: PushState, event: Event) -> None:
    """Ignore an event that comes late, early or twice."""
