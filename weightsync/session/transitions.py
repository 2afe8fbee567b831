"""The table: for each state and event, which rule decides and which states may follow.

It is the whole of a push's behaviour in one place; the diagram in docs/ is drawn from it. An event that is not listed
for a state is ignored there: it is late, early or a duplicate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import events as ev
from weightsync.session.ending import SETTLED
from weightsync.session.failing import Failing as Rules  # the class on top: it has every rule
from weightsync.session.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TRANSITIONS", "Row"]

Row = tuple["Callable[..., None]", tuple[State, ...]]

_T, _C, _OK = State.TRANSFERRING, State.COMMITTING, State.COMMITTED
_ABORT, _TORN = State.ABORTED, State.TORN

_OPENING: dict[type[ev.Event], Row] = {
    ev.RankOpened: (Rules._on_rank_opened, ()),
    ev.LayoutsMissing: (Rules._on_layouts_missing, ()),
    ev.LayoutReceived: (Rules._on_layout_received, ()),
    ev.PlanMade: (Rules._on_plan_made, (_T, _ABORT)),
    ev.PlanFailed: (Rules._on_plan_failed, (_ABORT,)),
    ev.RailsFormed: (Rules._on_rails_formed, (_T, _ABORT)),
    ev.EngineProbed: (Rules._on_engine_probed, (_ABORT,)),
    ev.EngineAccepted: (Rules._on_engine_accepted, (_T,)),
    ev.EngineFailed: (Rules._on_engine_failed, (_T, _ABORT)),
    ev.NodeLost: (Rules._on_node_lost, (_T, _ABORT)),
    ev.BridgeLost: (Rules._on_bridge_lost, ()),
    ev.RankFailed: (Rules._on_rank_failed, (_ABORT,)),
    ev.RankLost: (Rules._on_rank_lost, (_ABORT,)),
    ev.StopRequested: (Rules._on_stop_requested, (_ABORT,)),
    ev.Tick: (Rules._on_tick, (_ABORT,)),
}
_TRANSFERRING: dict[type[ev.Event], Row] = {
    ev.EngineProbed: (Rules._on_last_answer, ()),
    ev.EngineAccepted: (Rules._on_last_answer, ()),
    ev.EnginePaused: (Rules._on_engine_paused, ()),
    ev.RankFilled: (Rules._on_rank_filled, ()),
    ev.RankExposed: (Rules._on_rank_exposed, ()),
    ev.RankMeasured: (Rules._on_rank_measured, (_C,)),
    ev.WeightsDrawn: (Rules._on_weights_drawn, (_C,)),
    ev.PlacesShown: (Rules._on_places_shown, ()),
    ev.WeightsDelivered: (Rules._on_weights_delivered, (_C,)),
    ev.BucketExported: (Rules._on_bucket_exported, ()),
    ev.EngineBegun: (Rules._on_engine_begun, (_C,)),
    ev.BucketRelayed: (Rules._on_bucket_relayed, (_C, _ABORT, _TORN)),
    ev.BucketLoaded: (Rules._on_bucket_loaded, (_C,)),
    ev.BucketReleased: (Rules._on_bucket_released, (_C, _ABORT, _TORN)),
    ev.EngineResumed: (Rules._on_engine_resumed, ()),  # of one that has left untouched
    ev.EngineFailed: (Rules._on_engine_failed, (_C, _ABORT, _TORN)),
    ev.NodeLost: (Rules._on_node_lost, (_C, _ABORT, _TORN)),
    ev.BridgeLost: (Rules._on_bridge_lost, (_C, _ABORT, _TORN)),
    ev.RankFailed: (Rules._on_rank_failed, (_ABORT, _TORN)),
    ev.RankLost: (Rules._on_rank_lost, (_ABORT, _TORN)),
    ev.StopRequested: (Rules._on_stop_requested, (_ABORT, _TORN)),
    ev.Tick: (Rules._on_tick, (_ABORT, _TORN)),
}
_COMMITTING: dict[type[ev.Event], Row] = {  # everything is loaded: the push no longer needs the ranks
    ev.EngineFinished: (Rules._on_engine_finished, ()),
    ev.EngineVerified: (Rules._on_engine_verified, ()),
    ev.EngineResumed: (Rules._on_engine_resumed, (_OK,)),
    ev.EnginePaused: (Rules._on_engine_paused, ()),  # of one that has left torn, or lost
    ev.EngineProbed: (Rules._on_last_answer, ()),
    ev.EngineAccepted: (Rules._on_last_answer, ()),
    ev.EngineBegun: (Rules._on_last_answer, ()),
    ev.BucketLoaded: (Rules._on_bucket_loaded, ()),  # of one that has left
    ev.WeightsDrawn: (Rules._on_weights_drawn, ()),  # likewise, as the next two
    ev.PlacesShown: (Rules._on_places_shown, ()),
    ev.WeightsDelivered: (Rules._on_weights_delivered, ()),
    ev.BucketRelayed: (Rules._on_bucket_relayed, ()),
    ev.BucketExported: (Rules._on_bucket_exported, ()),
    ev.BucketReleased: (Rules._on_bucket_released, (_OK, _TORN)),
    ev.EngineFailed: (Rules._on_engine_failed, (_OK, _TORN)),
    ev.NodeLost: (Rules._on_node_lost, (_OK, _TORN)),
    ev.BridgeLost: (Rules._on_bridge_lost, ()),
    ev.StopRequested: (Rules._on_stop_requested, (_TORN,)),
    ev.Tick: (Rules._on_tick, (_TORN,)),
}
_ENDED: dict[type[ev.Event], Row] = {
    **dict.fromkeys(SETTLED, (Rules._settle_engine, ())),
    ev.BucketLoaded: (Rules._on_bucket_loaded, ()),
    ev.WeightsDrawn: (Rules._on_weights_drawn, ()),
    ev.PlacesShown: (Rules._on_places_shown, ()),
    ev.WeightsDelivered: (Rules._on_weights_delivered, ()),
    ev.EngineFinished: (Rules._on_engine_finished, ()),
    ev.EngineVerified: (Rules._on_engine_verified, ()),
    ev.EngineResumed: (Rules._on_engine_resumed, ()),
    ev.EngineFailed: (Rules._on_engine_failed, ()),
    ev.RankFilled: (Rules._on_rank_filled, ()),
    ev.RankStopped: (Rules._on_rank_stopped, ()),
    ev.RankFailed: (Rules._on_rank_failed, ()),
    ev.RankLost: (Rules._on_rank_lost, ()),
    ev.BucketExported: (Rules._on_bucket_exported, ()),
    ev.BucketRelayed: (Rules._on_bucket_relayed, ()),
    ev.BucketReleased: (Rules._on_bucket_released, ()),
    ev.NodeLost: (Rules._on_node_lost, ()),
    ev.BridgeLost: (Rules._on_bridge_lost, ()),
    ev.StopRequested: (Rules._on_stop_after_end, ()),
    ev.Tick: (Rules._on_tick, ()),
}
_LISTED = {State.OPENING: _OPENING, State.TRANSFERRING: _TRANSFERRING, State.COMMITTING: _COMMITTING}


def _table() -> dict[tuple[State, type[ev.Event]], Row]:
    everything = [kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)]
    return {
        (state, event): _LISTED.get(state, _ENDED).get(event, (Rules._ignore, ()))
        for state in State
        for event in everything
    }


TRANSITIONS = _table()
"""(state, event) → (deciding rule, states that may follow besides the same one)."""
