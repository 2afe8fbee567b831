"""Weights by buckets: slots are leased and filled, exported, relayed to other nodes, loaded, and free again.

Engines that take none (see `drawing`) may be in the same push; where none takes buckets, no slot is leased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.committing import Committing
from weightsync.session.state import State, about
from weightsync.session.tracks import Copy, EngineStage, EngineTrack

if TYPE_CHECKING:
    from weightsync.session import events as ev
    from weightsync.session.instructions import Instruction

__all__ = ["Transferring"]

_RELAYS = 2  # broadcasts of one bridge that are asked for at a time


class Transferring(Committing):
    """Rules of the state TRANSFERRING."""

    def _begin_transfer(self, now: float, out: list[Instruction]) -> None:
        self.state = State.TRANSFERRING
        out.append(do.AnnouncePlan(expose=bool(self._unexposed)))
        for engine in self._live():  # with "none" too: what comes nearest to it is the engine's own affair
            engine.stage, engine.paused_by_us = EngineStage.PAUSING, True
            self._ask(engine, "pause", now)
            self._begun_at[engine.name] = now
            out.append(do.PauseEngine(engine=engine.name, mode=self.pause, deadline=self._until(now)))
        self._go_on(now, out)

    def _on_engine_paused(self, event: ev.EnginePaused, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "pause", now, out)
        if engine is not None:
            engine.stage = EngineStage.PAUSED
            self._go_on(now, out)

    def _on_engine_begun(self, event: ev.EngineBegun, now: float, out: list[Instruction]) -> None:
        engine = self._answered(event.engine, "begin", now, out)
        if engine is not None:
            engine.stage = EngineStage.LOADING
            self._go_on(now, out)

    def _on_rank_filled(self, event: ev.RankFilled, now: float, out: list[Instruction]) -> None:
        if not 0 <= event.bucket < len(self.buckets):
            return
        bucket = self.buckets[event.bucket]
        if event.rank not in bucket.unfilled:
            return
        bucket.unfilled.discard(event.rank)
        self.filled_bytes += event.nbytes
        if not bucket.unfilled and not bucket.filled:
            bucket.filled = True
            self.phases.stop("fill", now)
            if not self.ended and not self._spread:
                self._export(event.bucket, self.home, now, out)
        self._go_on(now, out)

    def _on_bucket_exported(self, event: ev.BucketExported, now: float, out: list[Instruction]) -> None:
        copy = self._copy(event.bucket, event.node)
        if copy is None or not copy.exporting:
            return
        copy.exporting, copy.exported = False, True
        self.phases.stop("export", now)
        for name in sorted(copy.named - copy.readers):  # evicted meanwhile: only now is there a hold to revoke
            self._revoke(name, event.bucket, now, out)
        self._go_on(now, out)

    def _on_bucket_relayed(self, event: ev.BucketRelayed, now: float, out: list[Instruction]) -> None:
        if not 0 <= event.bucket < len(self.buckets):
            return
        bucket = self.buckets[event.bucket]
        if not any(copy.relaying for copy in bucket.copies.values()):
            return
        bucket.relayed = True
        for copy in bucket.copies.values():
            copy.relaying = False
        self.phases.stop("wire", now)
        for node, error in event.failed:
            if node == self.home and not self.ended:
                self._fail(about(error, bucket=event.bucket, phase="wire"), now, out)
            self._drop_node(node, error, "relay", now=now, out=out)
        if not self.ended:
            for node in event.nodes:
                if node in self._nodes and node in bucket.copies:
                    self._export(event.bucket, node, now, out)
        self._go_on(now, out)

    def _on_bucket_loaded(self, event: ev.BucketLoaded, now: float, out: list[Instruction]) -> None:
        known = self.engines.get(event.engine)
        if known is None or known.next_bucket != event.bucket:
            return
        engine = self._succeeded(event.engine, "load", now, out)
        if engine is None:
            return
        for bucket in range(event.bucket, event.bucket + event.count):
            engine.next_bucket += 1
            engine.loaded += 1
            out.append(do.AwaitRelease(engine=engine.name, bucket=bucket, deadline=self._until(now)))
        self._go_on(now, out)

    # --- going on ---------------------------------------------------------------------------------------------------

    def _go_on(self, now: float, out: list[Instruction]) -> None:
        """Issue whatever has become possible: in bucket order for slots and relays, in its own order for each
        engine.
        """
        self._free_slots()
        if self.state is State.COMMITTING:
            self._resume_when_verified(now, out)
        if self.state is not State.TRANSFERRING:
            return
        live = self._live()
        if not self._worth_it():
            self._end_when_all_ended(now, out)
            return
        drawing = any(engine.draws and not self._all_loaded(engine) for engine in live)
        if not (drawing or self._delivering or all(engine.draws for engine in live)):
            self._grant(now, out)  # not before: an engine that finds that it cannot draw needs every bucket
        self._relay(now, out)
        for engine in live:
            self._advance(engine, now, out)
        loaded = all(e.stage is EngineStage.LOADING and self._all_loaded(e) for e in live)
        measured = not (self._unmeasured and any(engine.draws for engine in live))
        if loaded and measured and not self._delivering:  # a delivery to one that was lost reads the weights still
            self._begin_commit(now, out)

    def _all_loaded(self, engine: EngineTrack) -> bool:
        return engine.asked is None and engine.next_bucket == len(self.buckets)

    def _grant(self, now: float, out: list[Instruction]) -> None:
        """Lease slots, in bucket order. Where ranks of several nodes write, a bucket gets its slots on all nodes at
        once: one that waited for a slot while later ones held them all would wait for ever.
        """
        nodes = sorted(self._nodes) if self._spread else [self.home]
        for owner, waiting in self._ungranted.items():
            free = [self._free.get((node, owner), []) for node in nodes]
            while waiting and all(free):
                index = waiting.popleft()
                bucket = self.buckets[index]
                bucket.unfilled = set(bucket.fillers)
                self._active.add(index)
                self.phases.start("fill", now)
                writers: dict[str, list[int]] = {}
                for rank in sorted(bucket.fillers):
                    writers.setdefault(self._rank_nodes[rank], []).append(rank)
                for node, indices in zip(nodes, free, strict=True):
                    slot = do.Slot(node, owner, indices.pop(0))
                    bucket.copies[node] = Copy(slot)
                    if node in writers:
                        out.append(do.GrantLease(bucket=index, slot=slot, ranks=tuple(writers[node])))

    def _export(self, index: int, node: str, now: float, out: list[Instruction]) -> None:
        bucket = self.buckets[index]
        copy = bucket.copies[node]
        copy.readers = {e.name for e in self._live() if e.node == node and not e.draws}
        copy.named = frozenset(copy.readers)
        if bucket.relayed and not copy.readers:
            copy.exported = True  # to nobody: it was only on its way
            return
        copy.exporting = True
        self.phases.start("export", now)
        out.append(
            do.ExportBucket(
                bucket=index,
                slot=copy.slot,
                nbytes=bucket.nbytes,
                engines=tuple(sorted(copy.readers)),
                deadline=self._until(now),
            )
        )

    def _relay(self, now: float, out: list[Instruction]) -> None:
        """Broadcasts on each bridge, in bucket order, as soon as every remote node has a free slot. One is asked for
        while another is under way, so that no wire waits for daemons; an exchange is not, since who breaks one that
        follows a broken one is not to blame.
        """
        remote = self._receivers()
        if not remote:
            return
        for rail, waiting in self._unrelayed.items():
            if self._spread:
                if waiting and self.buckets[waiting[0]].filled and not self._relaying(rail):
                    self._exchange(waiting.popleft(), now, out)
                continue
            while waiting and self._relaying(rail) < _RELAYS:
                bucket = self.buckets[waiting[0]]
                home = bucket.copies.get(self.home)
                places = [(node, rail) for node in remote]
                if home is None or not home.exported or not all(self._free.get(place) for place in places):
                    break
                targets = tuple(do.Slot(node, rail, self._free[node, rail].pop(0)) for node, _ in places)
                self._broadcast(waiting.popleft(), home, targets, now, out)

    def _relaying(self, rail: int) -> int:
        """Buckets of which a broadcast or an exchange is under way on a bridge."""
        mine = (self.buckets[index] for index in self._active if self.buckets[index].owner == rail)
        return sum(any(copy.relaying for copy in bucket.copies.values()) for bucket in mine)

    def _broadcast(
        self, index: int, home: Copy, targets: tuple[do.Slot, ...], now: float, out: list[Instruction]
    ) -> None:
        bucket = self.buckets[index]
        for target in targets:
            bucket.copies[target.node] = Copy(target)
        home.relaying = True
        self.phases.start("wire", now)
        out.append(
            do.RelayBucket(
                bucket=index, slot=home.slot, nbytes=bucket.nbytes, targets=targets, deadline=self._until(now)
            )
        )

    def _exchange(self, index: int, now: float, out: list[Instruction]) -> None:
        bucket = self.buckets[index]
        for copy in bucket.copies.values():
            copy.relaying = True
        self.phases.start("wire", now)
        slots = tuple(copy.slot for _, copy in sorted(bucket.copies.items()))
        out.append(do.ExchangeBucket(bucket=index, slots=slots, deadline=self._until(now)))

    def _advance(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        """Begin the engine at its first bucket, then load what has been exported, several buckets in one call: it costs
        a real engine as much as a small bucket. Half of the slots at most, the larger half of an odd number of them:
        the rest is filled meanwhile.
        """
        if engine.asked is not None:
            return
        there = self._exported(engine, most=min((self._slots_of(engine.node) + 1) // 2, do.MOST_LOADED))
        if engine.stage is EngineStage.PAUSED and (there or not self.buckets):
            self._begin_engine(engine, now, out)
        elif engine.stage is EngineStage.LOADING and there:
            engine.loading = there
            self._ask(engine, "load", now)
            out.append(
                do.LoadBucket(engine=engine.name, bucket=engine.next_bucket, count=there, deadline=self._until(now))
            )

    def _begin_engine(self, engine: EngineTrack, now: float, out: list[Instruction]) -> None:
        engine.stage, engine.touched = EngineStage.BEGINNING, True
        self._ask(engine, "begin", now)
        self._begun_at.setdefault(engine.name, now)
        out.append(do.BeginEngine(engine=engine.name, deadline=self._until(now)))

    def _exported(self, engine: EngineTrack, most: int) -> int:
        """How many of the buckets that come next for this engine, up to `most`, lie ready for it."""
        for count in range(most):
            copy = self._copy(engine.next_bucket + count, engine.node)
            if copy is None or not copy.exported:
                return count
        return most

    def _slots_of(self, node: str) -> int:
        return sum(count for (where, _), count in self._capacity.items() if where == node)
