"""Where the time of a push went, as `weightsync trace` says it."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from weightsync.chrome_trace import document
from weightsync.cli import app
from weightsync.cli.trace_summary import read_trace, summarise, summary_view
from weightsync.errors import ConfigError, ErrorRecord
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.trace import Trace

ABOUT = {
    "model": "policy", "version": 7, "state": "torn", "seconds": 4.0, "bytes": 2_000_000_000, "buckets": 2,
    "began": "2026-01-01T00:00:00.000+00:00", "node": "n0", "waiting_for": "", "error": "e1: it answered 500",
}  # fmt: skip
SLOT = do.Slot("n0", 0, 0)


@pytest.fixture
def made():
    """Two buckets to two engines: the second bucket fails at e1, and e0 has not given it back yet."""
    trace = Trace("n0", {"e0": "n0", "e1": "n1"}, 0.0)
    trace.heard(ev.PlanMade(buckets=(ev.BucketPlan(10**9, 0, (0,)), ev.BucketPlan(10**9, 0, (0,)))), 0.0)
    trace.told([do.GrantLease(bucket=0, slot=SLOT, ranks=(0,))], 0.0)
    trace.heard(ev.RankFilled(rank=0, bucket=0, nbytes=10**9), 1.0)
    for bucket, begin, e0, e1 in ((0, 1.0, 1.5, 2.0), (1, 1.75, 2.25, None)):
        trace.told([do.LoadBucket(engine=name, bucket=bucket) for name in ("e0", "e1")], begin)
        trace.heard(ev.BucketLoaded(engine="e0", bucket=bucket), e0)
        if e1 is not None:
            trace.heard(ev.BucketLoaded(engine="e1", bucket=bucket), e1)
    trace.heard(
        ev.EngineFailed(engine="e1", phase="load", error=ErrorRecord(kind="EngineError", message="it answered 500")),
        4.0,
    )
    trace.told([do.AwaitRelease(engine="e0", bucket=1)], 2.25)
    return document(trace, 4.25, ABOUT)


def test_overlapping_pieces_count_once(made):
    steps = {step["step"]: step for step in summarise(made)["steps"]}
    assert list(steps) == ["fill", "load", "release"]  # as they begin
    load = steps["load"]
    assert (load["from"], load["seconds"], load["pieces"], load["bytes"]) == (1.0, 3.0, 4, 4 * 10**9)
    assert load["GB/s"] == pytest.approx(4 / 3)
    assert load["slowest"] == {"name": "load 1", "of": "e1", "seconds": 2.25}


def test_each_engine_has_its_own_seconds(made):
    engines = {engine["engine"]: engine for engine in summarise(made)["engines"]}
    assert engines["e0"]["seconds"]["load"] == 1.0
    assert engines["e1"]["seconds"]["load"] == 3.0
    assert engines["e1"]["slowest"] == {"bucket": 1, "seconds": 2.25}
    assert engines["e0"]["seconds"]["pause"] == 0.0


def test_what_failed_and_what_has_not_ended_is_named(made):
    found = summarise(made)
    assert found["failed"] == [{"name": "load 1", "of": "e1", "seconds": 2.25, "why": "it answered 500"}]
    assert found["unfinished"] == [{"name": "release 1", "of": "e0", "seconds": 2.0}]


def test_an_operator_reads_it_at_100_columns(made):
    console = Console(width=100, highlight=False, markup=False)
    with console.capture() as shown:
        console.print(summary_view(summarise(made)))
    text = shown.get()
    for words in (
        "version 7 of policy, torn: 2.00 GB in 2 buckets, 4.000 s, 0.50 GB/s",
        "e1: it answered 500",
        "2.2500 s  e1 load 1",
        "failed: e1 load 1 after 2.250 s: it answered 500",
        "not ended: e0 release 1, 2.000 s so far",
    ):
        assert words in text, words
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text  # nothing is cut off


def test_a_file_is_read_without_a_daemon(made, tmp_path):
    file, copy = tmp_path / "push.json", tmp_path / "copy.json"
    file.write_text(json.dumps(made))
    done = CliRunner().invoke(app, ["trace", str(file), "-o", str(copy), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["push"] == ABOUT
    assert copy.read_bytes() == file.read_bytes()


ROW = {"ph": "X", "cat": "load", "name": "x", "pid": 1, "tid": 1, "ts": 0, "dur": 1, "args": {}}
FOREIGN = [
    {},
    {"traceEvents": []},
    {"traceEvents": 3},
    {"traceEvents": [ROW]},
    {"traceEvents": [ROW], "otherData": {"a": 1}},
    {"traceEvents": [ROW], "otherData": []},
    {"traceEvents": [{"ph": "M", "pid": 1}], "otherData": ABOUT},
    {"traceEvents": [{**ROW, "dur": -1}], "otherData": ABOUT},
    {"traceEvents": [{**ROW, "args": {"bytes": "many"}}], "otherData": ABOUT},
    *({"traceEvents": [{k: v for k, v in ROW.items() if k != gone}], "otherData": ABOUT} for gone in ROW),
]


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"a": "\xff"}', b"[" * 9999, *map(json.dumps, FOREIGN)])
def test_other_files_are_refused_in_words(text, tmp_path):
    (file := tmp_path / "push.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"push\.json is no trace of a push"):
        read_trace(file.read_bytes(), "push.json")


def test_a_trace_in_which_nothing_has_begun_is_one():
    empty = document(Trace("n0", {}, 0.0), 1.0, ABOUT)
    assert summarise(read_trace(json.dumps(empty).encode(), "push.json"))["steps"] == []
