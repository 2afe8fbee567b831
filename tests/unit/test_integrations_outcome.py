"""Frameworks do not look at reports: what a push did not reach is in the log."""

from __future__ import annotations

import logging
from typing import Any

from weightsync.errors import EngineLost
from weightsync.integrations.outcome import noted
from weightsync.report import EngineReport, PushReport


def engine(name: str, outcome: str, error: Any = None) -> EngineReport:
    return EngineReport(name, "node0", outcome, None, 0.0, 0, 0, error)


def test_an_engine_that_did_not_commit_is_warned_of(caplog):
    lost = engine("e1", "lost", EngineLost("it does not answer").record())
    report = PushReport("default", 7, 0, 0, 0, 0.0, 0.0, {}, (engine("e0", "committed"), lost, engine("e2", "torn")))
    with caplog.at_level(logging.WARNING):
        assert noted(report) is report
    assert [record.getMessage() for record in caplog.records] == [
        "[engine=e1 v=7] push.lost it does not answer",
        "[engine=e2 v=7] push.torn no error",
    ]
