"""The trace of a push: every piece of work is there, begun and ended, in lanes that do not overlap."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from tests.session_world import ERROR, World
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.trace import Trace
from weightsyncd.traces import write_trace

REMOTE = {"a": "home", "b": "away"}


def traced(world: World) -> Trace:
    """A trace that hears and is told what the world's session is."""
    trace = Trace(world.session.home, REMOTE, world.now)
    trace.told(world.pending, world.now)
    handle = world.session.handle

    def watched(event: ev.Event, now: float) -> list[do.Instruction]:
        trace.heard(event, now)
        instructions = handle(event, now)
        trace.told(instructions, now)
        return instructions

    world.session.handle = watched  # type: ignore[method-assign]
    return trace


def test_a_push_is_told_from_the_first_fill_to_the_last_release():
    world = World(buckets=3, engines=REMOTE)
    trace = traced(world)
    world.open_all()
    world.run()
    assert all(span.end is not None and not span.failed for span in trace.spans)
    kinds = Counter(span.name.split(" ")[0] for span in trace.spans)
    assert (kinds["broadcast"], kinds["export"]) == (3, 6)
    assert (kinds["load"], kinds["release"]) == (6, 6)
    assert kinds["fill"] == sum(len(bucket.fillers) for bucket in world.session.buckets)
    for step in ("accept", "pause", "begin", "finish", "verify", "resume"):
        assert kinds[step] == 2, step
    places = {(span.process, span.lane) for span in trace.spans}
    assert ("away", "b: load") in places
    assert ("home", "bridge 0: wire") in places
    assert {process for process, _ in places} == {"trainer", "home", "away"}


def test_rows_of_a_lane_follow_one_another():
    world = World(buckets=7, engines=REMOTE)
    trace = traced(world)
    world.open_all()
    world.run()
    rows = [row for row in trace.document(world.now)["traceEvents"] if row["ph"] == "X"]
    assert len(rows) == len(trace.spans)
    until: dict[tuple[int, int], float] = {}
    for row in rows:
        place = (row["pid"], row["tid"])
        assert row["ts"] >= until.get(place, 0.0) - 0.1
        until[place] = row["ts"] + row["dur"]


def test_what_fails_and_what_never_ends_is_told():
    world = World(buckets=3, engines=REMOTE)
    trace = traced(world)
    world.open_all()
    load = world.run_until(do.LoadBucket, engine="b")
    world.pending.remove(load)
    world.hear(ev.EngineFailed(engine="b", phase="load", error=ERROR))
    rows = trace.document(world.now + 1)["traceEvents"]
    assert [row["name"] for row in rows if row.get("args", {}).get("failed") == ERROR.message] == ["load 0"]
    assert any(row.get("args", {}).get("unfinished") for row in rows)
    assert all(row["dur"] >= 0 for row in rows if row["ph"] == "X")


def test_an_empty_trace_is_a_document_too():
    assert Trace("home", {}, 0.0).document(1.0)["traceEvents"] == []


def test_the_newest_files_are_kept(tmp_path):
    folder = tmp_path / "traces"
    for number in range(25):
        write_trace(str(folder), f"push-{number:02}", {"number": number})
        os.utime(folder / f"push-{number:02}.json", (number, number))
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [f"push-{number:02}.json" for number in range(5, 25)]
    assert json.loads((folder / "push-24.json").read_text()) == {"number": 24}


def test_a_directory_that_is_none_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    write_trace(str(tmp_path / "file"), "push-1", {})
    assert "log.trace_dir" in caplog.text


@pytest.mark.parametrize("engine", ["a", "b"])
def test_spans_of_another_engine_go_on_when_one_fails(engine):
    trace = Trace("home", REMOTE, 0.0)
    trace.told([do.LoadBucket(engine=name, bucket=0) for name in REMOTE], 1.0)
    trace.heard(ev.EngineFailed(engine=engine, phase="load", error=ERROR), 2.0)
    assert [span.end for span in trace.spans if span.process == REMOTE[engine]] == [2.0]
    assert [span.end for span in trace.spans if span.process != REMOTE[engine]] == [None]
