"""The words of a push: what it waits for, and its errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import ErrorRecord
from weightsync.session.state import State

if TYPE_CHECKING:
    from weightsync.session.state import PushState

__all__ = ["PUSH_ERRORS", "about", "buckets", "listed", "phase_of", "rank_failed", "record", "waited_for"]

PUSH_ERRORS = frozenset({"PushRefused", "PushAborted", "PushTimeout"})
"""The kinds of error that a push as a whole may end with."""


# --- errors -------------------------------------------------------------------------------------------------------


def record(push: PushState, kind: str, message: str, *, hint: str | None = None, **where: object) -> ErrorRecord:
    """Return an error of this push; `where` is any of rank, engine, bucket and phase."""
    return about(ErrorRecord(kind=kind, message=message, model=push.model, version=push.version, hint=hint), **where)


def about(error: ErrorRecord, **changes: object) -> ErrorRecord:
    """Return the error with `changes`. `message` and `kind` are replaced; other fields are set only if None."""
    fill = {k: v for k, v in changes.items() if k in ("message", "kind") or getattr(error, k) is None}
    return msgspec.structs.replace(error, **fill)


def rank_failed(rank: int, error: ErrorRecord) -> ErrorRecord:
    """Return the error that a push ends with on all ranks if one of them has failed with `error`."""
    if error.kind in PUSH_ERRORS:
        return about(error, rank=rank)
    return about(error, kind="PushAborted", message=f"trainer rank {rank} failed: {error.message}", rank=rank)


def phase_of(push: PushState) -> str:
    """Return the phase of the push as a whole, for an error of no particular rank, engine or bucket."""
    return {State.OPENING: "open", State.TRANSFERRING: "transfer"}.get(push.state, "finalise")


# --- what it waits for ----------------------------------------------------------------------------------------------


def waited_for(push: PushState) -> tuple[str, dict[str, int | str]]:
    """Return what the push waits for, in words and as fields of an error."""
    if push.state is State.OPENING:
        missing = [r for r in range(push.world) if r not in push.opened]
        if missing:
            words = f"rank{'s' if len(missing) > 1 else ''} {listed(missing)} of {push.world} to call push_weights"
            return words, {"rank": missing[0], "phase": "open"}
        if push.awaited_layouts:
            ranks = sorted(push.awaited_layouts)
            return f"the layout of rank {listed(ranks)}", {"rank": ranks[0], "phase": "plan"}
        if push.planned and not push.rails_ready:
            return f"the communicator to {', '.join(push.remote_nodes())}", {"phase": "open"}
    if push.unexposed:
        ranks = sorted(push.unexposed)
        return f"rank {listed(ranks)} to expose its weights", {"rank": ranks[0], "phase": "fill"}
    for bucket, track in enumerate(push.buckets):
        if track.unfilled:
            ranks = sorted(track.unfilled)
            words = f"rank {listed(ranks)} to fill bucket {bucket}"
            return words, {"rank": ranks[0], "bucket": bucket, "phase": "fill"}
    if any(e.asked for e in push.engines.values()):
        return _engines_that_work(push)
    if push.state is State.OPENING:
        return "the plan", {"phase": "plan"}
    held = sorted(push.held())
    if push.state is State.COMMITTING and held:
        name, bucket = held[0]
        return f"engine {name} to release bucket {bucket}", {"engine": name, "bucket": bucket, "phase": "load"}
    if push.unmeasured:
        ranks = sorted(push.unmeasured)
        return f"the fingerprints of rank {listed(ranks)}", {"rank": ranks[0], "phase": "fill"}
    if push.phases.active["export"] and not push.phases.active["wire"]:
        bucket = min(i for i in push.active if any(c.exporting for c in push.buckets[i].copies.values()))
        return f"a bridge to export bucket {bucket}", {"bucket": bucket, "phase": "export"}
    return "the wire", {"phase": "wire"}


def _engines_that_work(push: PushState) -> tuple[str, dict[str, int | str]]:
    busy = [e for e in push.engines.values() if e.asked]
    loads = {e.name: f", {buckets(e.loaded, e.loading)}" for e in busy if e.asked == "load"}
    words = ", ".join(f"{e.name} ({e.asked}{loads.get(e.name, '')})" for e in busy)
    first = busy[0]
    fields: dict[str, int | str] = {"engine": first.name, "phase": first.asked or ""}
    if first.asked == "load":
        fields["bucket"] = first.loaded
    return f"engine {words}", fields


def buckets(first: int, count: int) -> str:
    """Return consecutive buckets in words."""
    return f"bucket {first}" if count == 1 else f"buckets {first} to {first + count - 1}"


def listed(numbers: list[int]) -> str:
    """Return some numbers in words: eight of them, and how many more there are."""
    shown = ", ".join(str(n) for n in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
