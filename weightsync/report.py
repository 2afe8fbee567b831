"""The report that `push_weights` returns: the same on every rank, except for `blocked_seconds`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from weightsync.errors import ErrorRecord
    from weightsync.wire.messages import PushOutcome

__all__ = ["EngineReport", "PushReport"]


@dataclass(frozen=True)
class EngineReport:
    """How the push ended on one engine."""

    engine: str
    node: str
    outcome: str  # committed | skipped (untouched) | torn (paused until repaired) | lost (does not answer)
    version: int | None  # the one that it serves now; None: it serves no pushed version
    seconds: float  # from its pause to its resume
    checked: int  # tensors whose bytes in the engine were compared with the trainer's
    not_pushed: int | None  # tensors of the engine that the push did not contain; None if it cannot tell (stock)
    error: ErrorRecord | None
    drawn: bool = False  # it read the trainer's memory in place, not slots


@dataclass(frozen=True)
class PushReport:
    """A push that reached at least one engine. `str()` gives a table."""

    model: str
    version: int
    bytes: int  # of all tensors, each counted once
    tensors: int
    buckets: int
    seconds: float  # from the first rank's call until every engine served again
    blocked_seconds: float  # part of `seconds` in which this rank described and filled (differs between ranks)
    phases: dict[str, float]  # seconds that each was under way: describe plan fill export wire load finalise verify
    engines: tuple[EngineReport, ...]

    @classmethod
    def of(cls, outcome: PushOutcome, blocked_seconds: float) -> PushReport:
        """Return the report of an outcome that the daemon sent."""
        return cls(
            model=outcome.model,
            version=outcome.version,
            bytes=outcome.nbytes,
            tensors=outcome.tensors,
            buckets=outcome.buckets,
            seconds=outcome.seconds,
            blocked_seconds=blocked_seconds,
            phases=outcome.phases,
            engines=tuple(
                EngineReport(**{f: getattr(e, f) for f in EngineReport.__dataclass_fields__}) for e in outcome.engines
            ),
        )

    @property
    def complete(self) -> bool:
        """Whether every engine of the model serves the new version."""
        return all(e.outcome == "committed" for e in self.engines)

    @property
    def gigabytes_per_second(self) -> float:
        """`bytes` divided by the seconds of the whole push."""
        return self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {**plain, "complete": self.complete}

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        console = Console(file=out, width=120, color_system=None, highlight=False)
        console.print(
            f"version {self.version} of {self.model}: {self.bytes / 1e6:,.1f} MB, {self.tensors:,} tensors, "
            f"{self.buckets} buckets in {self.seconds:.3f} s ({self.gigabytes_per_second:.2f} GB/s)"
        )
        console.print(self._phase_table())
        console.print(self._engine_table())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _phase_table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for phase in self.phases:
            table.add_column(phase, justify="right")
        table.add_row(*(f"{seconds * 1e3:.1f} ms" for seconds in self.phases.values()))
        return table

    def _engine_table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("engine", "node", "outcome", "serves", "seconds", "tensors checked", "error"):
            table.add_column(column, justify="right" if column in ("serves", "seconds", "tensors checked") else "left")
        for e in self.engines:
            serves = "–" if e.version is None else str(e.version)
            error = e.error.message if e.error is not None else ""
            outcome = f"{e.outcome}, in place" if e.drawn else e.outcome
            table.add_row(e.engine, e.node, outcome, serves, f"{e.seconds:.3f}", str(e.checked), error)
        return table
