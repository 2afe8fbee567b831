"""Which engines a router is shown."""

from __future__ import annotations

from weightsync.integrations.router import up_to_date
from weightsync.wire.messages import EngineStatus


def engine(name: str, state: str, version: int | None) -> EngineStatus:
    return EngineStatus(
        name=name, node="n", kind="sglang", model="default", url=f"http://{name}:1", state=state, version=version
    )


def test_engines_that_serve_the_latest_version_and_no_others():
    engines = [
        engine("latest", "serving", 7),
        engine("also", "serving", 7),
        engine("behind", "serving", 6),
        engine("torn", "torn", 7),
        engine("paused", "paused", 7),
        engine("new", "blank", None),
        engine("gone", "lost", None),
    ]
    assert [e.name for e in up_to_date(engines)] == ["latest", "also"]


def test_engines_that_were_never_pushed_to_are_not_up_to_date():
    assert up_to_date([engine("new", "blank", None), engine("other", "serving", None)]) == []
