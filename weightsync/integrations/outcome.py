"""Warnings about engines that a push did not reach, since frameworks do not look at the report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from weightsync.integrations.shares import rank_and_world

if TYPE_CHECKING:
    from weightsync.report import PushReport

__all__ = ["noted"]

logger = logging.getLogger(__name__)


def noted(report: PushReport) -> PushReport:
    """Warn, on rank 0, of every engine that did not commit. Returns `report`.

    A torn engine answers no request until a push repairs it.
    """
    if rank_and_world()[0] == 0:
        for engine in report.engines:
            if engine.outcome != "committed":
                said = engine.error.message if engine.error is not None else "no error"
                logger.warning("[engine=%s v=%d] push.%s %s", engine.engine, report.version, engine.outcome, said)
    return report
