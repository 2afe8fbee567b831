"""Promises that hold after every event of a push, whatever happens. Tests check them each time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from weightsync.session.state import State
from weightsync.session.tracks import EngineStage
from weightsync.session.words import PUSH_ERRORS

if TYPE_CHECKING:
    from weightsync.session.state import PushState
    from weightsync.session.tracks import EngineTrack

__all__ = ["check"]


def check(push: PushState) -> None:
    """Raise AssertionError if a promise does not hold; cheap enough to call after each event in tests."""
    _slots_hold_one_bucket_each(push)
    for engine in push.engines.values():
        _engine_is_whole_or_stands_still(push, engine)
        _engine_is_asked_what_it_may_be(push, engine)
    if not push.ended:
        _phases_count_what_is_under_way(push)
    _end_has_its_error(push)


def _slots_hold_one_bucket_each(push: PushState) -> None:
    held: set[tuple[str, int, int]] = set()
    for index, bucket in enumerate(push.buckets):
        assert bucket.unfilled <= bucket.fillers, f"bucket {index} waits for a rank that does not fill it"
        for node, copy in bucket.copies.items():
            key = (node, copy.slot.bridge, copy.slot.index)
            assert key not in held, f"slot {key} holds two buckets"
            assert copy.slot.index not in push.free.get(key[:2], []), f"slot {key} is free and holds {index}"
            held.add(key)
            assert not copy.exported or not bucket.unfilled, f"bucket {index} was exported before it was filled"


def _engine_is_whole_or_stands_still(push: PushState, engine: EngineTrack) -> None:
    assert engine.loaded <= len(push.buckets)
    if engine.stage is EngineStage.COMMITTED:
        assert engine.loaded == len(push.buckets), f"{engine.name} committed without every bucket"
        assert push.state in (State.COMMITTING, State.COMMITTED, State.TORN)
    if engine.stage is EngineStage.SKIPPED:
        assert not engine.touched, f"{engine.name} was touched and counts as untouched"
    if engine.touched and engine.stage is EngineStage.RESUMING:
        assert engine.loaded == len(push.buckets), f"{engine.name} is resumed with a mixture"
        assert not any(e == engine.name for e, _ in push.held()), f"{engine.name} may yet turn out damaged"


def _engine_is_asked_what_it_may_be(push: PushState, engine: EngineTrack) -> None:
    if engine.asked == "draw":
        assert engine.touched, f"{engine.name} draws and was not begun"
        assert engine.node == push.home, f"{engine.name} draws from another node"
    if engine.asked in ("show", "deliver"):
        assert engine.touched, f"{engine.name} shows its places and was not begun"
        assert engine.node != push.home, f"{engine.name} has its own node deliver"
    if engine.asked == "resume" and engine.touched:
        assert engine.stage is EngineStage.RESUMING, f"{engine.name} is torn and is being resumed"


def _phases_count_what_is_under_way(push: PushState) -> None:
    counted = Counter(engine.phase for engine in push.engines.values())
    for bucket in push.buckets:
        copies = bucket.copies.values()
        counted["export"] += sum(copy.exporting for copy in copies)
        counted["wire"] += any(copy.relaying for copy in copies)
    for phase in ("export", "wire", "load", "finalise", "verify"):
        assert push.phases.active[phase] == counted[phase], f"{phase} counts as under way, and is not"


def _end_has_its_error(push: PushState) -> None:
    if push.state is State.ABORTED:
        assert not any(e.touched for e in push.fleet), "aborted, yet an engine was touched"
    if push.ended:
        assert push.state is State.COMMITTED or push.error is not None
        if push.error is not None:
            assert push.error.kind in PUSH_ERRORS, f"a push ends with a {push.error.kind}"
    else:
        assert push.error is None
