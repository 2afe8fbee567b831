"""Weights without buckets.

An engine beside the trainer draws them: it reads the memory that ranks of its node expose. To those on other nodes
bridges deliver what they have places for out of that memory, to all at once. Who cannot after all is given buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.engines import ask, succeeded
from weightsync.session.tracks import EngineStage, EngineTrack
from weightsync.session.transferring import begin_engine

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.state import PushState

__all__ = [
    "choose_who_draws",
    "draw",
    "on_places_shown",
    "on_rank_exposed",
    "on_rank_measured",
    "on_weights_delivered",
    "on_weights_drawn",
]


def choose_who_draws(push: PushState) -> None:
    """Engines beside which all of the trainer's ranks are, if these offer their weights in place; and those on
    other nodes, if that goes for all of them: the buckets that one needs pass all of their nodes.
    """
    offered = len(push.in_place) == push.world and set(push.rank_nodes.values()) == {push.home}
    elsewhere = all(engine.draws for engine in _away(push))
    for engine in push.live():
        engine.draws = engine.draws and offered and (engine.node == push.home or elsewhere)
    if any(engine.draws for engine in push.live()):
        push.unexposed, push.unmeasured = set(range(push.world)), set(range(push.world))
        push.phases.start("fill", push.now)


# --- what is heard --------------------------------------------------------------------------------------------------


def on_rank_exposed(push: PushState, event: ev.RankExposed) -> None:
    if event.rank not in push.unexposed:
        return
    push.unexposed.discard(event.rank)
    if event.problem:  # then all of it goes through slots
        push.unexposed.clear()
        push.unmeasured.clear()
        push.phases.stop("fill", push.now)
        for engine in push.engines.values():
            _takes_buckets(push, engine)


def on_rank_measured(push: PushState, event: ev.RankMeasured) -> None:
    if event.rank not in push.unmeasured:
        return
    push.unmeasured.discard(event.rank)
    if all(engine.draws for engine in push.live()):  # else what is filled is counted
        push.filled_bytes += event.nbytes
    if not push.unmeasured:
        push.phases.stop("fill", push.now)


def on_weights_drawn(push: PushState, event: ev.WeightsDrawn) -> None:
    engine = succeeded(push, event.engine, "draw")
    if engine is None:
        return
    if event.drawn:
        engine.next_bucket = engine.loaded = len(push.buckets)
    else:
        _takes_buckets(push, engine)


def on_places_shown(push: PushState, event: ev.PlacesShown) -> None:
    engine = succeeded(push, event.engine, "show")
    if engine is None:
        return
    engine.shown = not event.problem
    if event.problem:
        for one in _away(push):
            _takes_buckets(push, one)


def on_weights_delivered(push: PushState, event: ev.WeightsDelivered) -> None:
    push.delivering = frozenset()
    for name in event.engines:
        engine = succeeded(push, name, "deliver")
        if engine is None:  # it has left
            continue
        if event.problem:  # buckets bring every byte of it again, out of arenas of which one may be another by now
            engine.stage = EngineStage.PAUSED
            _takes_buckets(push, engine)
        else:
            engine.next_bucket = engine.loaded = len(push.buckets)


# --- going on -------------------------------------------------------------------------------------------------------


def draw(push: PushState, engine: EngineTrack) -> None:
    """Once every rank has said where its weights lie: begin one that draws or is delivered to, then have it so."""
    if push.unexposed:
        return
    if engine.stage is EngineStage.PAUSED:
        begin_engine(push, engine)
    elif engine.stage is not EngineStage.LOADING or push.has_all(engine):
        return
    elif engine.node == push.home:
        ask(push, engine, "draw")
        push.issue(do.DrawWeights(engine=engine.name, deadline=push.until()))
    elif not engine.shown:
        ask(push, engine, "show")
        push.issue(do.ShowPlaces(engine=engine.name, deadline=push.until()))
    else:
        _deliver(push)


def _deliver(push: PushState) -> None:
    """To all engines elsewhere, once each has shown its places."""
    away = _away(push)
    if push.delivering or any(engine.asked or not engine.shown for engine in away):
        return
    push.delivering = frozenset(engine.node for engine in away)
    for engine in away:
        ask(push, engine, "deliver")
    # one call for the whole model, so its time grows with that; half of the push is left to buckets
    usual = push.operation_timeout / 2 + push.nbytes / do.SLOWEST
    until = push.now + min((push.push_deadline - push.now) / 2, usual)
    names, nodes = (tuple(getattr(engine, of) for engine in away) for of in ("name", "node"))
    push.issue(do.DeliverWeights(engines=names, nodes=nodes, deadline=until))


def _takes_buckets(push: PushState, engine: EngineTrack) -> None:
    """After all. What is filled is counted from here on: no slot is leased before all have drawn."""
    engine.draws, push.filled_bytes = False, 0


def _away(push: PushState) -> list[EngineTrack]:
    """Engines that are on other nodes than the trainer."""
    return [engine for engine in push.live() if engine.node != push.home]
