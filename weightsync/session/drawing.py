"""Weights without buckets.

An engine beside the trainer draws them: it reads the memory that ranks of its node expose. To those on other nodes
bridges deliver what they have places for out of that memory, to all at once. Who cannot after all is given buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.tracks import EngineStage, EngineTrack
from weightsync.session.transferring import Transferring

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.instructions import Instruction

__all__ = ["Drawing"]


class Drawing(Transferring):
    """Rules of the state TRANSFERRING for engines that take no buckets."""

    def _begin_transfer(self, now: float, out: list[Instruction]) -> None:
        self._choose_who_draws(now)
        super()._begin_transfer(now, out)

    def _choose_who_draws(self, now: float) -> None:
        """Engines beside which all of the trainer's ranks are, if these offer their weights in place; and those on
        other nodes, if that goes for all of them: the buckets that one needs pass all of their nodes.
        """
        offered = len(self._in_place) == self.world and set(self._rank_nodes.values()) == {self.home}
        elsewhere = all(engine.draws for engine in self._away())
        for engine in self._live():
            engine.draws = engine.draws and offered and (engine.node == self.home or elsewhere)
        if any(engine.draws for engine in self._live()):
            self._unexposed, self._unmeasured = set(range(self.world)), set(range(self.world))
            self.phases.start("fill", now)

    def _on_rank_exposed(self, event: ev.RankExposed, now: float, out: list[Instruction]) -> None:
        if event.rank not in self._unexposed:
            return
        self._unexposed.discard(event.rank)
        if event.problem:  # then all of it goes through slots
            self._unexposed.clear()
            self._unmeasured.clear()
            self.phases.stop("fill", now)
            for engine in self.engines.values():
                self._takes_buckets(engine)
        self._go_on(now, out)

    def _on_rank_measured(self, event: ev.RankMeasured, now: float, out: list[Instruction]) -> None:
        if event.rank not in self._unmeasured:
            return
        self._unmeasured.discard(event.rank)
        if all(engine.draws for engine in self._live()):  # else what is filled is counted
            self.filled_bytes += event.nbytes
        if not self._unmeasured:
            self.phases.stop("fill", now)
        self._go_on(now, out)

    def _on_weights_drawn(self, event: ev.WeightsDrawn, now: float, out: list[Instruction]) -> None:
        engine = self._succeeded(event.engine, "draw", now, out)
        if engine is None:
            return
        if event.drawn:
            engine.next_bucket = engine.loaded = len(self.buckets)
        else:
            self._takes_buckets(engine)
        self._go_on(now, out)

    def _on_places_shown(self, event: ev.PlacesShown, now: float, out: list[Instruction]) -> None:
        engine = self._succeeded(event.engine, "show", now, out)
        if engine is None:
            return
        engine.shown = not event.problem
        if event.problem:
            for one in self._away():
                self._takes_buckets(one)
        self._go_on(now, out)

    def _on_weights_delivered(self, event: ev.WeightsDelivered, now: float, out: list[Instruction]) -> None:
        self._delivering = frozenset()
        for name in event.engines:
            engine = self._succeeded(name, "deliver", now, out)
            if engine is None:  # it has left
                continue
            if event.problem:  # buckets bring every byte of it again, out of arenas of which one may be another by now
                engine.stage = EngineStage.PAUSED
                self._takes_buckets(engine)
            else:
                engine.next_bucket = engine.loaded = len(self.buckets)
        self._go_on(now, out)

    # --- going on ---------------------------------------------------------------------------------------------------

    def _advance(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        if not engine.draws:
            super()._advance(engine, now, out)
        elif engine.asked is None:
            self._draw(engine, now, out)

    def _draw(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """Once every rank has said where its weights lie: begin one that draws or is delivered to, then have it so."""
        if self._unexposed:
            return
        if engine.stage is EngineStage.PAUSED:
            self._begin_engine(engine, now, out)
        elif engine.stage is not EngineStage.LOADING or self._all_loaded(engine):
            return
        elif engine.node == self.home:
            self._ask(engine, "draw", now)
            out.append(do.DrawWeights(engine=engine.name, deadline=self._until(now)))
        elif not engine.shown:
            self._ask(engine, "show", now)
            out.append(do.ShowPlaces(engine=engine.name, deadline=self._until(now)))
        else:
            self._deliver(now, out)

    def _deliver(self, now: float, out: list[Instruction]) -> None:
        """To all engines elsewhere, once each has shown its places."""
        away = self._away()
        if self._delivering or any(engine.asked or not engine.shown for engine in away):
            return
        self._delivering = frozenset(engine.node for engine in away)
        for engine in away:
            self._ask(engine, "deliver", now)
        # one call for the whole model, so its time grows with that; half of the push is left to buckets
        usual = self.operation_timeout / 2 + self.nbytes / do.SLOWEST
        until = now + min((self.push_deadline - now) / 2, usual)
        names, nodes = (tuple(getattr(engine, of) for engine in away) for of in ("name", "node"))
        out.append(do.DeliverWeights(engines=names, nodes=nodes, deadline=until))

    def _takes_buckets(self, engine: EngineTrack) -> None:
        """After all. What is filled is counted from here on: no slot is leased before all have drawn."""
        engine.draws, self.filled_bytes = False, 0

    def _away(self) -> list[EngineTrack]:
        """Engines that are on other nodes than the trainer."""
        return [engine for engine in self._live() if engine.node != self.home]
