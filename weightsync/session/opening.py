"""Before anything is touched: ranks arrive, engines are probed, the plan is made, every engine accepts it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.drawing import choose_who_draws
from weightsync.session.ending import drop_node, fail, fail_without_engines
from weightsync.session.engines import answered, ask
from weightsync.session.tracks import BucketTrack, EngineStage
from weightsync.session.transferring import begin_transfer
from weightsync.session.words import record

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.state import PushState

__all__ = [
    "on_engine_accepted",
    "on_engine_probed",
    "on_layout_received",
    "on_layouts_missing",
    "on_plan_failed",
    "on_plan_made",
    "on_rails_formed",
    "on_rank_opened",
    "open_on",
    "plan_anew",
    "probe",
]


def probe(push: PushState) -> None:
    """Ask all engines how they are, while ranks arrive."""
    for engine in push.engines.values():
        push.issue(do.ProbeEngine(engine=engine.name, deadline=push.until()))


# --- ranks and their plan -------------------------------------------------------------------------------------------


def on_rank_opened(push: PushState, event: ev.RankOpened) -> None:
    if event.rank in push.opened:
        return
    push.opened.add(event.rank)
    if event.in_place:
        push.in_place.add(event.rank)
    push.partial = push.partial or event.partial
    push.rank_nodes[event.rank] = event.node or push.home
    push.nodes.add(event.node or push.home)
    for bridge, count in enumerate(event.slots):
        if (event.node, bridge) not in push.capacity:
            push.capacity[event.node, bridge] = count
            push.free[event.node, bridge] = list(range(count))
    push.phases.seconds["describe"] = max(push.phases.seconds["describe"], event.describe_seconds)
    _plan_when_open(push)


def _plan_when_open(push: PushState) -> None:
    if len(push.opened) == push.world and not push.planning and not push.awaited_layouts:
        push.planning = True
        _plan(push)


def _plan(push: PushState) -> None:
    push.phases.start("plan", push.now)
    push.issue(do.MakePlan(deadline=push.until()))


def on_layouts_missing(push: PushState, event: ev.LayoutsMissing) -> None:
    if not push.planning:
        return
    push.planning = False
    push.phases.stop("plan", push.now)
    push.awaited_layouts = set(event.ranks)
    for rank in event.ranks:
        push.issue(do.AskLayout(rank=rank))


def on_layout_received(push: PushState, event: ev.LayoutReceived) -> None:
    if event.rank in push.awaited_layouts:
        push.awaited_layouts.discard(event.rank)
        _plan_when_open(push)


def on_plan_made(push: PushState, event: ev.PlanMade) -> None:
    if not push.planning or push.planned:
        return
    push.planned = True
    push.phases.stop("plan", push.now)
    push.buckets = [BucketTrack(b.nbytes, b.owner, frozenset(b.fillers)) for b in event.buckets]
    push.nbytes = sum(b.nbytes for b in push.buckets)
    push.ungranted.clear()
    push.unrelayed.clear()
    for index, bucket in enumerate(push.buckets):
        push.ungranted.setdefault(bucket.owner, deque()).append(index)
        push.unrelayed.setdefault(bucket.owner, deque()).append(index)
    _form_rails(push)


def on_plan_failed(push: PushState, event: ev.PlanFailed) -> None:
    if push.planning and not push.planned:
        fail(push, event.error)


def plan_anew(push: PushState) -> None:
    """Plan again, because a bridge at home was lost. Nothing was leased yet, so its successor can take its place."""
    if push.planned:
        push.planned = push.rails_ready = False
        push.rails_number += 1  # rails that are being formed include the old bridge
        _plan(push)


# --- nodes ----------------------------------------------------------------------------------------------------------


def _form_rails(push: PushState) -> None:
    """Form rails between the nodes that have engines or ranks that write. Nodes with replicas alone leave the push."""
    writers = {push.rank_nodes[rank] for rank in frozenset[int]().union(*(b.fillers for b in push.buckets))}
    push.spread = bool(writers - {push.home})
    push.nodes &= {push.home, *writers, *(e.node for e in push.live())}
    for node in [n for n in push.remote_nodes() if (n, 0) not in push.capacity]:
        drop_node(push, node, record(push, "DaemonLost", f"node {node} was not connected when the push began"), "open")
    if push.ended:
        return
    remote = push.remote_nodes()
    push.rails_number += 1
    push.rails_ready = not remote
    if remote:
        push.issue(do.FormRails(nodes=tuple(remote), number=push.rails_number, deadline=push.until()))


def on_rails_formed(push: PushState, event: ev.RailsFormed) -> None:
    if push.rails_ready or event.number != push.rails_number:  # rails have been asked for again since
        return
    push.rails_ready = True
    for node, error in event.failed:
        drop_node(push, node, error, "open")


# --- engines --------------------------------------------------------------------------------------------------------


def on_engine_probed(push: PushState, event: ev.EngineProbed) -> None:
    engine = answered(push, event.engine, "probe")
    if engine is not None:
        engine.stage = EngineStage.KNOWN
        engine.version, engine.was_paused, engine.was_torn = event.version, event.paused, event.torn


def on_engine_accepted(push: PushState, event: ev.EngineAccepted) -> None:
    engine = answered(push, event.engine, "accept")
    if engine is None:
        return
    engine.stage, engine.not_pushed = EngineStage.ACCEPTED, event.not_pushed
    engine.draws = event.draws and not engine.keeper
    if push.partial and event.needs_all and event.not_pushed is None:
        message = f"engine {engine.name} is torn or asleep, so it needs the whole model, and only a part is pushed"
        fail(push, record(push, "PushRefused", message, hint="push without only=", engine=engine.name))


# --- going on -------------------------------------------------------------------------------------------------------


def open_on(push: PushState) -> None:
    """Show the plan to all engines once it is made, the rails stand and every engine has answered its probe. Begin the
    transfer once all have accepted the plan.
    """
    if not (push.planned and push.rails_ready):
        return
    live = push.live()
    if not push.worth_it():
        fail_without_engines(push)
    elif all(engine.stage is EngineStage.ACCEPTED for engine in live):
        choose_who_draws(push)
        begin_transfer(push)
    elif all(engine.stage is EngineStage.KNOWN for engine in live) and _version_rises(push):
        for engine in live:
            engine.stage = EngineStage.ACCEPTING
            ask(push, engine, "accept")
            push.issue(do.AcceptEngine(engine=engine.name, deadline=push.until()))


def _version_rises(push: PushState) -> bool:
    """Return whether the version is above all that engines serve or that was pushed before; refuse the push if not."""
    served = {e.version: e.name for e in push.live() if e.version is not None and not (e.was_torn or e.keeper)}
    newest = max(served, default=None)
    if newest is not None and newest >= push.version:
        which = f"version {newest}, which engine {served[newest]} serves"
    elif push.last_version is not None and push.last_version >= push.version:
        which = f"version {push.last_version}, pushed before"
    else:
        return True
    message, hint = f"version {push.version} is not above {which}", "versions must rise; push a higher number"
    fail(push, record(push, "PushRefused", message, hint=hint))
    return False
