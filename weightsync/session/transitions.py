"""The table: for each state and event, the rule that decides and the states that may follow.

The diagram in docs/ is drawn from it. An event that is not listed for a state is ignored there: it is late, early or a
duplicate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.session import committing, drawing, ending, failing, opening, transferring
from weightsync.session import events as ev
from weightsync.session.ending import SETTLED
from weightsync.session.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.session.state import PushState

__all__ = ["TRANSITIONS", "Row"]

Row = tuple["Callable[[PushState, Any], None]", tuple[State, ...]]

_T, _C, _OK = State.TRANSFERRING, State.COMMITTING, State.COMMITTED
_ABORT, _TORN = State.ABORTED, State.TORN

_OPENING: dict[type[ev.Event], Row] = {
    ev.RankOpened: (opening.on_rank_opened, ()),
    ev.LayoutsMissing: (opening.on_layouts_missing, ()),
    ev.LayoutReceived: (opening.on_layout_received, ()),
    ev.PlanMade: (opening.on_plan_made, (_T, _ABORT)),
    ev.PlanFailed: (opening.on_plan_failed, (_ABORT,)),
    ev.RailsFormed: (opening.on_rails_formed, (_T, _ABORT)),
    ev.EngineProbed: (opening.on_engine_probed, (_ABORT,)),
    ev.EngineAccepted: (opening.on_engine_accepted, (_T, _ABORT)),
    ev.EngineFailed: (failing.on_engine_failed, (_T, _ABORT)),
    ev.NodeLost: (failing.on_node_lost, (_T, _ABORT)),
    ev.BridgeLost: (failing.on_bridge_lost, ()),
    ev.RankFailed: (failing.on_rank_failed, (_ABORT,)),
    ev.RankLost: (failing.on_rank_lost, (_ABORT,)),
    ev.StopRequested: (failing.on_stop_requested, (_ABORT,)),
    ev.Tick: (failing.on_tick, (_ABORT,)),
}
_TRANSFERRING: dict[type[ev.Event], Row] = {
    ev.EngineProbed: (ending.on_last_answer, ()),
    ev.EngineAccepted: (ending.on_last_answer, ()),
    ev.EnginePaused: (transferring.on_engine_paused, ()),
    ev.RankFilled: (transferring.on_rank_filled, ()),
    ev.RankExposed: (drawing.on_rank_exposed, ()),
    ev.RankMeasured: (drawing.on_rank_measured, (_C,)),
    ev.WeightsDrawn: (drawing.on_weights_drawn, (_C,)),
    ev.PlacesShown: (drawing.on_places_shown, ()),
    ev.WeightsDelivered: (drawing.on_weights_delivered, (_C,)),
    ev.BucketExported: (transferring.on_bucket_exported, ()),
    ev.EngineBegun: (transferring.on_engine_begun, (_C,)),
    ev.BucketRelayed: (transferring.on_bucket_relayed, (_C, _ABORT, _TORN)),
    ev.BucketLoaded: (transferring.on_bucket_loaded, (_C, _TORN)),  # torn: a follower of another version
    ev.BucketReleased: (transferring.on_bucket_released, (_C, _ABORT, _TORN)),
    ev.EngineResumed: (committing.on_engine_resumed, ()),  # of an engine that has left untouched
    ev.EngineFailed: (failing.on_engine_failed, (_C, _ABORT, _TORN)),
    ev.NodeLost: (failing.on_node_lost, (_C, _ABORT, _TORN)),
    ev.BridgeLost: (failing.on_bridge_lost, (_C, _ABORT, _TORN)),
    ev.RankFailed: (failing.on_rank_failed, (_ABORT, _TORN)),
    ev.RankLost: (failing.on_rank_lost, (_ABORT, _TORN)),
    ev.StopRequested: (failing.on_stop_requested, (_ABORT, _TORN)),
    ev.Tick: (failing.on_tick, (_ABORT, _TORN)),
}
_COMMITTING: dict[type[ev.Event], Row] = {  # everything is loaded: the push no longer needs the ranks
    ev.EngineFinished: (committing.on_engine_finished, ()),
    ev.EngineVerified: (committing.on_engine_verified, ()),
    ev.EngineResumed: (committing.on_engine_resumed, (_OK,)),
    ev.EnginePaused: (transferring.on_engine_paused, ()),  # of an engine that has left torn, or lost
    ev.EngineProbed: (ending.on_last_answer, ()),
    ev.EngineAccepted: (ending.on_last_answer, ()),
    ev.EngineBegun: (ending.on_last_answer, ()),
    ev.BucketLoaded: (transferring.on_bucket_loaded, ()),  # of an engine that has left, as the next three
    ev.WeightsDrawn: (drawing.on_weights_drawn, ()),
    ev.PlacesShown: (drawing.on_places_shown, ()),
    ev.WeightsDelivered: (drawing.on_weights_delivered, ()),
    ev.BucketRelayed: (transferring.on_bucket_relayed, ()),
    ev.BucketExported: (transferring.on_bucket_exported, ()),
    ev.BucketReleased: (transferring.on_bucket_released, (_OK, _TORN)),
    ev.EngineFailed: (failing.on_engine_failed, (_OK, _TORN)),
    ev.NodeLost: (failing.on_node_lost, (_OK, _TORN)),
    ev.BridgeLost: (failing.on_bridge_lost, ()),
    ev.StopRequested: (failing.on_stop_requested, (_TORN,)),
    ev.Tick: (failing.on_tick, (_TORN,)),
}
_ENDED: dict[type[ev.Event], Row] = {
    **dict.fromkeys(SETTLED, (ending.settle_engine, ())),
    ev.BucketLoaded: (transferring.on_bucket_loaded, ()),
    ev.WeightsDrawn: (drawing.on_weights_drawn, ()),
    ev.PlacesShown: (drawing.on_places_shown, ()),
    ev.WeightsDelivered: (drawing.on_weights_delivered, ()),
    ev.EngineFinished: (committing.on_engine_finished, ()),
    ev.EngineVerified: (committing.on_engine_verified, ()),
    ev.EngineResumed: (committing.on_engine_resumed, ()),
    ev.EngineFailed: (failing.on_engine_failed, ()),
    ev.RankFilled: (transferring.on_rank_filled, ()),
    ev.RankStopped: (failing.on_rank_stopped, ()),
    ev.RankFailed: (failing.on_rank_failed, ()),
    ev.RankLost: (failing.on_rank_lost, ()),
    ev.BucketExported: (transferring.on_bucket_exported, ()),
    ev.BucketRelayed: (transferring.on_bucket_relayed, ()),
    ev.BucketReleased: (transferring.on_bucket_released, ()),
    ev.NodeLost: (failing.on_node_lost, ()),
    ev.BridgeLost: (failing.on_bridge_lost, ()),
    ev.StopRequested: (ending.on_stop_after_end, ()),
    ev.Tick: (failing.on_tick, ()),
}
_LISTED = {State.OPENING: _OPENING, State.TRANSFERRING: _TRANSFERRING, State.COMMITTING: _COMMITTING}


def _table() -> dict[tuple[State, type[ev.Event]], Row]:
    everything = [kind for kind in vars(ev).values() if isinstance(kind, type) and issubclass(kind, ev.Event)]
    return {
        (state, event): _LISTED.get(state, _ENDED).get(event, (ending.ignore, ()))
        for state in State
        for event in everything
    }


TRANSITIONS = _table()
"""(state, event) → (deciding rule, states that may follow besides the same one)."""
