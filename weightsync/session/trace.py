"""Records what a push did when: spans from each instruction to the event that ended it.

Pure: a `Trace` is told each event and each answer of a session, with its time. It only notes them, which is cheap
enough for every push. `Trace.spans` makes spans of the notes, and `weightsync.chrome_trace` puts them into a file. In
that file each node is a process, and the trainer is another; lanes are ranks, bridges and engines.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsync.session import events as ev
from weightsync.session import instructions as do

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["NOTES", "TRAINER", "Span", "Trace"]

NOTES = 100_000  # in one push; after them, notes of single buckets are left out
LAST = 10_000  # more notes, for what is rare: failures, each engine's steps, the end

_STEPS: dict[type[do.Instruction], str] = {
    do.ProbeEngine: "probe",
    do.AcceptEngine: "accept",
    do.PauseEngine: "pause",
    do.BeginEngine: "begin",
    do.DrawWeights: "draw",
    do.ShowPlaces: "show",
    do.FinishEngine: "finish",
    do.VerifyEngine: "verify",
    do.ResumeEngine: "resume",
}
_ENDS: dict[type[ev.Event], str] = {
    ev.EngineProbed: "probe",
    ev.EngineAccepted: "accept",
    ev.EnginePaused: "pause",
    ev.EngineBegun: "begin",
    ev.WeightsDrawn: "draw",
    ev.PlacesShown: "show",
    ev.EngineFinished: "finish",
    ev.EngineVerified: "verify",
    ev.EngineResumed: "resume",
}
# successes of single buckets, which come for each bucket and each rank or engine
_MANY = (ev.RankFilled, ev.BucketExported, ev.BucketRelayed, ev.BucketLoaded, ev.BucketReleased)
_MANY_TOLD = (do.GrantLease, do.ExportBucket, do.RelayBucket, do.ExchangeBucket, do.LoadBucket, do.AwaitRelease)
_OF_BUCKETS = ("fill", "export", "wire", "load", "release")
TRAINER = "trainer"
_Key = tuple[object, ...]


@dataclass(slots=True)
class Span:
    """One piece of work. `begin` and `end` are seconds of the session's clock; `end` is None while it is under way."""

    process: str  # a node, or the trainer
    lane: str
    step: str  # fill, load, verify, …
    name: str  # the same, with the bucket
    begin: float
    end: float | None = None
    failed: str = ""
    bucket: int | None = None
    count: int = 1  # number of buckets, beginning with `bucket`
    nbytes: int = 0
    engine: str = ""
    rank: int | None = None
    cut: bool = False  # it was under way when the trace became full, and `end` is that time


class Trace:
    """The spans of one push."""

    def __init__(self, home: str, engines: Mapping[str, str], start: float) -> None:
        """`engines` maps each engine's name to its node."""
        self.home = home
        self.start = start
        self.dropped = 0  # notes that were left out
        self._engines = engines
        self._times = array("d")
        self._notes: list[ev.Event | list[do.Instruction]] = []  # what was heard, and what was answered
        self._cut: tuple[int, float] | None = None  # where the first left-out note would have been, and its time

    def told(self, instructions: list[do.Instruction], now: float) -> None:
        """Note what the session has answered. The list is kept, so it must not be changed any more."""
        if instructions:
            self._note(instructions, now)

    def heard(self, event: ev.Event, now: float) -> None:
        """Note what the session was given."""
        if not isinstance(event, ev.Tick):
            self._note(event, now)

    def _note(self, note: ev.Event | list[do.Instruction], now: float) -> None:
        if len(self._notes) >= NOTES:
            few = _few(note) if len(self._notes) < NOTES + LAST else None
            if few is not note:
                self.dropped += 1
                self._cut = self._cut or (len(self._notes), now)
            if few is None:
                return
            note = few
        self._times.append(now)
        self._notes.append(note)

    def spans(self) -> list[Span]:
        """Return all spans known by now, in the order in which they became known."""
        reading = _Reading(self.home, self._engines)
        notes, (cut, full) = tuple(self._notes), self._cut or (-1, 0.0)  # a push under way adds to them meanwhile
        for i, (now, note) in enumerate(zip(self._times, notes, strict=False)):
            if i == cut:
                reading.cut(full)
            if isinstance(note, list):
                for instruction in note:
                    reading.begin(instruction, now)
            else:
                reading.hear(note, now)
        if cut == len(notes):
            reading.cut(full)
        return reading.spans


def _few(note: ev.Event | list[do.Instruction]) -> ev.Event | list[do.Instruction] | None:
    """Return what a full trace still takes of a note: all of it, some of its instructions, or None."""
    if isinstance(note, list):
        few = [instruction for instruction in note if not isinstance(instruction, _MANY_TOLD)]
        return note if len(few) == len(note) else few or None
    went_wrong = (isinstance(note, ev.BucketReleased) and (note.leaked or note.damaged)) or (
        isinstance(note, ev.BucketRelayed) and note.failed
    )
    return note if went_wrong or not isinstance(note, _MANY) else None


class _Reading:
    """Makes spans of notes, from the first to the last."""

    def __init__(self, home: str, engines: Mapping[str, str]) -> None:
        self.spans: list[Span] = []
        self._home, self._engines = home, engines
        self._first: float | None = None  # when the first rank called
        self._announced = 0.0  # when ranks were told of the plan
        self._open: dict[_Key, Span] = {}
        self._sizes: tuple[int, ...] = ()  # of the buckets
        self._full = False

    def cut(self, now: float) -> None:
        """End the spans of single buckets that are under way: from here on, only failures of buckets are noted."""
        self._full = True
        for key in [key for key, span in self._open.items() if span.step in _OF_BUCKETS]:
            span = self._open.pop(key)
            span.end, span.cut = now, True

    def begin(self, instruction: do.Instruction, now: float) -> None:
        for key, span in self._begun(instruction, now):
            if span.bucket is not None and span.step != "fill" and span.bucket < len(self._sizes):
                span.nbytes = sum(self._sizes[span.bucket : span.bucket + span.count])
            self._open[key] = span
            self.spans.append(span)

    def hear(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.RankFilled():
                if (span := self._open.get(("fill", event.rank, event.bucket))) is not None:
                    span.nbytes = event.nbytes
                self._end(("fill", event.rank, event.bucket), now)
            case ev.BucketExported():
                self._end(("export", event.node, event.bucket), now)
            case ev.BucketRelayed():
                wrong = "; ".join(f"{n}: {e.message}" for n, e in event.failed)
                if not self._end(("wire", event.bucket), now, wrong):
                    self._beyond(Span(self._home, "wire", "wire", f"wire {event.bucket}", now), wrong)
            case ev.BucketLoaded():
                self._end(("load", event.engine, event.bucket), now)
            case ev.BucketReleased():
                wrong = "never given back" if event.leaked else "other bytes were read" if event.damaged else ""
                if not self._end(("release", event.engine, event.bucket), now, wrong):
                    self._beyond(self._of(event.engine, "release", now, event.bucket), wrong)
            case ev.RankOpened():
                self._opened(event, now)
            case ev.RankExposed() | ev.RankMeasured():
                step = "expose" if isinstance(event, ev.RankExposed) else "measure"
                span = Span(TRAINER, f"rank {event.rank}: {step}", step, step, self._announced, now, rank=event.rank)
                span.nbytes = getattr(event, "nbytes", 0)
                span.failed = getattr(event, "problem", "")
                self.spans.append(span)
            case ev.WeightsDelivered():
                for engine in event.engines:
                    self._end(("deliver", engine), now, event.problem)
            case ev.PlanMade():
                self._sizes = tuple(bucket.nbytes for bucket in event.buckets)
                self._end(("plan",), now)
            case ev.PlanFailed():
                self._end(("plan",), now, event.error.message)
            case ev.LayoutsMissing():
                self._end(("plan",), now)
            case ev.RailsFormed():
                self._end(("rails", event.number), now, "; ".join(f"{n}: {e.message}" for n, e in event.failed))
            case ev.EngineFailed():
                why = event.error.message
                if not self._fail(lambda span: span.engine == event.engine, now, why):
                    self._beyond(self._of(event.engine, event.phase, now), why)
            case ev.RankFailed() | ev.RankLost():
                why = event.reason if isinstance(event, ev.RankLost) else event.error.message
                if not self._fail(lambda span: span.rank == event.rank, now, why):
                    self._beyond(Span(TRAINER, f"rank {event.rank}", "fill", "fill", now, rank=event.rank), why)
            case ev.NodeLost():
                if not self._fail(lambda span: span.process == event.node, now, event.error.message):
                    self._beyond(Span(event.node, "node", "lost", "lost", now), event.error.message)
            case ev.BridgeLost():
                lane = f"bridge {event.bridge}:"
                gone = event.error.message
                if not self._fail(lambda span: span.process == event.node and span.lane.startswith(lane), now, gone):
                    self._beyond(Span(event.node, lane.rstrip(":"), "lost", "lost", now), gone)
            case _ if type(event) in _ENDS:
                self._end((_ENDS[type(event)], getattr(event, "engine", "")), now, getattr(event, "problem", ""))

    def _opened(self, event: ev.RankOpened, now: float) -> None:
        lane, rank = f"rank {event.rank}", event.rank
        if event.describe_seconds > 0:
            before = now - event.describe_seconds
            self.spans.append(Span(TRAINER, lane, "describe", "describe", before, now, rank=rank))
        if self._first is None:
            self._first = now
        else:
            self.spans.append(Span(TRAINER, lane, "late", "has not called yet", self._first, now, rank=rank))

    def _begun(self, instruction: do.Instruction, now: float) -> Iterator[tuple[_Key, Span]]:
        match instruction:
            case do.GrantLease(bucket=bucket):
                for rank in instruction.ranks:
                    span = Span(TRAINER, f"rank {rank}", "fill", f"fill {bucket}", now, bucket=bucket, rank=rank)
                    yield ("fill", rank, bucket), span
            case do.ExportBucket(bucket=bucket, slot=slot):
                span = Span(slot.node, f"bridge {slot.bridge}: export", "export", f"export {bucket}", now)
                span.bucket = bucket
                yield ("export", slot.node, bucket), span
            case do.RelayBucket(bucket=bucket, slot=slot):
                span = Span(self._home, f"bridge {slot.bridge}: wire", "wire", f"broadcast {bucket}", now)
                span.bucket = bucket
                yield ("wire", bucket), span
            case do.ExchangeBucket(bucket=bucket, slots=slots):
                span = Span(self._home, f"bridge {slots[0].bridge}: wire", "wire", f"exchange {bucket}", now)
                span.bucket = bucket
                yield ("wire", bucket), span
            case do.DeliverWeights():
                for engine in instruction.engines:
                    yield ("deliver", engine), self._of(engine, "deliver", now)
            case do.LoadBucket(engine=engine, bucket=bucket):
                yield ("load", engine, bucket), self._of(engine, "load", now, bucket, instruction.count)
            case do.AwaitRelease(engine=engine, bucket=bucket):
                yield ("release", engine, bucket), self._of(engine, "release", now, bucket)
            case do.AnnouncePlan():
                self._announced = now
            case do.MakePlan():
                yield ("plan",), Span(self._home, "plan", "plan", "plan", now)
            case do.FormRails():
                yield ("rails", instruction.number), Span(self._home, "communicators", "form", "form", now)
            case _ if type(instruction) in _STEPS:
                engine, step = getattr(instruction, "engine", ""), _STEPS[type(instruction)]
                yield (step, engine), self._of(engine, step, now)

    def _of(self, engine: str, step: str, now: float, bucket: int | None = None, count: int = 1) -> Span:
        lane, name = (engine, step) if bucket is None else (f"{engine}: {step}", f"{step} {bucket}")
        if bucket is not None and count > 1:
            name += f"-{bucket + count - 1}"
        return Span(self._engines[engine], lane, step, name, now, bucket=bucket, count=count, engine=engine)

    def _end(self, key: _Key, now: float, failed: str = "") -> bool:
        span = self._open.pop(key, None)
        if span is not None:
            span.end, span.failed = now, failed
        return span is not None

    def _fail(self, of: Callable[[Span], bool], now: float, why: str) -> bool:
        keys = [key for key, span in self._open.items() if of(span)]
        for key in keys:
            self._end(key, now, why)
        return bool(keys)

    def _beyond(self, span: Span, wrong: str) -> None:
        """Add a span without length for a failure that a full trace noted, but whose beginning it did not."""
        if self._full and wrong:
            span.end, span.failed = span.begin, wrong
            self.spans.append(span)
