"""Rules for failures: one engine is out, one node is out, or the push fails as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session.ending import abandon, drop_node, end_when_all_ended, fail, retire
from weightsync.session.engines import answered, evict, nothing_asked
from weightsync.session.opening import plan_anew
from weightsync.session.slots import forget_arena, lose_copy, rank_writes_no_more
from weightsync.session.state import State
from weightsync.session.words import about, phase_of, rank_failed, record, waited_for

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.state import PushState

__all__ = [
    "on_bridge_lost",
    "on_engine_failed",
    "on_node_lost",
    "on_rank_failed",
    "on_rank_lost",
    "on_rank_stopped",
    "on_stop_requested",
    "on_tick",
]


# --- engines, nodes and bridges -------------------------------------------------------------------------------------


def on_engine_failed(push: PushState, event: ev.EngineFailed) -> None:
    engine = answered(push, event.engine, event.phase)
    if engine is None:
        return
    evict(push, engine, event.error, lost=event.lost)
    refused = event.error.kind == "EngineRefused" and not engine.keeper
    if refused and not push.ended:  # the engine is well, but cannot take what is pushed
        message = f"engine {engine.name} cannot take these weights: {event.error.message}"
        fail(push, about(event.error, kind="PushRefused", message=message, engine=engine.name))
    end_when_all_ended(push)  # `go_on` does so only once there is a plan


def on_node_lost(push: PushState, event: ev.NodeLost) -> None:
    for rank in push.ranks_on(event.node):
        rank_writes_no_more(push, rank)
    drop_node(push, event.node, event.error, "node", lost=True)
    for engine in push.engines.values():
        if engine.node == event.node:
            nothing_asked(push, engine)
    if event.node != push.home:  # an export that was under way there will have no outcome
        for index in range(len(push.buckets)):
            lose_copy(push, index, event.node)
    end_when_all_ended(push)  # `go_on` does so only once there is a plan


def on_bridge_lost(push: PushState, event: ev.BridgeLost) -> None:
    forget_arena(push, event.node, event.bridge)
    if push.state is State.OPENING and event.node == push.home:
        plan_anew(push)
    elif push.state is State.TRANSFERRING and event.node == push.home:
        fail(push, about(event.error, phase="wire" if push.remote_nodes() else phase_of(push)))
    elif push.state is State.TRANSFERRING:
        drop_node(push, event.node, event.error, "wire")


# --- trainer ranks --------------------------------------------------------------------------------------------------


def on_rank_failed(push: PushState, event: ev.RankFailed) -> None:
    bucket, phase = _at_work(push, event.rank)
    rank_writes_no_more(push, event.rank)
    if not push.ended:
        fail(push, about(rank_failed(event.rank, event.error), bucket=bucket, phase=phase))


def on_rank_lost(push: PushState, event: ev.RankLost) -> None:
    """Replace the arenas in which the rank holds leases: it may be alive and still writing. Fail if it is needed."""
    bucket, phase = _at_work(push, event.rank)
    node = push.rank_nodes.get(event.rank, push.home)
    held = {b.copies[node].slot.bridge for b in push.buckets if event.rank in b.unfilled and node in b.copies}
    for bridge in sorted(held):
        retire(push, node, bridge, f"rank {event.rank} was lost while it held a lease")
    rank_writes_no_more(push, event.rank)
    if push.state in (State.OPENING, State.TRANSFERRING):
        message = f"trainer rank {event.rank} was lost: {event.reason}"
        fail(push, record(push, "PushAborted", message, rank=event.rank, bucket=bucket, phase=phase))


def on_rank_stopped(push: PushState, event: ev.RankStopped) -> None:
    """Note that the rank has heard of the end of the push, and writes no more."""
    rank_writes_no_more(push, event.rank)


def _at_work(push: PushState, rank: int) -> tuple[int | None, str]:
    """Return the bucket that the rank is filling, or None, and the phase that it is in."""
    bucket = next((i for i, b in enumerate(push.buckets) if rank in b.unfilled), None)
    filling = bucket is not None or rank in push.unexposed or rank in push.unmeasured
    return bucket, "fill" if filling else phase_of(push)


# --- time and the operator ------------------------------------------------------------------------------------------


def on_tick(push: PushState, event: ev.Tick) -> None:
    if push.ended:
        if push.drain_until is not None and push.now >= push.drain_until and not push.done:
            abandon(push)
    elif push.now >= push.push_deadline:
        words, where = waited_for(push)
        message = f"the push did not end before its deadline; it was waiting for {words}"
        fail(push, about(record(push, "PushTimeout", message), **where))


def on_stop_requested(push: PushState, event: ev.StopRequested) -> None:
    fail(push, record(push, "PushAborted", event.reason, phase=phase_of(push)))
