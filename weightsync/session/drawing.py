"""Weights without buckets.

An engine on the trainer's node draws its weights: it reads the memory that ranks expose. To engines on other nodes,
bridges deliver weights from that memory into the engines' places, to all engines at once. An engine that turns out to
be unable to draw or to be delivered to is given buckets.
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
    """Decide which engines draw: none, unless every rank is at home and offers its weights in place.

    Engines on other nodes are delivered to only if all of them can be: buckets for one would pass every remote node
    anyway.
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
    if event.problem:  # then all weights go through slots
        push.unexposed.clear()
        push.unmeasured.clear()
        push.phases.stop("fill", push.now)
        for engine in push.engines.values():
            _takes_buckets(push, engine)


def on_rank_measured(push: PushState, event: ev.RankMeasured) -> None:
    if event.rank not in push.unmeasured:
        return
    push.unmeasured.discard(event.rank)
    if all(engine.draws for engine in push.live()):  # else the bytes filled into slots are counted
        push.filled_bytes += event.nbytes
    if not push.unmeasured:
        push.phases.stop("fill", push.now)


def on_weights_drawn(push: PushState, event: ev.WeightsDrawn) -> None:
    engine = succeeded(push, event.engine, "draw")
    if engine is None:
        return
    if event.drawn:
        engine.loaded = len(push.buckets)
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
        if event.problem:  # buckets bring every byte again; it is begun anew, as an arena may have been replaced
            engine.stage = EngineStage.PAUSED
            _takes_buckets(push, engine)
        else:
            engine.loaded = len(push.buckets)


# --- going on -------------------------------------------------------------------------------------------------------


def draw(push: PushState, engine: EngineTrack) -> None:
    """Once every rank has exposed its weights, begin the engine, then have it draw or be delivered to."""
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
    """Deliver to all engines on other nodes, once each has shown its places."""
    away = _away(push)
    if push.delivering or any(engine.asked or not engine.shown for engine in away):
        return
    push.delivering = frozenset(engine.node for engine in away)
    for engine in away:
        ask(push, engine, "deliver")
    # one call delivers the whole model, so its time grows with the bytes; half of the push's time is left for buckets
    usual = push.operation_timeout / 2 + push.nbytes / do.SLOWEST
    until = push.now + min((push.push_deadline - push.now) / 2, usual)
    names, nodes = (tuple(getattr(engine, of) for engine in away) for of in ("name", "node"))
    push.issue(do.DeliverWeights(engines=names, nodes=nodes, deadline=until))


def _takes_buckets(push: PushState, engine: EngineTrack) -> None:
    """Fall back to buckets. `filled_bytes` restarts at zero: no slot is leased before every engine has drawn."""
    engine.draws, push.filled_bytes = False, 0


def _away(push: PushState) -> list[EngineTrack]:
    """Return the live engines that are not on the trainer's node."""
    return [engine for engine in push.live() if engine.node != push.home]
