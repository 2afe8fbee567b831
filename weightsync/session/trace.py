"""What a push did when: spans from each instruction to the event that ended it, in the format of Perfetto.

Pure: it is told what a session was given and what it answered, and by which clock. Open the file at ui.perfetto.dev or
chrome://tracing. Every node is a process there, and the trainer another; lanes are ranks, bridges and engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsync.session import events as ev
from weightsync.session import instructions as do

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Span", "Trace"]

_STEPS: dict[type[do.Instruction], str] = {
    do.ProbeEngine: "probe",
    do.AcceptEngine: "accept",
    do.PauseEngine: "pause",
    do.BeginEngine: "begin",
    do.FinishEngine: "finish",
    do.VerifyEngine: "verify",
    do.ResumeEngine: "resume",
}
_ENDS: dict[type[ev.Event], str] = {
    ev.EngineProbed: "probe",
    ev.EngineAccepted: "accept",
    ev.EnginePaused: "pause",
    ev.EngineBegun: "begin",
    ev.EngineFinished: "finish",
    ev.EngineVerified: "verify",
    ev.EngineResumed: "resume",
}
_OF_ENGINES = {*_STEPS.values(), "load", "release"}
_TRAINER = "trainer"
_Key = tuple[object, ...]


@dataclass
class Span:
    """One piece of work. `begin` and `end` are seconds of the session's clock; no end: it was under way at the last."""

    process: str  # a node, or the trainer
    lane: str
    name: str
    begin: float
    end: float | None = None
    failed: str = ""


class Trace:
    """The spans of one push."""

    def __init__(self, home: str, engines: Mapping[str, str], start: float) -> None:
        """`engines` says on which node each is."""
        self.spans: list[Span] = []
        self._home = home
        self._engines = engines
        self._start = start
        self._open: dict[_Key, Span] = {}

    def told(self, instructions: Iterable[do.Instruction], now: float) -> None:
        """What the session has answered."""
        for instruction in instructions:
            for key, span in self._begun(instruction, now):
                self._open[key] = span
                self.spans.append(span)

    def heard(self, event: ev.Event, now: float) -> None:
        """What the session was given."""
        match event:
            case ev.RankFilled():
                self._end(("fill", event.rank, event.bucket), now)
            case ev.BucketExported():
                self._end(("export", event.node, event.bucket), now)
            case ev.BucketRelayed():
                self._end(("wire", event.bucket), now, "; ".join(f"{n}: {e.message}" for n, e in event.failed))
            case ev.BucketLoaded():
                self._end(("load", event.engine, event.bucket), now)
            case ev.BucketReleased():
                self._end(("release", event.engine, event.bucket), now)
            case ev.PlanMade() | ev.PlanFailed() | ev.LayoutsMissing():
                self._end(("plan",), now)
            case ev.GroupFormed():
                self._end(("group", event.number), now)
            case ev.EngineFailed():
                for key in [key for key in self._open if key[0] in _OF_ENGINES and key[1] == event.engine]:
                    self._end(key, now, event.error.message)
            case _ if type(event) in _ENDS:
                self._end((_ENDS[type(event)], getattr(event, "engine", "")), now)

    def document(self, now: float) -> dict[str, Any]:
        """All of it as one JSON object (Trace Event Format; times are microseconds since the push began)."""
        rows: list[dict[str, Any]] = []
        processes: dict[str, int] = {}
        lanes: dict[tuple[str, str], list[float]] = {}  # lane → when each of its rows is free
        numbers: dict[tuple[str, str, int], int] = {}
        for span in sorted(self.spans, key=lambda span: span.begin):
            process = processes.setdefault(span.process, len(processes) + 1)
            free = lanes.setdefault((span.process, span.lane), [])
            end = now if span.end is None else span.end
            row = next((i for i, until in enumerate(free) if until <= span.begin), len(free))
            free[row : row + 1] = [end]
            thread = numbers.setdefault((span.process, span.lane, row), len(numbers) + 1)
            more = {"failed": span.failed} if span.failed else {"unfinished": True} if span.end is None else {}
            rows.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": process,
                    "tid": thread,
                    "ts": round((span.begin - self._start) * 1e6, 1),
                    "dur": round((end - span.begin) * 1e6, 1),
                    "args": more,
                }
            )
        named = [("process_name", pid, 0, name) for name, pid in processes.items()]
        named += [
            ("thread_name", processes[process], tid, lane if row == 0 else f"{lane} ({row + 1})")
            for (process, lane, row), tid in numbers.items()
        ]
        names = [{"ph": "M", "name": kind, "pid": p, "tid": t, "args": {"name": name}} for kind, p, t, name in named]
        return {"displayTimeUnit": "ms", "traceEvents": [*names, *rows]}

    def _begun(self, instruction: do.Instruction, now: float) -> Iterator[tuple[_Key, Span]]:
        match instruction:
            case do.GrantLease(bucket=bucket):
                for rank in instruction.ranks:
                    yield ("fill", rank, bucket), Span(_TRAINER, f"rank {rank}", f"fill {bucket}", now)
            case do.ExportBucket(bucket=bucket, slot=slot):
                span = Span(slot.node, f"bridge {slot.bridge}: export", f"export {bucket}", now)
                yield ("export", slot.node, bucket), span
            case do.RelayBucket(bucket=bucket, slot=slot):
                yield ("wire", bucket), Span(self._home, f"bridge {slot.bridge}: wire", f"broadcast {bucket}", now)
            case do.ExchangeBucket(bucket=bucket, slots=slots):
                bridge = slots[0].bridge
                yield ("wire", bucket), Span(self._home, f"bridge {bridge}: wire", f"exchange {bucket}", now)
            case do.LoadBucket(engine=engine, bucket=bucket):
                yield ("load", engine, bucket), self._of(engine, f"{engine}: load", f"load {bucket}", now)
            case do.AwaitRelease(engine=engine, bucket=bucket):
                yield ("release", engine, bucket), self._of(engine, f"{engine}: release", f"release {bucket}", now)
            case do.MakePlan():
                yield ("plan",), Span(self._home, "plan", "plan", now)
            case do.FormGroup():
                yield ("group", instruction.number), Span(self._home, "communicators", "form", now)
            case _ if type(instruction) in _STEPS:
                engine, step = getattr(instruction, "engine", ""), _STEPS[type(instruction)]
                yield (step, engine), self._of(engine, engine, step, now)

    def _of(self, engine: str, lane: str, name: str, now: float) -> Span:
        return Span(self._engines[engine], lane, name, now)

    def _end(self, key: _Key, now: float, failed: str = "") -> None:
        span = self._open.pop(key, None)
        if span is not None:
            span.end, span.failed = now, failed
