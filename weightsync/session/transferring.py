"""Weights by buckets: slots are filled, exported, relayed to other nodes, and loaded. `slots` leases and frees them.

Engines that take no buckets (see `drawing`) may be in the same push. If no engine takes buckets, no slot is leased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.ending import drop_node, fail
from weightsync.session.engines import answered, ask, evict, revoke, succeeded
from weightsync.session.slots import slots_of
from weightsync.session.state import State
from weightsync.session.tracks import Copy, EngineStage, EngineTrack
from weightsync.session.words import about, buckets, record

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.state import PushState

__all__ = [
    "begin_engine",
    "begin_transfer",
    "load",
    "on_bucket_exported",
    "on_bucket_loaded",
    "on_bucket_relayed",
    "on_bucket_released",
    "on_engine_begun",
    "on_engine_paused",
    "on_rank_filled",
    "relay",
]

_RELAYS = 2  # broadcasts that one bridge is asked for at a time


def begin_transfer(push: PushState) -> None:
    """Tell the ranks of the plan, which all engines have accepted, and pause the engines."""
    push.state = State.TRANSFERRING
    push.issue(do.AnnouncePlan(expose=bool(push.unexposed)))
    for engine in push.live():  # also with "none": each adapter does what comes nearest to that
        engine.stage, engine.paused_by_us, engine.began = EngineStage.PAUSING, True, push.now
        ask(push, engine, "pause")
        push.issue(do.PauseEngine(engine=engine.name, mode=push.pause, deadline=push.until()))


# --- engines --------------------------------------------------------------------------------------------------------


def on_engine_paused(push: PushState, event: ev.EnginePaused) -> None:
    engine = answered(push, event.engine, "pause")
    if engine is not None:
        engine.stage = EngineStage.PAUSED


def begin_engine(push: PushState, engine: EngineTrack) -> None:
    """Open the engine's update. From here on the engine is touched."""
    engine.stage, engine.touched = EngineStage.BEGINNING, True
    ask(push, engine, "begin")
    push.issue(do.BeginEngine(engine=engine.name, deadline=push.until()))


def on_engine_begun(push: PushState, event: ev.EngineBegun) -> None:
    engine = answered(push, event.engine, "begin")
    if engine is not None:
        engine.stage = EngineStage.LOADING


def load(push: PushState, engine: EngineTrack) -> None:
    """Begin the engine once its first bucket lies ready, then have it load the buckets that lie ready.

    One call loads several buckets, because a call costs a real engine as much as a small bucket. It loads half of the
    node's slots at most, rounded up, so that the others are filled meanwhile, and never more than `MOST_LOADED`.
    """
    there = _exported(push, engine, most=min((slots_of(push, engine.node) + 1) // 2, do.MOST_LOADED))
    if engine.stage is EngineStage.PAUSED and (there or not push.buckets):
        begin_engine(push, engine)
    elif engine.stage is EngineStage.LOADING and there:
        engine.loading = there
        ask(push, engine, "load")
        first = engine.loaded
        push.issue(do.LoadBucket(engine=engine.name, bucket=first, count=there, deadline=push.until()))


def _exported(push: PushState, engine: EngineTrack, most: int) -> int:
    """Return how many of the engine's next buckets, up to `most`, lie exported on its node."""
    for count in range(most):
        copy = push.copy(engine.loaded + count, engine.node)
        if copy is None or not copy.exported:
            return count
    return most


def on_bucket_loaded(push: PushState, event: ev.BucketLoaded) -> None:
    known = push.engines.get(event.engine)
    if known is None or known.loaded != event.bucket:
        return
    engine = succeeded(push, event.engine, "load")
    if engine is None:
        return
    if event.count != engine.loading:  # the follower runs a version that loads one bucket in a call
        what = f"{event.count} of {buckets(event.bucket, engine.loading)}"
        message = f"node {engine.node} says that it loaded {what} into {engine.name}"
        hint = "install the same weightsync on all nodes"
        error = record(push, "RemoteProtocolError", message, hint=hint, engine=engine.name, phase="load")
        evict(push, engine, error)
        return
    for bucket in range(event.bucket, event.bucket + event.count):
        engine.loaded += 1
        push.issue(do.AwaitRelease(engine=engine.name, bucket=bucket, deadline=push.until()))


def on_bucket_released(push: PushState, event: ev.BucketReleased) -> None:
    engine = push.engines.get(event.engine)
    if engine is None or not 0 <= event.bucket < engine.loaded:
        return
    copy = push.copy(event.bucket, engine.node)
    if copy is None or event.engine not in copy.readers:
        return
    copy.readers.discard(event.engine)
    if (event.leaked or event.damaged) and not engine.stage.ended:
        # an engine that never released may still read a slot that is about to be filled again
        what = "never released" if event.leaked else "read back other bytes than were sent of"
        message = f"engine {engine.name} {what} bucket {event.bucket}"
        error = record(push, "EngineError", message, engine=engine.name, bucket=event.bucket, phase="load")
        evict(push, engine, error)


# --- buckets --------------------------------------------------------------------------------------------------------


def on_rank_filled(push: PushState, event: ev.RankFilled) -> None:
    if not 0 <= event.bucket < len(push.buckets):
        return
    bucket = push.buckets[event.bucket]
    if event.rank not in bucket.unfilled:
        return
    bucket.unfilled.discard(event.rank)
    push.filled_bytes += event.nbytes
    if not bucket.unfilled and not bucket.filled:
        bucket.filled = True
        push.phases.stop("fill", push.now)
        if not push.ended and not push.spread:
            _export(push, event.bucket, push.home)


def _export(push: PushState, index: int, node: str) -> None:
    bucket = push.buckets[index]
    copy = bucket.copies[node]
    copy.readers = {e.name for e in push.live() if e.node == node and not e.draws}
    copy.named = frozenset(copy.readers)
    if bucket.relayed and not copy.readers:
        copy.exported = True  # no engine here reads it, and it is sent no further
        return
    copy.exporting = True
    push.phases.start("export", push.now)
    readers, nbytes = tuple(sorted(copy.readers)), bucket.nbytes
    push.issue(do.ExportBucket(bucket=index, slot=copy.slot, nbytes=nbytes, engines=readers, deadline=push.until()))


def on_bucket_exported(push: PushState, event: ev.BucketExported) -> None:
    copy = push.copy(event.bucket, event.node)
    if copy is None or not copy.exporting:
        return
    copy.exporting, copy.exported = False, True
    push.phases.stop("export", push.now)
    for name in sorted(copy.named - copy.readers):  # evicted during the export: only now is there a hold to revoke
        revoke(push, name, event.bucket)


def relay(push: PushState) -> None:
    """Broadcast on each bridge, in bucket order, as soon as every remote node has a free slot.

    A second broadcast is asked for while one is under way, so that no wire waits for daemons. Exchanges go one at a
    time: a broken exchange would break the next one too, and a node that is not at fault would be blamed.
    """
    remote = push.receivers()
    if not remote:
        return
    for rail, waiting in push.unrelayed.items():
        if push.spread:
            if waiting and push.buckets[waiting[0]].filled and not _relaying(push, rail):
                _exchange(push, waiting.popleft())
            continue
        while waiting and _relaying(push, rail) < _RELAYS:
            home = push.copy(waiting[0], push.home)
            places = [(node, rail) for node in remote]
            if home is None or not home.exported or not all(push.free.get(place) for place in places):
                break
            targets = tuple(do.Slot(node, rail, push.free[node, rail].pop(0)) for node, _ in places)
            _broadcast(push, waiting.popleft(), home, targets)


def _relaying(push: PushState, rail: int) -> int:
    """Return how many broadcasts and exchanges are under way on a rail."""
    mine = (push.buckets[index] for index in push.active if push.buckets[index].owner == rail)
    return sum(any(copy.relaying for copy in bucket.copies.values()) for bucket in mine)


def _broadcast(push: PushState, index: int, home: Copy, targets: tuple[do.Slot, ...]) -> None:
    bucket = push.buckets[index]
    for target in targets:
        bucket.copies[target.node] = Copy(target)
    home.relaying = True
    push.phases.start("wire", push.now)
    slot, nbytes = home.slot, bucket.nbytes
    push.issue(do.RelayBucket(bucket=index, slot=slot, nbytes=nbytes, targets=targets, deadline=push.until()))


def _exchange(push: PushState, index: int) -> None:
    bucket = push.buckets[index]
    for copy in bucket.copies.values():
        copy.relaying = True
    push.phases.start("wire", push.now)
    slots = tuple(copy.slot for _, copy in sorted(bucket.copies.items()))
    push.issue(do.ExchangeBucket(bucket=index, slots=slots, deadline=push.until()))


def on_bucket_relayed(push: PushState, event: ev.BucketRelayed) -> None:
    if not 0 <= event.bucket < len(push.buckets):
        return
    bucket = push.buckets[event.bucket]
    if not any(copy.relaying for copy in bucket.copies.values()):
        return
    bucket.relayed = True
    for copy in bucket.copies.values():
        copy.relaying = False
    push.phases.stop("wire", push.now)
    for node, error in event.failed:
        if node == push.home and not push.ended:
            fail(push, about(error, bucket=event.bucket, phase="wire"))
        drop_node(push, node, error, "relay")
    if not push.ended:
        for node in event.nodes:
            if node in push.nodes and node in bucket.copies:
                _export(push, event.bucket, node)
