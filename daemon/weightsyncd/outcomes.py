"""What a push came to, and how far it is, as ranks and operators are told."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from weightsync.plan.manifest import Manifest
    from weightsync.session.machine import PushSession

__all__ = ["outcome_of", "status_of_push"]


def outcome_of(session: PushSession, manifest: Manifest | None) -> msg.PushOutcome:
    """Of a push that has just ended; `manifest` is None where none was planned."""
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
                untouched=e.untouched,
                error=e.error,
            )
            for e in session.fleet
        ),
    )


def status_of_push(session: PushSession) -> msg.PushStatus:
    """Of one that is under way."""
    return msg.PushStatus(
        model=session.model,
        version=session.version,
        state=str(session.state),
        seconds=time.monotonic() - session.started,
        nbytes=session.nbytes,
        filled_bytes=session.filled_bytes,
        waiting_for="" if session.ended else session.waiting_for(),
    )
