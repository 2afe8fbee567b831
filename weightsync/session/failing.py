"""What may go wrong, and what it means: one engine is out, one node is out, or the push fails as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import events as ev
from weightsync.session.opening import Opening
from weightsync.session.state import State, about, buckets, rank_failed

if TYPE_CHECKING:
    from weightsync.session.instructions import Instruction

__all__ = ["Failing"]


class Failing(Opening):
    """Rules for failures, whenever they come."""

    # --- engines ------------------------------------------------------------------------------------------------

    def _on_engine_failed(self, event: ev.EngineFailed, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, event.phase, now, out)
        if engine is None:
            return
        self._evict(engine, event.error, lost=event.lost, now=now, out=out)
        if (
            event.error.kind == "EngineRefused" and not engine.keeper and not self.ended
        ):  # it is well, and what was asked is wrong
            message = f"engine {engine.name} cannot take these weights: {event.error.message}"
            self._fail(about(event.error, kind="PushRefused", message=message, engine=engine.name), now, out)
            return
        self._go_on_without(now, out)

    def _on_bucket_loaded(self, event: ev.BucketLoaded, now: float, out: list[Instruction]) -> None:
        """A follower that says nothing of more than one bucket is of another version, and has loaded one."""
        engine = self.engines.get(event.engine)
        under_way = engine is not None and engine.asked == "load" and engine.next_bucket == event.bucket
        if engine is None or not under_way or engine.loading == event.count:
            super()._on_bucket_loaded(event, now, out)
            return
        what = f"{event.count} of {buckets(event.bucket, engine.loading)}"
        error = self._record(
            "RemoteProtocolError",
            f"node {engine.node} says that it loaded {what} into {engine.name}",
            hint="install the same weightsync on all nodes",
            engine=engine.name,
            phase="load",
        )
        self._on_engine_failed(ev.EngineFailed(engine=engine.name, phase="load", error=error), now, out)

    def _go_on_without(self, now: float, out: list[Instruction]) -> None:
        """One engine or more has left: whatever waited for it goes on."""
        if self.ended:
            self._free_slots()
        elif not self._worth_it():
            self._end_when_all_ended(now, out)
        elif self.state is State.OPENING:
            self._open_on(now, out)
        elif self.state is State.COMMITTING:
            self._resume_when_verified(now, out)
        else:
            self._go_on(now, out)

    def _on_bucket_released(self, event: ev.BucketReleased, now: float, out: list[Instruction]) -> None:
        engine = self.engines.get(event.engine)
        if engine is None or not 0 <= event.bucket < engine.loaded:
            return
        copy = self._copy(event.bucket, engine.node)
        if copy is None or event.engine not in copy.readers:
            return
        copy.readers.discard(event.engine)
        if (event.leaked or event.damaged) and not engine.stage.ended:
            # one that never lets go may still read a slot that is about to be filled again
            what = "never released" if event.leaked else "read back other bytes than were sent of"
            message = f"engine {engine.name} {what} bucket {event.bucket}"
            error = self._record("EngineError", message, engine=engine.name, bucket=event.bucket, phase="load")
            self._evict(engine, error, lost=False, now=now, out=out)
            self._go_on_without(now, out)
            return
        self._go_on(now, out)

    def _on_node_lost(self, event: ev.NodeLost, now: float, out: list[Instruction]) -> None:
        for rank in self._ranks_on(event.node):
            self._rank_stopped(rank)
        self._drop_node(event.node, event.error, "node", lost=True, now=now, out=out)
        for engine in self.engines.values():
            if engine.node == event.node:
                self._nothing_asked(engine, now)
        for index in range(len(self.buckets)) if event.node != self.home else ():
            self._lose_copy(index, event.node, now)  # nor is an export heard of that was under way when it was dropped
        self._go_on_without(now, out)

    # --- bridges --------------------------------------------------------------------------------------------------

    def _on_bridge_lost(self, event: ev.BridgeLost, now: float, out: list[Instruction]) -> None:
        """Its arena is gone, with every lease and export in it."""
        place = (event.node, event.bridge)
        for index in self._active:
            bucket = self.buckets[index]
            copy = bucket.copies.get(event.node)
            if copy is not None and copy.slot.bridge == event.bridge:
                bucket.unfilled.difference_update(self._ranks_on(event.node))
                self._lose_copy(index, event.node, now)
        if place in self._capacity:
            self._free[place] = list(range(self._capacity[place]))
        if self.state is State.OPENING and event.node == self.home:
            self._home_bridge_lost(now, out)
        elif self.state is State.TRANSFERRING and event.node == self.home:
            self._fail(about(event.error, phase="wire" if self._remote_nodes() else self._phase()), now, out)
        elif self.state is State.TRANSFERRING:
            self._drop_node(event.node, event.error, "wire", now=now, out=out)
            self._go_on_without(now, out)
        self._go_on(now, out)

    # --- trainer ranks --------------------------------------------------------------------------------------------

    def _on_rank_failed(self, event: ev.RankFailed, now: float, out: list[Instruction]) -> None:
        bucket, phase = self._at_work(event.rank)
        self._rank_stopped(event.rank)
        if not self.ended:
            self._fail(about(rank_failed(event.rank, event.error), bucket=bucket, phase=phase), now, out)
        self._free_slots()

    def _on_rank_lost(self, event: ev.RankLost, now: float, out: list[Instruction]) -> None:
        """The rank may be alive and still writing: the arenas it holds leases in are replaced."""
        bucket, phase = self._at_work(event.rank)
        node = self._rank_nodes.get(event.rank, self.home)
        held = {b.copies[node].slot.bridge for b in self.buckets if event.rank in b.unfilled and node in b.copies}
        for bridge in sorted(held):
            self._retire(node, bridge, f"rank {event.rank} was lost while it held a lease", now, out)
        self._rank_stopped(event.rank)
        if self.state in (State.OPENING, State.TRANSFERRING):
            message = f"trainer rank {event.rank} was lost: {event.reason}"
            error = self._record("PushAborted", message, rank=event.rank, bucket=bucket, phase=phase)
            self._fail(error, now, out)
        self._free_slots()

    def _on_rank_stopped(self, event: ev.RankStopped, now: float, out: list[Instruction]) -> None:
        if self.ended:
            self._rank_stopped(event.rank)
            self._free_slots()

    def _at_work(self, rank: int) -> tuple[int | None, str]:
        """The bucket that the rank was filling, if it was, and the phase it was in."""
        bucket = next((i for i, b in enumerate(self.buckets) if rank in b.unfilled), None)
        filling = bucket is not None or rank in self._unexposed or rank in self._unmeasured
        return bucket, "fill" if filling else self._phase()

    def _rank_stopped(self, rank: int) -> None:
        for bucket in self.buckets:
            bucket.unfilled.discard(rank)

    # --- time and the operator ------------------------------------------------------------------------------------

    def _on_tick(self, event: ev.Tick, now: float, out: list[Instruction]) -> None:
        if self.ended:
            if self._drain_until is not None and now >= self._drain_until and not self.done:
                self._abandon(now, out)
        elif now >= self.push_deadline:
            words, where = self._blame()
            message = f"the push did not end before its deadline; it was waiting for {words}"
            self._fail(about(self._record("PushTimeout", message), **where), now, out)

    def _on_stop_requested(self, event: ev.StopRequested, now: float, out: list[Instruction]) -> None:
        self._fail(self._record("PushAborted", event.reason, phase=self._phase()), now, out)
