"""What a session remembers of each engine, each bucket and each phase while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightsync.errors import ErrorRecord
    from weightsync.session.instructions import Slot

__all__ = ["PHASES", "BucketTrack", "Copy", "EngineStage", "EngineTrack", "PhaseClock"]

PHASES = ("describe", "plan", "fill", "export", "wire", "load", "finalise", "verify")
"""The phases of a report, in order. They overlap; each counts the seconds in which any of its work was under way."""


class EngineStage(StrEnum):
    """Where one engine stands in one push. In the last four stages it has ended."""

    PROBING = "probing"
    KNOWN = "known"
    ACCEPTING = "accepting"
    ACCEPTED = "accepted"
    PAUSING = "pausing"
    PAUSED = "paused"
    BEGINNING = "beginning"
    LOADING = "loading"
    FINISHING = "finishing"
    VERIFYING = "verifying"
    VERIFIED = "verified"
    RESUMING = "resuming"
    COMMITTED = "committed"  # serves the new version
    SKIPPED = "skipped"  # untouched: still what it was before the push
    TORN = "torn"  # touched and not completed: paused until repaired
    LOST = "lost"  # does not answer (any more)

    @property
    def ended(self) -> bool:
        return self in _ENDS


_ENDS = frozenset({EngineStage.COMMITTED, EngineStage.SKIPPED, EngineStage.TORN, EngineStage.LOST})


@dataclass(slots=True)
class EngineTrack:
    """One engine in one push."""

    name: str
    node: str
    keeper: bool = False  # serves nothing: keeps the push to repeat it, and has no say in how the push ends
    stage: EngineStage = EngineStage.PROBING
    asked: str | None = "probe"  # name of the one instruction that is under way at this engine
    phase: str | None = None  # the report's phase that this instruction counts as
    touched: bool = False  # True from the moment BeginEngine was issued
    was_paused: bool = False  # before this push
    was_torn: bool = False
    paused_by_us: bool = False
    at_rest: bool = False  # ended, and told to pause or resume if its end demands that
    version: int | None = None  # served before this push
    loaded: int = 0  # buckets; they are loaded in order, so this is also the index of the one under way or next
    loading: int = 0  # number of buckets in its current or last call to load
    checked: int = 0  # tensors compared after the push
    not_pushed: int | None = 0  # tensors it holds that this push leaves as they are; None: it cannot tell
    draws: bool = False  # it takes no buckets: it draws its weights, or has them delivered
    shown: bool = False  # it has shown its places, so that bridges can deliver to it
    error: ErrorRecord | None = None
    began: float = 0.0  # when it was asked to pause
    seconds: float = 0.0  # from pause to resume


@dataclass(slots=True)
class Copy:
    """One bucket in one node's slot."""

    slot: Slot
    exported: bool = False
    exporting: bool = False
    relaying: bool = False  # a broadcast reads from this slot; an exchange writes into it, too
    readers: set[str] = field(default_factory=set)  # engines of `named` whose fence has not passed
    named: frozenset[str] = frozenset()  # engines that the export is for


@dataclass(slots=True)
class BucketTrack:
    """One bucket: the ranks that still write it, and where it lies."""

    nbytes: int
    owner: int
    fillers: frozenset[int]
    unfilled: set[int] = field(default_factory=set)  # ranks that hold a lease and have not reported
    filled: bool = False
    relayed: bool = False  # its broadcast or exchange has ended
    copies: dict[str, Copy] = field(default_factory=dict)  # by node


class PhaseClock:
    """Seconds during which at least one piece of work of a phase was under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.active: dict[str, int] = dict.fromkeys(PHASES, 0)  # pieces of work that are under way
        self._since: dict[str, float] = {}

    def start(self, phase: str, now: float) -> None:
        if self.active[phase] == 0:
            self._since[phase] = now
        self.active[phase] += 1

    def stop(self, phase: str, now: float) -> None:
        if self.active[phase] == 0:
            return
        self.active[phase] -= 1
        if self.active[phase] == 0:
            self.seconds[phase] += now - self._since.pop(phase)

    def stop_all(self, now: float) -> None:
        for phase in PHASES:
            while self.active[phase]:
                self.stop(phase, now)
