"""The trace of a push: every piece of work is there, begun and ended, in lanes that do not overlap."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter

import pytest

from tests.session_world import ERROR, World
from weightsync.chrome_trace import document
from weightsync.cli.trace_summary import summarise
from weightsync.errors import ConfigError
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.trace import Trace
from weightsync.wire import messages as msg
from weightsyncd.traces import PushTrace, Traces, write_trace

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
    assert all(span.end is not None and not span.failed for span in trace.spans())
    kinds = Counter(span.name.split(" ")[0] for span in trace.spans())
    assert (kinds["broadcast"], kinds["export"]) == (3, 6)
    assert (kinds["load"], kinds["release"]) == (6, 6)
    assert kinds["fill"] == sum(len(bucket.fillers) for bucket in world.session.buckets)
    for step in ("accept", "pause", "begin", "finish", "verify", "resume"):
        assert kinds[step] == 2, step
    places = {(span.process, span.lane) for span in trace.spans()}
    assert ("away", "b: load") in places
    assert ("home", "bridge 0: wire") in places
    assert {process for process, _ in places} == {"trainer", "home", "away"}


def test_rows_of_a_lane_follow_one_another():
    world = World(buckets=7, engines=REMOTE)
    trace = traced(world)
    world.open_all()
    world.run()
    rows = [row for row in document(trace, world.now, {})["traceEvents"] if row["ph"] == "X"]
    assert len(rows) == len(trace.spans())
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
    rows = document(trace, world.now + 1, {})["traceEvents"]
    assert [row["name"] for row in rows if row.get("args", {}).get("failed") == ERROR.message] == ["load 0"]
    assert any(row.get("args", {}).get("unfinished") for row in rows)
    assert all(row["dur"] >= 0 for row in rows if row["ph"] == "X")


def test_an_empty_trace_is_a_document_too():
    assert document(Trace("home", {}, 0.0), 1.0, {})["traceEvents"] == []


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


@pytest.fixture
def disk(monkeypatch):
    """Writes no trace before `set`; the names of those written."""
    goes_on, written = threading.Event(), []

    def write(directory: str, name: str, document: dict[str, object]) -> None:
        assert goes_on.wait(30)
        written.append(name)

    monkeypatch.setattr("weightsyncd.traces.write_trace", write)
    yield goes_on, written
    goes_on.set()


def test_nobody_waits_for_a_disk_that_hangs(disk, caplog):
    goes_on, written = disk
    traces = Traces("n0", "/traces")
    traces.write(push_trace("a", 1, 1.0), "n0-1")
    assert not asyncio.run(traces.settle(time.monotonic()))
    assert "log.trace_dir: /traces is slow; 1 traces are left out" in caplog.text
    for version in range(2, 12):  # one is with the thread, four may wait
        traces.write(push_trace("a", version, 1.0), f"n0-{version}")
    assert "the trace of push n0-11 is left out" in caplog.text
    goes_on.set()
    assert asyncio.run(traces.settle(time.monotonic() + 30))
    assert written[0] == "push-n0-1-v1"
    assert len(written) in (4, 5)


def test_a_trace_that_cannot_be_written_keeps_no_other_from_it(tmp_path, caplog):
    traces = Traces("n0", str(tmp_path))
    broken = push_trace("a", 1, 1.0)
    broken.about["no JSON"] = object()
    traces.write(broken, "n0-1")
    traces.write(push_trace("a", 2, 1.0), "n0-2")
    assert asyncio.run(traces.settle(time.monotonic() + 30))
    assert "push-n0-1-v1 cannot be written" in caplog.text
    assert [path.name for path in tmp_path.glob("push-*")] == ["push-n0-2-v2.json"]


def test_where_there_is_no_directory_nothing_is_written(disk):
    traces = Traces("n0", "")
    traces.write(push_trace("a", 1, 1.0), "n0-1")
    assert asyncio.run(traces.settle(time.monotonic()))


@pytest.mark.parametrize("engine", ["a", "b"])
def test_spans_of_another_engine_go_on_when_one_fails(engine):
    trace = Trace("home", REMOTE, 0.0)
    trace.told([do.LoadBucket(engine=name, bucket=0) for name in REMOTE], 1.0)
    trace.heard(ev.EngineFailed(engine=engine, phase="load", error=ERROR), 2.0)
    assert [span.end for span in trace.spans() if span.process == REMOTE[engine]] == [2.0]
    assert [span.end for span in trace.spans() if span.process != REMOTE[engine]] == [None]


def test_bytes_are_those_of_ranks_and_of_buckets():
    world = World(buckets=3, engines=REMOTE)
    trace = traced(world)
    world.open_all()
    world.run()
    nbytes = {(span.step, span.nbytes) for span in trace.spans() if span.bucket is not None}
    assert {("load", 100), ("release", 100), ("export", 100), ("wire", 100)} <= nbytes
    fills = [span.nbytes for span in trace.spans() if span.step == "fill"]
    assert sum(fills) == world.session.filled_bytes > 0
    rows = [row for row in document(trace, world.now, {})["traceEvents"] if row["ph"] == "X"]
    (first,) = [row for row in rows if row["name"] == "load 0" and row["args"]["engine"] == "b"]
    assert (first["cat"], first["args"]["bucket"], first["args"]["bytes"]) == ("load", 0, 100)


def test_a_rank_that_calls_late_is_seen_to():
    trace = Trace("home", REMOTE, 10.0)
    trace.heard(ev.RankOpened(rank=0, layout=b"", describe_seconds=0.5), 10.0)
    trace.heard(ev.RankOpened(rank=11, layout=b""), 12.0)
    assert [(span.step, span.lane, span.begin, span.end) for span in trace.spans()] == [
        ("describe", "rank 0", 9.5, 10.0),
        ("late", "rank 11", 10.0, 12.0),
    ]
    rows = [row for row in document(trace, 12.0, {})["traceEvents"] if row["ph"] == "X"]
    assert [row["ts"] for row in rows] == [0.0, 500000.0]  # nothing comes before the beginning


def test_what_a_lost_rank_bridge_or_node_was_at_ends_with_it():
    trace = Trace("home", REMOTE, 0.0)
    slot, away = do.Slot("home", 1, 0), do.Slot("away", 0, 0)
    trace.told(
        [
            do.GrantLease(bucket=0, slot=slot, ranks=(0, 1)),
            do.ExportBucket(bucket=0, slot=slot, nbytes=1, engines=("a",)),
            do.ExportBucket(bucket=0, slot=away, nbytes=1, engines=("b",)),
            do.LoadBucket(engine="b", bucket=0),
        ],
        1.0,
    )
    trace.heard(ev.RankLost(rank=1, reason="silent"), 2.0)
    trace.heard(ev.BridgeLost(node="home", bridge=1, error=ERROR), 3.0)
    trace.heard(ev.NodeLost(node="away", error=ERROR), 4.0)
    ends = {(span.process, span.lane): (span.end, span.failed) for span in trace.spans()}
    assert ends == {
        ("trainer", "rank 0"): (None, ""),
        ("trainer", "rank 1"): (2.0, "silent"),
        ("home", "bridge 1: export"): (3.0, ERROR.message),
        ("away", "bridge 0: export"): (4.0, ERROR.message),
        ("away", "b: load"): (4.0, ERROR.message),
    }


def test_rows_are_in_the_order_of_their_numbers():
    trace = Trace("home", REMOTE, 0.0)
    trace.told([do.LoadBucket(engine="a", bucket=0)], 1.0)
    trace.told([do.GrantLease(bucket=0, slot=do.Slot("home", 0, 0), ranks=(10, 2))], 2.0)
    rows = document(trace, 3.0, {})["traceEvents"]
    names = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    order = {names[row["tid"]]: row["args"]["sort_index"] for row in rows if row["name"] == "thread_sort_index"}
    assert order["rank 2"] < order["rank 10"]
    places = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    first = next(r for r in rows if r["name"] == "process_sort_index" and r["args"]["sort_index"] == 0)
    assert places[first["pid"]] == "trainer"


def test_notes_are_bounded_and_what_is_left_out_is_said(monkeypatch):
    monkeypatch.setattr("weightsync.session.trace.NOTES", 3)
    trace = Trace("home", REMOTE, 0.0)
    trace.told([], 0.0)  # nothing is noted of nothing
    for bucket in range(4):
        trace.told([do.LoadBucket(engine="a", bucket=bucket)], float(bucket))
    trace.heard(ev.BucketLoaded(engine="a", bucket=0), 9.0)
    assert [span.bucket for span in trace.spans()] == [0, 1, 2]
    assert document(trace, 10.0, {"push": "p"})["otherData"] == {"push": "p", "dropped": 2}


@pytest.fixture
def full(monkeypatch):
    """A trace that two loads have filled: the first has ended, the second is under way."""
    monkeypatch.setattr("weightsync.session.trace.NOTES", 3)
    trace = Trace("home", REMOTE, 0.0)
    trace.told([do.LoadBucket(engine="a", bucket=0)], 0.0)
    trace.heard(ev.BucketLoaded(engine="a", bucket=0), 1.0)
    trace.told([do.LoadBucket(engine="a", bucket=1)], 1.0)
    return trace


def test_the_end_of_a_push_is_in_a_full_trace(full):
    full.heard(ev.BucketLoaded(engine="a", bucket=1), 5.0)
    full.told([do.LoadBucket(engine="a", bucket=2), do.VerifyEngine(engine="a")], 5.0)
    full.heard(ev.EngineVerified(engine="a"), 6.0)
    assert [(span.name, span.begin, span.end, span.cut) for span in full.spans()] == [
        ("load 0", 0.0, 1.0, False),
        ("load 1", 1.0, 5.0, True),
        ("verify", 5.0, 6.0, False),
    ]
    assert full.dropped == 2


def test_a_piece_that_was_cut_is_neither_the_slowest_nor_unfinished(full):
    full.heard(ev.BucketLoaded(engine="a", bucket=1), 5.0)
    found = summarise(document(full, 9.0, {}))
    (load,) = found["steps"]
    assert load["slowest"]["name"] == "load 0"
    assert found["engines"][0]["slowest"]["bucket"] == 0
    assert found["unfinished"] == []


@pytest.mark.parametrize(
    "event",
    [
        ev.EngineFailed(engine="a", phase="load", error=ERROR),
        ev.RankFailed(rank=3, error=ERROR),
        ev.RankLost(rank=3, reason=ERROR.message),
        ev.NodeLost(node="away", error=ERROR),
        ev.BridgeLost(node="home", bridge=0, error=ERROR),
        ev.BucketRelayed(bucket=4, nodes=("away",), failed=(("away", ERROR),)),
        ev.BucketReleased(engine="a", bucket=4, leaked=True),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_goes_wrong_is_told_in_a_full_trace(full, event):
    full.heard(ev.BucketLoaded(engine="a", bucket=1), 5.0)
    full.heard(event, 7.0)
    (failed,) = summarise(document(full, 9.0, {}))["failed"]
    assert (failed["seconds"], bool(failed["why"])) == (0.0, True)


def test_a_full_trace_has_its_bound(full, monkeypatch):
    monkeypatch.setattr("weightsync.session.trace.LAST", 2)
    for _ in range(5):
        full.heard(ev.EngineFailed(engine="a", phase="load", error=ERROR), 5.0)
    assert full.dropped == 3
    assert [span.failed for span in full.spans()] == ["", ERROR.message]


def push_trace(model: str, version: int, until: float) -> PushTrace:
    return PushTrace(Trace("home", REMOTE, 0.0), until, model, version, {"model": model})


def answer_of(traces: Traces, current: PushTrace | None = None, **question) -> tuple[str, int]:
    found = asyncio.run(traces.answer(msg.TraceRequest(**question), current))
    assert json.loads(found.document)["otherData"]["model"] == found.model
    return found.model, found.version


def test_which_push_is_shown():
    traces = Traces("n0", "")
    with pytest.raises(ConfigError, match="no push has begun on node n0"):
        answer_of(traces)
    traces.keep(push_trace("a", 1, 1.0), failed=True)
    traces.keep(push_trace("b", 7, 2.0), failed=True)
    traces.keep(push_trace("a", 2, 3.0), failed=False)
    assert answer_of(traces) == ("a", 2)  # the newest
    assert answer_of(traces, model="b") == ("b", 7)
    assert answer_of(traces, failed=True) == ("b", 7)
    assert answer_of(traces, failed=True, model="a") == ("a", 1)
    under_way = push_trace("b", 8, 4.0)
    assert answer_of(traces, under_way) == ("b", 8)
    assert answer_of(traces, under_way, model="a") == ("a", 2)
    assert answer_of(traces, under_way, failed=True) == ("b", 7)
    with pytest.raises(ConfigError, match="of model 'c'") as caught:
        answer_of(traces, model="c")
    assert caught.value.hint == "there are traces of a, b"
