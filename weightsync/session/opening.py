"""Before anything is touched: ranks arrive, engines are probed, the plan is made, every engine accepts it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.drawing import Drawing
from weightsync.session.state import State
from weightsync.session.tracks import BucketTrack, EngineStage

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.instructions import Instruction

__all__ = ["Opening"]


class Opening(Drawing):
    """Rules of the state OPENING."""

    def start(self, now: float) -> list[Instruction]:
        """Probe the engines while ranks arrive."""
        self.started = now
        until = self._until(now)
        return [do.ProbeEngine(engine=e.name, deadline=until) for e in self.engines.values()]

    def _form_rails(self, now: float, out: list[Instruction]) -> None:
        """Of nodes with engines, and with ranks that write: replicas elsewhere need not be reached."""
        writers = {self._rank_nodes[rank] for rank in frozenset[int]().union(*(b.fillers for b in self.buckets))}
        self._spread = bool(writers - {self.home})
        self._nodes &= {self.home, *writers, *(e.node for e in self._live())}
        for node in [n for n in self._remote_nodes() if (n, 0) not in self._capacity]:
            error = self._record("DaemonLost", f"node {node} was not connected when the push began")
            self._drop_node(node, error, "open", now=now, out=out)
        if self.ended:
            return
        remote = self._remote_nodes()
        self._rails_number += 1
        self._rails_ready = not remote
        if remote:
            out.append(do.FormRails(nodes=tuple(remote), number=self._rails_number, deadline=self._until(now)))

    def _on_rank_opened(self, event: ev.RankOpened, now: float, out: list[Instruction]) -> None:
        if event.rank in self._layouts:
            return
        self._layouts[event.rank] = event.layout
        if event.in_place:
            self._in_place.add(event.rank)
        self._rank_nodes[event.rank] = event.node or self.home
        self._nodes.add(event.node or self.home)
        for bridge, count in enumerate(event.slots):
            if (event.node, bridge) not in self._capacity:
                self._capacity[event.node, bridge] = count
                self._free[event.node, bridge] = list(range(count))
        self.phases.seconds["describe"] = max(self.phases.seconds["describe"], event.describe_seconds)
        self._plan_when_open(now, out)

    def _plan_when_open(self, now: float, out: list[Instruction]) -> None:
        if len(self._layouts) == self.world and not self._planning and not self._awaited_layouts:
            self._planning = True
            self.phases.start("plan", now)
            out.append(do.MakePlan(deadline=self._until(now)))

    def _on_layouts_missing(self, event: ev.LayoutsMissing, now: float, out: list[Instruction]) -> None:
        if not self._planning:
            return
        self._planning = False
        self.phases.stop("plan", now)
        self._awaited_layouts = set(event.ranks)
        out.extend(do.AskLayout(rank=rank) for rank in event.ranks)

    def _on_layout_received(self, event: ev.LayoutReceived, now: float, out: list[Instruction]) -> None:
        if event.rank in self._awaited_layouts:
            self._awaited_layouts.discard(event.rank)
            self._plan_when_open(now, out)

    def _on_plan_made(self, event: ev.PlanMade, now: float, out: list[Instruction]) -> None:
        if not self._planning or self._planned:
            return
        self._planned = True
        self.phases.stop("plan", now)
        self.buckets = [BucketTrack(b.nbytes, b.owner, frozenset(b.fillers)) for b in event.buckets]
        self.nbytes = sum(b.nbytes for b in self.buckets)
        self._ungranted.clear()
        self._unrelayed.clear()
        for index, bucket in enumerate(self.buckets):
            self._ungranted.setdefault(bucket.owner, deque()).append(index)
            self._unrelayed.setdefault(bucket.owner, deque()).append(index)
        self._form_rails(now, out)
        self._open_on(now, out)

    def _on_plan_failed(self, event: ev.PlanFailed, now: float, out: list[Instruction]) -> None:
        if self._planning and not self._planned:
            self._fail(event.error, now, out)

    def _on_rails_formed(self, event: ev.RailsFormed, now: float, out: list[Instruction]) -> None:
        if self._rails_ready or event.number != self._rails_number:  # asked for once more since
            return
        self._rails_ready = True
        for node, error in event.failed:
            self._drop_node(node, error, "open", now=now, out=out)
        self._open_on(now, out)

    def _on_engine_probed(self, event: ev.EngineProbed, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "probe", now, out)
        if engine is None:
            return
        engine.stage = EngineStage.KNOWN
        engine.version, engine.was_paused, engine.was_torn = event.version, event.paused, event.torn
        self._open_on(now, out)

    def _on_engine_accepted(self, event: ev.EngineAccepted, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "accept", now, out)
        if engine is None:
            return
        engine.stage, engine.not_pushed = EngineStage.ACCEPTED, event.not_pushed
        engine.draws = event.draws and not engine.keeper
        self._open_on(now, out)

    def _home_bridge_lost(self, now: float, out: list[Instruction]) -> None:
        """Nothing was leased yet: its successor will do, once the plan and the rails stand on it."""
        if self._planned:
            self._planned = self._rails_ready = False
            self._rails_number += 1  # what is being formed stands on the old one
            self.phases.start("plan", now)
            out.append(do.MakePlan(deadline=self._until(now)))

    # --- going on ---------------------------------------------------------------------------------------------------

    def _open_on(self, now: float, out: list[Instruction]) -> None:
        """Once the plan is made and the rails stand: show the plan to every engine that has answered its probe; once
        all have accepted it, begin.
        """
        if self.state is not State.OPENING or not (self._planned and self._rails_ready):
            return
        live = self._live()
        if not self._worth_it():
            self._fail_without_engines(now, out)
        elif all(e.stage is EngineStage.ACCEPTED for e in live):
            self._begin_transfer(now, out)
        elif all(e.stage is EngineStage.KNOWN for e in live) and self._version_rises(now, out):
            for engine in live:
                engine.stage, engine.asked = EngineStage.ACCEPTING, "accept"
                out.append(do.AcceptEngine(engine=engine.name, deadline=self._until(now)))

    def _version_rises(self, now: float, out: list[Instruction]) -> bool:
        """Whether every engine serves an older version; if not, the push is refused."""
        served = {e.version: e.name for e in self._live() if e.version is not None and not (e.was_torn or e.keeper)}
        newest = max(served, default=None)
        if newest is not None and newest >= self.version:
            which = f"version {newest}, which engine {served[newest]} serves"
        elif self.last_version is not None and self.last_version >= self.version:
            which = f"version {self.last_version}, pushed before"
        else:
            return True
        self._refuse(f"version {self.version} is not above {which}", now, out)
        return False
