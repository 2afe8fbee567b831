"""The outcome and the progress of a push, as ranks and operators are told."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.plan.manifest import Manifest
    from weightsync.session.machine import PushSession
    from weightsync.session.tracks import EngineTrack

__all__ = ["account_of", "brought_all", "outcome_of", "status_of_push"]


def brought_all(engines: Iterable[EngineTrack], *, partial: bool) -> bool:
    """Return whether a push brought all that these engines hold.

    An engine that cannot tell is taken to hold what the trainer holds; a `partial` push left out some of that.
    """
    told = [engine.not_pushed for engine in engines]
    return not any(told) and not (partial and None in told)


def outcome_of(session: PushSession, manifest: Manifest | None) -> msg.PushOutcome:
    """Return the outcome of a push that has just ended. `manifest` is None if no plan was made."""
    return msg.PushOutcome(
        model=session.model,
        version=session.version,
        nbytes=manifest.nbytes if manifest is not None else 0,
        tensors=len(manifest.tensors) if manifest is not None else 0,
        buckets=len(session.buckets),
        seconds=session.finished - session.started,
        phases=dict(session.phases.seconds),
        engines=tuple(
            msg.EngineOutcome(
                engine=e.name,
                node=e.node,
                outcome=str(e.stage),
                version=session.version if e.stage.value == "committed" else None if e.touched else e.version,
                seconds=e.seconds,
                checked=e.checked,
                not_pushed=e.not_pushed,
                drawn=e.draws and e.stage.value == "committed",
                error=e.error,
            )
            for e in session.fleet
        ),
    )


def status_of_push(session: PushSession) -> msg.PushStatus:
    """Return the status of a push that is under way."""
    return msg.PushStatus(
        model=session.model,
        version=session.version,
        state=str(session.state),
        seconds=time.monotonic() - session.started,
        nbytes=session.nbytes,
        filled_bytes=session.filled_bytes,
        waiting_for="" if session.ended else session.waiting_for(),
        buckets=len(session.buckets),
        engines=tuple(
            msg.EngineProgress(engine=e.name, stage=str(e.stage), loaded=e.loaded) for e in session.engines.values()
        ),
        phases={phase: seconds for phase, seconds in session.phases.seconds.items() if seconds},
    )


def account_of(session: PushSession, push: str, began: float, now: float) -> dict[str, Any]:
    """Return what a trace says of its push as a whole. `began` is by the wall clock, `now` by the session's."""
    error = session.error
    return {
        "push": push,
        "model": session.model,
        "version": session.version,
        "node": session.home,
        "began": datetime.fromtimestamp(began, UTC).isoformat(timespec="milliseconds"),
        "state": str(session.state),
        "seconds": round((session.finished if session.ended else now) - session.started, 6),
        "bytes": session.nbytes,
        "buckets": len(session.buckets),
        "ranks": session.world,
        "phases": {phase: round(seconds, 6) for phase, seconds in session.phases.seconds.items()},
        "engines": {e.name: str(e.stage) for e in session.fleet},
        "waiting_for": "" if session.ended else session.waiting_for(),
        "error": error.message if error is not None else "",
    }
