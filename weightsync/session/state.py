"""What a session knows of its push, what it is asked about it, and what must always hold.

The rules that change it are in `opening`, `drawing`, `transferring`, `committing`, `ending` and `failing`, each a class
on top of the one it uses; `machine` puts them together.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import ErrorRecord
from weightsync.session.tracks import BucketTrack, Copy, EngineStage, EngineTrack, PhaseClock

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Container, Mapping


__all__ = ["PUSH_ERRORS", "SessionState", "State", "about", "buckets", "listed", "rank_failed"]


class State(StrEnum):
    """Where a push stands; see `machine`. The last three are ends."""

    OPENING = "opening"
    TRANSFERRING = "transferring"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTED = "aborted"
    TORN = "torn"

    @property
    def ended(self) -> bool:
        return self in _ENDED


_ENDED = frozenset({State.COMMITTED, State.ABORTED, State.TORN})


class SessionState:
    """Everything a `PushSession` remembers. Changed by the rules alone."""

    def __init__(
        self,
        *,
        model: str,
        version: int,
        world: int,
        home: str,
        engines: Mapping[str, str],
        slots: Mapping[tuple[str, int], int],
        pause: str,
        deadline: float,
        operation_timeout: float,
        grace: float,
        last_version: int | None,
        keepers: Container[str],
    ) -> None:
        """`engines` maps name to node; `slots` maps (node, bridge) to how many slots it has, the home node's at
        least. `keepers` are those engines that only keep what is pushed: without an engine that serves it, nothing is.
        """
        self.model, self.version, self.world, self.home, self.pause = model, version, world, home, pause
        self.push_deadline = deadline
        self.operation_timeout = operation_timeout
        self.grace = grace
        self.last_version = last_version
        self.state = State.OPENING
        self.error: ErrorRecord | None = None
        self.engines = {name: EngineTrack(name, node, keeper=name in keepers) for name, node in engines.items()}
        self.buckets: list[BucketTrack] = []
        self.phases = PhaseClock()
        self.nbytes = 0  # of the whole plan
        self.filled_bytes = 0
        self.started = self.finished = 0.0
        self._free = {place: list(range(count)) for place, count in slots.items()}
        self._capacity = dict(slots)
        self._layouts: dict[int, bytes] = {}
        self._awaited_layouts: set[int] = set()
        self._planning = self._planned = False
        self._rails_ready = False
        self._rails_number = 0  # number of the one that is waited for
        self._nodes: set[str] = {home, *engines.values()}  # and those of the ranks; without what has left
        self._rank_nodes: dict[int, str] = {}
        self._in_place: set[int] = set()  # ranks whose weights may be read where they lie
        self._unexposed: set[int] = set()  # ranks that were asked where that is, and have not said
        self._unmeasured: set[int] = set()  # ranks of which the fingerprints of that have not come
        self._delivering: frozenset[str] = frozenset()  # nodes to which bridges do, which use all slots there and here
        self._spread = False  # ranks of several nodes write: every node gets every bucket by an exchange
        self._ungranted: dict[int, deque[int]] = {}  # by bridge: buckets that wait for a slot, in order
        self._unrelayed: dict[int, deque[int]] = {}  # by bridge: buckets that wait for their broadcast, in order
        self._active: set[int] = set()  # buckets that lie in a slot somewhere
        self._drain_until: float | None = None
        self._abandoned = False
        self._begun_at: dict[str, float] = {}

    # --- what the daemon asks -----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """The outcome is decided."""
        return self.state.ended

    @property
    def done(self) -> bool:
        """Ended, and nothing of it is under way any more: the next push may use engines and slots."""
        return self.ended and (self._abandoned or not self._outstanding())

    @property
    def fleet(self) -> list[EngineTrack]:
        """Engines that serve: all but keepers."""
        return [e for e in self.engines.values() if not e.keeper]

    @property
    def torn(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.fleet if e.stage is EngineStage.TORN)

    @property
    def committed(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.fleet if e.stage is EngineStage.COMMITTED)

    def taken(self, node: str, bridge: int) -> int:
        """How many slots of a bridge hold a bucket."""
        place = (node, bridge)
        return self._capacity[place] - len(self._free[place]) if place in self._capacity else 0

    def deadline(self) -> float | None:
        """When `Tick` is due; None once done."""
        if self.done:
            return None
        return self._drain_until if self.ended else self.push_deadline

    def waiting_for(self) -> str:
        """What keeps the push from going on, in words, for errors and status."""
        return self._blame()[0]

    def _blame(self) -> tuple[str, dict[str, int | str]]:
        """What is waited for, in words and as fields of an error."""
        if self.state is State.OPENING:
            missing = [r for r in range(self.world) if r not in self._layouts]
            if missing:
                words = f"rank{'s' if len(missing) > 1 else ''} {listed(missing)} of {self.world} to call push_weights"
                return words, {"rank": missing[0], "phase": "open"}
            if self._awaited_layouts:
                ranks = sorted(self._awaited_layouts)
                return f"the layout of rank {listed(ranks)}", {"rank": ranks[0], "phase": "plan"}
            if self._planned and not self._rails_ready:
                return f"the communicator to {', '.join(self._remote_nodes())}", {"phase": "open"}
        if self._unexposed:
            ranks = sorted(self._unexposed)
            return f"rank {listed(ranks)} to expose its weights", {"rank": ranks[0], "phase": "fill"}
        writing = [(i, sorted(b.unfilled)) for i, b in enumerate(self.buckets) if b.unfilled]
        if writing:
            bucket, ranks = writing[0]
            words = f"rank {listed(ranks)} to fill bucket {bucket}"
            return words, {"rank": ranks[0], "bucket": bucket, "phase": "fill"}
        busy = [e for e in self.engines.values() if e.asked]
        if busy:
            what = {e.name: f", {buckets(e.next_bucket, e.loading)}" if e.asked == "load" else "" for e in busy}
            words = ", ".join(f"{e.name} ({e.asked}{what[e.name]})" for e in busy)
            first = busy[0]
            fields: dict[str, int | str] = {"engine": first.name, "phase": first.asked or ""}
            if first.asked == "load":
                fields["bucket"] = first.next_bucket
            return f"engine {words}", fields
        if self.state is State.OPENING:
            return "the plan", {"phase": "plan"}
        held = sorted(self._held())
        if self.state is State.COMMITTING and held:
            name, bucket = held[0]
            return f"engine {name} to release bucket {bucket}", {"engine": name, "bucket": bucket, "phase": "load"}
        if self._unmeasured:
            ranks = sorted(self._unmeasured)
            return f"the fingerprints of rank {listed(ranks)}", {"rank": ranks[0], "phase": "fill"}
        if self.phases.active["export"] and not self.phases.active["wire"]:
            bucket = min(i for i in self._active if any(c.exporting for c in self.buckets[i].copies.values()))
            return f"a bridge to export bucket {bucket}", {"bucket": bucket, "phase": "export"}
        return "the wire", {"phase": "wire"}

    def validate(self) -> None:
        """Raise AssertionError if a promise does not hold; cheap enough to call after each event in tests."""
        held: set[tuple[str, int, int]] = set()
        for index, bucket in enumerate(self.buckets):
            assert bucket.unfilled <= bucket.fillers, f"bucket {index} waits for a rank that does not fill it"
            for node, copy in bucket.copies.items():
                key = (node, copy.slot.bridge, copy.slot.index)
                assert key not in held, f"slot {key} holds two buckets"
                assert copy.slot.index not in self._free.get(key[:2], []), f"slot {key} is free and holds {index}"
                held.add(key)
                assert not copy.exported or not bucket.unfilled, f"bucket {index} was exported before it was filled"
        for engine in self.engines.values():
            assert engine.next_bucket <= len(self.buckets)
            if engine.stage is EngineStage.COMMITTED:
                assert engine.loaded == len(self.buckets), f"{engine.name} committed without every bucket"
                assert self.state in (State.COMMITTING, State.COMMITTED, State.TORN)
            if engine.stage is EngineStage.SKIPPED:
                assert not engine.touched, f"{engine.name} was touched and counts as untouched"
            if engine.touched and engine.stage is EngineStage.RESUMING:
                assert engine.loaded == len(self.buckets), f"{engine.name} is resumed with a mixture"
                assert not any(e == engine.name for e, _ in self._held()), f"{engine.name} may yet turn out damaged"
            if engine.asked == "draw":
                assert engine.touched, f"{engine.name} draws and was not begun"
                assert engine.node == self.home, f"{engine.name} draws from another node"
            if engine.asked in ("show", "deliver"):
                assert engine.touched, f"{engine.name} shows its places and was not begun"
                assert engine.node != self.home, f"{engine.name} has its own node deliver"
            if engine.asked == "resume" and engine.touched:
                assert engine.stage is EngineStage.RESUMING, f"{engine.name} is torn and is being resumed"
        if not self.ended:
            counted = Counter(engine.phase for engine in self.engines.values())
            for bucket in self.buckets:
                copies = bucket.copies.values()
                counted["export"] += sum(copy.exporting for copy in copies)
                counted["wire"] += any(copy.relaying for copy in copies)
            for phase in ("export", "wire", "load", "finalise", "verify"):
                assert self.phases.active[phase] == counted[phase], f"{phase} counts as under way, and is not"
        if self.state is State.ABORTED:
            assert not any(e.touched for e in self.fleet), "aborted, yet an engine was touched"
        if self.ended:
            assert self.state is State.COMMITTED or self.error is not None
            if self.error is not None:
                assert self.error.kind in PUSH_ERRORS, f"a push ends with a {self.error.kind}"
        else:
            assert self.error is None

    # --- what the rules share -----------------------------------------------------------------------------------

    def _until(self, now: float) -> float:
        """When an operation that begins now must have ended."""
        return min(self.push_deadline, now + self.operation_timeout)

    def _live(self) -> list[EngineTrack]:
        """Engines that may still commit, keepers among them."""
        return [e for e in self.engines.values() if not e.stage.ended]

    def _worth_it(self) -> bool:
        """Whether an engine that serves may still commit."""
        return any(not e.stage.ended for e in self.fleet)

    def _remote_nodes(self) -> list[str]:
        return sorted(self._nodes - {self.home})

    def _receivers(self) -> list[str]:
        """Nodes that buckets are sent to: every other node, so that communicators stay as they are, or none once no
        engine there takes buckets.
        """
        taken = self._spread or any(e.node != self.home and not e.draws for e in self._live())
        return self._remote_nodes() if taken else []

    def _held(self) -> set[tuple[str, int]]:
        """Engines and the buckets of which they have not said yet that they let go of them whole."""
        return {(e, i) for i in self._active for copy in self.buckets[i].copies.values() for e in copy.readers}

    def _ranks_on(self, node: str) -> list[int]:
        return sorted(rank for rank, place in self._rank_nodes.items() if place == node)

    def _copy(self, bucket: int, node: str) -> Copy | None:
        return self.buckets[bucket].copies.get(node) if 0 <= bucket < len(self.buckets) else None

    def _outstanding(self) -> bool:
        return bool(self._active) or bool(self._delivering) or any(e.asked for e in self.engines.values())

    def _free_slots(self) -> None:
        """Take back each copy that nobody writes, sends or reads any more."""
        remote = self._receivers()
        for index in list(self._active):
            bucket = self.buckets[index]
            for node, copy in list(bucket.copies.items()):
                idle = not (bucket.unfilled or copy.readers or copy.exporting or copy.relaying)
                served = copy.exported and (node != self.home or bucket.relayed or not remote)
                if idle and (served or self.ended):
                    del bucket.copies[node]
                    self._free.setdefault((node, copy.slot.bridge), []).append(copy.slot.index)
            if not bucket.copies:
                self._active.discard(index)

    def _lose_copy(self, index: int, node: str, now: float) -> None:
        """Its arena is gone, or nobody will be heard of it any more."""
        copies = self.buckets[index].copies
        copy = copies.pop(node, None)
        if copy is not None and copy.exporting:
            self.phases.stop("export", now)
        if copy is not None and copy.relaying and not any(c.relaying for c in copies.values()):
            self.phases.stop("wire", now)

    def _phase(self) -> str:
        return {State.OPENING: "open", State.TRANSFERRING: "transfer"}.get(self.state, "finalise")

    def _record(self, kind: str, message: str, *, hint: str | None = None, **where: object) -> ErrorRecord:
        """An error of this push; `where` is any of rank, engine, bucket and phase."""
        record = ErrorRecord(kind=kind, message=message, model=self.model, version=self.version, hint=hint)
        return about(record, **where)


PUSH_ERRORS = frozenset({"PushRefused", "PushAborted", "PushTimeout"})
"""How a push as a whole may end, besides well."""


def about(error: ErrorRecord, **changes: object) -> ErrorRecord:
    """The same error with who and where filled in; `message` and `kind` replace, the rest only fills gaps."""
    fill = {k: v for k, v in changes.items() if k in ("message", "kind") or getattr(error, k) is None}
    return msgspec.structs.replace(error, **fill)


def rank_failed(rank: int, error: ErrorRecord) -> ErrorRecord:
    """What a push ends with on all ranks when one of them has failed with `error`."""
    if error.kind in PUSH_ERRORS:
        return about(error, rank=rank)
    return about(error, kind="PushAborted", message=f"trainer rank {rank} failed: {error.message}", rank=rank)


def buckets(first: int, count: int) -> str:
    """Some buckets, one after the other, in words."""
    return f"bucket {first}" if count == 1 else f"buckets {first} to {first + count - 1}"


def listed(numbers: list[int]) -> str:
    """Some numbers in words, not all of many."""
    shown = ", ".join(str(n) for n in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
