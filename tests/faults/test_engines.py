"""Engines that fail, die, restart, stall or are slow, at every step of a push; the others go on."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.kit import engine_processes, until
from weightsync.errors import PushAborted
from weightsyncd.engines import SOON

pytestmark = pytest.mark.faults

DROP = {"model.norm.weight": "drop"}  # a plan that the engines have not seen, or have forgotten


def outcomes(report):
    return {e["engine"]: (e["outcome"], e["version"]) for e in report["engines"]}


def error_of(report, name):
    error = next(e["error"] for e in report["engines"] if e["engine"] == name)
    return {k: v for k, v in error.items() if v is not None}


def push_alone(node, **terms):
    """A push by one rank; its report."""
    (rank,) = node.start_ranks(1)
    rank.push(**node.terms(0, 1, version=node.next_version(), **terms))
    return rank.report()


def start(node, **terms):
    (rank,) = node.start_ranks(1)
    rank.push(**node.terms(0, 1, version=node.next_version(), **terms))
    return rank


@pytest.mark.parametrize(
    ("endpoint", "after", "outcome", "phase", "bucket"),
    [
        ("/pause", 0, "skipped", "pause", None),
        ("/begin", 0, "torn", "begin", None),
        ("/load", 0, "torn", "load", 0),
        ("/load", 3, "torn", "load", 3),
        ("/load", 7, "torn", "load", 7),
        ("/finish", 0, "torn", "finish", None),
        ("/fingerprints", 0, "torn", "verify", None),
        ("/resume", 0, "torn", "resume", None),
    ],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_an_engine_that_answers_500_is_out_and_the_other_goes_on(node, victim, endpoint, after, outcome, phase, bucket):
    broken, well = node.engines[victim], node.engines[1 - victim]
    node.order(broken, fail={"endpoint": endpoint, "after": after})
    report = push_alone(node)
    assert not report["complete"]
    assert outcomes(report)[well.name] == ("committed", report["version"])
    assert outcomes(report)[broken.name][0] == outcome
    error = error_of(report, broken.name)
    assert (error["engine"], error["phase"], error.get("bucket")) == (broken.name, phase, bucket)
    assert (error["version"], error["model"]) == (report["version"], "default")
    node.serves(well, "C")
    if outcome == "skipped":
        node.serves(broken, node.before)
    elif endpoint == "/begin":  # it is whole, but that is not known
        assert node.info(broken)["paused"]
        assert node.engine_state(broken.name) == "torn"
    else:
        node.does_not_serve(broken)
        assert node.engine_state(broken.name) == "torn"


@pytest.mark.parametrize("endpoint", ["/info", "/manifest"])
def test_an_engine_that_fails_before_anything_began_is_left_out_untouched(node, endpoint):
    broken, well = node.engines
    node.order(broken, fail={"endpoint": endpoint, "times": 1000})
    report = push_alone(node, change=DROP)
    assert outcomes(report)[broken.name][0] == "skipped"
    assert outcomes(report)[well.name] == ("committed", report["version"])
    node.clear()
    node.serves(broken, node.before)


def test_when_every_engine_fails_the_push_is_aborted_and_says_where(node):
    for engine in node.engines:
        node.order(engine, fail={"endpoint": "/load", "after": 4})
    with pytest.raises(PushAborted) as caught:
        node.push("C")
    error = caught.value
    assert (error.engine, error.phase, error.bucket) in [("e1", "load", 4), ("e2", "load", 4)]
    assert "torn and paused: e1, e2" in error.message
    for engine in node.engines:
        node.does_not_serve(engine)


@pytest.mark.parametrize("endpoint", ["/pause", "/begin", "/load", "/resume"])
def test_an_engine_slower_than_the_deadline_is_lost_and_its_late_work_harms_nobody(node, endpoint):
    slow, well = node.engines
    node.delay(slow, endpoint, after=2 if endpoint == "/load" else 0)
    report = push_alone(node)
    assert outcomes(report)[slow.name][0] == "lost"
    assert outcomes(report)[well.name] == ("committed", report["version"])
    assert error_of(report, slow.name)["engine"] == slow.name
    if endpoint != "/pause":
        assert node.info(slow)["paused"]
    node.clear()  # it goes on with what it was asked then
    if endpoint in ("/begin", "/load"):
        node.does_not_serve(slow)
    elif endpoint == "/pause":  # untouched: once it answers, it is let go
        node.wait_log(f"[engine={slow.name}] was left paused by a push that never touched it")
        node.wait_unpaused(slow)
        node.serves(slow, node.before)


@pytest.mark.parametrize("read", [None, 0, 9])
def test_an_engine_that_is_stopped_and_goes_on_later(node, read):
    """Stopped before the push, once it is paused, and in the middle of its loads."""
    stopped, well = node.engines[1], node.engines[0]
    rank = None
    if read is not None:
        rank = start(node, gate=["read", read])
        rank.wait_at("read")
        if read:
            node.wait_torn(stopped)
        else:
            node.wait_paused(stopped)
            paused = time.monotonic()
            until(lambda: time.monotonic() - paused > SOON, "its probe is too old to go by")
    processes = engine_processes(stopped)
    for process in processes:
        process.suspend()
    if rank is None:
        rank = start(node)
    else:
        rank.go()
    report = rank.report()
    assert outcomes(report)[stopped.name][0] == "lost"
    assert outcomes(report)[well.name] == ("committed", report["version"])
    node.wait_engine_state(stopped.name, "lost")
    for process in processes:
        process.resume()
    if read:
        node.does_not_serve(stopped)
    else:
        node.wait_unpaused(stopped)
        node.serves(stopped, node.before)


def test_a_worker_that_is_stopped_holds_up_its_own_engine_only(node):
    stopped, well = node.engines[1], node.engines[0]
    rank = start(node, gate=["read", 9])
    rank.wait_at("read")
    node.wait_torn(stopped)
    worker = engine_processes(stopped)[2]
    worker.suspend()
    rank.go()
    report = rank.report()
    assert outcomes(report) == {stopped.name: ("lost", None), well.name: ("committed", report["version"])}
    again = push_alone(node)  # the engine answers, and says that it is busy
    assert outcomes(again)[well.name] == ("committed", again["version"])
    assert outcomes(again)[stopped.name][0] in ("torn", "lost")
    worker.resume()
    node.does_not_serve(stopped)


@pytest.mark.parametrize(
    ("part", "stage"), [("worker", "before"), ("worker", "loading"), ("worker", "loaded"), ("front", "loading")]
)
def test_an_engine_that_is_killed_is_lost_and_comes_back_whole(node, stage, part):
    dead, well = node.engines[1], node.engines[0]
    processes = engine_processes(dead)
    victim = processes[0 if part == "front" else 2]
    rank = None
    if stage == "loading":
        node.delay(dead, "/load", after=3)
        rank = start(node)
        node.wait_waiting_for("e2 (load, bucket 3)")
    elif stage == "loaded":
        node.delay(dead, "/finish")
        rank = start(node)
        node.wait_waiting_for("e2 (finish)")
    victim.kill()
    if part == "worker" or stage == "before":
        dead.process.wait(10)  # an engine without one of its workers ends by itself
    report = (rank or start(node)).report()
    assert outcomes(report)[dead.name][0] == "lost"
    assert outcomes(report)[well.name] == ("committed", report["version"])
    dead.process.wait(10)
    until(lambda: not any(p.is_running() for p in processes[1:]), "nothing of it is left")
    node.serves(well, "C")
    assert node.engine_state(dead.name) == "lost"
    node.fleet.restart_engine(dead)
    node.serves(dead, "A")  # what it was started on; it has not been told of any version


def test_an_engine_that_restarts_in_the_middle_is_not_loaded_while_it_serves(node):
    """Paused by the push, it died and came back, serving, before the first bucket was filled."""
    restarted, well = node.engines
    rank = start(node, gate=["read", 0])
    rank.wait_at("read")
    node.wait_paused(restarted)
    restarted.kill(signal.SIGKILL)
    node.fleet.restart_engine(restarted)
    assert not node.info(restarted)["paused"]
    rank.go()
    report = rank.report()
    assert outcomes(report)[well.name] == ("committed", report["version"])
    assert outcomes(report)[restarted.name][0] == "lost"
    assert "restarted during the push" in error_of(report, restarted.name)["message"]
    assert not node.info(restarted)["torn"]
    node.serves(restarted, "A")


def test_an_engine_that_somebody_resumes_is_paused_again_before_it_loads(node):
    engine = node.engines[0]
    rank = start(node, gate=["read", 0])
    rank.wait_at("read")
    node.wait_paused(engine)
    paused = time.monotonic()
    node.post(engine, "/resume", {}).raise_for_status()
    assert not node.info(engine)["paused"]
    node.delay(engine, "/load")
    until(lambda: time.monotonic() - paused > SOON, "its probe is too old to go by")
    rank.go()
    node.wait_waiting_for("e1 (load, bucket 0)")
    node.does_not_serve(engine)
    node.clear()
    assert rank.report()["complete"]


@pytest.mark.parametrize("again", ["keep", "none"])
@pytest.mark.parametrize("fault", ["fails", "is slow"])
def test_an_engine_torn_by_an_in_flight_update_ends_up_paused(node, fault, again):
    """With pause="none" it serves while it loads; once it is torn it must not. The next push takes it back."""
    broken, well = node.engines
    if fault == "fails":
        node.order(broken, fail={"endpoint": "/load", "after": 3})
    else:
        node.delay(broken, "/load", after=3)
    report = push_alone(node, pause="none")
    assert outcomes(report)[broken.name] == ("torn" if fault == "fails" else "lost", None)
    assert outcomes(report)[well.name] == ("committed", report["version"])
    node.does_not_serve(broken)
    node.clear()
    node.does_not_serve(broken)
    node.check(pause=again)


def test_a_torn_engine_is_not_repaired_by_half(node):
    """It refuses a push that would leave it a mixture, untouched; a whole one repairs it."""
    node.order(node.engines[0], fail={"endpoint": "/load", "after": 2})
    push_alone(node)
    ranks = node.start_ranks(1)
    node.push_all(ranks, node.next_version(), change=DROP)
    error = ranks[0].error()
    assert (error["kind"], error["engine"]) == ("PushRefused", "e1")
    assert "model.norm.weight: not in this push" in error["message"]
    node.does_not_serve(node.engines[0])
    node.serves(node.engines[1], "C")
